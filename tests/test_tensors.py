"""Vectors as tuples of tensors against NumPy on the flattened vector."""

import numpy as np
import pytest
import torch

from bissl_hf.tensors import (
    accumulate,
    add_scaled,
    block_dots,
    check_same_structure,
    cosine,
    dot,
    fill_missing,
    norm,
    subtract,
)

SHAPES = [(3, 4), (5,), (2, 1, 3), ()]


def vector(seed):
    """A vector whose first tensor is stored transposed, so that it cannot be flattened as a view."""
    generator = np.random.default_rng(seed)
    parts = [torch.as_tensor(generator.normal(size=shape)) for shape in SHAPES]
    parts[0] = parts[0].T.contiguous().T
    return tuple(parts)


def flatten(parts):
    return np.concatenate([np.asarray(part).reshape(-1) for part in parts])


def test_sums_and_differences():
    x, y = vector(0), vector(1)
    kept = [part.clone() for part in x]
    for found, expected in (
        (add_scaled(x, y, -0.3), flatten(x) - 0.3 * flatten(y)),
        (subtract(x, y), flatten(x) - flatten(y)),
    ):
        assert isinstance(found, tuple)
        assert [part.shape for part in found] == [torch.Size(shape) for shape in SHAPES]
        np.testing.assert_allclose(flatten(found), expected, rtol=1e-15, atol=1e-15)
    assert all(torch.equal(part, old) for part, old in zip(x, kept, strict=True))


def test_inner_products():
    x, y = vector(0), vector(1)
    expected = [float(np.vdot(a.numpy(), b.numpy())) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(block_dots(x, y).numpy(), expected, rtol=1e-13)
    assert dot(x, y).shape == ()
    assert float(dot(x, y)) == pytest.approx(flatten(x) @ flatten(y), rel=1e-13)


def test_norm_and_cosine():
    x, y = vector(0), vector(1)
    assert float(norm(x)) == pytest.approx(np.linalg.norm(flatten(x)), rel=1e-14)
    expected = flatten(x) @ flatten(y) / np.linalg.norm(flatten(x)) / np.linalg.norm(flatten(y))
    assert float(cosine(x, y)) == pytest.approx(expected, rel=1e-13)
    assert float(cosine(x, add_scaled(x, x, -3.0))) == pytest.approx(-1.0, rel=1e-14)
    assert float(cosine(x, subtract(x, x))) == 0.0, "a vector of zeros has no direction"


def test_missing_tensors_become_zeros_of_their_neighbours_kind():
    like = (torch.ones(2, 3), torch.ones(4, dtype=torch.float64), torch.ones(2))
    given = torch.full((2,), 7.0)
    filled = fill_missing([None, None, given], like)
    assert filled[2] is given
    for found, reference in zip(filled[:2], like[:2], strict=True):
        assert found.shape == reference.shape
        assert found.dtype == reference.dtype
        assert not found.any()
    with pytest.raises(ValueError, match="is longer than"):
        fill_missing([None, None], like)


def test_vectors_of_another_structure_are_refused():
    x = (torch.ones(2, 3), torch.ones(4))
    check_same_structure(x, (torch.zeros(2, 3), torch.zeros(4)), names=("a", "b"))
    with pytest.raises(ValueError, match="image has 1 tensors and rhs has 2; they must agree"):
        check_same_structure(x[:1], x, names=("image", "rhs"))
    with pytest.raises(ValueError, match=r"Tensor 1 has shape \(5,\) in image and \(4,\) in rhs; they must agree"):
        check_same_structure((x[0], torch.ones(5)), x, names=("image", "rhs"))


def test_accumulating_changes_the_total_in_place():
    total, part = (torch.ones(2), torch.zeros(2, 2)), (torch.tensor([1.0, -3.0]), torch.ones(2, 2))
    first = total[0]
    accumulate(total, part)
    assert first.tolist() == [2.0, -2.0]
    assert total[1].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert part[0].tolist() == [1.0, -3.0]
