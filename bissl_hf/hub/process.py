"""Work with the Hub in a process of its own.

`huggingface_hub` waits for ever on a server that accepts and never answers, and its time-outs are settings of the
whole process. Here they hold for one job, training goes on meanwhile, and nothing is left hanging at the end.

As a program (`python process.py ORDERS`) this file takes a job as JSON and writes what came of it to standard
output; it imports nothing but `huggingface_hub` and the HTTP library below it.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

# The HTTP library below `huggingface_hub`: httpx in its version 1, httpx2 in its version 2; both may be installed.
httpx: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])

# A Hub that makes no progress for so long is given up.
PATIENCE_SECONDS = 60.0
# How often a job looks whether the process that ordered it is still there.
_WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class HubResult:
    """What came of a job.

    Args:
        outcome (`str`): `done`; `missing`, if there is nothing to download; `refused`, if the token or the name of the
            repository is wrong; `stalled`, if the Hub made no progress; or `failed`.
        reason (`str`): why it is not done, as a clause for a message.
        repo_id, commit_url, commit_oid (`str`): where an upload is now.
    """

    outcome: str
    reason: str = ""
    repo_id: str = ""
    commit_url: str = ""
    commit_oid: str = ""


@dataclass(frozen=True)
class UploadJob:
    """An upload of a folder in one commit.

    Args:
        repo_id (`str`): `user/name`, or a name in the user's own namespace.
        private (`bool`, *optional*): whether a new repository is private; the namespace's default if not given.
        revision (`str`, *optional*): branch, created if need be; `main` if not given.
        folder (`str`, *optional*): tree to upload. Without one the token is checked and the repository created.
        message (`str`): of the commit.
        delete_patterns (`tuple[str, ...]`): files of the repository that go if the folder lacks them.
        prepare (`bool`): whether the token is to be checked and the repository may have to be created first.
    """

    kind: ClassVar[str] = "upload"

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    folder: str | None = None
    message: str = ""
    delete_patterns: tuple[str, ...] = ()
    prepare: bool = True

    def carry_out(self, api: HfApi) -> HubResult:
        """Does the job in this process."""
        repo_id = self._prepare(api) if self.prepare else self.repo_id
        if self.folder is None:
            return HubResult("done", repo_id=repo_id)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=self.folder,
            revision=self.revision,
            commit_message=self.message,
            delete_patterns=list(self.delete_patterns) or None,
        )
        return HubResult("done", repo_id=repo_id, commit_url=commit.commit_url, commit_oid=commit.oid)

    def _prepare(self, api: HfApi) -> str:
        """Checks the token, and creates repository and branch where they do not exist. Returns the repository's full
        name."""
        if get_token() is None:
            raise PermissionError("there is no token")
        access = api.whoami().get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise PermissionError("the token may only read")
        repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
            api.create_branch(repo_id, branch=str(self.revision), exist_ok=True)
        return repo_id


@dataclass(frozen=True)
class DownloadJob:
    """A download of one folder of a repository.

    Args:
        repo_id (`str`): `user/name`, or a name in the user's own namespace.
        path_in_repo (`str`): the folder.
        target (`str`): where to put it, under its own name.
        revision (`str`, *optional*): branch or commit; `main` if not given.
    """

    kind: ClassVar[str] = "download"

    repo_id: str
    path_in_repo: str
    target: str
    revision: str | None = None

    def carry_out(self, api: HfApi) -> HubResult:
        """Does the job in this process."""
        repo_id = self.repo_id if "/" in self.repo_id else f"{api.whoami()['name']}/{self.repo_id}"
        pattern = f"{self.path_in_repo}/*"
        try:
            files = api.list_repo_files(repo_id, revision=self.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return HubResult("missing", "there is no such repository or branch", repo_id=repo_id)
        if not any(file.startswith(pattern[:-1]) for file in files):
            return HubResult("missing", f"there is no {self.path_in_repo}/ in it", repo_id=repo_id)
        api.snapshot_download(repo_id, revision=self.revision, allow_patterns=pattern, local_dir=self.target)
        return HubResult("done", repo_id=repo_id)


Job = UploadJob | DownloadJob


class HubProcess:
    """A job that runs in a process of its own from the moment this is made.

    Args:
        job ([`UploadJob`] or [`DownloadJob`])
        token (`str`, *optional*): the one of `huggingface_hub` if not given. It travels in the environment.
    """

    def __init__(self, job: Job, *, token: str | None = None) -> None:
        seconds = f"{max(round(PATIENCE_SECONDS), 1)}s"
        # `hf_xet` talks to the Hub's storage by itself.
        names = ("CONNECT_TIMEOUT", "READ_TIMEOUT", "RETRY_MAX_DURATION")
        environment = {**os.environ, **{f"HF_XET_CLIENT_{name}": seconds for name in names}}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        # Resolved here: a notebook's vault cannot be asked from another process.
        if token := token or get_token():
            environment["HF_TOKEN"] = token
        request = json.dumps(
            {"kind": job.kind, "job": asdict(job), "patience": PATIENCE_SECONDS, "parent": os.getpid()}
        )
        # -P: the modules beside this file are not to be taken for those of the standard library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, request],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def running(self) -> bool:
        """Whether it is still under way."""
        return self._process.poll() is None

    def result(self) -> HubResult:
        """Waits for the end, which comes in any case, and returns what came of it."""
        output, errors = self._process.communicate()
        if self._process.returncode == 0:
            return HubResult(**json.loads(output.splitlines()[-1]))
        last_line = (errors.strip().splitlines() or ["no message"])[-1]
        return HubResult("failed", f"the process ended with code {self._process.returncode}: {last_line}")


# What runs in the process of its own


class StalledError(RuntimeError):
    """The Hub makes no progress."""


class _StallTimer:
    """Knows for how long nothing has succeeded."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.failing_since: float | None = None

    def succeeded(self) -> None:
        self.failing_since = None

    def failed(self, error: Exception | None = None) -> None:
        """Notes that a request came to nothing; gives up if that has gone on for too long.

        Raises:
            `StalledError`
        """
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        if isinstance(error, httpx.TimeoutException) or now - self.failing_since >= self.seconds:
            raise StalledError(f"it made no progress for {self.seconds:g} seconds") from error


