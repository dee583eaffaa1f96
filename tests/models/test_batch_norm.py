"""Batch-norm statistics against plain means over the batches."""

import pytest
import torch
from torch import nn

from bissl_hf.data.batches import split_rows
from bissl_hf.models.batch_norm import check_rows_for_batch_norm, has_batch_norm, recalibrate_batch_norm


class Network(nn.Module):
    """Dropout before batch norm: with dropout on, the statistics would be others."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is not None:
            raise RuntimeError("labels must not reach the model")
        return self.untracked(self.norm(self.dropout(pixel_values)).mean(dim=(2, 3)))


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=generator) * (k + 1) + k for k in range(3)]
    return [{"pixel_values": image, "labels": torch.zeros(4, dtype=torch.long)} for image in images]


def test_has_batch_norm() -> None:
    assert has_batch_norm(Network())
    assert not has_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert not has_batch_norm(nn.BatchNorm1d(2, track_running_stats=False))


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_the_mean_over_batches(training: bool) -> None:
    network = Network().double().train(training)
    network.dropout.eval()
    network.norm.running_mean.fill_(7.0)
    modes = {name: module.training for name, module in network.named_modules()}
    weight = network.norm.weight.detach().clone()
    recalibrate_batch_norm(network, iter(batches()))

    images = [batch["pixel_values"].transpose(0, 1).reshape(3, -1) for batch in batches()]
    mean = torch.stack([image.mean(dim=1) for image in images]).mean(dim=0)
    variance = torch.stack([image.var(dim=1, correction=1) for image in images]).mean(dim=0)
    torch.testing.assert_close(network.norm.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(network.norm.running_var, variance, rtol=0, atol=1e-12)
    assert network.norm.num_batches_tracked.item() == 3
    assert network.norm.momentum == 0.3
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert torch.equal(network.norm.weight, weight)
    assert not any(p.grad is not None for p in network.parameters())


def test_restores_modes_when_a_batch_fails() -> None:
    network = Network()
    with pytest.raises(ValueError, match="expected 4D input"):
        recalibrate_batch_norm(network, [{"pixel_values": torch.ones(2, 3)}])
    assert network.dropout.training
    assert network.norm.momentum == 0.3


def test_refuses_no_batch() -> None:
    with pytest.raises(ValueError, match="pass at least one"):
        recalibrate_batch_norm(Network(), [])


def test_leaves_a_model_without_batch_norm_alone() -> None:
    recalibrate_batch_norm(nn.Linear(2, 2), [{"pixel_values": torch.ones(1)}])  # would not accept this input


@pytest.mark.parametrize(("rows", "part"), [(1, None), (1, 4), (2, 1), (3, 2), (5, 2)])
def test_passes_over_one_row_are_refused_with_batch_norm(rows, part):
    with pytest.raises(ValueError, match=f"upper_size: batch norm would have no statistics.*batch of {rows} row"):
        check_rows_for_batch_norm(nn.Sequential(nn.BatchNorm1d(2)), rows, part, what="upper_size")
    check_rows_for_batch_norm(nn.Sequential(nn.LayerNorm(2)), rows, part, what="upper_size")


@pytest.mark.parametrize(("rows", "part"), [(2, None), (9, 4), (7, 3), (4, 2), (5, 9), (5, 3)])
def test_even_parts_leave_two_rows_to_each(rows, part):
    model = nn.Sequential(nn.BatchNorm1d(2))
    check_rows_for_batch_norm(model, rows, part, what="upper_size")
    for inputs, _ in split_rows({"x": torch.rand(rows, 2)}, part):
        model(inputs["x"])
