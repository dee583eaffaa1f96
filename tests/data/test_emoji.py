"""The set of emoji, from tiny packages that are made in the test."""

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bissl_hf import load_image_dataset
from bissl_hf.data.emoji import DESIGNERS, SHARES, SIDE, Designer, Picture, group_kinds, kind_of, make_emoji
from bissl_hf.data.npm import NpmPackage, fetch, read_json
from recipes import make_emoji as recipe

WOMAN_COOKS, PERSON_COOKS = "1f469-200d-1f373", "1f9d1-200d-1f373"
LIST = [
    *({"unified": f"1F4{number:02X}", "category": "Food"} for number in range(20)),
    *({"unified": f"1F5{number:02X}-FE0F", "category": "Cars"} for number in range(20)),
    {"unified": "1F44B", "category": "Cars"},
    {"unified": WOMAN_COOKS.upper(), "category": "Food"},
    {"unified": PERSON_COOKS.upper(), "category": "Food"},
    {"unified": "1F3FB", "category": "Component"},
]


def picture_of(seed: int, mode: str = "RGBA") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(written, "png")
    return written.getvalue()


def designer(folder: Path, name: str, pictures: dict[str, bytes]) -> Designer:
    """Writes the archive of a package, and returns what describes it."""
    package = NpmPackage(f"@fake/{name}", "1.0.0", "")
    folder.mkdir(exist_ok=True)
    files = {"package/emoji.json": json.dumps(LIST).encode()}
    files |= {f"package/img/{code}.png": content for code, content in pictures.items()}
    with tarfile.open(folder / package.archive_name, "w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha512((folder / package.archive_name).read_bytes()).digest()
    return Designer(
        name, replace(package, sha512=base64.b64encode(digest).decode()), "package/img", "free", f"{name} & Co."
    )


@pytest.fixture(scope="module")
def designers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Designer]]:
    folder = tmp_path_factory.mktemp("packages")
    codes = [entry["unified"].lower() for entry in LIST[:-1]]
    first = {code: picture_of(number) for number, code in enumerate(codes)}
    first |= {"1f44b-1f3fb": picture_of(900), "1f3fb": picture_of(901), "1f999": picture_of(902)}
    second = {code.replace("-fe0f", ""): picture_of(100 + number, "L") for number, code in enumerate(codes)}
    second["1f400"] = second["1f401"]
    return folder, [designer(folder, "first", first), designer(folder, "second", second)]


@pytest.fixture(scope="module")
def made(designers: tuple[Path, list[Designer]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("emoji")
    make_emoji(output, designers[0], designers=designers[1])
    return output


def test_the_set_is_read_like_any_other(made: Path) -> None:
    splits = load_image_dataset(made)
    assert splits["train"].features["label"].names == ["Cars", "Food"]
    assert set(splits) == {"train", "validation", "test", "unlabeled"}
    assert splits["test"][0]["image"].size == (SIDE, SIDE)
    assert splits["test"][0]["image"].mode == "RGB"
    labelled = sum(len(splits[name]) for name in ("train", "validation", "test"))
    assert labelled == 2 * 43 - 1, "all emoji of the list by both designers, but for a picture that is there twice"


def test_no_emoji_is_in_two_splits(made: Path) -> None:
    splits = load_parquet(made)
    kinds = {name: {kind_of(code) for code in rows["emoji"]} for name, rows in splits.items()}
    for name in SHARES:
        for other in kinds.keys() - {name}:
            assert not kinds[name] & kinds[other], (name, other)
    assert kinds["train"] == kinds["unlabeled"]
    (place,) = [name for name in ("train", *SHARES) if "1f400" in splits[name]["emoji"]]
    assert "1f401" in splits[place]["emoji"], "a designer drew both alike"
    assert len(splits["unlabeled"]["image"]) == len({row["bytes"] for row in splits["unlabeled"]["image"]})


def load_parquet(folder: Path) -> dict[str, dict[str, list]]:
    import pyarrow.parquet as parquet

    return {file.stem: parquet.read_table(file).to_pydict() for file in folder.glob("*.parquet")}


def test_variants_have_no_label_and_what_is_in_no_list_is_left_out(made: Path) -> None:
    splits = load_parquet(made)
    labelled = {code for name in ("train", *SHARES) for code in splits[name]["emoji"]}
    assert "1f44b-1f3fb" not in labelled
    assert "1f999" not in labelled | set(splits["unlabeled"]["emoji"])
    assert "1f3fb" not in labelled
    assert ("1f44b-1f3fb" in splits["unlabeled"]["emoji"]) == ("1f44b" in splits["train"]["emoji"])


def test_the_readme_states_sizes_and_licences(made: Path) -> None:
    text = (made / "README.md").read_text()
    splits = load_parquet(made)
    assert (
        f"| all | {' | '.join(str(len(splits[name]['emoji'])) for name in ('train', 'test', 'validation'))} |" in text
    )
    assert "| second | second & Co. | free | @fake/second 1.0.0 |" in text


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "png")
    pictures = {entry["unified"].lower(): picture_of(number) for number, entry in enumerate(LIST)}
    only = designer(tmp_path / "packages", "only", {**pictures, "1f400": clear.getvalue()})
    make_emoji(tmp_path / "out", tmp_path / "packages", designers=[only])
    (found,) = [
        content["bytes"]
        for name, rows in load_parquet(tmp_path / "out").items()
        if name != "unlabeled"
        for code, content in zip(rows["emoji"], rows["image"], strict=True)
        if code == "1f400"
    ]
    assert np.asarray(Image.open(io.BytesIO(found))).min() == 255


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (WOMAN_COOKS, kind_of(PERSON_COOKS)),
        ("1F468-1F3FD-200D-1F373", kind_of(PERSON_COOKS)),
        ("1f3c3-1f3fb-200d-2640-fe0f", "1f3c3"),
        ("2764-fe0f", "2764"),
        ("1f1eb-1f1ee", "1f1eb-1f1ee"),
    ],
)
def test_variants_share_a_kind(code: str, kind: str) -> None:
    assert kind_of(code) == kind


