"""Arguments of the downstream loss and of the examples that it sees."""

from dataclasses import dataclass, field

from ..data.balanced import BALANCED


@dataclass
class LossArguments:
    """How the classes of a downstream task are weighted, and how often each is seen."""

    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the loss: balanced (by the inverse of their numbers of images), or a "
            "number for each class in the order of their names."
        },
    )

    class_sampling: str | None = field(
        default=None,
        metadata={
            "help": "balanced: training images of rare classes are repeated until each class has as many as the most "
            "frequent one."
        },
    )

    def weights(self) -> str | list[float] | None:
        """Returns what [`resolve_class_weights`] takes.

        Raises:
            `ValueError`: for words that are no numbers.
        """
        given = self.class_weights
        if given is None or given == [BALANCED]:
            return given if given is None else BALANCED
        try:
            return [float(word) for word in given]
        except ValueError as error:
            raise ValueError(
                f"class_weights is {' '.join(given)}; it must be {BALANCED}, or a number for each class."
            ) from error
