"""A set of small colour pictures, many without and few with a label: emoji as four designers drew them.

The class of an emoji is its group in Unicode's list. The set is split by emoji, not by picture: variants of an emoji
that differ in skin tone or gender, and emoji of which some designer's pictures are the same, are in one split.
"""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, Value

from ..checkpoints import write_text
from .npm import NpmPackage, fetch, read_json, read_members

SIDE = 64
SHARES = {"test": 0.2, "validation": 0.15}
_LIST = "package/emoji.json"
_NO_CLASS = "Component"  # skin tones and hair by themselves
_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_JOINERS = frozenset({"200d", "fe0f", "2640", "2642"})  # zero-width joiner, variation selector, female, male
_PERSON = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man and woman


@dataclass(frozen=True)
class Designer:
    """The pictures of one designer.

    Args:
        name (`str`)
        package ([`NpmPackage`]): where they come from.
        folder (`str`): of the pictures in it, whose file names are the code points.
        license (`str`): of the pictures.
        owner (`str`): whom to name as their author.
    """

    name: str
    package: NpmPackage
    folder: str
    license: str
    owner: str


# fmt: off
DESIGNERS = (
    Designer(
        "noto",
        NpmPackage(
            "emoji-datasource-google", "16.0.0",
            "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        ),
        "package/img/google/64", "Apache 2.0 (the package: MIT)", "Google, Noto Emoji",
    ),
    Designer(
        "twemoji",
        NpmPackage(
            "emoji-datasource-twitter", "16.0.0",
            "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        ),
        "package/img/twitter/64", "CC BY 4.0 (the package: MIT)", "Twitter and other contributors, Twemoji",
    ),
    Designer(
        "emojione",
        NpmPackage(
            "emojione", "2.2.7",
            "Gbf8qysc34+TFUS5HPwOUY62v8gjLuPmfVTWUR/zirULSYUe/D3MrvYo0W5Y2gScF1YI7EBe5t81IbD8q144Ag==",
        ),
        "package/assets/png", "CC BY 4.0 (versions 2.x of the package)", "EmojiOne",
    ),
    Designer(
        "fluent",
        NpmPackage(
            "@lobehub/fluent-emoji-3d", "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ),
        "package/assets", "MIT", "Microsoft, Fluent Emoji; packed by LobeHub",
    ),
)
# fmt: on


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        code (`str`): the emoji's code points.
        kind (`str`): see [`kind_of`].
        designer (`str`)
        label (`str`, *optional*): the class, of emoji in the list; `None` for variants of them.
        png (`bytes`): `SIDE` x `SIDE` pixels in colour, on white.
    """

    code: str
    kind: str
    designer: str
    label: str | None
    png: bytes


def kind_of(code: str) -> str:
    """Returns what all variants of an emoji share: its code points without skin tones and gender.

    Args:
        code (`str`): code points in hexadecimal, with `-` between them.
    """
    points = [point for point in code.lower().split("-") if point not in _SKIN_TONES | _JOINERS]
    return "-".join(_PERSON.get(point, point) for point in points)


def labels_of(emoji: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the class of each emoji of a list, by its code points without variation selectors."""
    return {_plain(entry["unified"]): entry["category"] for entry in emoji if entry["category"] != _NO_CLASS}


def _plain(code: str) -> str:
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def read_pictures(archive: Path, designer: Designer, labels: Mapping[str, str]) -> Iterator[Picture]:
    """Yields the pictures of an archive whose kind is one of the list's.

    Args:
        archive (`Path`)
        designer ([`Designer`])
        labels (`Mapping[str, str]`): see [`labels_of`].
    """
    kinds = {kind_of(code) for code in labels}

    def wanted(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return folder == designer.folder and kind_of(name.split(".")[0]) in kinds

    for path, content in read_members(archive, wanted):
        code = _plain(path.rpartition("/")[2].split(".")[0])
        yield Picture(code, kind_of(code), designer.name, labels.get(code), _on_white(content))


def _on_white(content: bytes) -> bytes:
    with PIL.Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA").resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    background = PIL.Image.new("RGBA", picture.size, "white")
    written = io.BytesIO()
    PIL.Image.alpha_composite(background, picture).convert("RGB").save(written, "png")
    return written.getvalue()


def group_kinds(pictures: Sequence[Picture]) -> dict[str, str]:
    """Returns the group of each kind: kinds that share a picture, directly or through others, are in one."""
    group = {picture.kind: picture.kind for picture in pictures}

    def first(kind: str) -> str:
        while group[kind] != kind:
            kind = group[kind]
        return kind

    owner: dict[str, str] = {}
    for picture in pictures:
        other = owner.setdefault(hashlib.sha256(picture.png).hexdigest(), picture.kind)
        group[first(picture.kind)] = first(other)
    return {kind: first(kind) for kind in group}


def assign_splits(pictures: Sequence[Picture], groups: Mapping[str, str], *, seed: int) -> dict[str, str]:
    """Returns the split of each group: of each class the shares of `SHARES`, the rest for training.

    A group whose labelled pictures are of several classes counts as one of the class of most of them.

    Raises:
        `ValueError`: if a class has too few groups for three splits.
    """
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in pictures:
        if picture.label is not None:
            classes[groups[picture.kind]][picture.label] += 1
    by_class: dict[str, list[str]] = defaultdict(list)
    for group, counted in classes.items():
        by_class[max(sorted(counted), key=lambda label: counted[label])].append(group)
    splits: dict[str, str] = {}
    generator = np.random.default_rng(seed)
    for label in sorted(by_class):
        members = [by_class[label][index] for index in generator.permutation(len(by_class[label]))]
        counts = {split: round(share * len(members)) for split, share in SHARES.items()}
        if min(counts.values()) == 0 or sum(counts.values()) == len(members):
            raise ValueError(
                f"The class {label!r} has {len(members)} kinds of emoji, too few for the splits train, "
                f"{', '.join(counts)}."
            )
        for split, count in counts.items():
            splits |= dict.fromkeys(members[:count], split)
            members = members[count:]
        splits |= dict.fromkeys(members, "train")
    return splits


def build_splits(pictures: Sequence[Picture], *, seed: int = 0) -> dict[str, Dataset]:
    """Returns `train`, `validation` and `test` with a column `label`, and `unlabeled`: the training pictures, and the
    variants of their emoji. Pictures that a split has already are left out of it.

    Args:
        pictures (`Sequence[Picture]`)
        seed (`int`, *optional*, defaults to 0): decides the splits.

    Raises:
        `ValueError`: see [`assign_splits`].
    """
    pictures = sorted(pictures, key=lambda picture: (picture.code, picture.designer))
    groups = group_kinds(pictures)
    splits = assign_splits(pictures, groups, seed=seed)
    names = sorted({picture.label for picture in pictures if picture.label is not None})
    rows: dict[str, dict[str, Picture]] = {name: {} for name in ("train", *SHARES, "unlabeled")}
    for picture in pictures:
        split = splits.get(groups[picture.kind])
        places = [split] if picture.label is not None and split is not None else []
        for place in [*places, "unlabeled"] if split == "train" else places:
            rows[place].setdefault(hashlib.sha256(picture.png).hexdigest(), picture)
    return {name: _as_dataset(list(found.values()), names, name != "unlabeled") for name, found in rows.items()}


def _as_dataset(pictures: Sequence[Picture], names: list[str], labelled: bool) -> Dataset:
    columns: dict[str, list[Any]] = {"image": [{"bytes": picture.png, "path": None} for picture in pictures]}
    features: dict[str, Any] = {"image": Image()}
    if labelled:
        columns["label"] = [picture.label for picture in pictures]
        features["label"] = ClassLabel(names=names)
    for name, values in (("emoji", [p.code for p in pictures]), ("designer", [p.designer for p in pictures])):
        columns[name], features[name] = values, Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def make_emoji(output: Path, archives: Path, *, designers: Sequence[Designer] = DESIGNERS) -> dict[str, Dataset]:
    """Fetches the packages and writes the set: a Parquet file per split, and a README with its sizes and licences.

    Args:
        output (`Path`): new or empty folder of the set.
        archives (`Path`): where the archives of the packages are kept.
        designers (`Sequence[Designer]`, *optional*): the list of emoji is that of the first one's package.

    Raises:
        `ValueError`: if the folder is not empty, or see [`fetch`] and [`assign_splits`].
        `RuntimeError`: see [`fetch`].
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"The folder {output} is not empty; name a new one.")
    fetched = [fetch(designer.package, archives) for designer in designers]
    labels = labels_of(read_json(fetched[0], _LIST))
    pictures = [
        picture
        for archive, designer in zip(fetched, designers, strict=True)
        for picture in read_pictures(archive, designer, labels)
    ]
    splits = build_splits(pictures)
    output.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(output / f"{name}.parquet")
    write_text(output / "README.md", describe(splits, designers))
    return splits


def describe(splits: Mapping[str, Dataset], designers: Sequence[Designer]) -> str:
    """Returns the README of the set."""
    names = splits["train"].features["label"].names
    counted = {name: Counter(split["label"]) for name, split in splits.items() if "label" in split.features}
    sizes = [
        f"| {name} | {' | '.join(str(found[index]) for found in counted.values())} |"
        for index, name in enumerate(names)
    ]
    total = f"| all | {' | '.join(str(len(splits[name])) for name in counted)} |"
    sources = [
        f"| {each.name} | {each.owner} | {each.license} | {each.package.name} {each.package.version} |"
        for each in designers
    ]
    return "\n".join(
        [
            "# Emoji of several designers\n",
            f"Pictures of {SIDE}x{SIDE} pixels in colour, on white. The class of an emoji is its group in Unicode's",
            "list. All pictures of an emoji are in one split, with its variants in skin tone and gender, and with any",
            "emoji that shares a picture with it.\n",
            "| class | " + " | ".join(counted) + " |",
            "| --- |" + " --- |" * len(counted),
            *sizes,
            total,
            f"\nunlabeled: {len(splits['unlabeled'])} pictures, those of train and the variants of their emoji.\n",
            "| designer | author | licence of the pictures | npm package |",
            "| --- | --- | --- | --- |",
            *sources,
            "\nThe pictures were scaled and put on white; the licences that are named CC BY ask that their authors "
            "are named as above.\n",
        ]
    )
