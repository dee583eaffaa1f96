"""Texts for a language model as the lower and a classifier as the upper level: read, tokenized, masked by key."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .alternation import keyed_random_state
from .batches import copy_without_waiting
from .hub import load_repository

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_IGNORED = -100  # a label that the losses of transformers leave out


def read_texts(
    source: str | os.PathLike[str], *, text_column: str = "text", label_column: str | None = None, split: str = "train"
) -> tuple[list[str], list[str] | None]:
    """Reads texts, and labels where a column of them is named.

    Args:
        source (`str` or `os.PathLike`): a CSV, JSON Lines or Parquet file, or the id of a data set at the Hub.
        text_column (`str`, *optional*, defaults to `"text"`)
        label_column (`str`, *optional*): class names or numbers.
        split (`str`, *optional*, defaults to `"train"`): of a data set at the Hub.

    Returns:
        `tuple[list[str], list[str] | None]`: texts and labels.

    Raises:
        `ValueError`: for a file that cannot be read or is of another kind, a data set that cannot be loaded, a split
            or a column that is not there, and rows without a text or a label.
    """
    data = _load(Path(source).expanduser(), str(source), split)
    for field, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None and column not in data.column_names:
            raise ValueError(f"{field} is {column!r}; the columns of {source} are {', '.join(data.column_names)}.")
    texts = list(data[text_column])
    other = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if other is not None:
        raise ValueError(
            f"Row {other} of {source} has {texts[other]!r} in the column {text_column!r}; it must be a text."
        )
    labels = None if label_column is None else _label_names(data, label_column)
    return texts, labels


def _load(path: Path, source: str, split: str) -> datasets.Dataset:
    if not path.is_file():
        if path.suffix in _FORMATS or path.is_dir():
            raise ValueError(f"{source} is no file; name a file {', '.join(_FORMATS)}, or a data set at the Hub.")
        splits = load_repository(source, revision=None, load_kwargs={})
        if split not in splits:
            raise ValueError(
                f"{source} has the splits {', '.join(splits)}, and none is {split!r}; choose one of them."
            )
        return splits[split]
    if path.suffix not in _FORMATS:
        raise ValueError(f"source is {path}; it must be a file {', '.join(_FORMATS)}, or a data set at the Hub.")
    try:
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{source} cannot be read as {path.suffix[1:]}: {str(cause).splitlines()[0]}") from error


def _label_names(data: datasets.Dataset, column: str) -> list[str]:
    without = next((row for row, label in enumerate(data[column]) if label is None), None)
    if without is not None:
        raise ValueError(f"Row {without} has nothing in the column {column!r}; leave it out, or give it a label.")
    feature = data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(number) for number in data[column]]
    return [str(label) for label in data[column]]


class TokenizedTexts(Dataset):
    """Texts as tokens, all of one length, so that rows of any batch stack.

    Args:
        texts (`Sequence[str]`)
        tokenizer (`PreTrainedTokenizerBase`): of the checkpoint.
        max_length (`int`, *optional*, defaults to 128): tokens per text; longer ones are cut, shorter ones padded.
        labels (`Sequence[int]`, *optional*): class numbers.

    Raises:
        `ValueError`: if there are no texts, or not as many labels, or the tokenizer cannot pad.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 128,
        labels: Sequence[int] | None = None,
    ) -> None:
        if not texts:
            raise ValueError("texts is empty; it must have at least one text.")
        if labels is not None and len(labels) != len(texts):
            raise ValueError(f"labels has {len(labels)} entries and texts {len(texts)}; each text needs one.")
        if tokenizer.pad_token is None:
            raise ValueError("tokenizer has no pad_token; set it, for GPT-2 to its eos_token.")
        encoded = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
        )
        self.input_ids: Tensor = encoded["input_ids"]
        self.attention_mask: Tensor = encoded["attention_mask"]
        self.labels = None if labels is None else [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"input_ids": self.input_ids[index], "attention_mask": self.attention_mask[index]}
        return row if self.labels is None else {**row, "labels": self.labels[index]}


class MaskTokens:
    """Masked language modelling (Devlin et al., arXiv 1810.04805, section 3.1) as a transform: of the tokens of a
    text a share is to be predicted; of those 80 % are replaced by the mask, 10 % by any token, 10 % stay. What is
    drawn depends on the key only. At least one token per text is masked, so that no loss is a mean over nothing.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): its special tokens are never masked.
        mask_ratio (`float`, *optional*, defaults to 0.15): above 0 and below 1.

    Raises:
        `ValueError`: for another ratio, or a tokenizer without a mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, mask_ratio: float = 0.15) -> None:
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; it must be above 0 and below 1.")
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer has no mask_token; masked language modelling needs one, as that of BERT has.")
        self.mask_ratio, self.mask = mask_ratio, int(tokenizer.mask_token_id)
        self.special, self.vocabulary = torch.tensor(tokenizer.all_special_ids), len(tokenizer)

    def __call__(self, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        """Returns the inputs with masked `input_ids`, and as `labels` the tokens to predict and -100 elsewhere, both
        of shape `(batch, length)`."""
        ids = inputs["input_ids"]
        with keyed_random_state(key):  # drawn on the CPU: the same on each device
            drawn = torch.rand(ids.shape), torch.rand(ids.shape), torch.randint(self.vocabulary, ids.shape)
        scores, actions, others = (copy_without_waiting(draw, ids.device) for draw in drawn)
        if self.special.device != ids.device:
            self.special = copy_without_waiting(self.special, ids.device)
        candidates = ~torch.isin(ids, self.special)
        scores = scores.masked_fill(~candidates, float("inf"))
        chosen = (scores < self.mask_ratio) | (scores == scores.amin(dim=1, keepdim=True))
        chosen &= candidates
        masked = ids.masked_fill(chosen & (actions < 0.8), self.mask)
        masked = torch.where(chosen & (actions >= 0.9), others.to(ids.dtype), masked)
        return {**inputs, "input_ids": masked, "labels": ids.masked_fill(~chosen, _IGNORED)}
