"""Properties that hold for every system: random spectra, right-hand sides and scales."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bissl_hf.bilevel.hypergradient import SOLVERS, implicit_gradient
from bissl_hf.bilevel.linear_solve import SolveStatus, conjugate_gradient, sufficient_damping
from bissl_hf.bilevel.recycling import Directions, recycled_conjugate_gradient

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
definite = st.lists(st.floats(0.5, 50.0), min_size=1, max_size=8)
indefinite = st.lists(st.floats(-5.0, 5.0).filter(lambda value: abs(value) > 1e-2), min_size=2, max_size=8)
seeds = st.integers(0, 10_000)


def system(eigenvalues, seed):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2, torch.randn(4, n, generator=generator, dtype=torch.float64)


def solves(matrix, sides, **options):
    """Yields (right-hand side, solution, info) of both solvers."""
    directions = Directions()
    for b in sides:
        for x, info in (
            conjugate_gradient(lambda v: (matrix @ v[0],), (b,), **options),
            recycled_conjugate_gradient(lambda v: (matrix @ v[0],), (b,), directions, **options),
        ):
            yield b, x[0], info


def residual(matrix, x, b):
    return float((b - matrix @ x).norm() / b.norm())


@quick
@given(definite, seeds)
def test_definite_systems_are_solved_in_as_many_steps_as_unknowns(eigenvalues, seed):
    matrix, sides = system(eigenvalues, seed)
    for b, x, info in solves(matrix, sides, max_iterations=2 * len(eigenvalues), tolerance=1e-7):
        assert info.status == SolveStatus.CONVERGED
        assert info.iterations <= len(eigenvalues)
        assert residual(matrix, x, b) < 1.1e-7


@quick
@given(indefinite, seeds, st.integers(1, 6))
def test_no_solution_is_worse_than_the_right_hand_side(eigenvalues, seed, steps):
    matrix, sides = system(eigenvalues, seed)
    for b, x, info in solves(matrix, sides, max_iterations=steps):
        true = residual(matrix, x, b)
        assert true <= residual(matrix, b, b) * (1 + 1e-6) + 1e-6
        assert np.isfinite(info.residual)
        assert info.residual == pytest.approx(true, rel=1e-4, abs=1e-6)
        assert info.worse_than_no_solve == (info.residual > 1)
        assert info.rayleigh_quotient <= 1e-10
        if info.returned_rhs:
            assert torch.equal(x, b)


@quick
@given(definite, seeds, st.integers(-100, 100))
def test_the_scale_of_the_right_hand_side_does_not_matter(eigenvalues, seed, power):
    matrix, sides = system(eigenvalues, seed)
    scale = 2.0**power
    first, second = (list(solves(matrix, s, max_iterations=2)) for s in (sides, scale * sides))
    for (_, x, _), (_, y, _) in zip(first, second, strict=True):
        assert torch.allclose(scale * x, y, rtol=1e-9, atol=0)


@quick
@given(st.floats(-20.0, -0.01), st.floats(1e-3, 10.0), st.floats(0.0, 10.0))
def test_the_damping_named_is_enough_along_the_direction(rho, proximal_weight, damping):
    enough = sufficient_damping(rho, proximal_weight=proximal_weight, damping=damping)
    curvature = (rho - 1) * (proximal_weight + damping)
    assert 1 + curvature / (proximal_weight + enough) == pytest.approx(0.5)


def test_the_damping_named_lets_a_broken_solve_go_through():
    hessian = torch.diag(torch.tensor([-2.0, 0.1, 0.1], dtype=torch.float64))
    rhs, options = (torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64),), {"proximal_weight": 1.0, "max_iterations": 3}
    solution, info = implicit_gradient(lambda v: (hessian @ v[0],), rhs, damping=0.0, **options)
    assert (info.status, info.iterations, info.returned_rhs) == (SolveStatus.NEGATIVE_CURVATURE, 0, True)
    assert torch.equal(solution[0], rhs[0])
    damping = sufficient_damping(info.rayleigh_quotient, proximal_weight=1.0, damping=0.0)
    _, info = implicit_gradient(lambda v: (hessian @ v[0],), rhs, damping=damping, **options)
    assert info.status in (SolveStatus.CONVERGED, SolveStatus.ITERATION_LIMIT)
    assert info.residual < 1e-10
    with pytest.raises(ValueError, match="quotient is 1"):
        sufficient_damping(-1.0, proximal_weight=1.0, damping=0.0, quotient=1)
    with pytest.raises(ValueError, match="rayleigh_quotient is nan"):
        sufficient_damping(float("nan"), proximal_weight=1.0, damping=0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_of_the_table(solver):
    entry, rhs = SOLVERS[solver], (torch.ones(3, dtype=torch.float64), torch.ones(0), torch.ones(2))
    memory = entry.memory() if entry.memory else None
    curvature = (lambda v: tuple(2 * t for t in v)) if entry.second_order else None
    options = {"proximal_weight": 1.0, "damping": 1.0, "max_iterations": 3, "solver": solver}
    x, _ = implicit_gradient(curvature, rhs, memory=memory, **options)
    expected = {"none": 0.0, "identity": 1.0, "mfac": 1.0}.get(solver, 0.5)
    for found, given_tensor in zip(x, rhs, strict=True):
        torch.testing.assert_close(found, torch.full_like(given_tensor, expected))
    if entry.second_order:
        with pytest.raises(ValueError, match="curvature is None"):
            implicit_gradient(None, rhs, memory=memory, **options)
    if entry.memory is None:
        with pytest.raises(ValueError, match="remembers nothing"):
            implicit_gradient(curvature, rhs, memory=Directions(), **options)
    else:
        with pytest.raises(TypeError, match="memory is of type NoneType"):
            implicit_gradient(curvature, rhs, **options)


def test_a_right_hand_side_of_another_type_is_refused():
    with pytest.raises(ValueError, match="must be of a floating-point type"):
        conjugate_gradient(lambda v: v, (torch.ones(2, dtype=torch.long),), max_iterations=1)
    with pytest.raises(ValueError, match="rhs is empty"):
        conjugate_gradient(lambda v: v, (torch.ones(0),), max_iterations=1)
    with pytest.raises(ValueError, match="they must agree"):
        conjugate_gradient(lambda v: v, (torch.ones(2), torch.ones(2, device="meta")), max_iterations=1)
