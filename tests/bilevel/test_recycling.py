"""The recycling solver against dense solves, on one matrix and several right-hand sides."""

import math

import numpy as np
import pytest
import torch

from bissl_hf.bilevel import recycling
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.hypergradient import implicit_gradient
from bissl_hf.bilevel.linear_solve import SolveStatus, conjugate_gradient
from bissl_hf.bilevel.recycling import Directions, recycled_conjugate_gradient

from .test_linear_solve import Product, flatten, plain_cg, random_matrix, split

SIZE = len(random_matrix())


def right_hand_sides(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, SIZE))


def relative_residual(matrix, solution, rhs):
    return np.linalg.norm(rhs - matrix @ flatten(solution)) / np.linalg.norm(rhs)


def solve(product, rhs, directions, **options):
    return recycled_conjugate_gradient(product, split(rhs), directions, **options)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_first_solve_is_conjugate_gradient(steps):
    matrix, (rhs,) = random_matrix(), right_hand_sides(1)
    product, directions = Product(matrix), Directions()
    solution, info = solve(product, rhs, directions, max_iterations=steps)
    assert np.allclose(flatten(solution), plain_cg(matrix, rhs, steps), rtol=1e-9, atol=1e-12)
    assert (info.iterations, product.calls, len(directions)) == (steps, steps, steps)
    assert info.status == SolveStatus.ITERATION_LIMIT
    assert info.residual == pytest.approx(relative_residual(matrix, solution, rhs), rel=1e-8)


def test_every_solve_is_the_best_in_the_span_of_all_directions():
    """The restated claim: x minimises 1/2 x'Ax - b'x over the old directions and the Krylov space of the residual."""
    matrix, directions = random_matrix(), Directions()
    basis = np.zeros((SIZE, 0))
    for rhs in right_hand_sides(4):
        start = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs) if basis.shape[1] else 0 * rhs
        krylov = rhs - matrix @ start
        for _ in range(3):
            basis = np.linalg.qr(np.column_stack([basis, krylov]))[0]
            best = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs)
            krylov = rhs - matrix @ best
        solution, info = solve(Product(matrix), rhs, directions, max_iterations=3)
        assert np.allclose(flatten(solution), best, rtol=1e-7, atol=1e-9)
        assert info.residual == pytest.approx(np.linalg.norm(krylov) / np.linalg.norm(rhs), rel=1e-6)
    assert len(directions) == 12


def test_directions_that_span_the_space_solve_every_system_without_a_product():
    matrix, directions = random_matrix(), Directions(max_directions=2 * SIZE)
    first, *others = right_hand_sides(4)
    solve(Product(matrix), first, directions, max_iterations=2 * SIZE, tolerance=1e-13)
    for rhs in others:
        product = Product(matrix)
        solution, info = solve(product, rhs, directions, max_iterations=SIZE, tolerance=1e-8)
        assert (product.calls, info.iterations, info.status) == (0, 0, SolveStatus.CONVERGED)
        expected = np.linalg.solve(matrix, rhs)
        assert np.linalg.norm(flatten(solution) - expected) / np.linalg.norm(expected) < 1e-8


def test_a_right_hand_side_met_before_takes_no_product():
    matrix, (rhs,) = random_matrix(), right_hand_sides(1)
    product, directions = Product(matrix), Directions()
    solve(product, rhs, directions, max_iterations=100, tolerance=1e-6)
    first = product.calls
    _, info = solve(product, 3 * rhs, directions, max_iterations=100, tolerance=1e-6)
    assert (product.calls, info.iterations) == (first, 0)
    assert info.residual <= 1e-6


def test_a_phase_takes_fewer_products_than_solves_of_their_own():
    """Outliers over a bulk, as in the curvature of a trained network."""
    generator = np.random.default_rng(3)
    rotation = np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0]
    spectrum = np.concatenate([[60.0, 30.0, 12.0, 7.0, 5.0], 1 + 0.1 * generator.random(SIZE - 5)])
    matrix = rotation @ np.diag(spectrum) @ rotation.T
    product, alone, directions = Product(matrix), Product(matrix), Directions()
    for rhs in right_hand_sides(8):
        solution, info = solve(product, rhs, directions, max_iterations=20, tolerance=1e-2)
        conjugate_gradient(alone, split(rhs), max_iterations=20, tolerance=1e-2)
        assert info.status == SolveStatus.CONVERGED
        assert relative_residual(matrix, solution, rhs) <= 1.001e-2
    assert product.calls < 0.5 * alone.calls


