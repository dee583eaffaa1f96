"""Constructors of trainers that take data, transforms and metrics from a task."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from ..tasks.image_task import ImageTask

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def filled_from_task(arguments: Callable[[ImageTask], dict[str, Any]]) -> Callable[[Constructor], Constructor]:
    """Returns a decorator of a constructor, which then takes from its keyword `task` the arguments that it is not
    given.

    Args:
        arguments (`Callable`): returns the arguments that a task has for this trainer.
    """

    def decorate(init: Constructor) -> Constructor:
        @wraps(init)
        def filled(self: Any, *args: Any, task: ImageTask | None = None, **given: Any) -> None:
            if task is not None and not isinstance(task, ImageTask):
                raise TypeError(
                    f"task is a {type(task).__name__}; {type(self).__name__} takes an ImageTask (see "
                    "load_image_task), or data sets and transforms one by one."
                )
            init(self, *args, **({} if task is None else arguments(task)) | given)

        return cast(Constructor, filled)

    return decorate
