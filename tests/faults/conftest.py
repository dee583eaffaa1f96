"""Uninterrupted runs, to which all others are compared."""

from pathlib import Path

import pytest

from .harness import TRAINERS, run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs that nothing has disturbed, by the kind of their trainer."""
    folders = {kind: tmp_path_factory.mktemp(f"whole-{kind}") for kind in TRAINERS}
    for kind, folder in folders.items():
        assert run(kind, folder) == 0
    return folders
