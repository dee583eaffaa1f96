"""The part of the Hub's protocol that the clients speak."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from .contents import Answer, Commit, HubRefusalError, Repository, Request, git_oid

USER = "user"
TOKEN = "hf_StandInTokenThatMustNeverLeaveTheMach"
OTHER_TOKEN = "hf_StandInTokenOfSomebodyElseAltogether0"
READ_ONLY_TOKEN = "hf_StandInTokenThatMayOnlyReadNotWrite00"
LARGE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".parquet", ".png", ".npz")
EPOCH = "2026-01-01T00:00:00.000Z"


class Protocol:
    """What the Hub answers. Users and repositories are plain dictionaries, for tests to look into and to change."""

    def __init__(self, *, large_files: bool) -> None:
        self.large_files = large_files
        self.users = {TOKEN: USER, OTHER_TOKEN: "somebody", READ_ONLY_TOKEN: USER}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.url = ""

    # What lies on it

    def add_repository(
        self,
        id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> Repository:
        """Puts a repository there, with one commit."""
        repository = self.repositories[kind, id] = Repository(kind, id, private, gated)
        content = {path: data.encode() if isinstance(data, str) else data for path, data in (files or {}).items()}
        repository.commit("main", "initial commit", content)
        return repository

    def add_folder(self, id: str, folder: Path | str, **options: Any) -> Repository:
        """Puts the files of a folder there: a model, or with `kind="dataset"` a data set of Parquet or image files."""
        root = Path(folder)
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        return self.add_repository(id, files, **options)

    def files(self, id: str, *, kind: str = "model", branch: str = "main") -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.repositories[kind, id].branches[branch][-1].files

    def commits(self, id: str, *, kind: str = "model", branch: str = "main") -> list[Commit]:
        """The commits of a branch, the oldest first."""
        return self.repositories[kind, id].branches[branch]

    # Protocol

    def answer(self, request: Request) -> Answer:
        """The answer to a request that no fault has met."""
        if request.token is not None and request.token not in self.users:
            raise HubRefusalError(401, None, "Invalid credentials in Authorization header")
        for pattern, method in _ROUTES:
            if match := pattern.fullmatch(request.line):
                groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                with self.lock:
                    return method(self, request, **groups)
        raise HubRefusalError(404, None, f"The stand-in does not know {request.line}")

    def user(self, request: Request, *, writing: bool = False) -> str | None:
        user = self.users.get(request.token or "")
        if writing and user is None:
            raise HubRefusalError(401, None, "Invalid username or password.")
        if writing and request.token == READ_ONLY_TOKEN:
            raise HubRefusalError(
                403, None, "You have read access but not the required permissions for this operation"
            )
        return user

    def repository(self, request: Request, kind: str, id: str, *, writing: bool = False) -> Repository:
        user = self.user(request, writing=writing)
        repository = self.repositories.get((kind.rstrip("s"), id))
        owner = id.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise HubRefusalError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if writing and user != owner:
            raise HubRefusalError(403, None, "Forbidden: you must be the owner")
        return repository

    def revision(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise HubRefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def is_large(self, path: str, size: int) -> bool:
        return self.large_files and (path.endswith(LARGE_SUFFIXES) or size > 10_000_000)

    def describe(self, path: str, content: bytes) -> dict[str, Any]:
        """A file as the listings of a repository show it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if self.is_large(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def whoami(self, request: Request) -> Answer:
        user = self.user(request)
        if user is None:
            raise HubRefusalError(401, None, "Invalid username or password.")
        role = "read" if request.token == READ_ONLY_TOKEN else "write"
        token = {"displayName": "stand-in", "role": role, "createdAt": EPOCH}
        access = {"type": "access_token", "accessToken": token}
        return Answer({"type": "user", "name": user, "orgs": [], "auth": access})

    def create(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        user = self.user(request, writing=True)
        kind, owner = wanted.get("type", "model"), wanted.get("organization") or user
        id = f"{owner}/{wanted['name']}"
        if owner != user:
            raise HubRefusalError(
                403, None, f"You don't have the rights to create a {kind} under the namespace {owner}"
            )
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.url}/{prefix}{id}", "name": id, "id": "0123456789abcdef01234567"}
        if (kind, id) in self.repositories:
            return Answer({**answer, "error": "You already created this repo"}, status=409)
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.add_repository(id, {".gitattributes": ""}, kind=kind, private=private)
        return Answer(answer)

    def validate_yaml(self, request: Request) -> Answer:
        return Answer({"errors": [], "warnings": []})

    def information(self, request: Request, kind: str, id: str, revision: str = "main") -> Answer:
        repository = self.repository(request, kind, id)
        commit = self.revision(repository, revision)
        siblings = [
            {"rfilename": path, **({"size": len(data)} if "blobs" in request.query else {})}
            for path, data in commit.files.items()
        ]
        answer = {
            "id": id,
            "modelId": id,
            "_id": "0123456789abcdef01234567",
            "author": id.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
            "lastModified": EPOCH,
            "createdAt": EPOCH,
        }
        return Answer(answer)

    def preupload(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repository = self.repository(request, kind, id, writing=True)
        files = self.revision(repository, revision).files
        answers = []
        for wanted in json.loads(request.body)["files"]:
            path, large = wanted["path"], self.is_large(wanted["path"], wanted["size"])
            oid = None
            if path in files:
                oid = hashlib.sha256(files[path]).hexdigest() if large else git_oid(files[path])
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return Answer({"files": answers})

    def batch(self, request: Request, id: str, prefix: str = "") -> Answer:
        self.repository(request, prefix.strip("/") or "models", id, writing=True)
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs-objects/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        return Answer({"transfer": "basic", "objects": objects})

    def store(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubRefusalError(400, None, "The content does not match its hash")
        self.objects[oid] = request.body
        return Answer(b"")

    def add_commit(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repository = self.repository(request, kind, id, writing=True)
        files = dict(self.revision(repository, revision).files)
        for line in request.body.splitlines()[1:]:
            operation = json.loads(line)
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubRefusalError(400, None, f"{path} was not uploaded")
                files[path] = self.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[path]
            elif operation["key"] == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(path.rstrip("/") + "/")}
        commit = repository.commit(revision, request.summary, files)
        url = f"{self.url}/{id}/commit/{commit.oid}"
        return Answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def tree(self, request: Request, kind: str, id: str, revision: str, path: str = "") -> Answer:
        files = self.revision(self.repository(request, kind, id), revision).files
        return Answer(self.listing(files, path.strip("/"), recursive=request.query.get("recursive") == ["true"]))

    def listing(self, files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, data in sorted(files.items()):
            parts = path.removeprefix(prefix).split("/")
            if not path.startswith(prefix):
                continue
            for depth in range(1, len(parts)):
                if depth == 1 or recursive:
                    name = prefix + "/".join(parts[:depth])
                    entries[name] = {"type": "directory", "path": name, "size": 0, "oid": git_oid(name.encode())}
            if len(parts) == 1 or recursive:
                entries[path] = self.describe(path, data)
        if folder and not entries:
            raise HubRefusalError(404, "EntryNotFound", f"{folder} does not exist")
        return list(entries.values())

    def paths_info(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        files = self.revision(self.repository(request, kind, id), revision).files
        if request.headers.get("content-type", "").startswith("application/json"):
            paths = json.loads(request.body)["paths"]
        else:
            paths = parse_qs(request.body.decode())["paths"]
        found = [self.describe(path, files[path]) for path in paths if path in files]
        folders = [
            {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
            for path in paths
            if any(name.startswith(f"{path}/") for name in files)
        ]
        return Answer([*found, *folders])

    def references(self, request: Request, kind: str, id: str) -> Answer:
        branches = self.repository(request, kind, id).branches
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].oid}
            for name, history in branches.items()
        ]
        return Answer({"branches": heads, "tags": [], "converts": [], "pullRequests": []})

    def create_branch(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repository = self.repository(request, kind, id, writing=True)
        if revision in repository.branches:
            raise HubRefusalError(409, None, "Reference already exists")
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        repository.branches[revision] = [self.revision(repository, start)]
        return Answer({})

    def resolve(self, request: Request, id: str, revision: str, path: str, prefix: str = "") -> Answer:
        repository = self.repository(request, prefix.strip("/") or "models", id)
        user = self.user(request)
        if repository.gated and user not in {*repository.granted, id.split("/")[0]}:
            raise HubRefusalError(401 if user is None else 403, "GatedRepo", f"Access to {id} is restricted")
        commit = self.revision(repository, revision)
        if path not in commit.files:
            raise HubRefusalError(404, "EntryNotFound", "Entry not found")
        content = commit.files[path]
        large = self.is_large(path, len(content))
        etag = hashlib.sha256(content).hexdigest() if large else git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return Answer(content[first : last + 1], status=206, headers=headers)
        return Answer(content, headers=headers)


def _routes(table: Iterable[tuple[str, Callable[..., Answer]]]) -> list[tuple[re.Pattern[str], Callable[..., Answer]]]:
    pieces = {
        "{repo}": r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)",
        "{id}": r"/(?P<prefix>datasets/)?(?P<id>[^/]+/[^/]+?)",
        "{revision}": r"(?P<revision>[^/]+)",
    }
    compiled = []
    for text, method in table:
        for name, pattern in pieces.items():
            text = text.replace(name, pattern)
        compiled.append((re.compile(text), method))
    return compiled


_ROUTES = _routes(
    [
        ("GET /api/whoami-v2", Protocol.whoami),
        ("POST /api/repos/create", Protocol.create),
        ("POST /api/validate-yaml", Protocol.validate_yaml),
        ("GET {repo}", Protocol.information),
        ("GET {repo}/revision/{revision}", Protocol.information),
        ("POST {repo}/preupload/{revision}", Protocol.preupload),
        ("POST {repo}/commit/{revision}", Protocol.add_commit),
        ("GET {repo}/tree/{revision}(?:/(?P<path>.*))?", Protocol.tree),
        ("POST {repo}/paths-info/{revision}", Protocol.paths_info),
        ("GET {repo}/refs", Protocol.references),
        ("POST {repo}/branch/{revision}", Protocol.create_branch),
        (r"POST {id}\.git/info/lfs/objects/batch", Protocol.batch),
        ("PUT /lfs-objects/(?P<oid>[0-9a-f]{64})", Protocol.store),
        ("(?:GET|HEAD) {id}/resolve/{revision}/(?P<path>.*)", Protocol.resolve),
    ]
)
