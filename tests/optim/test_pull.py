"""lambda is set and corrected for a target pull, and the damping stands for the horizon of the lower steps."""

import pytest
import torch

from bissl_hf.optim.optimizers import LARS
from bissl_hf.optim.pull import ProximalWeight, Pull, horizon_damping, step_length


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.02, 1.0])
def test_a_tensor_without_a_gradient_does_not_rule_the_mean_of_lars(size):
    """A key bias, 0.1 % of the entries: whatever its trust ratio, the step length is that of the weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    bias = size * torch.randn(4, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(64, 64, generator=generator, dtype=torch.float64), torch.zeros_like(bias)]
    optimizer = LARS([weight, bias], lr=1.0, momentum=0.0, weight_decay=1e-6)
    alone = float(step_length(optimizer, [weight], gradients[:1]))
    assert alone == pytest.approx(0.001 * float(weight.norm()) / float((gradients[0] + 1e-6 * weight).norm()))
    assert float(step_length(optimizer, [weight, bias], gradients)) == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("horizon", [0.2, 2.0, 20.0, 200.0])
def test_the_damped_solve_turns_a_vector_as_the_steps_of_its_horizon_do(horizon):
    """theta_P after K gradient steps on a quadratic, differentiated in theta_D by unrolling."""
    weight, steps = 0.1, 4000
    eta = horizon / steps
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.T / 30
    direction = torch.randn(30, generator=generator, dtype=torch.float64)
    response = torch.zeros_like(direction)  # d theta_P along a move of theta_D
    for _ in range(steps):
        response = response - eta * (hessian @ response + weight * (response - direction))
    shift = weight + horizon_damping(weight, weight * horizon)
    solution = torch.linalg.solve(torch.eye(30, dtype=torch.float64) + hessian / shift, direction)
    assert float(torch.cosine_similarity(solution, response, dim=0)) > 0.99


def pull_after(total: float, last: float) -> Pull:
    pull = Pull()
    pull.load_state_dict({"total": total, "before": total - last})
    return pull


@pytest.mark.parametrize(
    ("total", "last", "factor"),
    [
        (1.0, 1.0, 1.0),  # on its way to 10
        (0.8, 0.8, 1.0),  # to 8, within 1.5
        (0.5, 0.5, 9.5 / 4.5),  # to 5
        (0.1, 0.1, 4.0),  # to 1, changed by at most 4 at once
        (4.0, 4.0, 6 / 36),  # to 40, at least 1 / 4 ...
    ],
)
def test_lambda_is_corrected_where_the_run_would_miss_its_target(total, last, factor):
    weight = ProximalWeight(None, 10.0)
    weight.start(100.0)
    assert weight.value == pytest.approx(0.1)
    weight.correct(pull_after(total, last), past_rates=1.0, coming_rates=9.0)
    assert weight.value == pytest.approx(0.1 * max(factor, 0.25))


def test_a_given_lambda_stays():
    weight = ProximalWeight(0.3, None)
    weight.start(100.0)
    weight.correct(pull_after(4.0, 4.0), past_rates=1.0, coming_rates=9.0)
    weight.load_state_dict({"value": 5.0})
    assert weight.value == 0.3


@pytest.mark.parametrize("estimate", [0.0, float("nan"), float("inf")])
def test_an_estimate_from_which_no_lambda_follows_is_refused(estimate):
    with pytest.raises(ValueError, match=f"target_pull is 10.0.* is estimated at {estimate}"):
        ProximalWeight(None, 10.0).start(estimate)
