"""Means of making an alternation faster, each tried beside what it would take the place of.

What wins belongs into the package and what loses does not. Which one wins depends on the machine, so here is how to
find out on another one.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ..data.alternation import StepKey, Stream
from ..linear_solve import conjugate_gradient
from ..tensors import Vector
from ..trainer.optimizer import LARS
from .loops import BareLoop, Baseline, Batch, plain_conjugate_gradient
from .measuring import interleaved_seconds
from .workload import SMALL_RATE, WORKLOADS, Workload, build_model, build_trainer, to_channels_last

_SOLVER_ITERATIONS = 5


@dataclass(frozen=True)
class Trial:
    """Two ways to the same end.

    Args:
        name (`str`): of the new one.
        old (`Callable`), new (`Callable`): functions without arguments.
        kept (`str`): what the package does.
    """

    name: str
    old: Callable[[], Any]
    new: Callable[[], Any]
    kept: str


def try_means(
    device: torch.device, *, workload: Workload | None = None, say: Callable[[str], Any] = print
) -> list[dict[str, Any]]:
    """Times each trial's two ways in turn.

    Args:
        device (`torch.device`)
        workload ([`Workload`], *optional*): sizes; by default those of the machine.
        say (`Callable`, *optional*): gets one line before each trial.

    Returns:
        `list[dict]`: for each trial the median of the ratios of old to new, with the smallest and the largest, or the
            `"error"` that kept it from running.
    """
    workload = workload or WORKLOADS["gpu" if device.type == "cuda" else "cpu"]
    found = []
    for build in (*_TRIALS, *(_GPU_TRIALS if device.type == "cuda" else ())):
        # A trial may need what a machine lacks, such as a compiler for C++.
        try:
            for trial in build(_Bench(workload, device)):
                say(f"Trying {trial.name}")
                times = interleaved_seconds(
                    {"old": trial.old, "new": trial.new}, device, repeats=workload.repeats, warmups=2
                )
                ratios = [old / new for old, new in zip(times["old"], times["new"], strict=True)]
                found.append(
                    {
                        "trial": trial.name,
                        "ratio": median(ratios),
                        "smallest": min(ratios),
                        "largest": max(ratios),
                        "kept": trial.kept,
                    }
                )
        except RuntimeError as error:
            found.append({"trial": build.__name__.strip("_").replace("_", " "), "error": str(error).split("\n")[0]})
    return found


class _Bench:
    """Models, data and vectors for the trials of one kind, so that none finds what another one left."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        model = build_model(workload)
        model.start_upper_from_lower()
        self.trainer = build_trainer(workload, model, device)
        # In the precision and layout of the workload.
        self.loop = self.new_loop(channels_last=workload.bf16, bf16=workload.bf16)

    def new_loop(self, *, channels_last: bool = False, bf16: bool = False) -> BareLoop:
        """Returns a loop with a model of its own, by default in float32 and the usual layout."""
        model = copy.deepcopy(self.trainer.model)
        if channels_last:
            to_channels_last(model)
        args = copy.copy(self.trainer.args)
        args.bf16 = bf16
        loop = BareLoop(self.trainer, model, args)
        loop.model.train()
        return loop

    def batch(self, stream: Stream = Stream.LOWER) -> Batch:
        """Returns a batch with its views."""
        return next(self.loop.batches(stream))

    def vector(self, like: tuple[Tensor, ...]) -> Vector:
        """Returns random numbers in the shape of parameters."""
        return tuple(torch.randn_like(tensor) for tensor in like)

    def product(self, loop: BareLoop, batch: Batch, vector: Vector | None = None) -> Callable[[], Any]:
        """Returns a function that takes a product on a graph that is kept, with random numbers by default."""
        return partial(loop.curvature(batch), self.vector(loop.theta_p) if vector is None else vector)


def _kept_graph(bench: _Bench) -> Iterator[Trial]:
    baseline = Baseline(bench.trainer, copy.deepcopy(bench.trainer.model), workers=0)
    batch = bench.batch()
    vector = bench.vector(baseline.theta_p)
    new = bench.product(bench.new_loop(), batch, vector)
    yield Trial("product on the kept graph", partial(baseline.product, batch, vector), new, "yes")


def _solver_in_place(bench: _Bench) -> Iterator[Trial]:
    rhs = bench.vector(bench.loop.theta_p)
    diagonal = [0.5 + torch.rand_like(tensor) for tensor in rhs]

    def matvec(vector: Vector) -> Vector:
        return tuple(torch._foreach_mul(list(vector), diagonal))

    yield Trial(
        "vectors of conjugate gradient in place, without the products",
        partial(plain_conjugate_gradient, matvec, rhs, _SOLVER_ITERATIONS),
        partial(conjugate_gradient, matvec, rhs, max_iterations=_SOLVER_ITERATIONS),
        "yes",
    )


