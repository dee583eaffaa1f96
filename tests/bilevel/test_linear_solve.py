import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from bissl_hf.bilevel import linear_solve
from bissl_hf.bilevel.linear_solve import SolveStatus, conjugate_gradient

SHAPES = [(3, 4), (5,), (2, 2, 2), (2, 1)]
SIZES = [math.prod(shape) for shape in SHAPES]


def split(flat):
    flat = torch.as_tensor(flat)
    return tuple(part.reshape(shape) for part, shape in zip(flat.split(SIZES), SHAPES, strict=True))


def flatten(vector):
    return torch.cat([tensor.reshape(-1) for tensor in vector]).numpy()


def random_matrix(seed=0, definite=True):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(sum(SIZES), sum(SIZES)))
    return root @ root.T + np.eye(sum(SIZES)) if definite else root + root.T


class Product:
    """A dense matrix as a product on tuples of tensors, which counts its calls."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, vector):
        self.calls += 1
        return split(self.matrix @ flatten(vector))


def plain_cg(matrix, rhs, steps):
    """Conjugate gradient of the textbook, on flat vectors."""
    x, r = np.zeros_like(rhs), rhs.copy()
    p = r.copy()
    for _ in range(steps):
        ap = matrix @ p
        alpha = (r @ r) / (p @ ap)
        x, new = x + alpha * p, r - alpha * ap
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


def blockwise_cg(matrix, rhs, steps):
    """The same with a step length and a ratio of its own for each block."""
    edges = np.cumsum([0, *SIZES])
    blocks = [slice(a, b) for a, b in pairwise(edges)]
    x, r = np.zeros_like(rhs), rhs.copy()
    p = r.copy()
    for _ in range(steps):
        ap, new = matrix @ p, r.copy()
        for block in blocks:
            alpha = (r[block] @ r[block]) / (p[block] @ ap[block])
            x[block] += alpha * p[block]
            new[block] -= alpha * ap[block]
        for block in blocks:
            p[block] = new[block] + (new[block] @ new[block]) / (r[block] @ r[block]) * p[block]
        r = new
    return x


@pytest.fixture
def rhs():
    return np.random.default_rng(1).normal(size=sum(SIZES))


def test_agrees_with_a_dense_solve(rhs):
    matrix = random_matrix()
    solution, info = conjugate_gradient(Product(matrix), split(rhs), max_iterations=200, tolerance=1e-13)
    expected = np.linalg.solve(matrix, rhs)
    assert np.linalg.norm(flatten(solution) - expected) / np.linalg.norm(expected) < 1e-10
    assert info.status == SolveStatus.CONVERGED
    assert [tensor.shape for tensor in solution] == [torch.Size(shape) for shape in SHAPES]


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_takes_the_steps_of_the_textbook(rhs, steps):
    matrix, product = random_matrix(), None
    product = Product(matrix)
    solution, info = conjugate_gradient(product, split(rhs), max_iterations=steps)
    assert np.allclose(flatten(solution), plain_cg(matrix, rhs, steps), rtol=1e-10, atol=0)
    true_residual = np.linalg.norm(rhs - matrix @ flatten(solution)) / np.linalg.norm(rhs)
    assert info.residual == pytest.approx(true_residual, rel=1e-8)
    assert (info.iterations, product.calls, info.status) == (steps, steps, SolveStatus.ITERATION_LIMIT)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_stops_at_the_tolerance_and_not_before(rhs, tolerance):
    matrix = random_matrix()
    product = Product(matrix)
    solution, info = conjugate_gradient(product, split(rhs), max_iterations=100, tolerance=tolerance)
    residuals = [
        np.linalg.norm(rhs - matrix @ plain_cg(matrix, rhs, steps)) / np.linalg.norm(rhs)
        for steps in (info.iterations - 1, info.iterations)
    ]
    assert residuals[0] > tolerance >= residuals[1]
    true_residual = np.linalg.norm(rhs - matrix @ flatten(solution)) / np.linalg.norm(rhs)
    assert info.residual == pytest.approx(true_residual, rel=1e-6)
    assert product.calls == info.iterations


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_the_scale_of_the_right_hand_side_does_not_matter(rhs, scale):
    matrix = random_matrix()
    solution, info = conjugate_gradient(Product(matrix), split(scale * rhs), max_iterations=200, tolerance=1e-12)
    assert info.status == SolveStatus.CONVERGED
    assert np.allclose(flatten(solution) / scale, np.linalg.solve(matrix, rhs), rtol=1e-8)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_blockwise_residual_is_measured_at_every_scale(rhs, scale):
    matrix = random_matrix()
    _, info = conjugate_gradient(Product(matrix), split(scale * rhs), max_iterations=4, blockwise=True)
    expected = np.linalg.norm(rhs - matrix @ blockwise_cg(matrix, rhs, 4)) / np.linalg.norm(rhs)
    assert info.residual == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("blockwise", [False, True])
def test_a_zero_right_hand_side_has_the_zero_solution(rhs, blockwise):
    product = Product(random_matrix())
    solution, info = conjugate_gradient(product, split(0 * rhs), max_iterations=3, blockwise=blockwise)
    assert not flatten(solution).any()
    assert (info.iterations, info.residual, info.status) == (0, 0.0, SolveStatus.CONVERGED)


def test_negative_curvature_returns_the_last_sound_iterate(rhs):
    matrix = random_matrix(seed=3, definite=False) + 6 * np.eye(sum(SIZES))
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] < 0 < eigenvalues[-1]
    solution, info = conjugate_gradient(Product(matrix), split(rhs), max_iterations=100)
    assert info.status == SolveStatus.NEGATIVE_CURVATURE
    assert 0 < info.iterations < 100
    assert np.allclose(flatten(solution), plain_cg(matrix, rhs, info.iterations), rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blockwise", [False, True])
def test_iterating_on_a_solved_system_is_no_breakdown(dtype, blockwise):
    """Without a tolerance the residual shrinks until its square, or a curvature, underflows."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        rhs = torch.randn(3, generator=generator, dtype=torch.float64)
        matrix = 0.1 * root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64)
        low = matrix.to(dtype)
        solution, info = conjugate_gradient(
            lambda v, low=low: (low @ v[0],), (rhs.to(dtype),), max_iterations=80, blockwise=blockwise
        )
        assert info.status == SolveStatus.CONVERGED
        error = np.linalg.norm(solution[0].double().numpy() - np.linalg.solve(matrix.numpy(), rhs.numpy()))
        assert error / rhs.norm() < 1e3 * torch.finfo(dtype).eps


