"""Curvature and implicit gradient against dense Hessians and against a lower problem that is really solved again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.hypergradient import implicit_gradient
from bissl_hf.bilevel.linear_solve import SolveStatus

from ..conftest import TinyImages, tiny_model


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class ConvNet(nn.Module):
    """Convolution, batch norm, dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(3, 4)

    def forward(self, images):
        hidden = torch.tanh(self.norm(self.conv(images)))
        return self.head(self.dropout(hidden.mean(dim=(2, 3))))


class Attention(nn.Module):
    """The fused kernel of torch, which has no second derivative of its own."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, tokens):
        heads = (layer(tokens).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).mean(dim=1)


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def random_like(parameters):
    return tuple(torch.randn_like(parameter) for parameter in parameters)


def copies(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def row_by_row_hessian(loss, parameters):
    """Hessian of a loss value, one backward pass per entry of its gradient."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    gradient = flat([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)])
    rows = []
    for entry in gradient:
        if not entry.requires_grad:
            rows.append(torch.zeros_like(gradient))
            continue
        row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        rows.append(flat([torch.zeros_like(p) if r is None else r for r, p in zip(row, parameters, strict=True)]))
    return torch.stack(rows)


def batch_norm_by_hand(hidden, scale, shift):
    """Batch norm in train mode, written out: torch 2.13's vectorised second derivative of `F.batch_norm` is wrong
    behind a convolution with a bias (by 16 % in the Hessian below), so `torch.func.hessian` must not meet it."""
    mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
    variance = hidden.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
    return (hidden - mean) / (variance + 1e-5).sqrt() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["cached", "recompute"])
def test_products_are_those_of_the_dense_hessian_with_batch_norm(mode):
    model = ConvNet().train()
    images, labels = torch.randn(6, 1, 6, 6), torch.randint(0, 4, (6,))
    parameters = dict(model.named_parameters())
    names, sizes = list(parameters), [p.numel() for p in parameters.values()]

    def loss_of(vector):
        parts = {n: v.view_as(parameters[n]) for n, v in zip(names, vector.split(sizes), strict=True)}
        hidden = F.conv2d(images, parts["conv.weight"], parts["conv.bias"])
        hidden = batch_norm_by_hand(hidden, parts["norm.weight"], parts["norm.bias"])
        logits = torch.tanh(hidden).mean(dim=(2, 3)) @ parts["head.weight"].T + parts["head.bias"]
        return F.cross_entropy(logits, labels)

    dense = hessian(loss_of)(flat(parameters.values()).detach())
    before = copies(model)
    curvature = Curvature(
        lambda: F.cross_entropy(functional_call(model, copies(model), (images,)), labels),
        list(parameters.values()),
        mode=mode,
    )
    for _ in range(3):
        vector = random_like(parameters.values())
        assert relative_error(flat(curvature(vector)), dense @ flat(vector)) < 1e-10
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_running_statistics_stay_bit_identical_through_a_models_pure_forward(level):
    model = tiny_model().double().train()
    inputs = {"pixel_values": TinyImages(6, pairs=level == "lower", dtype=torch.float64).images}
    if level == "upper":
        inputs["labels"] = torch.tensor([0, 1, 2, 0, 1, 2])
    parameters = model.backbone_parameters(level)
    before = copies(model)
    curvature = Curvature(lambda: model.without_side_effects(level)(**inputs).loss, parameters)
    curvature(random_like(parameters))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    getattr(model, level)(**inputs)
    assert not all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("mode", ["cached", "recompute"])
def test_dropout_draws_the_same_masks_in_every_product(mode):
    model = ConvNet(dropout=0.5).train()
    images, labels = torch.randn(6, 1, 6, 6), torch.randint(0, 4, (6,))
    parameters = list(model.parameters())

    def loss():
        return F.cross_entropy(functional_call(model, copies(model), (images,)), labels)

    torch.manual_seed(5)
    dense = row_by_row_hessian(loss(), parameters)
    torch.manual_seed(5)
    curvature = Curvature(loss, parameters, mode=mode)
    for _ in range(2):
        torch.randn(3)  # what others draw in between must not matter
        vector = random_like(parameters)
        assert relative_error(flat(curvature(vector)), dense @ flat(vector)) < 1e-10


