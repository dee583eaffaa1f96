"""Models from folders and from the Hub, as training needs them: in full precision, finite, without code from there."""

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import is_timm_available, logging

from .finite import with_finite_weights


def load_config(source: str) -> PretrainedConfig:
    """Loads the configuration of a model; code beside it is not run.

    Args:
        source (`str`): folder or Hub id.

    Raises:
        `ValueError`: if it is one of `timm`, which is not installed.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        if is_timm_available():
            raise
        raise ValueError(
            f"{source} is a model of timm, which is not installed; install the extra: pip install 'bissl_hf[timm]'."
        ) from error


def load_pretrained(model_class: Any, source: str, **options: Any) -> Any:
    """Loads a model with its weights in torch's default dtype: a checkpoint in half precision would otherwise stay in
    half precision, in which training does not get anywhere.

    Args:
        model_class: a model class or an `Auto` class.
        source (`str`): folder or Hub id.
        **options: of `from_pretrained`.

    Raises:
        `ValueError`: if it has weights that are not finite, or its class needs what is not installed.
    """
    load_config(source)
    return with_finite_weights(
        model_class.from_pretrained(source, dtype=torch.get_default_dtype(), trust_remote_code=False, **options),
        source,
    )


def load_without_head(model_class: Any, source: str, **options: Any) -> Any:
    """Loads a model like [`load_pretrained`], of whose checkpoint only the backbone counts: a missing head is
    expected, and not reported at length. Returns the model and the names of missing weights."""
    load_config(source)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = model_class.from_pretrained(
            source, dtype=torch.get_default_dtype(), trust_remote_code=False, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    return model, report["missing_keys"]
