"""Figures of a collapse against numpy."""

import math

import numpy as np
import pytest
import torch

from bissl_hf.evaluation.monitors import EmbeddingMonitor, effective_rank, embedding_figures, embedding_std


def embeddings(rows: int = 9, dim: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 1, 1, 0.1, 0])[:dim]


def looped_std(matrix: np.ndarray) -> list[float]:
    unit = [row / math.sqrt(sum(value**2 for value in row)) for row in matrix]
    deviations = []
    for column in zip(*unit, strict=True):
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in column) / len(column)))
    return deviations


def looped_rank(matrix: np.ndarray) -> float:
    """Equation 1 of the paper; singular values as roots of the eigenvalues of the Gram matrix."""
    values = np.sqrt(np.clip(np.linalg.eigvalsh(matrix.T @ matrix), 0, None))
    entropy = 0.0
    for value in values:
        share = value / values.sum() + 1e-7
        entropy -= share * math.log(share)
    return math.exp(entropy)


def test_they_equal_the_loops() -> None:
    matrix = embeddings()
    torch.testing.assert_close(
        embedding_std(matrix), torch.tensor(looped_std(matrix.numpy()), dtype=torch.float64), rtol=0, atol=1e-13
    )
    assert effective_rank(matrix).item() == pytest.approx(looped_rank(matrix.numpy()), rel=1e-6)
    figures = embedding_figures(matrix)
    assert figures["embedding_std"].item() == pytest.approx(
        sum(looped_std(matrix.numpy())) / 5 * math.sqrt(5), rel=1e-12
    )
    assert torch.equal(figures["effective_rank"], effective_rank(matrix))


def test_a_collapse_and_an_even_spread() -> None:
    collapsed = embedding_figures(torch.tensor([[1.0, 2.0, 3.0]]).repeat(6, 1))
    assert collapsed["embedding_std"].item() == pytest.approx(0, abs=1e-6)
    assert collapsed["effective_rank"].item() == pytest.approx(1, abs=1e-4)
    spread = embedding_figures(torch.cat([torch.eye(4), -torch.eye(4)]))
    assert spread["embedding_std"].item() == pytest.approx(1)
    assert spread["effective_rank"].item() == pytest.approx(4, rel=1e-4)
    assert embedding_figures(torch.zeros(3, 2))["effective_rank"].item() == pytest.approx(1, abs=1e-4)


def test_of_several_views_the_first_counts_and_half_precision_is_widened() -> None:
    first, second = embeddings().float(), embeddings(seed=1).float()
    stacked = torch.stack([first, second], dim=1).requires_grad_()
    figures = embedding_figures(stacked)
    for name, figure in embedding_figures(first).items():
        assert torch.equal(figures[name], figure)
        assert not figures[name].requires_grad
    assert embedding_figures(first.bfloat16())["effective_rank"].dtype == torch.float32


def test_numbers_that_are_not_finite_give_nan() -> None:
    matrix = embeddings()
    matrix[0, 0] = float("inf")
    assert all(figure.isnan() for figure in embedding_figures(matrix).values())


def test_the_monitor_keeps_the_latest_rows_until_they_are_read() -> None:
    monitor = EmbeddingMonitor(max_rows=4)
    assert monitor.pop_figures() == {}
    matrix = embeddings()
    for seen in (embeddings(seed=1), torch.stack([matrix, embeddings(seed=2)], dim=1)):
        monitor.watch(seen)
    expected = embedding_figures(matrix[:4])
    matrix.zero_()
    found = monitor.pop_figures()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert monitor.pop_figures() == {}


def test_what_does_not_fit_is_refused() -> None:
    for shape in [(3,), (0, 4), (4, 0)]:
        with pytest.raises(ValueError, match=r"must be \(rows, dim\), neither of them 0"):
            embedding_std(torch.zeros(shape))
    with pytest.raises(ValueError, match="max_rows is 1; it must be at least 2"):
        EmbeddingMonitor(max_rows=1)
