"""Files of a checkpoint that Trainer writes: those of `torch.save` are read as tensors and numbers only."""

import pickle
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from ..checkpoints import DamagedFileError

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


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Returns the state that Trainer has written into a checkpoint.

    Raises:
        [`DamagedFileError`]: if the file was changed into something else.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error
    steps = (state.global_step, state.max_steps)
    if not all(isinstance(step, int) and step >= 0 for step in steps) or not isinstance(state.log_history, list):
        raise DamagedFileError(f"{path} does not hold the state of a run. Resume from another checkpoint.")
    return state
