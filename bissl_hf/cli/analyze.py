"""Measures and shows what the features of checkpoints are worth for a labelled data set.

    accelerate launch recipes/analyze.py --checkpoints outputs/a outputs/b/bilevel --dataset digits --output_dir DIR

Takes image classifiers, backbones, SimCLR models and folders with both levels of BiSSL, by folder or Hub id. For each
it measures nearest neighbours, a linear probe, the silhouette and the scatter of the classes on the test split, and
compares the features of all by linear CKA and by t-SNE layouts with one seed: a table, a JSON file and figures.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import PartialState
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from .. import BiSSLConfig, BiSSLModel
from ..checkpoints import write_json
from ..data.augment import EvalTransform
from ..data.preprocessing import Preprocessing
from ..evaluation.analysis import FeatureReport, Labelled, cka_matrix, report_features
from ..evaluation.features import extract_features, tsne_layout, with_one_class
from ..evaluation.figures import plot_layouts, plot_similarity
from ..evaluation.metrics import MULTI_LABEL
from ..models.backbone import load_backbone
from ..models.batch_norm import recalibrate_batch_norm
from ..models.configuration_backbone import backbone_config
from ..models.image_size import adapt_image_size
from ..models.loading import load_pretrained
from ..tasks.labelled import LabelledImages, decode_labelled
from ..text import format_table
from .arguments import parse_arguments, refusing_bad_input
from .console import prepare_console
from .images import DataArguments, load_labelled
from .loading import load_config, loading
from .outputs import RUN_RESULTS, afterwards, open_output_dir
from .running import check_one_process
from .starting import StartingPoint


@dataclass
class AnalysisArguments:
    """What is analysed, and how."""

    checkpoints: list[str] = field(
        metadata={"help": "Classifiers, backbones, SimCLR models or folders with both levels: folders or Hub ids."}
    )
    output_dir: str = field(metadata={"help": "New folder for the JSON file and the figures."})
    names: list[str] | None = field(
        default=None, metadata={"help": "Names of the checkpoints in table and figures; their folders' if not given."}
    )
    max_images: int = field(default=5000, metadata={"help": "Images of each split to use, drawn by the seed."})
    knn_neighbors: int = field(default=20, metadata={"help": "Neighbours that vote."})
    tsne_images: int = field(default=1000, metadata={"help": "Test images in the t-SNE layouts."})
    tsne_classes: int = field(default=10, metadata={"help": "Number of classes in the t-SNE layouts, the first ones."})
    recalibrate: bool = field(
        default=True,
        metadata={"help": "Estimate batch-norm statistics of each checkpoint anew on training images, labels unused."},
    )
    batch_size: int = field(default=128, metadata={"help": "Images that pass through a backbone at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})
    seed: int = field(default=0, metadata={"help": "Decides which images are drawn, carved splits and layouts."})


def check_arguments(arguments: AnalysisArguments) -> None:
    least_values = {
        "max_images": 4,
        "knn_neighbors": 1,
        "tsne_images": 4,
        "tsne_classes": 1,
        "batch_size": 1,
        "seed": 0,
    }
    for name, least in least_values.items():
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} is {getattr(arguments, name)}; it must be at least {least}.")
    if arguments.names is not None and len(arguments.names) != len(arguments.checkpoints):
        raise ValueError(
            f"names has {len(arguments.names)} entries for {len(arguments.checkpoints)} checkpoints; give one for "
            "each."
        )
    check_one_process("The analysis", cpu=arguments.use_cpu)


@dataclass(frozen=True)
class AnalysedBackbone:
    """A backbone, and how images are prepared for it."""

    backbone: PreTrainedModel
    preprocessing: Preprocessing


def load_backbones(arguments: AnalysisArguments, data: DataArguments) -> dict[str, AnalysedBackbone]:
    """The backbones by name; a folder with both levels holds two. Images are prepared as the data arguments say, and
    in what they leave open as the checkpoint does."""
    backbones: dict[str, AnalysedBackbone] = {}
    names = arguments.names or [Path(source).name for source in arguments.checkpoints]
    for name, source in zip(names, arguments.checkpoints, strict=True):
        config = load_config("checkpoints", source)
        prepared = StartingPoint(source, "checkpoints", backbone_config(config)).complete(data).preprocessing
        with loading("checkpoints", source):
            if isinstance(config, BiSSLConfig):
                both = load_pretrained(BiSSLModel, source)
                levels = {"lower": load_backbone(both.lower), "upper": load_backbone(both.upper)}
                found = {f"{name}, {level} level": backbone for level, backbone in levels.items()}
            else:
                found = {name: load_backbone(source)}
        if twice := sorted(set(found) & set(backbones)):
            raise ValueError(f"Two checkpoints are called {twice[0]!r}; give them different names with --names.")
        for level, backbone in found.items():
            backbones[level] = AnalysedBackbone(adapt_image_size(backbone, prepared.side), prepared)
    return backbones


class Analysis:
    """The images of an analysis, prepared in one way, and what passes them through a backbone."""

    def __init__(self, arguments: AnalysisArguments, images: LabelledImages, preprocessing: Preprocessing) -> None:
        self.arguments = arguments
        self.device = PartialState(cpu=arguments.use_cpu).device
        self.transform = EvalTransform.from_processor(preprocessing)
        random = np.random.default_rng(arguments.seed)
        self.splits: dict[str, Dataset] = {}
        for name in ("train", "validation", "test"):
            split = getattr(images, name)
            rows = np.sort(random.permutation(len(split))[: arguments.max_images])
            self.splits[name] = Subset(split, rows.tolist())

    def batches(self, split: str, *, whole: bool = False) -> Iterator[dict[str, Any]]:
        """Batches of a split; of equal size and at least two images if they are to be whole, as batch norm needs
        them."""
        size = min(self.arguments.batch_size, len(self.splits[split]))  # type: ignore[arg-type]
        size = max(size, 2) if whole else size
        loader = DataLoader(self.splits[split], size, drop_last=whole, collate_fn=default_data_collator)
        for batch in loader:
            yield self.transform({name: value.to(self.device) for name, value in batch.items()}, ())

    def features(self, name: str, backbone: PreTrainedModel) -> dict[str, Labelled]:
        """Features and labels of the three splits."""
        model: Any = backbone
        model.to(self.device)
        steps = tqdm(self.splits, desc=f"Features of {name}")
        if self.arguments.recalibrate:
            recalibrate_batch_norm(model, self.batches("train", whole=True))
        return {split: extract_features(model, self.batches(split)) for split in steps}

    def layouts(self, test: dict[str, Labelled]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """The layouts of the same test images by each checkpoint."""
        layouts = []
        for name, features in test.items():
            points, labels = with_one_class(*features)
            chosen = np.flatnonzero(labels < self.arguments.tsne_classes)[: self.arguments.tsne_images]
            if len(chosen) < 4:
                return []
            layouts.append((name, tsne_layout(points[chosen], seed=self.arguments.seed), labels[chosen]))
        return layouts


def write_outputs(
    analysis: Analysis,
    data: DataArguments,
    reports: dict[str, FeatureReport],
    test: dict[str, Labelled],
    class_names: list[str],
) -> None:
    output = Path(analysis.arguments.output_dir)
    names = list(reports)
    similarity = cka_matrix([features for features, _ in test.values()])
    write_json(
        output / RUN_RESULTS,
        {
            "checkpoints": {name: finite(asdict(report)) for name, report in reports.items()},
            "cka": {
                name: dict(zip(names, row, strict=True)) for name, row in zip(names, similarity.tolist(), strict=True)
            },
            "images": {name: len(split) for name, split in analysis.splits.items()},  # type: ignore[arg-type]
            "settings": {**asdict(analysis.arguments), **asdict(data)},
        },
    )
    with afterwards("The figure of the similarities"):
        if len(names) > 1:
            plot_similarity(similarity, names, output / "figures" / "cka.png", title="Linear CKA of test features")
    with afterwards("The figure of the features"):
        if layouts := analysis.layouts(test):
            plot_layouts(layouts, class_names[: analysis.arguments.tsne_classes], output / "figures" / "tsne.png")


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures that are not defined are null in JSON."""
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}


