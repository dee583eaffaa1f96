"""How to read the figures of a run: the same sentences on the console, in figures and in the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.proportions import PairedDifference
from ..optim.pull import GOOD_PULL, TYPICAL_PULL, WEAK_PULL

# A relative residual below the first is a close solution; above the second no solve (x = 0) would have been better.
CLOSE_RESIDUAL, USELESS_RESIDUAL = 0.1, 1.0

LEGEND = """\
What is printed after each alternation:
  pretext     loss of the lower level: should fall, or stay level
  downstream  loss of the aligned model in training: should fall
  residual    of the linear solve, relative: below 0.1 good, above 1 useless
  pull        of the upper level on the lower so far: 3 to 10 did well
  accuracy    of the aligned model on validation images: should rise"""


def explain_pull(pull: float) -> str:
    """Returns what a pull of this size over a run means, as a sentence."""
    start = f"Pull {pull:.2g} over the run: "
    if pull < WEAK_PULL:
        return f"{start}below {WEAK_PULL:g}, the lower level hardly felt the upper one."
    if pull < GOOD_PULL:
        return f"{start}between {WEAK_PULL:g} and {GOOD_PULL:g}, the upper level acted on the lower one weakly."
    if pull <= TYPICAL_PULL:
        return f"{start}in the range that did well ({GOOD_PULL:g} to {TYPICAL_PULL:g})."
    return f"{start}above {TYPICAL_PULL:g}, theta_P follows theta_D closely, and the pretext task has less of a say."


def explain_residual(residual: float) -> str:
    """Returns what a relative residual of the linear solve of this size means, as a sentence."""
    start = f"Residual {residual:.2g}: "
    if residual < CLOSE_RESIDUAL:
        return f"{start}the linear system was solved closely."
    if residual <= USELESS_RESIDUAL:
        return f"{start}the linear system was solved roughly; more iterations or more damping would solve it closely."
    return f"{start}above 1 the solve is worse than none; raise damping, or take curvature_kind gauss_newton."


def explain_end(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns sentences on the pull and the residual that a run ended with, as far as they were logged."""
    last = {name: row[name] for row in history for name in ("levels/pull", "solver/residual") if name in row}
    explained = {"levels/pull": explain_pull, "solver/residual": explain_residual}
    return [explain(last[name]) for name, explain in explained.items() if name in last]


def explain_difference(found: PairedDifference) -> str:
    """Returns the difference of two models on the same images, with its interval, as a sentence."""
    bounds = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return (
        f"Difference after minus before: {100 * found.difference:+.2f} points (95 % interval {bounds}; of "
        f"{found.examples:,} images {found.gained} gained, {found.lost} lost; McNemar p {found.p_value:.2g})."
    )


def judge_difference(found: PairedDifference, pull: float | None) -> list[str]:
    """Returns what may be concluded from a difference: nothing where it is within its interval, and nothing on BiSSL
    where the pull was too small to cause it."""
    sentences = []
    if not found.is_clear:
        sentences.append("The interval holds 0: these images do not show that the models differ.")
    if pull is not None and pull < WEAK_PULL:
        sentences.append(
            f"With a pull of {pull:.2g} no difference is due to BiSSL, but to further training; set target_pull=10."
        )
    elif pull is not None and pull < GOOD_PULL:
        sentences.append(f"With a pull of {pull:.2g} BiSSL has had little part in it; target_pull=10 gives it more.")
    sentences.append("It is one run: what comparisons over seeds found is in docs/results.md.")
    return sentences
