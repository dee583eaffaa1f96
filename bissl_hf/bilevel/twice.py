"""Convolution and batch norm whose second derivatives use the kernels of their first.

torch takes the second derivative of batch norm in about a hundred passes over the feature maps, and that of a
convolution by one with a whole map as its filter. Here both are exact and cheaper; first derivatives are torch's own.

**Convolution.** The backward (g, x, w) -> (gx, gw) is bilinear in (g, w) and in (g, x). For cotangents U of gx and A
of gw: that of g is conv(U, w) + conv(x, A), that of x the input gradient with A as the weight, and that of w the
weight gradient with U as the input.

**Batch norm** in training, y = gamma x^ + beta with x^ = (x - mean) s, s = 1 / sqrt(var + eps), over the n values of a
channel. With m1 = mean(g) and m2 = mean(g x^), the first derivative is  gx = gamma s (g - m1 - x^ m2). For cotangents
u of gx, a of gamma's gradient (n m2) and b of beta's (n m1), with p = mean(u x^) and q = mean(u (g - m1)) - p m2:

    of g:      gamma s (u - mean(u) - x^ p) + a x^ + b
    of gamma:  s n q
    of x:      s (a - gamma s p) (g - m1 - x^ m2) - gamma s^2 m2 (u - mean(u) - x^ p) - gamma s^2 q x^
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)
_FULL = (torch.float32, torch.float64)
_CONVOLUTIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class TwiceDifferentiable(TorchFunctionMode):
    """While entered, convolutions and batch norms are those of this module wherever a graph is recorded. What they do
    not cover (transposed, complex, evaluation mode, other transforms of functions, ...) stays torch's.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.bilevel.twice import TwiceDifferentiable
    >>> layer = torch.nn.Conv2d(1, 1, 3)
    >>> with TwiceDifferentiable():
    ...     output = layer(torch.ones(1, 1, 4, 4))
    >>> output.shape
    torch.Size([1, 1, 2, 2])
    ```
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            found = _convolve(_CONVOLUTIONS[func], *args, **kwargs) if _plain(args, kwargs) else None
        elif func is F.batch_norm:
            found = _normalise(*args, **kwargs) if _plain(args, kwargs) else None
        else:
            return func(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call records an ordinary graph of dense floating-point tensors."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(type(tensor) in (Tensor, nn.Parameter, nn.Buffer) for tensor in tensors)
        and all(tensor.layout == torch.strided and tensor.dtype in (*_HALF, *_FULL) for tensor in tensors)
        and len({tensor.device for tensor in tensors}) == 1
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # the functions here have no forward rule
    )


def _refuse_third_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "A third derivative was asked for (create_graph=True in a second one); the layers within "
            "TwiceDifferentiable have two. Leave the mode out."
        )


# Convolution


class _Geometry(NamedTuple):
    """What of a convolution is not a tensor."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nothing = [0] * len(self.stride)
        return torch.ops.aten.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, nothing, self.groups
        )

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Any, Any, Any]:
        """Returns gx, gw and the gradient of the bias, those of them that are asked for."""
        if not any(mask):
            return None, None, None
        nothing, bias = [0] * len(self.stride), weight.shape[:1]
        return torch.ops.aten.convolution_backward(
            g, x, weight, bias, self.stride, self.padding, self.dilation, False, nothing, self.groups, mask
        )


def _convolve(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Returns the convolution; `None` where it is left to torch."""
    sizes = [_per_dim(value, dims) for value in (stride, dilation)]
    if input.ndim != dims + 2 or weight.ndim != dims + 2 or input.numel() == 0 or None in sizes:
        return None
    strides, dilations = sizes
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, strides, dilations)
    paddings = _per_dim(padding, dims)
    input, weight, bias = (_as_autocast(tensor) for tensor in (input, weight, bias))
    if paddings is None or len({tensor.dtype for tensor in (input, weight, bias) if tensor is not None}) > 1:
        return None
    return _Convolution.apply(input, weight, bias, _Geometry(strides, paddings, dilations, groups))


def _per_dim(value: Any, dims: int) -> Any:
    """Returns a size for each dimension; `None` for what is not one."""
    values = (value,) * dims if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and all(isinstance(size, int) and size >= 0 for size in values) else None


def _resolve_padding(input: Tensor, weight: Tensor, padding: str, stride: Any, dilation: Any) -> tuple[Tensor, Any]:
    """Returns the input and the number of zeros on each side for `padding="same"` or `"valid"`."""
    if padding == "valid":
        return input, 0
    if padding != "same" or any(step != 1 for step in stride):
        return input, None
    totals = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    odd = [value for total in reversed(totals) for value in (0, total % 2)]  # the further zero is at the end
    return F.pad(input, odd) if any(odd) else input, [total // 2 for total in totals]


def _autocasts(device: str) -> bool:
    """Whether autocast is on; there is none for devices without kernels."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _as_autocast(tensor: Any) -> Any:
    """Returns a tensor in the precision that autocast gives to convolutions."""
    if tensor is None or tensor.dtype == torch.float64 or not _autocasts(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        with _without_autocast(x.device.type):
            return geometry.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *_ConvolutionBackward.apply(g, x, weight, ctx.geometry, list(ctx.needs_input_grad[:3])), None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: list[bool]) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        with _without_autocast(x.device.type):
            return geometry.backward(g, x, weight, mask)

    @staticmethod
    def backward(ctx: Any, of_gx: Tensor | None, of_gw: Tensor | None, of_bias: Tensor | None) -> Any:
        _refuse_third_derivative()
        g, x, weight = ctx.saved_tensors
        geometry, needs = ctx.geometry, ctx.needs_input_grad
        mask = [needs[1] and of_gw is not None, needs[2] and of_gx is not None, False]
        with _without_autocast(x.device.type):
            of_g = None
            if needs[0] and of_gx is not None:
                of_g = geometry.forward(of_gx, weight, of_bias)
                of_bias = None
            if needs[0] and (of_gw is not None or of_bias is not None):
                term = geometry.forward(x, torch.zeros_like(weight) if of_gw is None else of_gw, of_bias)
                of_g = term if of_g is None else of_g.add_(term)
            of_x, of_weight, _ = geometry.backward(
                g, x if of_gx is None else of_gx, weight if of_gw is None else of_gw, mask
            )
        return of_g, of_x, of_weight, None, None


# Batch norm


def _normalise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Returns the batch norm; `None` where it is left to torch."""
    others = [tensor for tensor in (running_mean, running_var, weight, bias) if tensor is not None]
    sums = torch.float64 if input.dtype == torch.float64 else torch.float32
    usual = (
        training
        and input.ndim >= 2
        and input.numel() > input.shape[1] > 0  # more than one value per channel
        and eps > 0
        and isinstance(momentum, float)
        and (running_mean is None) == (running_var is None)
        and (weight is None) == (bias is None)
        and (weight is not None or input.dtype in _FULL)  # else torch keeps the statistics in half precision
        and all(tensor.dtype == sums and tensor.shape == input.shape[1:2] for tensor in others)
    )
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps) if usual else None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        # What torch.batch_norm is made of: it chooses the kernel, and the backward must be that of the same one.
        output, mean, scale, reserve, kernel = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, True, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.save_for_backward(x, weight, mean, scale)
        # Not an argument of any derivative: the running statistics are not read in training.
        ctx.kernel = (kernel, reserve, eps)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        gx, g_weight, g_bias = _BatchNormBackward.apply(g, *ctx.saved_tensors, ctx.kernel)
        needs = ctx.needs_input_grad
        return gx if needs[0] else None, g_weight if needs[1] else None, g_bias if needs[2] else None, *[None] * 4


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, kernel: Any
    ) -> Any:
        index, reserve, eps = kernel
        g = _laid_out_like(g, x)
        gx, g_weight, g_bias = torch.ops.aten._batch_norm_impl_index_backward(
            index, x, g, weight, None, None, mean, scale, True, eps, [True, True, True], reserve
        )
        ctx.save_for_backward(g, x, weight, mean, scale, g_weight, g_bias)
        ctx.set_materialize_grads(False)
        return gx, g_weight if weight is not None else None, g_bias if weight is not None else None

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, a: Tensor | None, b: Tensor | None) -> Any:
        _refuse_third_derivative()
        g, x, weight, mean, scale, g_weight, g_bias = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        m1, m2 = g_bias / n, g_weight / n
        gamma = torch.ones_like(scale) if weight is None else weight
        u = torch.zeros_like(x) if u is None else _laid_out_like(u, x)
        a = torch.zeros_like(scale) if a is None else a
        b = torch.zeros_like(scale) if b is None else b
        u_sum, u_x = _sums(u, x, mean, scale)
        mean_u, p = u_sum / n, u_x / n
        q = _sums(u, g, m1, torch.ones_like(scale))[1] / n - p * m2

        along_x = (a - gamma * scale * p) * scale
        of_g = _combine([(u, gamma * scale), (x, along_x)], b - gamma * scale * mean_u - along_x * mean)
        of_weight = None if weight is None else scale * n * q
        if not ctx.needs_input_grad[1]:
            return of_g, None, of_weight, None, None, None
        of_gradient, of_cotangent = scale * (a - gamma * scale * p), -gamma * scale.square() * m2
        along_x = -(of_gradient * m2 + of_cotangent * p + gamma * scale.square() * q) * scale
        constant = -of_gradient * m1 - of_cotangent * mean_u - along_x * mean
        of_x = _combine([(g, of_gradient), (u, of_cotangent), (x, along_x)], constant)
        return of_g, of_x, of_weight, None, None, None


def _sums(u: Tensor, y: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums over each channel of  u  and  u (y - mean) scale, in the precision of `scale`: what the
    backward kernel of batch norm computes for its parameters, in one pass and without full-size tensors in between."""
    # The weight enters here as the dtype of the sums alone.
    _, u_y, total = torch.ops.aten.native_batch_norm_backward(
        u, y, scale, None, None, mean, scale, True, 1e-5, [False, True, True]
    )
    return total, u_y


def _combine(terms: list[tuple[Tensor, Tensor]], constant: Tensor) -> Tensor:
    """Returns the sum of tensors times a coefficient per channel, and of a constant per channel; half precision is
    rounded once, at the end."""
    first, _ = terms[0]
    shape = (1, -1, *[1] * (first.ndim - 2))
    total = first * terms[0][1].view(shape)
    for tensor, coefficient in terms[1:]:
        total.addcmul_(tensor, coefficient.view(shape))
    return total.add_(constant.view(shape)).to(first.dtype)


def _laid_out_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Returns a tensor in the memory format of another, for which the kernels have a fast path."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(reference.ndim)
    if last is not None and not reference.is_contiguous() and reference.is_contiguous(memory_format=last):
        return tensor.contiguous(memory_format=last)
    return tensor.contiguous()
