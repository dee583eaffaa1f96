"""Loading what a user has named by folder or Hub id; an error says by which argument."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from ..models import loading as loading_of_models

_ALLOWED = f"It must be a folder with a {CONFIG_NAME} and weights, or the id of a model at the Hub, such as user/name."


# Odd configurations make the constructors of models fail in many ways; all of them are bad input.
_LOADING_ERRORS = (
    AssertionError,  # of classes of transformers that are given another class's configuration
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, ImportError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


@contextmanager
def loading(field: str, source: str) -> Iterator[None]:
    """Has an error in loading a model name the argument and its value.

    Args:
        field (`str`): the argument that names the model.
        source (`str`): its value.

    Raises:
        `ValueError`: before anything is asked of the Hub, if `source` is neither a folder with a configuration nor
            the name of a repository; later for whatever hinders the loading.
    """
    if Path(source).is_dir():
        if not (Path(source) / CONFIG_NAME).is_file():
            raise ValueError(f"{field} is {source!r}, a folder without a {CONFIG_NAME}. {_ALLOWED}")
    elif not _may_be_repository(source):
        raise ValueError(f"{field} is {source!r}; there is no such folder. {_ALLOWED}")
    try:
        yield
    except _LOADING_ERRORS as error:
        reason = _reason(error)
        found = (
            "a folder that" if Path(source).is_dir() else "there is no such folder, and what the Hub has of that name"
        )
        raise ValueError(f"{field} is {source!r}; {found} cannot be loaded: {reason}. {_ALLOWED}") from error


def load_config(field: str, source: str) -> PretrainedConfig:
    """Loads the configuration of a model; code beside it is not run.

    Raises:
        `ValueError`: see [`loading`].
    """
    with loading(field, source):
        return loading_of_models.load_config(source)


def _may_be_repository(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle with more in it than tensors, which is not run; ask for safetensors"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__