def test_the_random_state_is_left_alone():
    model = ConvNet(dropout=0.5).train()
    parameters = list(model.parameters())
    state = torch.get_rng_state()
    curvature = Curvature(lambda: model(torch.ones(4, 1, 6, 6)).square().mean(), parameters, mode="recompute")
    curvature([torch.ones_like(p) for p in parameters])
    assert torch.equal(state, torch.get_rng_state())


def test_the_fused_attention_kernel_can_be_differentiated_twice():
    model, tokens = Attention(), torch.randn(3, 5, 4)
    parameters = list(model.parameters())
    curvature = Curvature(lambda: model(tokens).square().mean(), parameters)

    def loss_by_hand():
        query, key, value = (
            layer(tokens).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (model.query, model.key, model.value)
        )
        weights = torch.softmax(query @ key.mT / 2**0.5, dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2).mean(dim=1).square().mean()

    dense = row_by_row_hessian(loss_by_hand(), parameters)
    vector = random_like(parameters)
    assert relative_error(flat(curvature(vector)), dense @ flat(vector)) < 1e-10


def tiny_vit():
    config = ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    return ViTForImageClassification, config, inputs


def tiny_bert():
    config = BertConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=11,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokens = torch.randint(0, 11, (3, 6))
    return BertForMaskedLM, config, {"input_ids": tokens, "labels": tokens.roll(1, 1)}


@pytest.mark.parametrize("build", [tiny_vit, tiny_bert])
def test_transformers_with_their_default_attention_and_tied_weights(build):
    model_class, config, inputs = build()
    model = model_class(config).double().train()
    assert model.config._attn_implementation == "sdpa"
    parameters = list(model.parameters())  # a tied tensor stands here once
    curvature = Curvature(lambda: model(**inputs).loss, parameters)
    eager = model_class._from_config(config, attn_implementation="eager").double().train()
    eager.load_state_dict(model.state_dict())
    dense = row_by_row_hessian(eager(**inputs).loss, list(eager.parameters()))
    vector = random_like(parameters)
    assert relative_error(flat(curvature(vector)), dense @ flat(vector)) < 1e-10


def test_cached_and_recomputed_products_agree():
    model = tiny_model().double().train()
    images = TinyImages(8, pairs=True, dtype=torch.float64).images
    parameters = model.backbone_parameters("lower")
    products = []
    vector = random_like(parameters)
    for mode in ("cached", "recompute"):
        curvature = Curvature(
            lambda: model.without_side_effects("lower")(pixel_values=images).loss, parameters, mode=mode
        )
        curvature(random_like(parameters))
        products.append(flat(curvature(vector)))
    assert relative_error(*products) < 1e-12


