"""The data sets that have a short name: where they are on the Hub and what must be found there.

Repositories, splits, columns and numbers of images come from their pages and from public code; which of them have been
loaded from the Hub itself is shown by `loaded_from_hub`. The loader therefore checks all of it each time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_DATA = "data/{}-*"


@dataclass(frozen=True)
class CatalogueEntry:
    """What is known of a named data set.

    Args:
        title (`str`): its full name.
        repository (`str`): id on the Hub.
        num_classes (`int`): number of classes.
        rows (`Mapping[str, int]`): number of images of each split, by the names of the schema.
        protocol (`str`): where the splits come from.
        license_note (`str`): what is known of its terms; not legal advice.
        config (`str`, *optional*): configuration on the Hub.
        revision (`str`, *optional*, defaults to `"main"`): branch or commit.
        splits (`Mapping[str, str]`, *optional*): the repository's names of the splits, by the names of the schema;
            train and test under these names if not given. One whose number of images is not in `rows` may be missing.
        data_files (`str`, *optional*): pattern of the files of a split, `{}` standing for its name in the repository.
            For repositories that hold more than is needed.
        image_column (`str`, *optional*, defaults to `"image"`), label_column (`str`, *optional*, defaults to
            `"label"`): columns.
        multi_label (`bool`, *optional*, defaults to `False`): whether an image may have several classes.
        gated (`bool`, *optional*, defaults to `False`): whether its terms must be accepted on the Hub.
        rows_tolerance (`float`, *optional*, defaults to 0.0): by which share the number of images may differ, where
            it is known roughly.
        class_names (`tuple[str, ...]`, *optional*): for files that name no classes.
        remark (`str`, *optional*): what users should know.
        loaded_from_hub (`bool`, *optional*, defaults to `False`): whether this entry has been loaded from the real
            Hub.
    """

    title: str
    repository: str
    num_classes: int
    rows: Mapping[str, int]
    protocol: str
    license_note: str
    config: str | None = None
    revision: str = "main"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    data_files: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    multi_label: bool = False
    gated: bool = False
    rows_tolerance: float = 0.0
    class_names: tuple[str, ...] | None = None
    remark: str = ""
    loaded_from_hub: bool = False


# fmt: off
_GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)
# fmt: on
_OFFICIAL = "official train and test; validation taken from train"
_THREE_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
_VALIDATION_AS_TEST = {"train": "train", "test": "validation"}
_IMAGENET_TERMS = "non-commercial research and education (ImageNet's terms)"

CATALOGUE: dict[str, CatalogueEntry] = {
    "stl10": CatalogueEntry(
        title="STL-10",
        repository="jxie/stl10",
        num_classes=10,
        rows={"train": 5_000, "test": 8_000, "unlabeled": 100_000},
        splits={"train": "train", "test": "test", "unlabeled": "unlabeled"},
        data_files=_DATA,  # ten folds of the training images are beside them
        protocol="official; validation taken from train",
        license_note=_IMAGENET_TERMS,
        remark="About 7.5 % of the unlabelled images may be test images; see --drop_test_duplicates.",
    ),
    "cifar10": CatalogueEntry(
        title="CIFAR-10",
        repository="uoft-cs/cifar10",
        config="plain_text",
        revision="0b2714987fa478483af9968de7c934580d0bb9a2",
        num_classes=10,
        rows={"train": 50_000, "test": 10_000},
        image_column="img",
        protocol=_OFFICIAL,
        license_note="not stated by its authors",
    ),
    "cifar100": CatalogueEntry(
        title="CIFAR-100",
        repository="uoft-cs/cifar100",
        config="cifar100",
        revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5",
        num_classes=100,
        rows={"train": 50_000, "test": 10_000},
        image_column="img",
        label_column="fine_label",
        protocol=_OFFICIAL,
        license_note="not stated by its authors",
    ),
    "food101": CatalogueEntry(
        title="Food-101",
        repository="ethz/food101",
        revision="e06acf2a88084f04bce4d4a525165d68e0a36c38",
        num_classes=101,
        rows={"train": 75_750, "test": 25_250},
        splits=_VALIDATION_AS_TEST,
        protocol="official; the repository's validation is the official test split; validation taken from train",
        license_note="images from the web; scientific fair use",
        remark="The training labels are noisy on purpose.",
    ),
    "fashion_mnist": CatalogueEntry(
        title="Fashion-MNIST",
        repository="zalando-datasets/fashion_mnist",
        config="fashion_mnist",
        num_classes=10,
        rows={"train": 60_000, "test": 10_000},
        class_names=_GARMENTS,
        protocol=_OFFICIAL,
        license_note="MIT",
        remark="Also read from a folder of IDX files.",
    ),
    "mnist": CatalogueEntry(
        title="MNIST",
        repository="ylecun/mnist",
        config="mnist",
        revision="77f3279092a1c1579b2250db8eafed0ad422088c",
        num_classes=10,
        rows={"train": 60_000, "test": 10_000},
        class_names=tuple("0123456789"),
        protocol=_OFFICIAL,
        license_note="stated differently at different places",
        remark="Also read from a folder of IDX files.",
    ),
    "cars": CatalogueEntry(
        title="Stanford Cars",
        repository="tanganke/stanford_cars",
        revision="9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40",
        num_classes=196,
        rows={"train": 8_144, "test": 8_041},
        data_files=_DATA,  # seven corrupted copies of the test split are beside it
        protocol=_OFFICIAL,
        license_note="non-commercial research",
    ),
    "dtd": CatalogueEntry(
        title="Describable Textures",
        repository="tanganke/dtd",
        revision="d2afa97d9f335b1a6b3b09c637aef667f98f966e",
        num_classes=47,
        rows={"train": 3_760, "test": 1_880},
        protocol="the official train and validation splits are the repository's train; validation taken from it anew",
        license_note="research",
    ),
    "pets": CatalogueEntry(
        title="Oxford-IIIT Pets",
        repository="timm/oxford-iiit-pet",
        num_classes=37,
        rows={"train": 3_680, "test": 3_669},
        protocol=_OFFICIAL,
        license_note="CC BY-SA 4.0",
    ),
    "flowers102": CatalogueEntry(
        title="Oxford Flowers-102",
        repository="dpdl-benchmark/oxford_flowers102",
        num_classes=102,
        rows={"train": 1_020, "validation": 1_020, "test": 6_149},
        splits=_THREE_SPLITS,
        protocol="official",
        license_note="not stated by its authors",
    ),
    "aircraft": CatalogueEntry(
        title="FGVC-Aircraft",
        repository="Donghyun99/FGVC-Aircraft",
        num_classes=100,
        rows={"train": 3_334, "validation": 3_333, "test": 3_333},
        rows_tolerance=0.01,
        splits={"train": "train", "validation": "val", "test": "test"},
        protocol="official; classes are the 100 variants",
        license_note="non-commercial research",
        remark="Images have a banner of 20 pixels with the photographer's name at the bottom.",
    ),
    "caltech101": CatalogueEntry(
        title="Caltech-101",
        repository="dpdl-benchmark/caltech101",
        num_classes=102,
        rows={"train": 3_060, "test": 6_084},
        rows_tolerance=0.01,
        protocol="no official splits: 30 training images per class, the rest is test; validation taken from train",
        license_note="CC BY 4.0",
        remark="With the background class.",
    ),
    "sun397": CatalogueEntry(
        title="SUN397",
        repository="tanganke/sun397",
        num_classes=397,
        rows={"train": 19_850, "test": 19_850},
        protocol="50 training and 50 test images per class, as in the official partitions; validation from train",
        license_note="images from the web; research",
    ),
    "voc2007": CatalogueEntry(
        title="PASCAL VOC 2007",
        repository="mteb/VOC2007",
        revision="96d47458fb2f40713997b0ea271688c02bac840b",
        num_classes=20,
        rows={"train": 2_501, "test": 4_952},
        splits=_THREE_SPLITS,
        label_column="classes",
        multi_label=True,
        protocol="official; validation taken from train if the repository has none",
        license_note="images from Flickr, under its terms",
        remark="Trained with binary cross-entropy; the metric is the 11-point mean average precision.",
    ),
    "cub200": CatalogueEntry(
        title="Caltech-UCSD Birds-200-2011",
        repository="bentrevett/caltech-ucsd-birds-200-2011",
        revision="1ef09e021b0b65b40337f6f285909656f407f6e0",
        num_classes=200,
        rows={"train": 5_994, "test": 5_794},
        protocol=_OFFICIAL,
        license_note="non-commercial research and education",
    ),
    "imagenet": CatalogueEntry(
        title="ImageNet-1k",
        repository="ILSVRC/imagenet-1k",
        revision="49e2ee26f3810fb5a7536bbf732a7b07389a47b5",
        num_classes=1000,
        rows={"train": 1_281_167, "test": 50_000},
        splits=_VALIDATION_AS_TEST,
        data_files=_DATA,  # the test images have no labels
        gated=True,
        protocol="official; the official validation split is the test split here; validation taken from train",
        license_note=_IMAGENET_TERMS,
    ),
    "imagenette": CatalogueEntry(
        title="Imagenette (320 px)",
        repository="frgfm/imagenette",
        revision="refs/convert/parquet",
        num_classes=10,
        rows={"train": 9_469, "test": 3_925},
        splits=_VALIDATION_AS_TEST,
        data_files="320px/{}/*.parquet",  # the branch main holds a loading script, which is not run
        protocol="official; the official validation split is the test split here; validation taken from train",
        license_note=f"Apache-2.0 for the selection; images: {_IMAGENET_TERMS}",
    ),
}
