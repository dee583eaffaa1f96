"""Texts: reading, tokens, and masks that depend on the key only."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bissl_hf.data.text import MaskTokens, TokenizedTexts, read_texts
from tests.hub_stand_in import HubStandIn

WORDS = [f"word{number}" for number in range(20)]
SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}


def tiny_tokenizer(**special) -> PreTrainedTokenizerFast:
    names = special or SPECIAL
    vocabulary = {name: number for number, name in enumerate([*names.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def batch(rows: int = 200, length: int = 12) -> dict:
    ids = torch.randint(3, 23, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, -2:] = 1  # padding
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_reads_texts_with_labels(tmp_path, suffix):
    path = tmp_path / f"texts.{suffix}"
    if suffix == "csv":
        path.write_text("text,label\na b,x\nc,y\n")
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in (("a b", "x"), ("c", "y"))))
    else:
        Dataset.from_dict({"text": ["a b", "c"], "label": ["x", "y"]}).to_parquet(path)
    assert read_texts(path, label_column="label") == (["a b", "c"], ["x", "y"])
    assert read_texts(path) == (["a b", "c"], None)


def test_refuses_other_files_and_columns(tmp_path):
    (tmp_path / "texts.csv").write_text("text\na\n")
    (tmp_path / "texts.txt").write_text("a")
    with pytest.raises(ValueError, match=r"it must be a file \.csv, \.json"):
        read_texts(tmp_path / "texts.txt")
    with pytest.raises(ValueError, match=r"label_column is 'kind'; the columns of .* are text"):
        read_texts(tmp_path / "texts.csv", label_column="kind")
    with pytest.raises(ValueError, match=r"none.csv is no file; name a file \.csv, .*, or a data set at the Hub"):
        read_texts(tmp_path / "none.csv")


def test_refuses_rows_without_a_text_or_a_label_and_damaged_files(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": null, "label": "y"}\n')
    with pytest.raises(ValueError, match=r"Row 1 of .* has None in the column 'text'; it must be a text"):
        read_texts(tmp_path / "texts.jsonl")
    (tmp_path / "labels.jsonl").write_text('{"text": "a", "label": null}\n{"text": "b", "label": "y"}\n')
    with pytest.raises(ValueError, match=r"Row 0 has nothing in the column 'label'; leave it out"):
        read_texts(tmp_path / "labels.jsonl", label_column="label")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read as parquet: "):
        read_texts(tmp_path / "broken.parquet")


def test_texts_of_the_hub(monkeypatch, tmp_path):
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        with pytest.raises(ValueError, match=r"'user/none' is no file or folder here, and no data set on the Hub"):
            read_texts("user/none")
        Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "test.parquet")
        hub.add_repository(
            "user/texts",
            {"data/test-00000-of-00001.parquet": (tmp_path / "test.parquet").read_bytes()},
            kind="dataset",
        )
        assert read_texts("user/texts", split="test") == (["a"], None)
        with pytest.raises(ValueError, match=r"user/texts has the splits test, and none is 'train'; choose one"):
            read_texts("user/texts")


def test_rows_have_one_length():
    data = TokenizedTexts(["word0 word1", "word2"], tiny_tokenizer(), max_length=4, labels=[1, 0])
    assert data[0]["input_ids"].tolist() == [3, 4, 1, 1]
    assert data[1]["attention_mask"].tolist() == [1, 0, 0, 0]
    assert [data[index]["labels"] for index in range(len(data))] == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"labels": [1, 2]}, "labels has 2 entries and texts 1"),
        ({"tokenizer": tiny_tokenizer(unk_token="[UNK]")}, "tokenizer has no pad_token"),
    ],
)
def test_tokenized_texts_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenizedTexts(**{"texts": ["word0"], "tokenizer": tiny_tokenizer(), **settings})


def test_masks_depend_on_the_key_only():
    mask, inputs = MaskTokens(tiny_tokenizer()), batch()
    first, again, other = mask(inputs, (0, 1)), mask(inputs, (0, 1)), mask(inputs, (0, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], other["labels"])
    assert torch.equal(inputs["input_ids"], batch()["input_ids"])


def test_shares_of_masked_tokens():
    """15 % of 20,000 tokens, 80 / 10 / 10 % of them, within four standard deviations of a binomial count."""
    inputs = batch(rows=2000)
    out = MaskTokens(tiny_tokenizer())(inputs, (3, 4))
    ids, chosen = inputs["input_ids"], out["labels"] != -100
    assert torch.equal(out["labels"][chosen], ids[chosen])
    assert torch.equal(out["input_ids"][~chosen], ids[~chosen])
    assert not (chosen & (ids < 3)).any()
    assert chosen.any(dim=1).all(), "at least one token of each text"
    total = int(chosen.sum())
    # A text of 10 tokens without any below the ratio (0.85^10 of them) gets one.
    expected = 2000 * 10 * 0.15 + 2000 * 0.85**10
    assert abs(total - expected) < 4 * (20000 * 0.15 * 0.85) ** 0.5
    masked = int((out["input_ids"][chosen] == 2).sum())
    kept = int((out["input_ids"][chosen] == ids[chosen]).sum())
    # Any of the 23 tokens: one of them is the mask, one the token itself.
    assert abs(masked / total - (0.8 + 0.1 / 23)) < 4 * (0.16 / total) ** 0.5
    assert abs(kept / total - (0.1 + 0.1 / 23)) < 4 * (0.09 / total) ** 0.5


@pytest.mark.parametrize(
    ("tokenizer", "ratio", "message"),
    [
        (tiny_tokenizer(), 1.0, "mask_ratio is 1.0; it must be above 0 and below 1"),
        (tiny_tokenizer(unk_token="[UNK]", pad_token="[PAD]"), 0.15, "tokenizer has no mask_token"),
    ],
)
def test_mask_tokens_refuse(tokenizer, ratio, message):
    with pytest.raises(ValueError, match=message):
        MaskTokens(tokenizer, mask_ratio=ratio)
