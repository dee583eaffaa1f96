"""Second derivatives of batch norm and convolution against torch's own, in float64."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from bissl_hf.bilevel import twice
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.gradient_cache import EmbeddingCurvature
from bissl_hf.bilevel.twice import TwiceDifferentiable

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "bias": False},
    {"padding": "same"},
    {"padding": "same", "kernel_size": (2, 4), "dilation": (1, 3)},
    {"padding": "valid", "groups": 2},
    {"groups": 4, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1, "bias": False},
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def derivatives(function: Callable[[], Tensor], inputs: Sequence[Tensor], ours: bool) -> tuple[Tensor, ...]:
    """Output, gradients and a Hessian-vector product of a loss that is not quadratic in the output."""
    generator = torch.Generator().manual_seed(1)
    with TwiceDifferentiable() if ours else nullcontext():
        output = function()
        gradients = torch.autograd.grad(output.pow(3).mean() + output.sin().mean(), inputs, create_graph=True)
    vector = [torch.randn(part.shape, dtype=part.dtype, generator=generator) for part in inputs]
    return output, *gradients, *torch.autograd.grad(gradients, inputs, vector)


def assert_same_derivatives(build: Callable[[], nn.Module], x: Tensor, taken: str) -> None:
    """Both ways from the same start, with the buffers that they leave behind."""
    torch.manual_seed(0)
    theirs = build().double()
    ours = copy.deepcopy(theirs)
    results = []
    for module, mine in ((theirs, False), (ours, True)):
        inputs = [x.detach().requires_grad_(), *module.parameters()]
        results.append(derivatives(lambda module=module, inputs=inputs: module(inputs[0]), inputs, mine))
    assert taken in type(probe(ours, x)).__name__
    assert torch.equal(results[0][0], results[1][0]), "the same bits forward"
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for wanted, found in zip(theirs.buffers(), ours.buffers(), strict=True):
        assert torch.equal(found, wanted)


def probe(module: nn.Module, x: Tensor) -> Any:
    """The node of the graph that a layer leaves behind."""
    with TwiceDifferentiable():
        return copy.deepcopy(module)(x.detach().requires_grad_()).grad_fn


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolution(geometry: dict[str, Any], memory_format: torch.memory_format) -> None:
    settings = {"kernel_size": 3} | geometry
    x = images(3, 4, 8, 7).to(memory_format=memory_format)
    assert_same_derivatives(lambda: nn.Conv2d(4, 4, **settings).to(memory_format=memory_format), x, "_Convolution")


@pytest.mark.parametrize("dims", [1, 3])
def test_convolution_in_other_dimensions(dims: int) -> None:
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    assert_same_derivatives(
        lambda: layer(2, 4, 3, stride=2, padding=1, groups=2), images(3, 2, *[5] * dims), "_Convolution"
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2), (3, 3, 2, 3, 2)])
def test_batch_norm(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    assert_same_derivatives(lambda: layer(3, **settings), 5 + 2 * images(*shape), "_BatchNorm")


def test_batch_norm_of_other_layouts() -> None:
    for x in (images(4, 3, 5, 2).to(memory_format=torch.channels_last), images(4, 5, 3, 2).transpose(1, 2)):
        assert_same_derivatives(lambda: nn.BatchNorm2d(3), x, "_BatchNorm")


def test_a_weight_of_zero_has_its_derivatives() -> None:
    """Residual branches start there: the first derivative in x is then zero, the second is not."""

    def build() -> nn.Module:
        layer = nn.BatchNorm2d(3)
        nn.init.zeros_(layer.weight)
        return layer

    assert_same_derivatives(build, images(4, 3, 5, 2), "_BatchNorm")


def test_second_derivatives_agree_with_finite_differences() -> None:
    x, weight, bias = images(2, 2, 4, 4), images(4, 1, 3, 3), images(4)
    gamma, beta, rows = images(3).abs() + 0.5, images(3), images(4, 3)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with TwiceDifferentiable():
            return F.conv2d(x, weight, bias, stride=2, padding=1, groups=2)

    def normalise(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with TwiceDifferentiable():
            return F.batch_norm(x, None, None, gamma, beta, training=True)

    assert torch.autograd.gradcheck(convolve, [part.requires_grad_() for part in (x, weight, bias)])
    assert torch.autograd.gradgradcheck(convolve, [x, weight, bias])
    assert torch.autograd.gradcheck(normalise, [part.requires_grad_() for part in (rows, gamma, beta)])
    assert torch.autograd.gradgradcheck(normalise, [rows, gamma, beta])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "head"])
def test_constants_take_no_derivative(frozen: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).double()
    x = images(3, 2, 5, 5)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name and not (frozen == "head" and name.startswith("2")))
    inputs = [parameter for parameter in module.parameters() if parameter.requires_grad]
    inputs = inputs if frozen == "x" else [x.requires_grad_(), *inputs]
    found, wanted = (derivatives(lambda: module(x), inputs, ours) for ours in (True, False))
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_sums_in_float32() -> None:
    """Autocast: values as torch has them, and a product no further from the exact one, with means far from zero."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    nn.init.constant_(module[0].bias, 20.0)
    x = images(8, 3, 12, 12).float()
    parameters = list(module.parameters())

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x).float()

    theirs, ours = derivatives(half, parameters, False), derivatives(half, parameters, True)
    exact = derivatives(lambda: module(x), parameters, False)
    assert torch.equal(ours[0], theirs[0])
    count = len(parameters)

    def error(found: tuple[Tensor, ...]) -> float:
        pairs = list(zip(found[-count:], exact[-count:], strict=True))
        return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5

    assert error(ours) < 1.1 * error(theirs) + 1e-3
    assert all(a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_what_is_not_covered_stays_torchs() -> None:
    x = images(4, 3, 5, 5).requires_grad_()
    weight, statistics = images(2, 3, 3, 3).requires_grad_(), (images(3), images(3).abs())
    complex_x, complex_weight = x.to(torch.complex128), weight.to(torch.complex128)
    calls: list[Callable[[], Tensor]] = [
        lambda: F.batch_norm(x, *statistics, training=False),
        lambda: F.batch_norm(x.bfloat16(), None, None, training=True),
        lambda: F.conv_transpose2d(x, images(3, 2, 3, 3)),
        lambda: F.conv2d(complex_x, complex_weight),
        lambda: F.conv2d(x[0], weight),
        lambda: torch.func.vmap(lambda image: F.conv2d(image, weight))(x[None])[0],
    ]
    with TwiceDifferentiable():
        found = [call() for call in calls]
        with torch.no_grad():
            assert not F.conv2d(x, weight).requires_grad
        with forward_ad.dual_level():
            dual = F.conv2d(forward_ad.make_dual(x.detach(), x.detach()), weight)
            torch.testing.assert_close(*forward_ad.unpack_dual(dual))
    for output, call in zip(found, calls, strict=True):
        assert type(output.grad_fn).__module__ != twice.__name__
        assert "_BatchNorm" not in str(output.grad_fn)
        assert "_Convolution" not in str(output.grad_fn)
        torch.testing.assert_close(output, call(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x, w, stride=0),
        lambda x, w: F.conv2d(x, w, padding=-1),
        lambda x, w: F.conv2d(x, w, padding="same", stride=2),
        lambda x, w: F.conv2d(x, w, padding="around"),
        lambda x, w: F.conv2d(x, w, stride=(1, 1, 1)),
        lambda x, w: F.conv2d(x, w, groups=2),
        lambda x, w: F.batch_norm(x[:1, :, :1, :1], None, None, training=True),
        lambda x, w: F.batch_norm(x, None, None, training=True, eps=0.0),
        lambda x, w: F.batch_norm(x, None, None, w[0, 0, 0, :2], w[0, 0, 0, :2], training=True),
    ],
)
def test_bad_input_is_refused_as_torch_refuses_it(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = images(2, 3, 5, 5).requires_grad_(), images(2, 3, 3, 3)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        call(x, weight)
    with pytest.raises(theirs.type) as ours, TwiceDifferentiable():
        call(x, weight)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_a_third_derivative_is_refused() -> None:
    x = images(4, 3).requires_grad_()
    with TwiceDifferentiable():
        output = F.batch_norm(x, None, None, training=True).pow(3).sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    with pytest.raises(RuntimeError, match="A third derivative was asked for"):
        torch.autograd.grad(gradient.pow(2).sum(), x, create_graph=True)


@pytest.mark.parametrize("build", ["cached", "recompute", "parts"])
def test_curvatures_take_their_products_with_it(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)).double()
    x, parameters = images(4, 2, 5, 5), list(module.parameters())
    vector = tuple(images(*parameter.shape) for parameter in parameters)
    calls = []
    backward = twice._sums
    monkeypatch.setattr(twice, "_sums", lambda *arguments: calls.append(1) or backward(*arguments))

    def loss(outputs: Tensor) -> Tensor:
        return outputs.pow(4).mean()

    if build == "parts":
        curvature: Curvature = EmbeddingCurvature([lambda: module(x)], loss, parameters)
    else:
        curvature = Curvature(lambda: loss(module(x)), parameters, mode=build)
    found = curvature(vector)
    assert calls
    gradient = torch.autograd.grad(loss(module(x)), parameters, create_graph=True)
    for actual, wanted in zip(found, torch.autograd.grad(gradient, parameters, vector), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)
