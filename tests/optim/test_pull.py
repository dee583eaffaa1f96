"""lambda is set and corrected for a target pull, and the damping stands for the horizon of the lower steps."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from bissl_hf.optim.optimizers import LARS
from bissl_hf.optim.pull import ProximalWeight, Pull, estimate_pull, horizon_damping, step_length
from bissl_hf.optim.two_level import LevelSettings


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


ALTERNATIONS, STEPS = 4, 50
SCHEDULES = [("constant", 0), ("cosine", 0), ("cosine_with_min_lr", 20), ("linear", 100)]


def lower_level(schedule: str, warmup_steps: int) -> LevelSettings:
    return LevelSettings(
        prefix="lower_", optim="sgd", optimizer_options={"momentum": 0.0}, learning_rate=0.02, weight_decay=0.0,
        schedule=schedule, schedule_options={"min_lr_rate": 0.001} if schedule == "cosine_with_min_lr" else None,
        num_steps=ALTERNATIONS * STEPS, warmup_steps=warmup_steps, max_grad_norm=0.0,
    )  # fmt: skip


def run_alternations(
    settings: LevelSettings, hessian: torch.Tensor, weight: float, theta_d: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[float]]:
    """theta_P after each alternation on t'Ht/2, each begun at zero with a theta_D of its own, and its pull."""
    theta_p = torch.zeros(len(hessian), dtype=torch.float64, requires_grad=True)
    optimizer, pull, ends, pulls = settings.build_optimizer([theta_p]), Pull(), [], []
    schedule = LambdaLR(optimizer, settings.build_schedule())
    for target in theta_d:
        pull.begin_alternation()
        with torch.no_grad():
            theta_p.zero_()
        for _ in range(STEPS):
            theta_p.grad = (hessian @ theta_p + weight * (theta_p - target)).detach()
            pull.count(optimizer, [theta_p], torch.ones(()), proximal_weight=weight)
            optimizer.step()
            schedule.step()
        ends.append(theta_p.detach().clone())
        pulls.append(pull.of_alternation())
    return ends, pulls


@pytest.mark.parametrize(("schedule", "warmup_steps"), SCHEDULES)
def test_the_pull_follows_the_schedule_of_the_learning_rate(schedule, warmup_steps):
    """Without curvature theta_P takes over 1 - exp(-pull) of a move of theta_D; in each alternation, the last one at
    the end of the schedule too."""
    settings, weight, size = lower_level(schedule, warmup_steps), 0.05, 3
    move = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    none = torch.zeros(size, size, dtype=torch.float64)
    ends, pulls = run_alternations(settings, none, weight, [move] * ALTERNATIONS)
    for end, pull in zip(ends, pulls, strict=True):
        torch.testing.assert_close(end, (1 - math.exp(-pull)) * move, rtol=1e-3, atol=0)
    assert [weight * rates for rates in settings.learning_rates_by(STEPS)] == pytest.approx(pulls)
    theta_p = torch.zeros(size, requires_grad=True)
    estimate = estimate_pull(
        settings.build_optimizer([theta_p]), [theta_p], [torch.ones(size)], bound=0.0,
        learning_rates=settings.total_learning_rate(),
    )  # fmt: skip
    assert weight * estimate == pytest.approx(sum(pulls))


@pytest.mark.parametrize(("schedule", "warmup_steps"), SCHEDULES)
def test_the_damping_follows_the_schedule_of_the_learning_rate(schedule, warmup_steps):
    """The damped solve turns a vector as the steps of each alternation do, by brute force, from the first to the last.
    With the horizon of another alternation it does not."""
    settings, weight, size, step = lower_level(schedule, warmup_steps), 0.01, 12, 1e-4
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = 4 * root @ root.T / size
    base, move = torch.randn(2, size, generator=generator, dtype=torch.float64)
    (up, pulls), (down, _) = (
        run_alternations(settings, hessian, weight, [base + sign * step * move] * ALTERNATIONS) for sign in (1, -1)
    )
    cosines = torch.zeros(ALTERNATIONS, ALTERNATIONS, dtype=torch.float64)
    for row in range(ALTERNATIONS):
        response = (up[row] - down[row]) / (2 * step)
        for column, pull in enumerate(pulls):
            shift = weight + horizon_damping(weight, pull)
            solution = torch.linalg.solve(torch.eye(size, dtype=torch.float64) + hessian / shift, move)
            cosines[row, column] = torch.cosine_similarity(solution, response, dim=0)
    assert float(cosines.diagonal().min()) > 0.99
    if schedule != "constant":
        assert float(cosines[-1, 1]) < 0.97


def pull_after(total: float, last: float) -> Pull:
    pull = Pull()
    pull.load_state_dict({"total": total, "before": total - last})
    return pull


@pytest.mark.parametrize(
    ("total", "last", "factor"),
    [
        (1.0, 1.0, 1.0),  # on its way to 10
        (0.85, 0.85, 1.0),  # to 8.5, within 1.25
        (0.75, 0.75, 9.25 / 6.75),  # to 7.5
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


def test_lambda_is_not_raised_for_ever_where_that_does_not_help(caplog):
    """Steps are bounded here: the pull of an alternation stays what it is, whatever lambda."""
    weight = ProximalWeight(None, 10.0)
    weight.start(100.0)
    values = []
    for alternation in range(1, 6):
        weight.correct(pull_after(0.1 * alternation, 0.1), past_rates=1.0, coming_rates=6.0 - alternation)
        values.append(weight.value)
        resumed = ProximalWeight(None, 10.0)
        resumed.load_state_dict(weight.state_dict())
        weight = resumed
    assert values == pytest.approx([0.4, 1.6, 1.6, 1.6, 1.6])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "target_pull is 10.0, and the run is on its way to 0.6 although lambda is 16 times" in message
    assert "Raise lower_learning_rate" in message


def test_a_given_lambda_stays():
    weight = ProximalWeight(0.3, None)
    weight.start(100.0)
    weight.correct(pull_after(4.0, 4.0), past_rates=1.0, coming_rates=9.0)
    weight.load_state_dict({"value": 5.0, "first": 5.0})
    assert weight.value == 0.3


@pytest.mark.parametrize("estimate", [0.0, float("nan"), float("inf")])
def test_an_estimate_from_which_no_lambda_follows_is_refused(estimate):
    with pytest.raises(ValueError, match=f"target_pull is 10.0.* is estimated at {estimate}"):
        ProximalWeight(None, 10.0).start(estimate)
