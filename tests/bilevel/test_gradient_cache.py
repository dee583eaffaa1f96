"""Gradient and curvature in parts against those of the whole batch, in float64."""

import socket
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.gradient_cache import EmbeddingCurvature, embedding_gradients
from bissl_hf.distributed import average_flat, rank, world_size
from bissl_hf.losses import nt_xent_loss

ROWS, WIDTH, DIM = 10, 6, 4


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, DIM, bias=False))
    return nn.Sequential(*layers).double()


def views() -> Tensor:
    return torch.randn(ROWS, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def contrast(embeddings: Tensor) -> Tensor:
    return nt_xent_loss(*embeddings.unbind(1), temperature=0.5)


def parts_of(model: nn.Module, size: int) -> list:
    return [lambda part=part: model(part) for part in views().split(size)]


def direction(parameters) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters)


def assert_same(found, expected, atol: float = 1e-12) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [1, 3, 5, 10])
def test_the_gradient_is_that_of_the_whole_batch(size):
    model = network()
    parameters = list(model.parameters())
    whole = contrast(model(views()))
    expected = torch.autograd.grad(whole, parameters)
    loss, gradients = embedding_gradients(parts_of(model, size), contrast)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(whole.item(), rel=1e-14)
    terms = [(embed() * gradient).sum() for embed, gradient in zip(parts_of(model, size), gradients, strict=True)]
    assert_same(torch.autograd.grad(torch.stack(terms).sum(), parameters), expected)
    if size < ROWS:
        alone = torch.autograd.grad(contrast(model(views()[: max(size, 2)])), parameters)
        assert (alone[0] - expected[0]).abs().max() > 1e-2, "negatives from the part are another loss"


@pytest.mark.parametrize("size", [1, 4, 10])
def test_products_and_gradient_are_those_of_the_whole_batch(size):
    model = network()
    parameters = list(model.parameters())
    whole = Curvature(lambda: contrast(model(views())), parameters)
    curvature = EmbeddingCurvature(parts_of(model, size), contrast, parameters)
    for vector in (direction(parameters), tuple(g.detach() for g in whole.gradient)):
        expected = whole(vector)
        assert max(float(part.abs().max()) for part in expected) > 1e-2
        assert_same(curvature(vector), expected)
    assert_same(curvature.gradient, whole.gradient)
    assert not any(part.requires_grad for part in curvature.gradient)


@pytest.mark.parametrize("size", [3, 10])
def test_both_terms_of_the_product_count(size):
    """Without second derivatives of the network, H = J^T L'' J; without those of the loss, the other term alone."""
    model, linear = network(), nn.Linear(WIDTH, DIM, bias=False).double()
    for module, loss in ((linear, contrast), (model, lambda embeddings: embeddings.mean())):
        parameters = list(module.parameters())
        expected = Curvature(lambda module=module, loss=loss: loss(module(views())), parameters)(direction(parameters))
        assert max(float(part.abs().max()) for part in expected) > 1e-3
        assert_same(EmbeddingCurvature(parts_of(module, size), loss, parameters)(direction(parameters)), expected)


def test_every_pass_draws_the_same_dropout_masks():
    """Against a dense Hessian of the loss with the masks written out."""
    model, size = network(dropout=0.5), 4
    parameters = list(model.parameters())
    torch.manual_seed(3)
    curvature = EmbeddingCurvature(parts_of(model, size), contrast, parameters)
    torch.rand(7)  # what is drawn elsewhere does not matter
    vector = direction(parameters)
    found, again = curvature(vector), curvature(vector)
    assert_same(again, found, atol=0)

    torch.manual_seed(3)
    masks = torch.cat(
        [nn.functional.dropout(torch.ones(len(p), 2, 8, dtype=torch.float64)) for p in views().split(size)]
    )
    assert 0 < float((masks == 0).double().mean()) < 1

    def masked_loss() -> Tensor:
        hidden = model[:3](views()) * masks
        return contrast(model[4](hidden))

    gradient = torch.autograd.grad(masked_loss(), parameters, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    assert_same([torch.cat([g.reshape(-1) for g in curvature.gradient])], [flat.detach()])
    hessian = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(entry, parameters, retain_graph=True)])
            for entry in flat
        ]
    )
    expected = hessian @ torch.cat([part.reshape(-1) for part in vector])
    assert_same([torch.cat([part.reshape(-1) for part in found])], [expected])


def test_parameters_that_the_embeddings_do_not_use_have_no_curvature():
    model = network()
    unused = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    parameters = [*model.parameters(), unused]
    curvature = EmbeddingCurvature(parts_of(model, 4), contrast, parameters)
    assert float(curvature(direction(parameters))[-1].abs().max()) == 0
    assert float(curvature.gradient[-1].abs().max()) == 0


def test_only_one_part_is_held_at_a_time():
    """What autograd keeps for later is let go after each part: the peak does not grow with the number of parts."""
    model = network()
    parameters = list(model.parameters())
    peaks = []
    for count in (2, 5):
        held, peak = 0, 0

        class Held:
            def __init__(self, tensor):
                nonlocal held, peak
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                held += self.bytes
                peak = max(peak, held)

            def __del__(self):
                nonlocal held
                held -= self.bytes

        def embed(model=model, held_type=Held):
            with torch.autograd.graph.saved_tensors_hooks(held_type, lambda kept: kept.tensor):
                return model(views()[:2])

        curvature = EmbeddingCurvature([embed] * count, contrast, parameters)
        curvature(direction(parameters))
        assert curvature.gradient
        peaks.append(peak)
        assert held == 0
    assert peaks[0] == peaks[1] > 0


def in_process(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    assert (world_size(), rank()) == (2, number)
    model = network()
    parameters = list(model.parameters())
    own = views().chunk(2)[number].split(2)  # parts of 2, 2 and 1 rows
    parallel = DistributedDataParallel(model)
    _, gradients = embedding_gradients([lambda part=part: model(part) for part in own], contrast)
    for index, (part, gradient) in enumerate(zip(own, gradients, strict=True)):
        with nullcontext() if index == len(own) - 1 else parallel.no_sync():
            (parallel(part) * gradient).sum().backward()
    curvature = EmbeddingCurvature(
        [lambda part=part: model(part) for part in own], contrast, parameters, reduce=average_flat
    )
    found = {
        "gradient": [p.grad for p in parameters],
        "curvature.gradient": curvature.gradient,
        "product": curvature(direction(parameters)),
    }
    torch.save((dist.get_world_size(), found), f"{folder}/{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_gradient_and_products_of_the_global_batch(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(in_process, args=(port, str(tmp_path)), nprocs=2)
    model = network()
    parameters = list(model.parameters())
    whole = Curvature(lambda: contrast(model(views())), parameters)
    for number in range(2):
        size, found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert size == 2
        assert_same(found["gradient"], whole.gradient)
        assert_same(found["curvature.gradient"], whole.gradient)
        assert_same(found["product"], whole(direction(parameters)))


def test_changed_parameters_are_noticed():
    model = network()
    curvature = EmbeddingCurvature(parts_of(model, 5), contrast, list(model.parameters()))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="The parameters have changed"):
        curvature(direction(list(model.parameters())))
