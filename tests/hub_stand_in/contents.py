"""What lies on the stand-in, and what goes over the line."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Commit:
    """A commit: its message and the whole tree, path to content."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository and its branches, each a list of commits, the oldest first."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        history = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{self.kind}{self.id}{branch}{len(history)}{message}".encode()).hexdigest()
        history.append(Commit(oid, message, dict(files)))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch's name or a commit's oid."""
        if revision.removeprefix("refs/heads/") in self.branches:
            return self.branches[revision.removeprefix("refs/heads/")][-1]
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)


@dataclass
class Request:
    """A request as the log keeps it; `line` is the method and the path."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    status: int | str | None = None

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def summary(self) -> str:
        """The message of a commit that the request makes, or nothing."""
        if "/commit/" not in self.path or not self.body:
            return ""
        return json.loads(self.body.splitlines()[0])["value"]["summary"]


@dataclass
class Answer:
    """A status, headers, and a body of bytes or something to be written as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def encode(self) -> tuple[bytes, str]:
        if isinstance(self.content, bytes):
            return self.content, "application/octet-stream"
        return json.dumps(self.content).encode(), "application/json"


class HubRefusalError(Exception):
    """An answer that is an error of the Hub."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or f"{code or status}"


def git_oid(content: bytes) -> str:
    """The name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
