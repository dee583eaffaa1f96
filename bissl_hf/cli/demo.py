"""Runs all of BiSSL on handwritten digits that ship with scikit-learn: 3 to 10 minutes on two CPU cores.

    bissl-hf demo [--quick] [--field value ...]

Pre-training, head warm-up and alternations, then the aligned model with its figures, as `bissl-hf align` makes them
from the configuration in this package. `--quick` shows every stage within a minute or two, and learns next to nothing.
"""

import sys
from collections.abc import Sequence
from importlib.resources import as_file, files

from . import align

QUICK = {
    "image_size": 16,
    "pretrain_steps": 5,
    "num_alternations": 2,
    "lower_steps": 2,
    "upper_steps": 2,
    "head_warmup_epochs": 1,
    "bn_recalibration_images": 128,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo; arguments beside `--quick` are those of `align`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    quick = "--quick" in given
    changes = [f"--{name}={value}" for name, value in QUICK.items()] if quick else []
    given = [argument for argument in given if argument != "--quick"]
    with as_file(files(__package__) / "configs" / "digits.yaml") as config:
        own_config = any(argument.partition("=")[0] == "--config" for argument in given)
        align.main([*([] if own_config else ["--config", str(config)]), *changes, *given])


if __name__ == "__main__":
    main()
