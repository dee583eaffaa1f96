"""The low-rank solver against dense solves."""

import math

import pytest
import torch

from bissl_hf.bilevel.empirical_fisher import EmpiricalFisher

SHAPES = [(3, 2), (5,), ()]
SIZE = sum(math.prod(shape) for shape in SHAPES)


def vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES) for _ in range(count)]


def flat(vector):
    return torch.cat([tensor.reshape(-1) for tensor in vector])


def dense(gradients, rhs, shift):
    fisher = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    return shift * torch.linalg.solve(fisher + shift * torch.eye(len(rhs), dtype=torch.float64), rhs)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (4, 2), (4, 4), (4, 11), (20, 30)])
@pytest.mark.parametrize("shift", [1e-3, 0.5, 100.0])
def test_equals_the_dense_solve_with_the_last_gradients(per_tensor, size, count, shift):
    *gradients, rhs = vectors(count + 1)
    memory = EmpiricalFisher(size, per_tensor=per_tensor)
    for gradient in gradients:
        memory.record(gradient)
    solution = memory.solve(rhs, shift)
    last = gradients[-size:]
    if per_tensor:
        parts = [dense([g[i].reshape(-1) for g in last], rhs[i].reshape(-1), shift) for i in range(len(rhs))]
        expected = torch.cat(parts)
    else:
        expected = dense([flat(g) for g in last], flat(rhs), shift)
    assert len(memory) == len(last)
    assert float((flat(solution) - expected).norm() / expected.norm()) < 1e-10
    assert [tensor.shape for tensor in solution] == [torch.Size(shape) for shape in SHAPES]


def test_is_the_identity_while_nothing_is_recorded():
    (rhs,) = vectors(1)
    memory = EmpiricalFisher(3)
    assert torch.equal(flat(memory.solve(rhs, 0.1)), flat(rhs))
    memory.record(tuple(t * math.nan for t in rhs))
    assert len(memory) == 0
    assert memory.state_dict() == {}
    assert torch.equal(flat(memory.solve(rhs, 0.1)), flat(rhs))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_left_out(bad):
    *gradients, rhs = vectors(6)
    clean, tried = EmpiricalFisher(3), EmpiricalFisher(3)
    for gradient in gradients:
        clean.record(gradient)
        tried.record(gradient)
        tried.record((*gradient[:2], torch.tensor(bad, dtype=torch.float64)))
    assert torch.equal(flat(clean.solve(rhs, 0.1)), flat(tried.solve(rhs, 0.1)))


@pytest.mark.parametrize("before", [2, 5])
def test_what_was_saved_goes_on_to_the_last_bit(before):
    *gradients, rhs = vectors(8)
    kept, restored = EmpiricalFisher(3), EmpiricalFisher(3)
    for gradient in gradients[:before]:
        kept.record(gradient)
    restored.load_state_dict({name: tensor.clone() for name, tensor in kept.state_dict().items()})
    for gradient in gradients[before:]:
        assert torch.equal(flat(kept.solve(rhs, 0.1)), flat(restored.solve(rhs, 0.1)))
        kept.record(gradient)
        restored.record(gradient)
    assert torch.equal(flat(kept.solve(rhs, 0.1)), flat(restored.solve(rhs, 0.1)))
    with pytest.raises(ValueError, match="memory of 3 and this one has size 4"):
        EmpiricalFisher(4).load_state_dict(kept.state_dict())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="size is 0"):
        EmpiricalFisher(0)
    memory = EmpiricalFisher(2)
    memory.record((torch.ones(3),))
    with pytest.raises(ValueError, match="The gradient has 2 entries and the gradients recorded have 3"):
        memory.record((torch.ones(2),))
    with pytest.raises(ValueError, match="rhs has 4 entries"):
        memory.solve((torch.ones(4),), 1.0)