class _TimeLimitedClient(httpx.Client):
    """A client whose requests may not be silent for longer than the patience, however often they are repeated."""

    def __init__(self, timer: _StallTimer) -> None:
        super().__init__(follow_redirects=True, timeout=timer.seconds)
        self.timer = timer

    def send(self, request: Any, **kwargs: Any) -> Any:
        """Sends a request, and counts what came of it."""
        # Some calls of `huggingface_hub` ask for no time-out, whatever the client's is.
        asked, bound = request.extensions.get("timeout") or {}, self.timer.seconds
        waits = {name: min(asked.get(name) or bound, bound) for name in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": waits}
        try:
            response = super().send(request, **kwargs)
        except httpx.TransportError as error:
            self.timer.failed(error)
            raise
        if response.status_code < 400:
            self.timer.succeeded()
        else:
            self.timer.failed()
            # A wait that the Hub asks for may be longer than the patience; without it requests are spaced by seconds.
            for name in ("ratelimit", "retry-after"):
                response.headers.pop(name, None)
        return response


def _classify_error(error: BaseException) -> HubResult:
    """Returns what an error means for a run. `huggingface_hub` wraps some in errors of its own."""
    for cause in _causes(error):
        if isinstance(cause, StalledError):
            return HubResult("stalled", str(cause))
        if (response := getattr(cause, "response", None)) is not None:
            outcome = "refused" if response.status_code in (401, 403) else "failed"
            said = getattr(cause, "server_message", None) or response.headers.get("X-Error-Message") or ""
            return HubResult(outcome, f"it answered {response.status_code}{f' ({said})' if said else ''}")
        if isinstance(cause, httpx.TransportError):
            return HubResult("failed", f"the connection failed ({cause})")
    outcome = "refused" if isinstance(error, ValueError | PermissionError) else "failed"
    return HubResult(outcome, str(error) or type(error).__name__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def end_with(parent: int) -> None:
    """Ends this process once the one that ordered the job has ended, however that came about: a signal that kills it
    leaves it no time to end its jobs."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    request = json.loads(sys.argv[1])
    end_with(request["parent"])
    timer = _StallTimer(request["patience"])
    set_client_factory(lambda: _TimeLimitedClient(timer))
    job_class = {cls.kind: cls for cls in (UploadJob, DownloadJob)}[request["kind"]]
    if constants.is_offline_mode():
        result = HubResult("stalled", "HF_HUB_OFFLINE is set")
    else:
        try:
            result = job_class(**request["job"]).carry_out(HfApi(library_name="bissl_hf"))
        except Exception as error:  # whatever it is: it is reported, and training goes on
            result = _classify_error(error)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
