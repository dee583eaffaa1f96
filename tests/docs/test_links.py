"""Links, anchors and paths of the documentation lead somewhere."""

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, name_of, without_code

_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:recipes|tests|docs|bissl_hf|\.ci)/[\w./-]*[\w/])(?:::(\w+))?`")
# Files that a page has its readers write.
_TO_BE_WRITTEN = ("configuration_rotation.py", "modeling_rotation.py")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for target in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_paths_of_the_repository_exist(page: Path) -> None:
    wrong = []
    for name, function in _PATH.findall(page.read_text(encoding="utf-8")):
        path = ROOT / name
        if path.name in _TO_BE_WRITTEN:
            continue
        if not path.exists() or (function and f"def {function}(" not in path.read_text(encoding="utf-8")):
            wrong.append(f"{name} {function}".strip())
    assert wrong == []


def test_addresses_of_papers_are_those_of_the_site() -> None:
    for page in PAGES:
        for text, address in re.findall(r"\[arXiv ([^\]]+)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert address == f"https://arxiv.org/abs/{text}", name_of(page)
