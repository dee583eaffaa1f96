"""Operations on images, against kornia's own modules; and how their draws reach a device."""

from typing import Any

import kornia.augmentation as K
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bissl_hf.data.augment import EvalTransform, TrainTransform, TwoViewTransform
from bissl_hf.data.batches import copy_without_waiting
from bissl_hf.data.view_operations import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Operation,
    RandomCrop,
    Solarize,
    check_probabilities,
    place,
)

CPU, META = torch.device("cpu"), torch.device("meta")
# Operations for a probability, each with the module of kornia that does the same.
PAIRS = {
    "jitter": (ColorJitter, lambda p: K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=p)),
    "grayscale": (Grayscale, lambda p: K.RandomGrayscale(p=p)),
    "blur": (lambda p: GaussianBlur(p, 5), lambda p: K.RandomGaussianBlur((5, 5), (0.1, 2.0), p=p)),
    "solarize": (Solarize, lambda p: K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=p)),
}


def random_images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("probability", [0.5, 1.0])
@pytest.mark.parametrize("name", PAIRS)
def test_an_operation_is_that_of_kornia_for_the_same_random_state(name: str, probability: float) -> None:
    build, reference = PAIRS[name]
    images, operation, module = random_images(), build(probability), reference(probability)
    for seed in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = module(images)
            torch.manual_seed(seed)
            (drawn,) = place([operation.draw(images.shape)], CPU)
        assert torch.equal(drawn.apply(images, *drawn.draws), expected)


def test_placed_draws_are_those_that_were_drawn() -> None:
    operations: list[Operation] = [RandomCrop(8, (0.1, 1.0), (0.5, 1.0), 0.5, 3), ColorJitter(0.5), Grayscale(0.5)]
    drawn = [operation.draw(torch.Size((4, 3, 16, 16))) for operation in operations]
    for before, after in zip(drawn, place(drawn, CPU), strict=True):
        assert after.apply is before.apply
        for one, other in zip(before.draws, after.draws, strict=True):
            assert torch.equal(one.float(), other)


class CopiesTo(TorchDispatchMode):
    """Notes each copy of a tensor to a device, and whether the host waits for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.waiting: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and target != args[0].device:
            self.waiting.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("transform", "copies"),
    [(TwoViewTransform(16), 1), (TrainTransform(16), 1), (EvalTransform(16), 0)],
    ids=lambda value: type(value).__name__ if callable(value) else str(value),
)
def test_a_batch_takes_one_copy_of_its_draws_and_constants_are_copied_once(
    transform: Any, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: torch.no_grad())  # there is none for `meta`
    inputs = {"pixel_values": torch.zeros(4, 3, 20, 20, dtype=torch.uint8, device=META)}
    transform(inputs, (0, 0))  # mean and deviation
    with CopiesTo(META) as seen:
        transform(inputs, (0, 1))
    assert seen.waiting == [False] * copies


class HostTensor:
    """Stands in for a tensor of the host: notes what is done with it."""

    device = CPU

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pin_memory(self) -> "HostTensor":
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> "HostTensor":
        self.calls.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", ["pinned", ("cuda", True)]), ("cpu", [("cpu", True)]), ("meta", [("meta", True)])],
)
def test_only_what_goes_to_a_gpu_is_pinned(device: str, expected: list[Any]) -> None:
    tensor: Any = HostTensor()
    copy_without_waiting(tensor, torch.device(device))
    assert tensor.calls == expected


@pytest.mark.gpu
@pytest.mark.parametrize("transform", [TwoViewTransform(16), TrainTransform(16)], ids=lambda t: type(t).__name__)
def test_no_view_waits_for_the_gpu(transform: Any) -> None:
    """The driver raises where the host waits. The first batch, which allocates, may."""
    images = torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8, device="cuda")
    transform({"pixel_values": images}, (0, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        transform({"pixel_values": images}, (0, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"`grayscale` is {value}; it must be a probability between 0 and 1"):
        check_probabilities(grayscale=value)
