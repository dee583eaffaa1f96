"""The console script `bissl-hf`: one word for each command."""

import sys
from collections.abc import Sequence
from importlib import import_module

from .refusal import close_matches, refuse, show

PROGRAM = "bissl-hf"
# What `bissl-hf --help` says of each module of this package that is a command.
COMMANDS = {
    "demo": "run all of BiSSL on handwritten digits, without a network",
    "pretrain": "pre-train a backbone on images without labels (SimCLR)",
    "align": "align a pre-trained backbone with a downstream task (BiSSL)",
    "align_text": "align a language model with a classification of texts (BiSSL)",
    "joint": "train both tasks jointly on one backbone instead",
    "finetune": "fine-tune a backbone or a classifier, with a search and several seeds",
    "predict": "classify images into a CSV file",
    "analyze": "measure what the features of checkpoints are worth",
    "study": "compare BiSSL with the conventional pipeline over seeds",
    "convert": "convert released weights into a checkpoint, and back",
    "benchmark": "measure how fast an alternation is on this machine",
}


def list_commands() -> str:
    """Returns what the program says of itself: every command in a line."""
    width = max(map(len, COMMANDS))
    lines = [f"    {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--config FILE.yaml] [--field value ...]",
            "",
            "Bilevel self-supervised learning (BiSSL) on transformers. Commands:",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the fields of a command. On several processes or machines:",
            "accelerate launch -m bissl_hf.cli.COMMAND [--field value ...]",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names with the arguments after it."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        show(list_commands())
        return
    if name not in COMMANDS:
        refuse(f"Unknown command {name!r}{close_matches(name, COMMANDS, f'; see {PROGRAM} --help.')}")
    sys.argv[0] = f"{PROGRAM} {name}"  # which the usage of the command names
    import_module(f".{name}", __package__).main(rest)


if __name__ == "__main__":
    main()
