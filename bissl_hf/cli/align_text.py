"""Aligns a pre-trained language model with a classification of texts by BiSSL.

    accelerate launch recipes/align_text.py --config recipes/configs/text.yaml [--any_field value]

Masked language modelling on texts without labels is the lower level, a classification of labelled texts the upper one.
Any BERT-like checkpoint serves. The output is an ordinary checkpoint for text classification with its tokenizer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from .. import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments
from ..checkpoints import write_json, write_mapping
from ..data.balanced import sampled
from ..data.text import MaskTokens, TokenizedTexts, read_texts
from ..evaluation.figures import plot_run
from ..evaluation.metrics import SINGLE_LABEL, classification_metrics
from ..models.loading import load_pretrained, load_without_head
from ..text import for_console, for_terminal, format_table
from ..trainer.divergence import check_metrics
from .arguments import given_fields, parse_arguments, refusing_bad_input
from .card import CardArguments, recipe_facts
from .console import prepare_console
from .loading import loading
from .loss import LossArguments
from .outputs import RUN_RESULTS, afterwards, kept_results, name_metrics, open_run
from .pairs import check_pairs
from .running import as_a_run
from .starting import StartingPoint

BEFORE_NAME = "before.json"
_SHARES = {"test": 0.2, "validation": 0.1}


@dataclass
class TextArguments:
    """The texts, and the language model."""

    dataset: str = field(
        default="", metadata={"help": "Labelled texts: a CSV, JSON Lines or Parquet file, or a Hub id."}
    )
    lower_dataset: str | None = field(
        default=None,
        metadata={"help": "Texts without labels, likewise; the training texts of --dataset if not given."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of texts in both."})
    label_column: str = field(default="label", metadata={"help": "Column of class names or numbers in --dataset."})
    model: str = field(default="", metadata={"help": "Checkpoint like BERT with its tokenizer: a folder or Hub id."})
    max_length: int = field(default=128, metadata={"help": "Tokens per text; longer texts are cut."})
    mask_ratio: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted."})

    def check(self) -> None:
        """Refuses to start without texts or a model.

        Raises:
            `ValueError`: with what to write.
        """
        for name, what in (("dataset", "a CSV, JSON Lines or Parquet file, or a Hub id"), ("model", "a checkpoint")):
            if not getattr(self, name):
                raise ValueError(f"No {name} is given; pass --{name} with {what}, or --config FILE.yaml.")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2 tokens.")


@dataclass
class TokenizedSplits:
    """The tokenized data of both levels."""

    train: TokenizedTexts
    validation: TokenizedTexts
    test: TokenizedTexts
    lower: TokenizedTexts
    class_names: list[str]


def split_rows(labels: list[str], *, seed: int) -> dict[str, list[int]]:
    """Returns the rows of each split: of each class a fifth for the test, a tenth for validation, at least one each.

    Args:
        labels (`list[str]`)
        seed (`int`): decides which.

    Raises:
        `ValueError`: if there is a single class, or one with fewer than 3 texts.
    """
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"dataset has the single class {names[0]!r}; there is nothing to tell apart.")
    random, found = np.random.default_rng(seed), {name: list[int]() for name in ("train", *_SHARES)}
    for name in names:
        rows = random.permutation([row for row, label in enumerate(labels) if label == name]).tolist()
        if len(rows) < 3:
            raise ValueError(f"dataset has {len(rows)} texts of class {name!r}; each class needs at least 3.")
        count = len(rows)
        for split, share in _SHARES.items():
            size = max(1, round(share * count))
            found[split] += rows[:size]
            rows = rows[size:]
        found["train"] += rows
    return {split: sorted(rows) for split, rows in found.items()}


def tokenize(texts: TextArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> TokenizedSplits:
    """Reads the texts, splits the labelled ones and turns all into tokens.

    Raises:
        `ValueError`: for what cannot be read, or is too little.
    """
    whole, labels = read_texts(texts.dataset, text_column=texts.text_column, label_column=texts.label_column)
    labels = labels or []
    names, rows = sorted(set(labels)), split_rows(labels, seed=seed)
    splits = {
        split: TokenizedTexts(
            [whole[row] for row in chosen],
            tokenizer,
            max_length=texts.max_length,
            labels=[names.index(labels[row]) for row in chosen],
        )
        for split, chosen in rows.items()
    }
    below = [whole[row] for row in rows["train"]]
    if texts.lower_dataset:
        below, _ = read_texts(texts.lower_dataset, text_column=texts.text_column)
    lower = TokenizedTexts(below, tokenizer, max_length=texts.max_length)
    return TokenizedSplits(**splits, lower=lower, class_names=names)


def build_run(
    texts: TextArguments, args: BiSSLTrainingArguments, loss: LossArguments
) -> tuple[TokenizedSplits, BiSSLTrainer]:
    """Loads texts and models and builds the trainer."""
    set_seed(args.seed)
    check_pairs(args)
    with loading("model", texts.model):
        tokenizer: Any = AutoTokenizer.from_pretrained(texts.model, trust_remote_code=False)
    with args.main_process_first(desc="reading texts"):
        data = tokenize(texts, tokenizer, seed=args.seed)
    masking = MaskTokens(tokenizer, mask_ratio=texts.mask_ratio)
    with loading("model", texts.model):
        lower = load_pretrained(AutoModelForMaskedLM, texts.model)
        names = dict(enumerate(data.class_names))
        upper, _ = load_without_head(
            AutoModelForSequenceClassification,
            texts.model,
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type=SINGLE_LABEL,
        )
    longest = getattr(lower.config, "max_position_embeddings", texts.max_length)
    if texts.max_length > longest:
        raise ValueError(f"max_length is {texts.max_length}; {texts.model} takes at most {longest} tokens.")
    trainer = BiSSLTrainer(
        BiSSLModel.from_models(lower, upper),
        args,
        train_dataset=sampled(data.train, loss.class_sampling),
        lower_dataset=data.lower,
        eval_dataset=data.validation,
        lower_transform=masking,
        processing_class=tokenizer,
        class_weights=loss.weights(),
        compute_metrics=classification_metrics(SINGLE_LABEL, num_labels=len(names)),
    )
    trainer.try_losses(rows=4)
    trainer.create_optimizer()
    return data, trainer


def evaluate_before(trainer: BiSSLTrainer, test: TokenizedTexts, kept: Path, *, resumes: bool) -> dict[str, Any]:
    """Returns the test metrics of a head on the pre-trained model, or those that an earlier call has kept."""
    found = kept_results(kept, speaks=trainer.is_world_process_zero()) if resumes else None
    if found is not None:
        return found
    trainer.warm_up_head()
    before = trainer.evaluate(test, metric_key_prefix="before")
    if trainer.is_world_process_zero():
        write_mapping(kept, before)
    return before


def write_outputs(trainer: BiSSLTrainer, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Writes the native model with its tokenizer, its card, results and curves."""
    output = Path(str(trainer.args.output_dir))
    trainer.save_model(output)
    history = [row for row in trainer.state.log_history if "step" in row]
    write_json(output / RUN_RESULTS, {**before, **after, "log_history": history})
    with afterwards("The figure of the losses"):
        plot_run(trainer.state.log_history, output / "figures" / "training.png")
    with afterwards("The model card"):
        trainer.create_model_card()


