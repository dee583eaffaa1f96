"""What commands show of the libraries below them."""

import logging

from transformers.utils.logging import disable_progress_bar

from ..trainer.console import show_messages

# Messages that a user can do nothing about, by the logger that they come from.
_WITHOUT_REMEDY = {
    # 2026-11, transformers 5.23: of checkpoints written within a second, which it then sorts by their steps.
    "transformers.trainer_utils": "mtime may not be reliable",
}


def prepare_console() -> None:
    """Has a command show its own messages in whole words and whole lines, and leave out the bars of reading and
    writing weights, which takes a moment, and messages that a user can do nothing about."""
    disable_progress_bar()
    show_messages()
    for name, message in _WITHOUT_REMEDY.items():
        logging.getLogger(name).addFilter(_Without(message))


class _Without(logging.Filter):
    """Lets all records pass but those that begin with a text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)
