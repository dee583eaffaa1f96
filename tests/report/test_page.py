"""The page: what is on it, that nothing in it is code, and how a browser shows it."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bissl_hf.report.page import render_report, write_report
from bissl_hf.report.pictures import png_uri
from bissl_hf.report.record import Report

from .made import made_report, made_run, with_many_classes

_VOID = {"meta", "link", "img", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--enable-logging=stderr",
)  # fmt: skip


class Page(HTMLParser):
    """Elements, addresses and text of a page; fails where an element is not closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_whole_report_is_one_file_without_addresses_or_scripts(tmp_path: Path) -> None:
    path = write_report(made_report(), tmp_path)
    assert path.name == "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert all(address.startswith("data:") for address in page.addresses)
    assert page.tags.count("img") >= 8 * 3 + 20 + 9
    assert "script" not in page.tags
    for title in ("Outcome", "During training", "Views", "Classes", "Confusion matrix", "Most confident", "Time by"):
        assert title in page.text
    assert "before 77" in page.text  # of the test split


def test_names_from_outside_stay_text() -> None:
    text = render_report(made_report())
    page = Page(text)
    assert "Alignment <script>alert(1)</script> with digits" in page.text
    assert "a <b>bold</b> name" in page.text
    assert "\\u202ereversed" in page.text
    assert "‮" not in text
    assert 'from_pretrained("outputs/<digits>")' in page.text


def test_the_table_has_the_interval_of_wilson_and_the_difference_in_the_headline() -> None:
    report = made_report()
    right = int((report.after[1].labels == report.after[1].predicted).sum())
    p, n, z = right / 300, 300, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    text = Page(render_report(report)).text
    assert f"{low:.1f} to {high:.1f}" in text
    assert f"{100 * p:.2f} %" in text


def bare(kind: str) -> Report:
    return Report(title="bare", run=replace(made_run(kind), log_history=()), folder="outputs/bare")


@pytest.mark.parametrize("kind", ["aligned", "pretext", "classifier", "joint"])
def test_what_is_not_there_is_left_out(kind: str) -> None:
    page = Page(render_report(bare(kind)))
    assert "img" not in page.tags
    for title in ("Outcome", "During training", "Views", "Classes", "Confusion", "confident", "Time by part"):
        assert title not in page.text
    assert "How to load" in page.text
    assert "outputs/bare" in page.text


def test_many_classes_have_no_matrix_but_their_errors() -> None:
    page = Page(render_report(with_many_classes(made_report())))
    assert "Confusion matrix" not in page.text
    assert "Most frequent errors" in page.text
    assert "class 39" in page.text


def test_several_labels_per_image_have_no_interval_and_no_matrix() -> None:
    report = made_report()
    empty = np.zeros(0, dtype=np.int64)
    after = [replace(e, labels=empty, predicted=empty, confidence=empty, metrics={"map": 0.5}) for e in report.after]
    page = Page(render_report(replace(report, before=(), after=after)))
    assert "50.00 %" in page.text
    assert "Confusion" not in page.text


def test_a_run_with_other_names_of_epochs() -> None:
    assert "alternation" not in Page(render_report(replace(bare("pretext"), run=made_run("pretext")))).text


def test_pictures_are_checked_and_made_small() -> None:
    with pytest.raises(ValueError, match=r"`pixels` is float64 of shape \(3, 4, 4\); it must be uint8"):
        png_uri(np.zeros((3, 4, 4)))
    assert len(png_uri(np.zeros((3, 2000, 1000), dtype=np.uint8))) < 2000


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(made_report(), tmp_path_factory.mktemp("report"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(page: Path, width: int, tmp_path: Path):
    # A frame, because a window is never as narrow as a phone.
    frame = page.parent / f"frame-{width}.html"
    frame.write_text(
        f"<body style='margin:0'><iframe src='{page.name}' style='width:{width}px;height:9000px;border:0' "
        'onload="const e = this.contentDocument.documentElement; document.title = '
        '[e.scrollWidth, e.clientWidth, [...this.contentDocument.images].filter(i => !i.naturalWidth).length]">'
    )
    common = [str(CHROMIUM), *_FLAGS, "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"]
    options = {"capture_output": True, "text": True, "timeout": 120, "env": {**os.environ, "HOME": str(tmp_path)}}
    shown = subprocess.run([*common, "--dump-dom", frame.as_uri()], check=True, **options)
    sizes = re.search(r"<title>(\d+),(\d+),(\d+)</title>", shown.stdout)
    assert sizes is not None, shown.stdout[:500]
    content, visible, broken = map(int, sizes.groups())
    assert (content, broken) == (visible, 0)
    assert "CONSOLE" not in shown.stderr
    picture = tmp_path / "page.png"
    subprocess.run([*common, f"--window-size={max(width, 500)},9000", f"--screenshot={picture}", frame.as_uri()],
                   check=True, **options)  # fmt: skip
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))[:, :width]
    assert (pixels < 128).any(axis=1).mean() > 0.2