def test_a_parameter_that_the_loss_does_not_use_has_no_curvature():
    used, unused, linear = (torch.ones(2, requires_grad=True) for _ in range(3))
    curvature = Curvature(lambda: (used**3).sum() + linear.sum(), [used, unused, linear])
    products = curvature([torch.ones(2)] * 3)
    assert [product.tolist() for product in products] == [[6.0, 6.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_linear_loss_has_no_curvature():
    parameter = torch.ones(2, requires_grad=True)
    assert Curvature(lambda: parameter.sum(), [parameter])([torch.ones(2)])[0].tolist() == [0.0, 0.0]


def test_the_gradient_and_the_reduction():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    calls = []

    def halve(vector):
        calls.append(len(vector))
        return tuple(tensor / 2 for tensor in vector)

    curvature = Curvature(lambda: (parameter**3).sum(), [parameter], reduce=halve)
    assert curvature.gradient[0].tolist() == [1.5, 6.0]
    assert curvature([torch.ones(2)])[0].tolist() == [3.0, 6.0]
    assert not curvature.gradient[0].requires_grad
    assert calls == [1, 1]


@pytest.mark.parametrize("mode", ["cached", "recompute"])
def test_the_gradient_is_that_of_plain_autograd(mode):
    model = tiny_model().double().train()
    images = TinyImages(8, pairs=True, dtype=torch.float64).images
    parameters = model.backbone_parameters("lower")
    curvature = Curvature(lambda: model.without_side_effects("lower")(pixel_values=images).loss, parameters, mode=mode)
    model.lower(pixel_values=images).loss.backward()
    expected = flat([parameter.grad for parameter in parameters])
    assert relative_error(flat(curvature.gradient), expected) < 1e-13


@pytest.mark.parametrize("mode", ["cached", "recompute"])
def test_a_curvature_of_other_weights_is_refused(mode):
    parameter = torch.ones(2, requires_grad=True)
    curvature = Curvature(lambda: (parameter**3).sum(), [parameter], mode=mode)
    curvature([torch.ones(2)])
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        curvature([torch.ones(2)])


@pytest.mark.parametrize("mode", ["cached", "recompute"])
def test_a_loss_may_come_in_terms(mode):
    """With dropout: the terms draw one after the other, in every product."""
    model = ConvNet(dropout=0.5).train()
    parameters = list(model.parameters())
    images = torch.rand(2, 5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def term(number):
        return functional_call(model, copies(model), (images[number],)).square().mean()

    torch.manual_seed(3)
    whole = Curvature(lambda: term(0) + term(1), parameters)
    torch.manual_seed(3)
    curvature = Curvature([lambda: term(0), lambda: term(1)], parameters, mode=mode)
    for vector in (whole.gradient, [torch.ones_like(p) for p in parameters]):
        expected = flat(whole(vector))
        assert expected.norm() > 1e-3
        assert relative_error(flat(curvature(vector)), expected) < 1e-10
    assert relative_error(flat(curvature.gradient), flat(whole.gradient)) < 1e-10


def test_terms_are_recomputed_one_at_a_time():
    """What autograd keeps of a term is let go before the next one."""
    weights = torch.ones(50, requires_grad=True)
    held, peaks = [], []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            held.append(None)
            peaks[-1] = max(peaks[-1], len(held))

        def __del__(self):
            held.pop()

    def term():
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            return weights.exp().sin().sum()

    for count in (1, 4):
        peaks.append(0)
        curvature = Curvature([term] * count, [weights], mode="recompute")
        curvature([torch.ones(50)])
        assert curvature.gradient
        assert not held
    assert peaks[0] == peaks[1] > 0


def test_bad_arguments_are_refused():
    parameter = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="loss_fn is empty"):
        Curvature([], [parameter])
    with pytest.raises(ValueError, match="mode is 'eager'"):
        Curvature(lambda: parameter.sum(), [parameter], mode="eager")
    with pytest.raises(ValueError, match="parameters is empty"):
        Curvature(lambda: parameter.sum(), [])
    with pytest.raises(ValueError, match="1 of 2 parameters do not require gradients"):
        Curvature(lambda: parameter.sum(), [parameter, torch.ones(2)])
    with pytest.raises(ValueError, match="Tensor 0 has shape"):
        Curvature(lambda: parameter.sum(), [parameter])([torch.ones(3)])
    good = {"proximal_weight": 1.0, "damping": 0.0, "max_iterations": 1}
    for changed, message in (
        ({"solver": "magic"}, "solver is 'magic'"),
        ({"proximal_weight": 0.0}, "proximal_weight is 0.0"),
        ({"damping": -1.0}, "damping is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            implicit_gradient(lambda v: v, (torch.ones(2),), **{**good, **changed})


def test_the_implicit_gradient_solves_its_system():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(7, 7, generator=generator)
    matrix, rhs = root @ root.T, torch.randn(7, generator=generator)
    solution, info = implicit_gradient(
        lambda v: (matrix @ v[0],), (rhs,), proximal_weight=0.3, damping=0.5, max_iterations=50, tolerance=1e-13
    )
    expected = torch.linalg.solve(torch.eye(7) + matrix / 0.8, rhs)
    assert relative_error(solution[0], expected) < 1e-10
    assert info.status == SolveStatus.CONVERGED


def test_the_blockwise_solver_takes_a_step_length_per_tensor():
    """One step from zero along each block of the right-hand side: alpha = <r, r> / <r, (A r)> block by block."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(7, 7, generator=generator)
    matrix, rhs = root @ root.T, torch.randn(7, generator=generator)

    def product(vector):
        return (matrix @ torch.cat(list(vector))).split([3, 4])

    solution, info = implicit_gradient(
        product, rhs.split([3, 4]), proximal_weight=0.3, damping=0.5, max_iterations=1, solver="blockwise_cg"
    )
    system = torch.eye(7) + matrix / 0.8
    image = (system @ rhs).split([3, 4])
    expected = [r * (r @ r) / (r @ a) for r, a in zip(rhs.split([3, 4]), image, strict=True)]
    assert relative_error(flat(solution), torch.cat(expected)) < 1e-13
    residual = float((rhs - system @ torch.cat(expected)).norm() / rhs.norm())
    assert info.residual == pytest.approx(residual, rel=1e-10)


def test_the_identity_takes_no_product():
    rhs = (torch.ones(3),)

    def fail(vector):
        raise AssertionError("no product is needed")

    solution, info = implicit_gradient(
        fail, rhs, proximal_weight=1.0, damping=0.0, max_iterations=1, solver="identity"
    )
    assert torch.equal(solution[0], rhs[0])
    assert (info.iterations, info.status) == (0, SolveStatus.ITERATION_LIMIT)
    assert info.residual != info.residual  # NaN: it was not measured


def test_the_implicit_gradient_is_the_derivative_through_the_solved_lower_problem():
    """Central differences of L_D(theta_P*(theta_D)), the lower problem solved by Newton's method to 1e-12 each
    time."""
    images, views = torch.randn(5, 1, 6, 6), torch.randn(5, 1, 6, 6)
    targets, labels = torch.randn(5, 4), torch.randint(0, 4, (5,))
    model, weight = ConvNet().train(), 2.0
    theta = [*model.conv.parameters(), *model.norm.parameters()]
    head = [parameter.detach() for parameter in model.head.parameters()]
    upper_head = [torch.randn_like(parameter) for parameter in head]
    sizes, shapes = [p.numel() for p in theta], [p.shape for p in theta]

    def features(flat_theta, batch):
        kernel, bias, scale, shift = (p.view(s) for p, s in zip(flat_theta.split(sizes), shapes, strict=True))
        hidden = batch_norm_by_hand(F.conv2d(batch, kernel, bias), scale, shift)
        return torch.tanh(hidden).mean(dim=(2, 3))

    def lower_loss(flat_theta):
        return ((features(flat_theta, views) @ head[0].T + head[1] - targets) ** 2).mean()

    def upper_loss(flat_theta):
        return F.cross_entropy(features(flat_theta, images) @ upper_head[0].T + upper_head[1], labels)

    def solve_lower(theta_d):
        theta_p = theta_d.clone()
        for _ in range(50):
            point = theta_p.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(lower_loss(point), point)
            gradient = gradient + weight * (theta_p - theta_d)
            if gradient.norm() < 1e-12:
                return theta_p
            matrix = hessian(lower_loss)(theta_p) + weight * torch.eye(len(theta_p))
            theta_p = theta_p - torch.linalg.solve(matrix, gradient)
        raise AssertionError("Newton's method did not converge")

    theta_d = torch.cat([p.detach().reshape(-1) for p in theta])
    theta_p = solve_lower(theta_d)
    with torch.no_grad():
        for parameter, value in zip(theta, theta_p.split(sizes), strict=True):
            parameter.copy_(value.view_as(parameter))
    point = theta_p.clone().requires_grad_()
    rhs = torch.autograd.grad(upper_loss(point), point)[0].split(sizes)
    rhs = tuple(part.view(shape) for part, shape in zip(rhs, shapes, strict=True))

    def loss_of_module():
        return ((functional_call(model, copies(model), (views,)) - targets) ** 2).mean()

    solution, info = implicit_gradient(
        Curvature(loss_of_module, theta), rhs, proximal_weight=weight, damping=0.0, max_iterations=200, tolerance=1e-13
    )
    assert info.status == SolveStatus.CONVERGED
    step, differences = 1e-5, []
    for index in range(len(theta_d)):
        shift = torch.zeros_like(theta_d)
        shift[index] = step
        values = [upper_loss(solve_lower(theta_d + sign * shift)) for sign in (1, -1)]
        differences.append((values[0] - values[1]) / (2 * step))
    assert relative_error(flat(solution), torch.stack(differences)) < 1e-6
    # The curvature matters here: the right-hand side alone is far from the derivative.
    assert relative_error(flat(rhs), torch.stack(differences)) > 0.01


def test_the_gradient_of_other_weights_is_refused():
    parameter = torch.ones(2, requires_grad=True)
    curvature = Curvature(lambda: (parameter**3).sum(), [parameter])
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        _ = curvature.gradient


def test_an_empty_right_hand_side_is_refused():
    with pytest.raises(ValueError, match="rhs is empty"):
        implicit_gradient(lambda v: v, (), proximal_weight=1.0, damping=0.0, max_iterations=1, solver="identity")
