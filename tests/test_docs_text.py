"""The code of docs/text.md, run as it stands there, on a tiny BERT."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from .data.test_text import WORDS, tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "text.md"


@pytest.mark.filterwarnings("ignore:.*pull.*")
def test_the_example_of_the_page(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    texts = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(5)) for row in range(16)]
    (tmp_path / "unlabelled.csv").write_text("\n".join(["text", *texts]))
    rows = [f"{text},{'one' if row % 2 else 'two'}" for row, text in enumerate(texts[:8])]
    (tmp_path / "labelled.csv").write_text("\n".join(["text,label", *rows]))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    space = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "unlabelled": str(tmp_path / "unlabelled.csv"),
        "labelled": str(tmp_path / "labelled.csv"),
        "output_dir": str(tmp_path / "aligned"),
    }
    exec(compile(block, PAGE.name, "exec"), space)
    assert space["trainer"].state.global_step == 10
    classify = pipeline(
        "text-classification", str(tmp_path / "aligned"), tokenizer=AutoTokenizer.from_pretrained(tmp_path / "aligned")
    )
    assert classify(texts[0])[0]["label"] in ("one", "two")