def never_reading(monkeypatch):
    """Makes the recursion treat the CPU as it treats an accelerator: all iterations run, none reads a number."""
    monkeypatch.setattr(linear_solve, "may_read_device", lambda rhs, tolerance: False)


@pytest.mark.parametrize("case", ["limit", "solved", "zero", "indefinite", "not finite", "rhs not finite"])
@pytest.mark.parametrize("blockwise", [False, True])
def test_a_solve_that_reads_nothing_from_the_device_is_the_same(monkeypatch, rhs, case, blockwise):
    matrix = random_matrix(seed=3, definite=case != "indefinite")
    if case == "solved":
        matrix = np.diag(np.repeat(2.0, len(rhs)))
    if case in ("zero", "rhs not finite"):
        rhs = rhs * {"zero": 0.0, "rhs not finite": math.nan}[case]

    def solve():
        product = Product(matrix)

        def matvec(vector):
            image = product(vector)
            return tuple(math.inf * t for t in image) if case == "not finite" and product.calls == 3 else image

        solution, info = conjugate_gradient(matvec, split(rhs), max_iterations=6, blockwise=blockwise)
        return flatten(solution), info, product.calls

    expected, expected_info, _ = solve()
    never_reading(monkeypatch)
    found, info, calls = solve()
    assert calls == 6 + blockwise
    assert np.array_equal(found, expected)
    assert (info.iterations, info.status) == (expected_info.iterations, expected_info.status)
    assert info.residual == pytest.approx(expected_info.residual, rel=0, abs=0, nan_ok=True)