def print_summary(output: str, reports: dict[str, FeatureReport], problem_type: str) -> None:
    unit = "mAP" if problem_type == MULTI_LABEL else "accuracy"
    rows = [
        {
            "test features of": name,
            f"kNN {unit}": f"{100 * report.knn:.2f} %",
            f"probe {unit}": f"{100 * report.probe:.2f} %",
            "silhouette": f"{report.silhouette:.3f}",
            "between/within scatter": f"{report.scatter_ratio:.3f}",
        }
        for name, report in reports.items()
    ]
    print(f"\n{format_table(rows)}\n")
    print(f"All figures are in {output}/{RUN_RESULTS}, pictures in {output}/figures.\n")


def main(arguments: list[str] | None = None) -> None:
    options, data = parse_arguments(
        (AnalysisArguments, DataArguments), arguments, description=str(__doc__).split("\n\n")[-1]
    )
    prepare_console()
    with refusing_bad_input():
        check_arguments(options)
        open_output_dir(options.output_dir, None)
        backbones = load_backbones(options, data)
        splits = load_labelled(data, seed=options.seed)
        analyses: dict[Preprocessing, Analysis] = {}
        for prepared in {analysed.preprocessing: None for analysed in backbones.values()}:
            images = decode_labelled(splits, prepared.side, unreadable=data.unreadable, resample=prepared.resample)
            analyses[prepared] = Analysis(options, images, prepared)
    reports, test = {}, {}
    for name, analysed in backbones.items():
        analysis = analyses[analysed.preprocessing]
        print(f"Images for {name}: {analysed.preprocessing.describe()}")
        features = analysis.features(name, analysed.backbone)
        reports[name] = report_features(features, num_classes=len(images.class_names), neighbors=options.knn_neighbors)
        test[name] = features["test"]
    write_outputs(analysis, data, reports, test, images.class_names)
    with afterwards("The summary"):
        print_summary(options.output_dir, reports, images.problem_type)


if __name__ == "__main__":
    main()
