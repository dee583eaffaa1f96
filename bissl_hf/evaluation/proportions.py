"""What a test split of limited size says: intervals of an accuracy, and of the difference of two."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """Two classifiers compared on the same images.

    Args:
        gained, lost (`int`): images that only the second, or only the first, classifies rightly.
        examples (`int`): all images.
        difference (`float`): of the accuracies, second minus first.
        low, high (`float`): bounds of its interval.
        p_value (`float`): of the exact test of McNemar.
    """

    gained: int
    lost: int
    examples: int
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def wilson_interval(successes: int, examples: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the score interval of a proportion (Wilson, JASA 22, 1927), which keeps its level for few examples and
    near 0 and 1.

    Args:
        successes, examples (`int`)
        confidence (`float`, *optional*, defaults to 0.95)

    Raises:
        `ValueError`: if there are no examples, or fewer than successes.
    """
    if not 0 <= successes <= examples or examples < 1:
        raise ValueError(
            f"{successes} successes of {examples} examples; there must be 1 example, and no fewer of them."
        )
    z, p = stats.norm.ppf((1 + confidence) / 2), successes / examples
    middle = p + z**2 / (2 * examples)
    half = z * np.sqrt(p * (1 - p) / examples + z**2 / (4 * examples**2))
    low, high = ((middle + sign * half) / (1 + z**2 / examples) for sign in (-1, 1))
    return (float(low) if successes else 0.0), (float(high) if successes < examples else 1.0)


def compare_paired(first: np.ndarray, second: np.ndarray, confidence: float = CONFIDENCE) -> PairedDifference:
    """Compares which images two classifiers get right. Both saw the same images, so only those on which they differ
    count: the interval is that of Bonett and Price (Journal of Educational and Behavioral Statistics 37, 2012), a Wald
    interval with one image more in each of the two cells; the p-value that of McNemar's exact test.

    Args:
        first, second (`np.ndarray`): whether each image is classified rightly, shape `(images,)`, in the same order.
        confidence (`float`, *optional*, defaults to 0.95)

    Raises:
        `ValueError`: if the two are empty or not of one length.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"{first.shape} results are compared with {second.shape}; both need the same images.")
    gained, lost, total = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((up + down - (up - down) ** 2) / (total + 2))
    p_value = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    low, high = max(up - down - half, -1.0), min(up - down + half, 1.0)
    return PairedDifference(gained, lost, total, (gained - lost) / total, float(low), float(high), float(p_value))
