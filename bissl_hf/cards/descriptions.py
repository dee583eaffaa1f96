"""What the cards of this package's models say: one description per kind of run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..text import markdown_code
from .record import ModelRecord, RunRecord

MAX_CLASSES_NAMED = 20
_COUPLING_FIGURES = ("levels/proximal_weight", "solver/damping")

_BISSL = (
    "Self-supervised pre-training and fine-tuning are usually two stages, and the first does not know the second. "
    "[BiSSL](https://arxiv.org/abs/2410.02387) is a stage between them: a bilevel problem whose lower level keeps "
    "solving the pretext task while its backbone is drawn towards that of the upper level, and whose upper level "
    "minimises the downstream loss at the lower level's solution, through which it is differentiated implicitly."
)
_SAVED = {
    "aligned": "This is the aligned model: the lower level's backbone with the head trained on it, ready for "
    "fine-tuning.",
    "upper": "This is the upper level's model, the backbone and the head that the downstream loss has trained, and "
    "not the aligned one (the lower level's backbone with this head).",
}
_SIMCLR = (
    "It was pre-trained by [SimCLR](https://arxiv.org/abs/2002.05709), without labels: it learned to find the other "
    "view of an image among the views of all images in a batch. [BiSSL](https://arxiv.org/abs/2410.02387) takes it "
    "from here and, with it as the lower level, aligns its backbone with a downstream task before fine-tuning."
)
_CONVERTED = (
    "Its weights were converted, number for number, from a state dict of a ResNet under the names of "
    "[timm](https://huggingface.co/docs/timm); how they were trained is described where they come from."
)
_JOINT = (
    "One backbone was trained on both tasks at once: each step took the gradient of the pretext loss plus that of the "
    "downstream loss. [BiSSL](https://arxiv.org/abs/2410.02387), a bilevel problem of both tasks, is compared with it."
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
    """What a card says of a kind of model.

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
        progress (`str`, *optional*): Markdown about how training went, beyond what `all_results.json` holds.
    """

    summary: str
    usage: Sequence[Snippet]
    examples: Sequence[tuple[str, int | None]]
    tags: Sequence[str]
    citations: Sequence[str]
    library: str = "transformers"
    task: str | None = None
    base_models: Sequence[str] = field(default=())
    progress: str = ""


def describe(record: RunRecord, *, has_both_levels: bool = False) -> Description:
    """Returns what a card says of a run's model.

    Args:
        record ([`RunRecord`])
        has_both_levels (`bool`, *optional*, defaults to `False`): whether the folder `bilevel` is there to be loaded.

    Raises:
        `ValueError`: if there is no such kind of run.
    """
    if record.kind not in _DESCRIPTIONS:
        raise ValueError(f"kind is {record.kind!r}; a record of a run is one of {', '.join(_DESCRIPTIONS)}.")
    description = _DESCRIPTIONS[record.kind](record)
    if not has_both_levels:
        return description
    code = 'from bissl_hf import BiSSLModel\n\nmodel = BiSSLModel.from_pretrained("{model}", subfolder="bilevel")'
    return replace(
        description, usage=[*description.usage, Snippet("To go on with the alignment, with both levels:", code)]
    )


def describe_aligned(record: RunRecord) -> Description:
    """The aligned model of a BiSSL run."""
    upper, lower = record.models["upper"], record.models["lower"]
    return Description(
        summary=f"{_class_sentence(upper)}\n\n{_BISSL} {_saved_sentence(record)}",
        usage=native_usage(upper),
        examples=_examples_of_levels(record, lower),
        tags=["bissl", "bilevel-optimization", "self-supervised-learning"],
        citations=[BISSL_CITATION],
        task=upper.task,
        base_models=list(dict.fromkeys([*lower.hub_ids, *upper.hub_ids])),
        progress=f"{_level_progress(record)}\n\n{_coupling(record)}".strip(),
    )


def describe_joint(record: RunRecord) -> Description:
    """A model that was trained on both tasks at once."""
    upper, lower = record.models["upper"], record.models["lower"]
    return Description(
        summary=f"{_class_sentence(upper)}\n\n{_JOINT}",
        usage=native_usage(upper),
        examples=_examples_of_levels(record, lower),
        tags=["bissl", "multi-task-learning", "self-supervised-learning"],
        citations=[BISSL_CITATION],
        task=upper.task,
        base_models=list(dict.fromkeys([*lower.hub_ids, *upper.hub_ids])),
    )


def describe_pretext(record: RunRecord) -> Description:
    """A pretext model."""
    model = record.models["model"]
    is_simclr = model.model_type == "simclr"
    return replace(
        _pretext_model(model),
        summary=_class_sentence(model) + (f" {_SIMCLR}" if is_simclr else ""),
        examples=[("Pretext task", record.examples.get("train"))],
        citations=[SIMCLR_CITATION] if is_simclr else [],
        progress=_check_sentence(record),
    )


def describe_classifier(record: RunRecord) -> Description:
    """One native model, such as a fine-tuned classifier."""
    model = record.models["model"]
    return Description(
        summary=f"{_class_sentence(model)} It was trained on labelled examples, backbone and head.",
        usage=native_usage(model),
        examples=[("Training", record.examples.get("train"))],
        tags=["bissl"],
        citations=[BISSL_CITATION],
        task=model.task,
        base_models=list(model.hub_ids),
        progress=_check_sentence(record),
    )


_DESCRIPTIONS: dict[str, Callable[[RunRecord], Description]] = {
    "aligned": describe_aligned,
    "joint": describe_joint,
    "pretext": describe_pretext,
    "classifier": describe_classifier,
}


def describe_converted(model: ModelRecord) -> Description:
    """A model whose weights were converted: what it is, but not how it was trained, which weights do not show."""
    description = (
        _pretext_model(model)
        if model.model_type == "simclr"
        else Description("", native_usage(model), examples=[], tags=["bissl"], citations=[], task=model.task)
    )
    return replace(description, summary=f"{_class_sentence(model)} {_CONVERTED}")


def native_usage(model: ModelRecord) -> list[Snippet]:
    """Returns how plain `transformers` loads a model."""
    loader = model.loader or model.class_name
    usage = []
    if model.has_pipeline:
        code = f'from transformers import pipeline\n\npredict = pipeline("{model.task}", model="{{model}}")'
        usage.append(Snippet("It needs nothing but `transformers`:", code))
    imports = ", ".join(filter(None, (model.processor, loader)))
    lines = [f"from transformers import {imports}", "", f'model = {loader}.from_pretrained("{{model}}")']
    if model.processor:
        variable = "processor" if model.processor == "AutoImageProcessor" else "tokenizer"
        lines.append(f'{variable} = {model.processor}.from_pretrained("{{model}}")')
    usage.append(Snippet("As a model, for instance to fine-tune it:", "\n".join(lines)))
    return usage


def _pretext_model(model: ModelRecord) -> Description:
    """What holds of a pretext model however it came to be."""
    name = model.class_name
    load = f'from bissl_hf import {name}\n\nmodel = {name}.from_pretrained("{{model}}")\nbackbone = model.base_model'
    align = "accelerate launch recipes/bissl.py --lower_model {model} --dataset user/labelled-images"
    return Description(
        summary=_class_sentence(model),
        usage=[
            Snippet("The pretext model, and the backbone in it:", load),
            Snippet("As the lower level of BiSSL:", align, "bash"),
        ],
        examples=[],
        tags=[model.model_type, "self-supervised-learning", "bissl"],
        citations=[],
        library="bissl_hf",
        task="image-feature-extraction" if model.takes_images else None,
        base_models=list(model.hub_ids),
    )


def _examples_of_levels(record: RunRecord, lower: ModelRecord) -> list[tuple[str, int | None]]:
    return [
        ("Upper level: downstream task", record.examples.get("train")),
        (f"Lower level: pretext task ({markdown_code(lower.class_name)})", record.examples.get("lower")),
    ]


def _class_sentence(model: ModelRecord) -> str:
    """The class, size and classes of a model."""
    size, names = model.num_parameters, model.class_names
    count = f"{size / 1e6:,.1f} million" if size >= 1e6 else f"{size:,}"
    sentence = f"A {markdown_code(model.class_name)} with {count} parameters"
    if not names:
        return f"{sentence}."
    if len(names) > MAX_CLASSES_NAMED or names[0] == "LABEL_0":
        return f"{sentence}, for {len(names):,} classes."
    return f"{sentence}, for {len(names)} classes: {', '.join(map(markdown_code, names))}."


def _check_sentence(record: RunRecord) -> str:
    """What a running check of the features of a single model found."""
    checks = [log["knn_accuracy"] for log in record.log_history if "knn_accuracy" in log]
    if not checks:
        return ""
    found = f"{checks[-1]:.1%} of the validation images"
    if len(checks) > 1:
        found = f"{checks[0]:.1%} of the validation images at the first check and of {checks[-1]:.1%} at the last"
    return f"By the backbone's features, nearest neighbours among labelled images found the class of {found}."


def _saved_sentence(record: RunRecord) -> str:
    """Which of the two models of a run is saved, and why."""
    chosen = record.arguments.get("export_level")
    reason = " It did better in the last evaluation (`export_level: best`)." if chosen == "best" else ""
    return _SAVED[record.exported_level] + reason


def _coupling(record: RunRecord) -> str:
    """What coupled the levels: lambda, the linear systems of the upper steps, and their damping."""
    numbers = record.arguments
    if "solver" not in numbers:
        return ""
    logged = {name: log[name] for log in record.log_history for name in _COUPLING_FIGURES if name in log}
    weight = logged.get("levels/proximal_weight", numbers.get("proximal_weight"))
    target = numbers.get("target_pull")
    found = "" if target is None else f" at the end, found for a pull of {target:.4g}"
    parts = [] if weight is None else [f"The proximal weight lambda was {weight:.4g}{found}."]
    solver = markdown_code(str(numbers["solver"]))
    if numbers["solver"] in ("identity", "none"):
        return " ".join([*parts, f"The solver of the upper steps was {solver}, which has no damping."])
    kind = markdown_code(str(numbers["curvature_kind"]))
    curvature = "" if numbers["solver"] == "mfac" else f" with the curvature {kind}"
    automatic = numbers["damping"] == "auto"
    damping = logged.get("solver/damping") if automatic else numbers["damping"]
    value = "" if damping is None else f" {damping:.4g}" + (" at the end (`auto`)" if automatic else "")
    return " ".join(
        [*parts, f"The solver of the upper steps was {solver}{curvature}, its damping{value or ' `auto`'}."]
    )


def _level_progress(record: RunRecord) -> str:
    """How many alternations there were, and how far they moved the levels."""
    numbers = record.arguments
    parts = [
        f"{numbers['num_alternations']:,} alternations of {numbers['lower_steps']:,} lower steps and "
        f"{numbers['upper_steps']:,} upper steps."
    ]
    last: Mapping[str, float] = next((log for log in reversed(record.log_history) if "levels/moved" in log), {})
    sentences = {
        "levels/pull": "The pull of the upper level on the lower one, summed over the run, is {:.3g}.",
        "levels/moved": "The aligned backbone has moved by {:.3g} of its norm,",
        "levels/distance": "and its distance to that of the upper level is {:.3g} of its norm.",
    }
    return " ".join([*parts, *(sentence.format(last[name]) for name, sentence in sentences.items() if name in last)])