def print_summary(output: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Prints the metrics before and after, and how to go on."""
    rows = [
        {"test split": name, **name_metrics(metrics, prefix), "loss": f"{metrics[f'{prefix}_loss']:.4f}"}
        for name, prefix, metrics in (
            ("head on the pre-trained model", "before", before),
            ("aligned model, after BiSSL", "test", after),
        )
    ]
    output = for_terminal(output)
    print(f"\n{format_table(rows)}\n")
    print(f"The aligned model is in {output},\nboth levels in {output}/bilevel. To go on with it:\n")
    print("    from transformers import pipeline")
    print(f'    classify = pipeline("text-classification", model="{output}")\n')


@as_a_run()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    texts, loss, card, args = parse_arguments(
        (TextArguments, LossArguments, CardArguments, BiSSLTrainingArguments),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    prepare_console()
    with refusing_bad_input():
        texts.check()
        start = StartingPoint.find(texts, "model")
        args = start.with_usual_optimizers(args, given_fields(arguments), {"": "", "lower_": "lower_"})
        start.print_optimizers(args, to=args)
        checkpoint = open_run(args, leaves=("checkpoint-*",))
        data, trainer = build_run(texts, args, loss)
        trainer.facts = recipe_facts(
            card,
            dataset=texts.dataset,
            lower_dataset=texts.lower_dataset or texts.dataset,
            base_models=[texts.model],
            settings={"Texts": texts, "Loss": loss},
        )
        trainer.publisher.resume_files = (BEFORE_NAME,)
        trainer.publisher.outputs_follow = True
        if checkpoint:
            trainer.check_checkpoint(checkpoint)

    if trainer.is_world_process_zero():
        sizes = ", ".join(f"{len(getattr(data, split))} {split}" for split in ("train", "validation", "test"))
        names = ", ".join(data.class_names)
        print(for_console(f"Labelled texts: {sizes}, of the classes {names}; {len(data.lower)} below."))
    before = evaluate_before(
        trainer, data.test, Path(str(args.output_dir)) / BEFORE_NAME, resumes=checkpoint is not None
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = trainer.evaluate(data.test, metric_key_prefix="test")
    check_metrics(after, of="the aligned model")
    if trainer.is_world_process_zero():
        write_outputs(trainer, before, after)
        with afterwards("The summary"):
            print_summary(str(args.output_dir), before, after)
    trainer.push_outputs()


if __name__ == "__main__":
    main()