@pytest.mark.gpu
def test_a_solve_without_a_tolerance_does_not_wait_for_the_device(rhs):
    matrix = torch.as_tensor(random_matrix(), device="cuda")
    flat = torch.as_tensor(rhs, device="cuda")
    for blockwise in (False, True):
        torch.cuda.set_sync_debug_mode("error")
        try:
            solution, info = conjugate_gradient(
                lambda v: (matrix @ v[0],), (flat,), max_iterations=6, blockwise=blockwise
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert np.allclose(solution[0].cpu().numpy(), plain_cg(matrix.cpu().numpy(), rhs, 6), rtol=1e-8)
        assert info.status == SolveStatus.ITERATION_LIMIT


def test_zero_curvature_is_a_breakdown_too():
    _, info = conjugate_gradient(lambda v: (0 * v[0],), (torch.ones(3),), max_iterations=2)
    assert (info.status, info.iterations) == (SolveStatus.NEGATIVE_CURVATURE, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("blockwise", [False, True])
def test_numbers_that_are_not_finite_end_the_solve_soundly(rhs, bad, blockwise):
    matrix, sound_steps = random_matrix(), 2
    product = Product(matrix)

    def breaks(vector):
        image = product(vector)
        return tuple(bad * tensor for tensor in image) if product.calls == sound_steps + 1 else image

    solution, info = conjugate_gradient(breaks, split(rhs), max_iterations=9, blockwise=blockwise)
    expected = (blockwise_cg if blockwise else plain_cg)(matrix, rhs, sound_steps)
    assert (info.status, info.iterations) == (SolveStatus.NON_FINITE, sound_steps)
    assert np.allclose(flatten(solution), expected, rtol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_right_hand_side_that_is_not_finite_gives_zero(bad):
    solution, info = conjugate_gradient(lambda v: v, (torch.tensor([1.0, bad]),), max_iterations=3)
    assert not solution[0].any()
    assert (info.status, info.iterations) == (SolveStatus.NON_FINITE, 0)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_blockwise_variant_takes_a_step_length_per_tensor(rhs, steps):
    matrix = random_matrix()
    product = Product(matrix)
    solution, info = conjugate_gradient(product, split(rhs), max_iterations=steps, blockwise=True)
    assert np.allclose(flatten(solution), blockwise_cg(matrix, rhs, steps), rtol=1e-8)
    true_residual = np.linalg.norm(rhs - matrix @ flatten(solution)) / np.linalg.norm(rhs)
    assert info.residual == pytest.approx(true_residual, rel=1e-8)
    assert product.calls == steps + 1  # one for the residual


def test_the_blockwise_variant_is_no_conjugate_gradient_for_a_coupled_system(rhs):
    """Its residual grows on a well-conditioned system that conjugate gradient solves."""
    matrix = random_matrix()
    residuals = {
        blockwise: [
            conjugate_gradient(Product(matrix), split(rhs), max_iterations=steps, blockwise=blockwise)[1].residual
            for steps in (5, 20, 60)
        ]
        for blockwise in (False, True)
    }
    assert residuals[False][-1] < 1e-8
    assert residuals[True][-1] > residuals[True][0] > residuals[False][0]


def test_the_blockwise_variant_is_conjugate_gradient_for_one_tensor(rhs):
    matrix = torch.as_tensor(random_matrix())
    solutions = [
        conjugate_gradient(lambda v: (matrix @ v[0],), (torch.as_tensor(rhs),), max_iterations=4, blockwise=blockwise)
        for blockwise in (False, True)
    ]
    assert torch.equal(solutions[0][0][0], solutions[1][0][0])


def test_the_blockwise_variant_goes_on_through_negative_curvature(rhs):
    matrix = random_matrix(seed=3, definite=False)
    _, info = conjugate_gradient(Product(matrix), split(rhs), max_iterations=6, blockwise=True)
    assert (info.status, info.iterations) == (SolveStatus.ITERATION_LIMIT, 6)


def test_the_blockwise_variant_ignores_the_tolerance_with_a_warning(rhs):
    with pytest.warns(UserWarning, match="tolerance=0.5 is ignored"):
        _, info = conjugate_gradient(
            Product(random_matrix()), split(rhs), max_iterations=4, tolerance=0.5, blockwise=True
        )
    assert info.iterations == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"rhs": ()}, "rhs is empty"),
        ({"matvec": lambda v: v[:1]}, "the product has 1 tensors and rhs has 2"),
        ({"matvec": lambda v: (v[1], v[0])}, "Tensor 0 has shape"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    arguments = {"matvec": lambda v: v, "rhs": (torch.ones(2), torch.ones(3)), "max_iterations": 2, **changed}
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(
            arguments["matvec"], arguments["rhs"], max_iterations=arguments["max_iterations"],
            tolerance=arguments.get("tolerance", 0.0),
        )  # fmt: skip
