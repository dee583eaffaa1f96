"""BiSSL written down once more, in float64 and without any part of the package but its model classes: plain loops, a
dense Hessian and a dense solve. It follows the paper's formulas, not the trainer's code."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.func import functional_call


@dataclass(frozen=True)
class Settings:
    alternations: int = 3
    lower_steps: int = 3
    upper_steps: int = 2
    warmup_epochs: int = 1
    lower_batch: int = 8
    upper_batch: int = 5
    curvature_batch: int = 8
    proximal_weight: float = 0.3
    damping: float = 600.0
    direct_weight: float = 0.5
    lower_lr: float = 0.05
    upper_lr: float = 0.02
    lower_decay: float = 0.02
    upper_decay: float = 0.01
    momentum: float = 0.9
    lower_warmup: int = 3
    upper_warmup: int = 2
    lower_clip: float = 1.5
    upper_clip: float = 0.8
    lower_optim: str = "sgd"
    seed: int = 7
    min_rate: float = 0.001


LOWER, UPPER, CURVATURE, WARMUP = range(4)


def read(dataset, batch, position, seed, level):
    """The rows of one batch: permutations of the data one after another, left-over rows skipped."""
    epoch, place = divmod(position, len(dataset) // batch)
    order = np.random.default_rng([seed, level, epoch]).permutation(len(dataset))
    rows = [dataset[int(i)] for i in order[place * batch : (place + 1) * batch]]
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    if "labels" in rows[0]:
        inputs["labels"] = torch.tensor([row["labels"] for row in rows])
    return inputs


def rate(step, total, warmup, least):
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))


def clip(gradients, bound):
    size = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    scale = min(1.0, bound / (size + 1e-6))
    return [g * scale for g in gradients], size


class Momentum:
    """SGD with momentum, or LARS in the paper's mode, on a list of tensors."""

    def __init__(self, parameters, kind, momentum, decay):
        self.parameters, self.kind, self.momentum, self.decay = parameters, kind, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients, lr):
        for parameter, buffer, gradient in zip(self.parameters, self.buffers, gradients, strict=True):
            update = gradient + self.decay * parameter.detach()
            if self.kind == "lars":
                weight_norm, update_norm = float(parameter.detach().norm()), float(update.norm())
                update = update * (0.001 * weight_norm / update_norm if weight_norm > 0 and update_norm > 0 else 1.0)
            buffer.mul_(self.momentum).add_(update)
            parameter.data.sub_(lr * buffer)


def backbone_of(model):
    return [p for _, p in model.base_model.named_parameters()]


def head_of(model):
    backbone = {id(p) for p in backbone_of(model)}
    return [p for p in model.parameters() if id(p) not in backbone]


def with_copied_buffers(model, inputs, replaced=()):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, {**buffers, **dict(replaced)}, kwargs=inputs).loss


def dense_hessian(loss, parameters):
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    # All rows at once: entry i of the gradient is differentiated with the i-th unit vector.
    units = torch.eye(len(flat), dtype=flat.dtype)
    rows = torch.autograd.grad(flat, parameters, units, retain_graph=True, is_grads_batched=True)
    return torch.cat([row.reshape(len(flat), -1) for row in rows], dim=1)


def run(model, train, pretext, settings: Settings):
    """Returns the lower and the upper model after the whole run, and figures of the last upper step."""
    s = settings
    lower, upper = copy.deepcopy(model.lower).train(), copy.deepcopy(model.upper).train()
    theta_p, theta_d, phi_p, phi_d = backbone_of(lower), backbone_of(upper), head_of(lower), head_of(upper)
    prefix = f"{upper.base_model_prefix}."
    names = [prefix + name for name, _ in upper.base_model.named_parameters()]

    warmup = Momentum(phi_d, "sgd", s.momentum, s.upper_decay)
    for position in range(s.warmup_epochs * (len(train) // s.upper_batch)):
        loss = upper(**read(train, s.upper_batch, position, s.seed, WARMUP)).loss
        warmup.step(torch.autograd.grad(loss, phi_d), s.upper_lr)

    lower_optimizer = Momentum(theta_p + phi_p, s.lower_optim, s.momentum, s.lower_decay)
    upper_optimizer = Momentum(theta_d + phi_d, "sgd", s.momentum, s.upper_decay)
    figures = {}
    for alternation in range(s.alternations):
        for step in range(s.lower_steps):
            position = alternation * s.lower_steps + step
            loss = lower(**read(pretext, s.lower_batch, position, s.seed, LOWER)).loss
            penalty = sum(((p - d.detach()) ** 2).sum() for p, d in zip(theta_p, theta_d, strict=True))
            gradients = torch.autograd.grad(loss + 0.5 * s.proximal_weight * penalty, theta_p + phi_p)
            gradients, figures["lower/gradient_norm"] = clip(gradients, s.lower_clip)
            factor = rate(position, s.alternations * s.lower_steps, s.lower_warmup, s.min_rate)
            lower_optimizer.step(gradients, s.lower_lr * factor)

        batch = read(pretext, s.curvature_batch, alternation, s.seed, CURVATURE)
        hessian = dense_hessian(with_copied_buffers(lower, batch), theta_p)
        matrix = torch.eye(len(hessian), dtype=hessian.dtype) + hessian / (s.proximal_weight + s.damping)
        smallest = float(torch.linalg.eigvalsh(matrix)[0])
        figures["smallest eigenvalue"] = min(smallest, figures.get("smallest eigenvalue", smallest))
        for step in range(s.upper_steps):
            position = alternation * s.upper_steps + step
            batch = read(train, s.upper_batch, position, s.seed, UPPER)
            buffers = {prefix + name: buffer.clone() for name, buffer in lower.base_model.named_buffers()}
            aligned = with_copied_buffers(upper, batch, {**buffers, **dict(zip(names, theta_p, strict=True))})
            at_theta_p = torch.autograd.grad(aligned, theta_p + phi_d)
            direct = upper(**batch).loss
            at_theta_d = torch.autograd.grad(direct, theta_d + phi_d)
            rhs = torch.cat([g.reshape(-1) for g in at_theta_p[: len(theta_p)]])
            solution = torch.linalg.solve(matrix, rhs)
            figures["effect of the curvature"] = float((solution - rhs).norm() / rhs.norm())
            pieces = solution.split([p.numel() for p in theta_p])
            implicit = [piece.view_as(p) for piece, p in zip(pieces, theta_p, strict=True)]
            gradients = [
                first + s.direct_weight * second
                for first, second in zip([*implicit, *at_theta_p[len(theta_p) :]], at_theta_d, strict=True)
            ]
            gradients, figures["upper/gradient_norm"] = clip(gradients, s.upper_clip)
            factor = rate(position, s.alternations * s.upper_steps, s.upper_warmup, s.min_rate)
            upper_optimizer.step(gradients, s.upper_lr * factor)
    return lower, upper, figures