def _optimizers(bench: _Bench) -> Iterator[Trial]:
    def stepping(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1e-3)
        return optimizer.step

    def lars(groups: Any) -> Callable[[], Any]:
        return stepping(LARS(groups, lr=SMALL_RATE))

    def sgd(**settings: Any) -> Callable[[], Any]:
        return stepping(torch.optim.SGD(bench.new_loop().upper_parameters, lr=SMALL_RATE, momentum=0.9, **settings))

    apart = [{"params": [parameter]} for parameter in bench.new_loop().lower_parameters]
    yield Trial("LARS on all tensors together", lars(apart), lars(bench.new_loop().lower_parameters), "yes")
    yield Trial("SGD on all tensors together (foreach)", sgd(foreach=False), sgd(foreach=True), "as torch chooses")
    yield Trial("SGD, fused", sgd(foreach=True), sgd(fused=True), "an option (optim_args)")


def _precision_and_layout(bench: _Bench) -> Iterator[Trial]:
    batch, plain = bench.batch(), bench.new_loop()
    for name, settings, kept in (
        ("channels-last", {"channels_last": True}, "no"),
        ("bfloat16", {"bf16": True}, "an argument of Trainer"),
        ("bfloat16 and channels-last", {"channels_last": True, "bf16": True}, "bfloat16, an argument of Trainer"),
    ):
        loop = bench.new_loop(**settings)
        old, new = plain.forward_backward, loop.forward_backward
        yield Trial(f"{name}: forward and backward", partial(old, batch), partial(new, batch), kept)
        yield Trial(f"{name}: product", bench.product(plain, batch), bench.product(loop, batch), kept)


def _compiled_lower_step(bench: _Bench) -> Iterator[Trial]:
    batch, usual = bench.batch(), {"channels_last": bench.loop.args.bf16, "bf16": bench.loop.args.bf16}
    loop = bench.new_loop(**usual)
    compiled = torch.compile(partial(loop.model, level="lower"))
    new = partial(loop.gradient, compiled, batch, loop.lower_parameters)
    yield Trial("compiled forward and backward", partial(bench.loop.forward_backward, batch), new, "no")


def _compiled_product(bench: _Bench) -> Iterator[Trial]:
    """Both derivatives traced into one function of parameters and vector, which is compiled."""
    batch, loop = bench.batch(), bench.new_loop()
    names = [name for name, _ in loop.model.lower.base_model.named_parameters()]
    prefix = loop.model.lower.base_model_prefix
    buffers = dict(loop.model.lower.named_buffers())

    def product(parameters: list[Tensor], vector: list[Tensor]) -> tuple[Tensor, ...]:
        tensors = {f"{prefix}.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        loss = functional_call(loop.model.lower, {**tensors, **copies}, kwargs=batch).loss
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(gradient, parameters, vector)

    parameters = [parameter.detach().clone().requires_grad_() for parameter in loop.theta_p]
    vector = list(bench.vector(loop.theta_p))
    traced = make_fx(product)(parameters, vector)
    compiled = torch.compile(traced)
    detached = [parameter.detach() for parameter in parameters]

    def new() -> Any:
        with torch.no_grad():
            return compiled(detached, vector)

    yield Trial("compiled product", bench.product(loop, batch, tuple(vector)), new, "no")


def _images_on_the_device(bench: _Bench) -> Iterator[Trial]:
    source, moved = bench.trainer.sources[Stream.LOWER], bench.trainer.move_and_transform
    key = StepKey(bench.loop.args.key_seed, int(Stream.LOWER), 0, 0, 0)
    shape = source.read(key)["pixel_values"].shape[1:]
    pixels = torch.zeros(len(source.dataset), *shape, dtype=torch.uint8, device=bench.device)
    rows = torch.randint(len(pixels), (source.batch_size,), device=bench.device)
    yield Trial(
        "images held on the device as uint8",
        lambda: moved(source.read(key), key, None),
        lambda: pixels[rows],
        "no",
    )


def _views_on_a_side_stream(bench: _Bench) -> Iterator[Trial]:
    loop, ready = bench.loop, bench.batch()
    key = StepKey(loop.args.key_seed, int(Stream.LOWER), 0, 1, 0)
    raw = bench.trainer.sources[Stream.LOWER].read(key)
    side = torch.cuda.Stream(bench.device)

    def one_after_the_other() -> None:
        loop.lower_step(ready)
        loop.views(raw, key)

    def side_by_side() -> None:
        side.wait_stream(torch.cuda.current_stream(bench.device))
        with torch.cuda.stream(side):
            loop.views(raw, key)
        loop.lower_step(ready)
        torch.cuda.current_stream(bench.device).wait_stream(side)

    yield Trial("views of the next batch on a side stream", one_after_the_other, side_by_side, "no")


_TRIALS = (_kept_graph, _solver_in_place, _optimizers, _precision_and_layout, _compiled_lower_step, _compiled_product)
# What they are about lies beside the CPU's own work.
_GPU_TRIALS = (_images_on_the_device, _views_on_a_side_stream)


def trial_rows(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns what was measured as rows of a table."""
    return [
        {
            "trial": trial["trial"],
            "old time by new": f"{trial['ratio']:.2f} ({trial['smallest']:.2f} to {trial['largest']:.2f})"
            if "ratio" in trial
            else f"did not run: {trial['error']}",
            "kept": trial.get("kept", ""),
        }
        for trial in found
    ]
