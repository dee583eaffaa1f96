"""Does x, the solution of the linear system, turn the downstream gradient as the lower level really would?

The upper gradient is J' g with J = d theta_P / d theta_D, how the lower level answers a move of theta_D, and g the
downstream gradient at theta_P. A lower phase of some steps has a Jacobian of its own, which need not be that of the
minimum. It is measured here by running the lower phase twice, from theta_D + h d and from theta_D - h d, on the same
batches. What is measured is J d, and not J' d; the two are the same where J is symmetric, as for any number of
gradient steps, with momentum or without, on a quadratic.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..tensors import Vector, add_scaled, cosine, norm, subtract

LowerPhase = Callable[[Vector], Vector]


@dataclass(frozen=True)
class Alignment:
    """How a vector of a solver compares with the response that was measured.

    Args:
        cosine (`float`): of the two; 1 if it turns the direction as the lower level does, NaN for a vector of zeros.
        ratio (`float`): of its norm to that of the response.
        error (`float`): norm of their difference, relative to the response.
    """

    cosine: float
    ratio: float
    error: float


def measure_response(run_lower_phase: LowerPhase, theta_d: Vector, direction: Vector, *, step: float) -> Vector:
    """Returns the derivative of what a lower phase ends with along a direction, by a central difference.

    Args:
        run_lower_phase (`Callable[[Vector], Vector]`): takes theta_D and returns theta_P at the end of a lower phase.
            Each call starts from the same state (theta_P, head, momentum, running statistics) and reads the same
            batches.
        theta_d (`Vector`): where theta_D is.
        direction (`Vector`): d, of any norm.
        step (`float`): eps, the length of the move of theta_D in units of its norm: small against 1, and large
            against the rounding of the parameters.

    Returns:
        `Vector`: (theta_P(theta_D + h d) - theta_P(theta_D - h d)) / 2 h, with h = eps |theta_D| / |d|.

    Raises:
        `ValueError`: if `step` is not above 0, or `direction` is zero.
    """
    if not 0 < step < float("inf"):
        raise ValueError(f"`step` is {step}; it must be a finite number above 0.")
    length = float(norm(direction))
    if length == 0:
        raise ValueError("`direction` is zero; give one with a length, such as the downstream gradient.")
    move = step * (float(norm(theta_d)) or 1.0) / length
    ends = [run_lower_phase(add_scaled(theta_d, direction, sign * move)) for sign in (1, -1)]
    return tuple(difference / (2 * move) for difference in subtract(*ends))


def compare_with_response(response: Vector, solution: Vector) -> Alignment:
    """Compares what a solver returns for a direction with the response to it.

    Args:
        response (`Vector`): see [`measure_response`].
        solution (`Vector`): x for the right-hand side that was the direction.

    Raises:
        `ValueError`: if the response is zero: the lower phase does not see theta_D.
    """
    length = float(norm(response))
    if length == 0:
        raise ValueError("The response is zero: the lower phase does not depend on theta_D; check proximal_weight.")
    error = float(norm(subtract(solution, response))) / length
    return Alignment(float(cosine(response, solution)), float(norm(solution)) / length, error)


def compare_solvers(
    run_lower_phase: LowerPhase,
    theta_d: Vector,
    direction: Vector,
    solvers: Mapping[str, Callable[[Vector], Vector]],
    *,
    step: float,
) -> dict[str, Alignment]:
    """Measures the response to a direction once, and compares with it what each solver returns for the direction.

    Args:
        run_lower_phase, theta_d, direction, step: see [`measure_response`].
        solvers (`Mapping`): by name, what takes a right-hand side and returns x.
    """
    response = measure_response(run_lower_phase, theta_d, direction, step=step)
    return {name: compare_with_response(response, solve(direction)) for name, solve in solvers.items()}
