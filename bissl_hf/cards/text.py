"""What the cards of this package's models say: one description per kind of trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modelcard import TASK_MAPPING
from transformers.pipelines import SUPPORTED_TASKS

from ..data.naming import hub_repository
from .tables import statistics_table

if TYPE_CHECKING:
    from ..trainer.bissl_trainer import BiSSLTrainer
    from ..trainer.pretext_trainer import PretextTrainer
    from ..trainer.resumable_trainer import ResumableTrainer

MAX_CLASSES_NAMED = 20

_BISSL = (
    "Self-supervised pre-training and fine-tuning are usually two stages that never speak to each other. "
    "[BiSSL](https://arxiv.org/abs/2410.02387) is a stage between them: a bilevel problem whose lower level keeps "
    "solving the pretext task while its backbone is drawn towards that of the upper level, and whose upper level "
    "minimises the downstream loss at the lower level's solution, through which it is differentiated implicitly. What "
    "lies here is the lower level's backbone with the head trained on it, ready for fine-tuning."
)
_SIMCLR = (
    "It was pre-trained by [SimCLR](https://arxiv.org/abs/2002.05709), without labels: it learned to find the other "
    "view of an image among the views of all images in a batch. [BiSSL](https://arxiv.org/abs/2410.02387) takes it "
    "from here and, with it as the lower level, aligns its backbone with a downstream task before fine-tuning."
)
_CONVERTED = (
    "Its weights were converted, number for number, from a state dict of a ResNet under the names of "
    "[timm](https://huggingface.co/docs/timm); how they were trained is told where they come from."
)
BISSL_CITATION = """@article{zakarias2024bissl,
  title   = {BiSSL: Enhancing the Alignment Between Self-Supervised Pre-Training
             and Downstream Fine-Tuning via Bilevel Optimization},
  author  = {Zakarias, Gustav Wagner and Hansen, Lars Kai and Tan, Zheng-Hua},
  journal = {arXiv preprint arXiv:2410.02387},
  year    = {2024}
}"""
SIMCLR_CITATION = """@inproceedings{chen2020simclr,
  title     = {A Simple Framework for Contrastive Learning of Visual Representations},
  author    = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}"""


@dataclass(frozen=True)
class Snippet:
    """A sentence and the code that it announces. `{model}` in the code stands for the repository."""

    sentence: str
    code: str
    language: str = "python"


@dataclass(frozen=True)
class Description:
    """What a trainer knows about the model that it makes.

    Args:
        summary (`str`): Markdown of the first section.
        usage (`Sequence[Snippet]`): how to load the model.
        examples (`Sequence[tuple[str, int | None]]`): parts of the training data and their sizes; the first is that
            of `ModelFacts.dataset`, the second that of `ModelFacts.lower_dataset`.
        tags (`Sequence[str]`): of the card's metadata.
        citations (`Sequence[str]`): BibTeX entries.
        library (`str`, *optional*, defaults to `"transformers"`): what loads the model.
        task (`str`, *optional*): name of the pipeline that runs the model.
        base_models (`Sequence[str]`, *optional*): Hub ids of the models it started from.
        statistics_title, statistics (`str`, *optional*): Markdown about how training went.
    """

    summary: str
    usage: Sequence[Snippet]
    examples: Sequence[tuple[str, int | None]]
    tags: Sequence[str]
    citations: Sequence[str]
    library: str = "transformers"
    task: str | None = None
    base_models: Sequence[str] = field(default=())
    statistics_title: str = ""
    statistics: str = ""


def describe_aligned(trainer: "BiSSLTrainer", *, has_both_levels: bool) -> Description:
    """The aligned model of a [`BiSSLTrainer`].

    Args:
        trainer ([`BiSSLTrainer`])
        has_both_levels (`bool`): whether the folder `bilevel` is there to be loaded.
    """
    upper, lower = trainer.model.upper, trainer.model.lower
    usage = native_usage(upper, trainer.processing_class)
    if has_both_levels:
        code = 'from bissl_hf import BiSSLModel\n\nmodel = BiSSLModel.from_pretrained("{model}", subfolder="bilevel")'
        usage.append(Snippet("To go on with the alignment, with both levels:", code))
    alternations = f"{trainer.args.num_alternations:,} alternations of {trainer.args.lower_steps:,} lower steps"
    return Description(
        summary=f"{_class_sentence(upper)}\n\n{_BISSL}",
        usage=usage,
        examples=[
            ("Upper level: downstream task", _length(trainer.train_dataset)),
            (f"Lower level: pretext task (`{type(lower).__name__}`)", _length(trainer.lower_dataset)),
        ],
        tags=["bissl", "bilevel-optimization", "self-supervised-learning"],
        citations=[BISSL_CITATION],
        task=task_of(upper),
        base_models=loaded_from_hub(lower.config, getattr(lower.config, "backbone_config", None), upper.config),
        statistics_title="Linear solves" if trainer.args.solver != "identity" else "Levels",
        statistics=f"{alternations} and {trainer.args.upper_steps:,} upper steps.\n\n{_level_statistics(trainer)}",
    )


def describe_pretext(trainer: "PretextTrainer") -> Description:
    """The model of a [`PretextTrainer`]."""
    model = trainer.model
    return replace(
        _pretext_model(model),
        summary=_class_sentence(model) + (f" {_SIMCLR}" if model.config.model_type == "simclr" else ""),
        examples=[("Pretext task", _length(trainer.train_dataset))],
        citations=[SIMCLR_CITATION] if model.config.model_type == "simclr" else [],
        statistics_title="Loss",
        statistics=_loss_statistics(trainer),
    )


def describe_converted(model: PreTrainedModel) -> Description:
    """A model whose weights were converted: what it is, but not how it was trained, which weights do not tell."""
    description = (
        _pretext_model(model)
        if model.config.model_type == "simclr"
        else Description("", native_usage(model, None), examples=[], tags=["bissl"], citations=[], task=task_of(model))
    )
    return replace(description, summary=f"{_class_sentence(model)} {_CONVERTED}")


def _pretext_model(model: PreTrainedModel) -> Description:
    """What holds of a pretext model however it came to be."""
    name = type(model).__name__
    load = f'from bissl_hf import {name}\n\nmodel = {name}.from_pretrained("{{model}}")\nbackbone = model.base_model'
    align = "accelerate launch recipes/bissl.py --lower_model {model} --dataset user/labelled-images"
    return Description(
        summary=_class_sentence(model),
        usage=[
            Snippet("The pretext model, and the backbone in it:", load),
            Snippet("As the lower level of BiSSL:", align, "bash"),
        ],
        examples=[],
        tags=[model.config.model_type, "self-supervised-learning", "bissl"],
        citations=[],
        library="bissl_hf",
        task="image-feature-extraction" if model.main_input_name == "pixel_values" else None,
        base_models=loaded_from_hub(model.config, getattr(model.config, "backbone_config", None)),
    )


def describe_classifier(trainer: "ResumableTrainer") -> Description:
    """The model of a trainer of one native model, such as a fine-tuned classifier."""
    return Description(
        summary=f"{_class_sentence(trainer.model)} It was trained on labelled examples, backbone and head.",
        usage=native_usage(trainer.model, trainer.processing_class),
        examples=[("Training", _length(trainer.train_dataset))],
        tags=["bissl"],
        citations=[BISSL_CITATION],
        task=task_of(trainer.model),
        base_models=loaded_from_hub(trainer.model.config),
        statistics_title="Loss",
        statistics=_loss_statistics(trainer),
    )


def _class_sentence(model: PreTrainedModel) -> str:
    """The class, size and classes of a model."""
    size = sum(parameter.numel() for parameter in model.parameters())
    count = f"{size / 1e6:,.1f} million" if size >= 1e6 else f"{size:,}"
    sentence = f"A `{type(model).__name__}` with {count} parameters"
    if task_of(model) is None or not model.config.num_labels:
        return f"{sentence}."
    names = [str(name).replace("`", "'") for _, name in sorted((model.config.id2label or {}).items())]
    if len(names) > MAX_CLASSES_NAMED or names[0] == "LABEL_0":
        return f"{sentence}, for {len(names):,} classes."
    return f"{sentence}, for {len(names)} classes: {', '.join(f'`{name}`' for name in names)}."


def task_of(model: PreTrainedModel) -> str | None:
    """Returns the name of the pipeline for a model of `transformers`, or `None` if there is none."""
    name = type(model).__name__
    mappings: dict[str, Any] = dict(TASK_MAPPING)
    return next((task for task, names in mappings.items() if name in names.values()), None)


def native_usage(model: PreTrainedModel, processing_class: Any) -> list[Snippet]:
    """Returns how plain `transformers` loads a model."""
    task, name = task_of(model), type(model).__name__
    pipelines: dict[str, Any] = dict(SUPPORTED_TASKS)
    known = pipelines.get(task or "", {}).get("pt", ())
    loader = known[0].__name__ if known else name
    usage = []
    if known:
        code = f'from transformers import pipeline\n\npredict = pipeline("{task}", model="{{model}}")'
        usage.append(Snippet("It needs nothing but `transformers`:", code))
    processor = (
        "AutoImageProcessor" if isinstance(processing_class, BaseImageProcessor)
        else "AutoTokenizer" if isinstance(processing_class, PreTrainedTokenizerBase)
        else None
    )  # fmt: skip
    imports = ", ".join(filter(None, (processor, loader)))
    lines = [f"from transformers import {imports}", "", f'model = {loader}.from_pretrained("{{model}}")']
    if processor:
        variable = "processor" if processor == "AutoImageProcessor" else "tokenizer"
        lines.append(f'{variable} = {processor}.from_pretrained("{{model}}")')
    usage.append(Snippet("As a model, for instance to fine-tune it:", "\n".join(lines)))
    return usage


def loaded_from_hub(*configs: PretrainedConfig | None) -> list[str]:
    """Returns the Hub ids from which models with these configurations were loaded, where they were."""
    names = [
        hub_repository(config.name_or_path) for config in configs if config and getattr(config, "_commit_hash", None)
    ]
    return list(dict.fromkeys(name for name in names if name))


def _length(dataset: Any) -> int | None:
    return len(dataset) if dataset is not None else None


def _loss_statistics(trainer: "ResumableTrainer") -> str:
    """How the loss of a single model fell, and what a running check of its features found."""
    history = trainer.state.log_history
    table = statistics_table(history, {"loss": "Training loss"}, lambda before, now: now - before)
    checks = [log["knn_accuracy"] for log in history if "knn_accuracy" in log]
    if not checks:
        return table
    found = f"{checks[-1]:.1%} of the validation images"
    if len(checks) > 1:
        found = f"{checks[0]:.1%} of the validation images at the first check and of {checks[-1]:.1%} at the last"
    sentence = f"By the backbone's features, nearest neighbours among labelled images found the class of {found}."
    return f"{table}\n\n{sentence}"


def _level_statistics(trainer: "BiSSLTrainer") -> str:
    """How the solves of a run went, and how far it moved the levels."""
    args, history = trainer.args, trainer.state.log_history
    period = args.lower_steps + args.upper_steps

    def upper_steps(before: int, now: int) -> int:
        """Upper steps, each with one solve, among the steps after `before` up to `now`."""
        first, last = (
            step // period * args.upper_steps + max(0, step % period - args.lower_steps) for step in (before, now)
        )
        return last - first

    shown = {
        "solver/iterations": "Iterations per solve",
        "solver/residual": "Relative residual",
        "solver/cosine": "Cosine of solution and right-hand side (at 1 the identity would do)",
        "solver/negative_curvature": "Share stopped by negative curvature",
        "solver/non_finite": "Share stopped by numbers that are not finite",
        "alignment/cosine": "Cosine of pretext and downstream gradient",
    }
    table = statistics_table(history, shown, upper_steps)
    last = next((log for log in reversed(history) if "levels/moved" in log), {})
    sentences = {
        "levels/pull": "The pull of the upper level on the lower one, summed over the run, is {:.3g}.",
        "levels/moved": "The aligned backbone has moved by {:.3g} of its norm,",
        "levels/distance": "and lies {:.3g} of its norm from that of the upper level.",
    }
    text = " ".join(sentence.format(last[name]) for name, sentence in sentences.items() if name in last)
    return "\n\n".join(filter(None, (table, text)))