@pytest.mark.parametrize("max_directions", [1, 3, 5, 11])
def test_few_places_cost_products_and_no_accuracy(max_directions):
    matrix, directions = random_matrix(), Directions(max_directions=max_directions)
    for rhs in right_hand_sides(3):
        solution, info = solve(Product(matrix), rhs, directions, max_iterations=20 * SIZE, tolerance=1e-6)
        assert info.status == SolveStatus.CONVERGED
        assert relative_residual(matrix, solution, rhs) < 1.001e-6
    assert len(directions) == max_directions


def test_float32_claims_the_residual_that_it_has():
    matrix, directions = random_matrix(), Directions(max_directions=200)
    low = torch.as_tensor(matrix, dtype=torch.float32)

    def product(vector):
        return split(low @ torch.cat([tensor.reshape(-1) for tensor in vector]))

    for rhs in right_hand_sides(8).astype(np.float32):
        solution, info = solve(product, rhs, directions, max_iterations=60, tolerance=1e-4)
        assert info.status == SolveStatus.CONVERGED
        assert solution[0].dtype == torch.float32
        true = relative_residual(matrix, [tensor.double() for tensor in solution], rhs)
        assert true <= 1.05e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterating_on_a_solved_system_is_no_breakdown(dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        matrix = 0.1 * root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64)
        low, directions = matrix.to(dtype), Directions()
        for _ in range(3):
            rhs = torch.randn(3, generator=generator, dtype=torch.float64)
            (solution,), info = recycled_conjugate_gradient(
                lambda v, low=low: (low @ v[0],), (rhs.to(dtype),), directions, max_iterations=40
            )
            assert info.status in (SolveStatus.CONVERGED, SolveStatus.ITERATION_LIMIT)
            error = np.linalg.norm(solution.double().numpy() - np.linalg.solve(matrix.numpy(), rhs.numpy()))
            assert error / rhs.norm() < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_the_scale_of_a_right_hand_side_does_not_matter(scale):
    matrix, directions = random_matrix(), Directions(max_directions=100)
    first, second = right_hand_sides(2)
    solve(Product(matrix), first, directions, max_iterations=4)
    solution, info = solve(Product(matrix), scale * second, directions, max_iterations=200, tolerance=1e-11)
    assert info.status == SolveStatus.CONVERGED
    assert np.allclose(flatten(solution) / scale, np.linalg.solve(matrix, second), rtol=1e-7)


def test_a_zero_right_hand_side_has_the_zero_solution():
    product, directions = Product(random_matrix()), Directions()
    solve(product, right_hand_sides(1)[0], directions, max_iterations=3)
    solution, info = solve(product, np.zeros(SIZE), directions, max_iterations=3)
    assert not flatten(solution).any()
    assert (info.iterations, info.residual, info.status, product.calls) == (0, 0.0, SolveStatus.CONVERGED, 3)


def test_negative_curvature_returns_the_last_sound_iterate_and_is_not_handed_on():
    matrix, (rhs, other) = random_matrix(seed=3, definite=False) + 6 * np.eye(SIZE), right_hand_sides(2)
    directions, product = Directions(), Product(matrix)
    solution, info = solve(product, rhs, directions, max_iterations=100)
    assert info.status == SolveStatus.NEGATIVE_CURVATURE
    assert 0 < info.iterations == product.calls - 1 < 100
    assert np.allclose(flatten(solution), plain_cg(matrix, rhs, info.iterations), rtol=1e-7)
    inverse = directions.state_dict()["inverse_curvatures"]
    assert (inverse >= 0).all()
    assert torch.isfinite(inverse).all()
    solution, info = solve(product, other, directions, max_iterations=100)
    assert info.status == SolveStatus.NEGATIVE_CURVATURE
    assert np.isfinite(flatten(solution)).all()
    assert info.residual == pytest.approx(relative_residual(matrix, solution, other), rel=1e-8)


