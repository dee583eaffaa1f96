"""The command that aligns a language model, on a tiny BERT."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, pipeline

from bissl_hf.cli import align_text

from ..data.test_text import WORDS, tiny_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root, tokenizer = tmp_path_factory.mktemp("texts"), tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    texts = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(5)) for row in range(20)]
    rows = [f"{text},{'one' if row % 2 else 'two'}" for row, text in enumerate(texts)]
    (root / "labelled.csv").write_text("\n".join(["text,label", *rows]))
    (root / "one.csv").write_text("text,label\na,x\nb,x\n")
    (root / "few.csv").write_text("text,label\na,x\nb,x\nc,x\nd,y\n")
    return {
        "dataset": root / "labelled.csv", "model": root / "bert", "max_length": 6, "num_alternations": 1,
        "lower_steps": 2, "upper_steps": 1, "per_device_lower_batch_size": 6, "per_device_train_batch_size": 6,
        "head_warmup_epochs": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "curvature_kind": "gauss_newton", "class_weights": "balanced", "class_sampling": "balanced",
    }  # fmt: skip


def as_arguments(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_run_leaves_a_classifier_with_its_tokenizer(given, tmp_path: Path, capsys) -> None:
    output = tmp_path / "aligned"
    align_text.main(as_arguments({**given, "output_dir": output}))
    printed = capsys.readouterr()
    printed_words = " ".join(printed.out.split())
    assert "Labelled texts: 14 train, 2 validation, 4 test, of the classes one, two; 14 below." in printed_words
    assert "Optimizers: lower_optim adamw" in printed.out
    assert "warning" not in printed.err
    results = json.loads((output / "all_results.json").read_text())
    assert {"before_accuracy", "test_accuracy", "test_macro_f1"} <= set(results)
    (found,) = pipeline("text-classification", str(output))("word1 word2")
    assert found["label"] in ("one", "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, "No dataset is given; pass --dataset with a CSV"),
        ({"model": ""}, "No model is given; pass --model with a checkpoint"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2 tokens"),
        ({"max_length": 9}, "max_length is 9; .* takes at most 8 tokens"),
        ({"mask_ratio": 1}, "mask_ratio is 1.0; it must be above 0 and below 1"),
        ({"label_column": "kind"}, "label_column is 'kind'; the columns of .* are text, label"),
        ({"dataset": "one.csv"}, "dataset has the single class 'x'; there is nothing to tell apart"),
        ({"dataset": "few.csv"}, "dataset has 1 texts of class 'y'; each class needs at least 3"),
    ],
)
def test_refuses(given, changes, message, tmp_path: Path, capsys) -> None:
    if changes.get("dataset"):
        changes = {"dataset": given["dataset"].parent / changes["dataset"]}
    with pytest.raises(SystemExit):
        align_text.main(as_arguments({**given, "output_dir": tmp_path / "aligned", **changes}))
    assert re.search(message, capsys.readouterr().err)


def test_splits_hold_each_row_once_and_each_class() -> None:
    labels = ["a"] * 30 + ["b"] * 7
    splits = align_text.split_rows(labels, seed=3)
    assert sorted(row for rows in splits.values() for row in rows) == list(range(37))
    counts = {split: (sum(row < 30 for row in rows), sum(row >= 30 for row in rows)) for split, rows in splits.items()}
    assert counts == {"train": (21, 5), "test": (6, 1), "validation": (3, 1)}
    assert splits != align_text.split_rows(labels, seed=4)