def test_kinds_are_joined_through_others() -> None:
    def picture(kind: str, content: bytes) -> Picture:
        return Picture(kind, kind, "d", None, content)

    groups = group_kinds(
        [picture(*pair) for pair in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("c", b"2"), ("d", b"3"))]
    )
    assert groups["a"] == groups["b"] == groups["c"] != groups["d"]


def test_a_class_of_few_emoji_is_refused(designers: tuple[Path, list[Designer]], tmp_path: Path) -> None:
    few = designer(tmp_path, "few", {entry["unified"].lower(): picture_of(n) for n, entry in enumerate(LIST[:22])})
    with pytest.raises(ValueError, match="The class 'Cars' has 2 kinds of emoji, too few for the splits train, test"):
        make_emoji(tmp_path / "out", tmp_path, designers=[few])


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"The folder .* is not empty; name a new one"):
        make_emoji(tmp_path, tmp_path)


def test_another_archive_than_the_pinned_one_is_refused(
    designers: tuple[Path, list[Designer]],
) -> None:
    folder, (first, _) = designers
    with pytest.raises(ValueError, match=r"has the SHA-512 .*; that of @fake/first 1\.0\.0 is other"):
        fetch(replace(first.package, sha512="other"), folder)


def test_an_archive_without_a_list_is_refused(designers: tuple[Path, list[Designer]]) -> None:
    folder, (first, _) = designers
    with pytest.raises(ValueError, match=r"has no file 'package/other\.json'"):
        read_json(fetch(first.package, folder), "package/other.json")


def test_npm_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"npm, which fetches @fake/x, is not installed: install Node\.js, or put fake"
    ):
        fetch(NpmPackage("@fake/x", "1.0.0", ""), tmp_path)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the npm client."""
    file = tmp_path / "npm"
    monkeypatch.setattr("shutil.which", lambda name: str(file))
    return file


def test_the_npm_client_fetches_what_is_missing(tmp_path: Path, client: Path) -> None:
    client.write_text('#!/bin/sh\nprintf "$2" > "$4/fake-x-1.0.0.tgz"\n')
    client.chmod(0o755)
    content = b"@fake/x@1.0.0"
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    assert fetch(NpmPackage("@fake/x", "1.0.0", digest), tmp_path / "new").read_bytes() == content


def test_what_npm_says_is_shown(tmp_path: Path, client: Path) -> None:
    client.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    client.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"npm cannot fetch @fake/x 1\.0\.0: no network"):
        fetch(NpmPackage("@fake/x", "1.0.0", ""), tmp_path)


def test_the_recipe_makes_it(
    designers: tuple[Path, list[Designer]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, fakes = designers
    monkeypatch.setattr(recipe, "make_emoji", lambda output, archives: make_emoji(output, archives, designers=fakes))
    recipe.main(["--output_dir", str(tmp_path / "out"), "--archives_dir", str(folder)])
    assert "README.md in it states how they were made, and their licences" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipe.main(["--output_dir", str(tmp_path / "out"), "--archives_dir", str(folder)])
    assert "is not empty" in capsys.readouterr().err


def test_packages_are_pinned() -> None:
    for each in DESIGNERS:
        assert len(base64.b64decode(each.package.sha512)) == 64
        assert each.package.version.count(".") == 2
