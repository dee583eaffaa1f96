"""Checkpoints of `transformers` that are replaced as a whole."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save_model(model: PreTrainedModel, directory: str | os.PathLike[str], processing_class: Any = None) -> None:
    """Writes a model, and beside it what prepares its inputs. Files are written aside first, so that a failure leaves
    what lies in `directory` as it was.

    Args:
        model (`PreTrainedModel`)
        directory (`str` or `os.PathLike`): created if need be.
        processing_class (*optional*): image processor or tokenizer.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as staging:
        model.save_pretrained(staging)
        if processing_class is not None:
            processing_class.save_pretrained(staging)
        for path in sorted(Path(staging).iterdir()):
            if path.is_dir():
                shutil.rmtree(directory / path.name, ignore_errors=True)
            path.replace(directory / path.name)
