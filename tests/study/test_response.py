"""The response of a lower phase, against its closed form on a quadratic."""

import pytest
import torch

from bissl_hf.bilevel.hypergradient import implicit_gradient
from bissl_hf.study.response import Vector, compare_solvers, compare_with_response, measure_response

SIZES = (5, 3)


def split(vector: torch.Tensor) -> Vector:
    return tuple(vector.split(SIZES))


class Quadratic:
    """theta_P answers by gradient steps with momentum on 1/2 t'Ht - b't + lambda/2 |t - theta_D|^2, from a fixed
    start."""

    def __init__(self, *, steps: int, rate: float, weight: float, momentum: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        self.hessian = root @ root.T / 8
        self.start, self.linear, self.theta_d, self.direction = torch.randn(
            4, 8, generator=generator, dtype=torch.float64
        )
        self.steps, self.rate, self.weight, self.momentum = steps, rate, weight, momentum

    def run(self, theta_d: Vector) -> Vector:
        theta, velocity = self.start.clone(), torch.zeros(8, dtype=torch.float64)
        for _ in range(self.steps):
            gradient = self.hessian @ theta - self.linear + self.weight * (theta - torch.cat(theta_d))
            velocity = self.momentum * velocity + gradient
            theta = theta - self.rate * velocity
        return split(theta)

    def response(self) -> torch.Tensor:
        """J d, with J = (I - (I - eta (H + lambda))^K) lambda (H + lambda)^-1 for steps without momentum."""
        damped = self.hessian + self.weight * torch.eye(8, dtype=torch.float64)
        decay = torch.linalg.matrix_power(torch.eye(8, dtype=torch.float64) - self.rate * damped, self.steps)
        answer = torch.linalg.solve(damped, self.weight * self.direction)
        return answer - decay @ answer

    def solve(self, damping: float):
        def solved(rhs: Vector) -> Vector:
            return implicit_gradient(
                lambda vector: split(self.hessian @ torch.cat(vector)), rhs,
                proximal_weight=self.weight, damping=damping, max_iterations=30,
            )[0]  # fmt: skip

        return solved


@pytest.mark.parametrize("steps", [1, 7, 400])
def test_the_response_is_that_of_the_closed_form(steps):
    case = Quadratic(steps=steps, rate=0.1, weight=0.3)
    found = measure_response(case.run, split(case.theta_d), split(case.direction), step=1e-3)
    torch.testing.assert_close(torch.cat(found), case.response(), rtol=1e-9, atol=1e-9)


def test_momentum_takes_part_in_the_response():
    case = Quadratic(steps=2, rate=0.1, weight=0.3, momentum=0.9)
    found = measure_response(case.run, split(case.theta_d), split(case.direction), step=1e-3)
    damped = case.hessian + 0.3 * torch.eye(8, dtype=torch.float64)
    # d theta_2 / d theta_D = eta lambda (2 + mu) I - eta^2 lambda (H + lambda)
    expected = 0.1 * 0.3 * (2.9 * case.direction - 0.1 * damped @ case.direction)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-9)


def test_the_undamped_solve_answers_like_a_lower_level_at_its_minimum():
    case = Quadratic(steps=4000, rate=0.1, weight=0.3)
    solvers = {"undamped": case.solve(0.0), "identity": lambda rhs: rhs}
    found = compare_solvers(case.run, split(case.theta_d), split(case.direction), solvers, step=1e-3)
    assert found["undamped"].cosine == pytest.approx(1, abs=1e-9)
    assert found["undamped"].ratio == pytest.approx(1, abs=1e-6)
    assert found["undamped"].error < 1e-6
    assert found["identity"].cosine < 0.95


@pytest.mark.parametrize("steps", [5, 30])
def test_a_short_lower_phase_answers_like_the_solve_damped_by_its_horizon(steps):
    case = Quadratic(steps=steps, rate=0.02, weight=0.01)
    solvers = {"horizon": case.solve(1 / (0.02 * steps)), "undamped": case.solve(0.0)}
    found = compare_solvers(case.run, split(case.theta_d), split(case.direction), solvers, step=1e-3)
    assert found["horizon"].cosine > 0.995 > found["undamped"].cosine


def test_a_solution_of_zeros_has_no_angle():
    zeros, ones = torch.zeros(3), torch.ones(3)
    found = compare_with_response((ones,), (zeros,))
    assert found.cosine == 0.0
    assert (found.ratio, found.error) == (0, 1)


@pytest.mark.parametrize("step", [0.0, -1.0, float("inf")])
def test_a_step_without_a_length_is_refused(step):
    with pytest.raises(ValueError, match=f"`step` is {step}; it must be a finite number above 0"):
        measure_response(lambda theta: theta, (torch.ones(2),), (torch.ones(2),), step=step)


def test_a_direction_of_zeros_is_refused():
    with pytest.raises(ValueError, match="`direction` is zero"):
        measure_response(lambda theta: theta, (torch.ones(2),), (torch.zeros(2),), step=1e-3)


def test_a_lower_phase_that_does_not_see_theta_d_is_told():
    with pytest.raises(ValueError, match="The response is zero: the lower phase does not depend on theta_D"):
        compare_with_response((torch.zeros(2),), (torch.ones(2),))