def test_curvature_within_its_rounding_error_is_not_divided_by():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # (1, 0) is solved first, and along (0, 1) there is none
    matrix[0, 1] = matrix[1, 0] = 1e-9
    directions = Directions()
    recycled_conjugate_gradient(lambda v: (matrix @ v[0],), (torch.tensor([1.0, 0.0]),), directions, max_iterations=1)
    (solution,), info = recycled_conjugate_gradient(
        lambda v: (matrix @ v[0],), (torch.tensor([1.0, 1.0]),), directions, max_iterations=3
    )
    assert info.status == SolveStatus.NEGATIVE_CURVATURE
    assert solution.abs().max() < 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_end_the_solve_soundly(bad):
    matrix, (rhs, other) = random_matrix(), right_hand_sides(2)
    product, directions = Product(matrix), Directions()

    def breaks(vector):
        image = product(vector)
        return tuple(bad * tensor for tensor in image) if product.calls == 3 else image

    solution, info = solve(breaks, rhs, directions, max_iterations=9)
    assert (info.status, info.iterations) == (SolveStatus.NON_FINITE, 2)
    assert np.allclose(flatten(solution), plain_cg(matrix, rhs, 2), rtol=1e-9)
    solution, info = solve(product, other, directions, max_iterations=60, tolerance=1e-9)
    assert info.status == SolveStatus.CONVERGED
    assert relative_residual(matrix, solution, other) < 1.1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_right_hand_side_that_is_not_finite_gives_zero(bad):
    (solution,), info = recycled_conjugate_gradient(
        lambda v: v, (torch.tensor([1.0, bad]),), Directions(), max_iterations=3
    )
    assert not solution.any()
    assert (info.status, info.iterations) == (SolveStatus.NON_FINITE, 0)


@pytest.mark.parametrize("case", ["limit", "solved", "zero", "indefinite", "not finite", "rhs not finite"])
def test_a_solve_that_reads_nothing_from_the_device_is_the_same(monkeypatch, case):
    """What a GPU does without a tolerance: all iterations run, and the ones after a stop change nothing."""
    matrix = random_matrix(seed=3, definite=case != "indefinite")
    first, second, third = right_hand_sides(3)
    if case == "solved":
        matrix = np.diag(np.repeat(2.0, SIZE))
    if case in ("zero", "rhs not finite"):
        second = second * {"zero": 0.0, "rhs not finite": math.nan}[case]

    def run():
        product, directions, results = Product(matrix), Directions(), []

        def matvec(vector):
            image = product(vector)
            return tuple(math.inf * t for t in image) if case == "not finite" and product.calls == 3 else image

        for rhs in (first, second, third):
            solution, info = solve(matvec, rhs, directions, max_iterations=4)
            results.append((flatten(solution), info.iterations, info.status, info.residual))
        return results, product.calls

    expected, _ = run()
    monkeypatch.setattr(recycling, "may_read_device", lambda rhs, tolerance: False)
    found, calls = run()
    if case != "not finite":  # there the number of the call that fails depends on those before
        assert calls == 14, "two later solves take one product more, for the residual of x = rhs"
        for one, other in zip(found, expected, strict=True):
            assert np.allclose(one[0], other[0], rtol=1e-9, atol=1e-12)
            assert one[1:3] == other[1:3]
            assert one[3] == pytest.approx(other[3], rel=1e-6, abs=1e-12, nan_ok=True)
    else:
        assert found[0][1:3] == expected[0][1:3] == (2, SolveStatus.NON_FINITE)
        assert all(np.isfinite(one[0]).all() for one in found)


@pytest.mark.gpu
def test_a_solve_without_a_tolerance_does_not_wait_for_the_device():
    matrix = torch.as_tensor(random_matrix(), device="cuda")
    directions = Directions()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rhs in torch.as_tensor(right_hand_sides(3)).cuda(non_blocking=False).unbind():
            recycled_conjugate_gradient(lambda v: (matrix @ v[0],), (rhs,), directions, max_iterations=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(directions) == 12


def test_directions_that_were_saved_go_on_to_the_last_bit():
    matrix, (first, second, third) = random_matrix(), right_hand_sides(3)
    kept, product = Directions(), Product(matrix)
    solve(product, first, kept, max_iterations=7)
    solve(product, second, kept, max_iterations=3)
    restored = Directions()
    restored.load_state_dict({name: tensor.clone() for name, tensor in kept.state_dict().items()})
    assert len(restored) == len(kept) == 10, "more than are stored together"
    for directions in (kept, restored):
        directions.solution = flatten(solve(product, third, directions, max_iterations=3)[0])
    assert np.array_equal(kept.solution, restored.solution)
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name])
    restored.load_state_dict(Directions().state_dict())
    assert len(restored) == 0


