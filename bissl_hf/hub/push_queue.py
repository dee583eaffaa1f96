"""The pushes of a run: one at a time, beside the training, and never in its way."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .process import HubProcess, HubResult, UploadJob

logger = logging.get_logger(__name__)

# What has not reached the Hub is here in the output folder, laid out as it would be there.
UNPUSHED_FOLDER = "unpushed"
_PUSHING_FOLDER = ".pushing"
_STAGED_FOLDER = ".staged"


class PushQueue:
    """The pushes of a run: one at a time, beside the training, and never in its way.

    What is to be pushed is laid out as a tree in the folder `unpushed`; an upload takes the tree over, and gives it
    back when it fails. So nothing is lost, and what the Hub lacks can be pushed later from there.

    Args:
        output_dir (`Path`): folder of the run.
        job ([`UploadJob`]): repository, privacy and branch.
        token (`str`, *optional*): the one of `huggingface_hub` if not given.
    """

    def __init__(self, output_dir: Path, job: UploadJob, *, token: str | None = None) -> None:
        self.output_dir, self.job, self.token = output_dir, job, token
        self.unpushed, self._pushing = output_dir / UNPUSHED_FOLDER, output_dir / _PUSHING_FOLDER
        self.repo_id = job.repo_id
        self._prepared = self._given_up = self._has_warned = False
        self._upload: HubProcess | None = None
        self._give_back()

    def prepare(self) -> None:
        """Checks the token and creates the repository. A Hub that does not answer is only warned about.

        Raises:
            `ValueError`: if the Hub refuses the token or the repository's name.
        """
        result = HubProcess(self._job(), token=self.token).result()
        if result.outcome == "refused":
            raise ValueError(
                f"The Hub does not take pushes to {self.repo_id}: {result.reason}. Set HF_TOKEN to a token that may "
                "write there, change hub_model_id, or leave push_to_hub out."
            )
        self._note(result)
        self._warn_once(result)

    @contextmanager
    def laying_out(self) -> Iterator[Path]:
        """Gives a folder for a newer tree, which then takes the place of the one that waits. Folders that the newer
        one lacks stay."""
        staged = self.output_dir / _STAGED_FOLDER
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        yield staged
        _keep_folders(self.unpushed, staged)
        shutil.rmtree(self.unpushed, ignore_errors=True)
        staged.replace(self.unpushed)

    def push(self, message: str, *, always: bool = False) -> None:
        """Starts to push what waits, unless another push is under way (then it goes with the next one) or the Hub has
        been given up.

        Args:
            message (`str`): of the commit.
            always (`bool`): wait for the push under way.
        """
        if self._upload is not None and (always or not self._upload.running()):
            self._warn_once(self._take_over(self._upload))
        if self._upload is None and not self._given_up:
            self._start(message)

    def wait(self) -> None:
        """Waits for the push under way."""
        if self._upload is not None:
            self._take_over(self._upload)

    def push_and_wait(self, message: str) -> HubResult:
        """Pushes what waits, also to a Hub that was given up."""
        self.wait()
        return self._take_over(self._start(message))

    def push_and_report(self, message: str, *, quiet: bool = False) -> None:
        """Pushes, waits and prints the outcome; with `quiet` only failures."""
        result = self.push_and_wait(message)
        if result.outcome != "done":
            print(self.explain(result), file=sys.stderr)
        elif not quiet:
            print(f"Pushed to the Hub: {result.repo_id}")

    def command(self) -> str:
        """What pushes the rest later: a command of `huggingface_hub`."""
        words = ["hf", "upload", self.repo_id, str(self.unpushed), "."]
        words += ["--private"] if self.job.private else []
        words += ["--revision", self.job.revision] if self.job.revision else []
        return shlex.join(words)

    def explain(self, result: HubResult) -> str:
        """Says what did not get to the Hub, and how to push it later."""
        folders = sorted(f"{path.name}/" for path in self.unpushed.iterdir() if path.is_dir())
        return (
            f"The Hub did not take the push to {self.repo_id}: {result.reason}. Not there yet: "
            f"{', '.join(['the model', *folders])}. Everything is on disk, in {self.output_dir}. Push it later "
            f"with\n    {self.command()}"
        )

    def _job(self, **changes: Any) -> UploadJob:
        return replace(self.job, repo_id=self.repo_id, prepare=not self._prepared, **changes)

    def _start(self, message: str) -> HubProcess:
        shutil.rmtree(self._pushing, ignore_errors=True)
        self.unpushed.replace(self._pushing)
        folders = (f"{path.name}/*" for path in sorted(self._pushing.iterdir()) if path.is_dir())
        job = self._job(folder=str(self._pushing), message=message, delete_patterns=("model*.safetensors*", *folders))
        self._upload = HubProcess(job, token=self.token)
        return self._upload

    def _take_over(self, upload: HubProcess) -> HubResult:
        """Waits for an upload and deals with what came of it."""
        result = upload.result()
        self._upload = None
        if result.outcome == "done":
            shutil.rmtree(self._pushing)
        else:
            self._give_back()
        self._note(result)
        return result

    def _note(self, result: HubResult) -> None:
        if result.outcome == "done":
            self.repo_id, self._prepared, self._given_up = result.repo_id, True, False
        else:
            self._given_up = result.outcome in ("refused", "stalled")

    def _warn_once(self, result: HubResult) -> None:
        if result.outcome != "done" and not self._has_warned:
            again = "at the end of the run" if self._given_up else "at the next push"
            logger.warning(
                f"The Hub takes no push to {self.repo_id} for now: {result.reason}. The run goes on; the push is "
                f"tried again {again}."
            )
            self._has_warned = True

    def _give_back(self) -> None:
        """Puts what an upload had taken over back, unless something newer has taken its place."""
        if self._pushing.is_dir() and self.unpushed.is_dir():
            _keep_folders(self._pushing, self.unpushed)
            shutil.rmtree(self._pushing)
        elif self._pushing.is_dir():
            self._pushing.replace(self.unpushed)


def _keep_folders(older: Path, newer: Path) -> None:
    """Moves the folders that the newer tree lacks to it."""
    for path in older.iterdir() if older.is_dir() else ():
        if path.is_dir() and not (newer / path.name).exists():
            path.replace(newer / path.name)
