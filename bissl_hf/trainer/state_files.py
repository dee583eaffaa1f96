"""Files of a checkpoint that Trainer writes by `torch.save`: read as tensors and numbers only."""

import pickle
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

_SUFFIXES = (".pt", ".pth", ".bin")


def find_refused_file(checkpoint: Path) -> str | None:
    """Returns the first file that torch does not read without running code, as a clause for a message, or `None` if
    there is none. Tensors are mapped, not read, so that a large state of an optimizer costs nothing.

    Args:
        checkpoint (`Path`): a whole checkpoint.
    """
    for path in sorted(checkpoint.iterdir()):
        if path.suffix not in _SUFFIXES:
            continue
        try:
            with safe_globals():
                torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError:
            return f"{path.name} holds more than tensors and numbers; it is not read, since that could run code"
        except (RuntimeError, EOFError, OSError, ValueError):
            return f"{path.name} is not a file as torch.save writes it"
    return None