WEIGHTS = {"proximal_weight": 0.3, "damping": 0.5, "max_iterations": 50, "solver": "recycled"}


def test_the_implicit_gradient_by_recycling_solves_its_systems():
    matrix, directions = random_matrix(), Directions()
    product = Product(matrix)
    for rhs in right_hand_sides(3):
        solution, info = implicit_gradient(product, split(rhs), tolerance=1e-12, memory=directions, **WEIGHTS)
        expected = np.linalg.solve(np.eye(SIZE) + matrix / 0.8, rhs)
        assert np.linalg.norm(flatten(solution) - expected) / np.linalg.norm(expected) < 1e-10
        assert info.status == SolveStatus.CONVERGED


def test_directions_of_another_matrix_are_refused():
    directions, rhs = Directions(), split(right_hand_sides(1)[0])
    first, second = Product(random_matrix()), Product(random_matrix(seed=5))
    with pytest.raises(TypeError, match="memory is of type NoneType and this solver needs Directions"):
        implicit_gradient(first, rhs, **WEIGHTS)
    implicit_gradient(first, rhs, memory=directions, **WEIGHTS)
    with pytest.raises(RuntimeError, match="another curvature or another proximal_weight"):
        implicit_gradient(second, rhs, memory=directions, **WEIGHTS)
    with pytest.raises(RuntimeError, match="another curvature or another proximal_weight"):
        implicit_gradient(first, rhs, memory=directions, **{**WEIGHTS, "damping": 0.6})
    with pytest.raises(ValueError, match="max_directions is 0"):
        Directions(max_directions=0)


def test_weights_that_have_moved_are_noticed_even_where_no_product_is_needed():
    parameter = torch.ones(2, dtype=torch.float64, requires_grad=True)
    curvature, directions = Curvature(lambda: (parameter**4).sum(), [parameter]), Directions()
    rhs = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    implicit_gradient(curvature, rhs, tolerance=1e-6, memory=directions, **WEIGHTS)
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        implicit_gradient(curvature, rhs, tolerance=1e-6, memory=directions, **WEIGHTS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"rhs": ()}, "rhs is empty"),
        ({"matvec": lambda v: v[:1]}, "the product has 1 tensors and rhs has 2"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    arguments = {"matvec": lambda v: v, "rhs": (torch.ones(2), torch.ones(3)), "max_iterations": 2, **changed}
    matvec, rhs = arguments.pop("matvec"), arguments.pop("rhs")
    with pytest.raises(ValueError, match=message):
        recycled_conjugate_gradient(matvec, rhs, Directions(), **arguments)


@pytest.mark.parametrize("reads", [True, False])
def test_a_breakdown_at_the_last_product_is_held_against_the_right_hand_side(monkeypatch, reads):
    """The inherited directions are given up with no product left to start anew; x = 0 must not pass for an iterate."""
    monkeypatch.setattr(recycling, "may_read_device", lambda rhs, tolerance: reads)
    breakdowns = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        matrix = (basis * torch.tensor([4.0, 1.0, -1.0, 3.0], dtype=torch.float64)) @ basis.T
        directions = Directions()
        for rhs in torch.randn(4, 4, generator=generator, dtype=torch.float64):
            (x,), info = recycled_conjugate_gradient(
                lambda v, matrix=matrix: (matrix @ v[0],), (rhs,), directions, max_iterations=1
            )
            found, of_rhs = (float((rhs - matrix @ y).norm() / rhs.norm()) for y in (x, rhs))
            assert found <= of_rhs * (1 + 1e-9)
            assert info.residual == pytest.approx(found, rel=1e-8)
            breakdowns += info.status == SolveStatus.NEGATIVE_CURVATURE
    assert breakdowns > 20
