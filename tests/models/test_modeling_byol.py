"""BYOL's target and the convex form of its loss."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call, jvp

from bissl_hf import BYOLConfig, BYOLForPreTraining
from bissl_hf.models.convex_outputs import convex_outputs

from .test_modeling_simclr import resnet_config, same_weights, two_views, vit_config


def build(schedule: str = "constant", config: Any = None) -> BYOLForPreTraining:
    torch.manual_seed(0)
    return BYOLForPreTraining(
        BYOLConfig(
            backbone_config=config or resnet_config(),
            projection_dims=(7, 5),
            predictor_dims=(6, 5),
            ema_decay=0.9,
            ema_schedule=schedule,
        )
    )


def online(model: BYOLForPreTraining) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.startswith(("backbone.", "projection_head."))}


def target(model: BYOLForPreTraining) -> dict[str, torch.Tensor]:
    return dict(model.target.state_dict())


def shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(torch.rand_like(tensor))


def test_the_target_starts_as_a_frozen_copy_outside_the_backbone() -> None:
    model = build()
    assert target(model).keys() == online(model).keys()
    assert all(torch.equal(tensor, online(model)[name]) for name, tensor in target(model).items())
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"target"}
    assert not any(name.startswith("target") for name, _ in model.base_model.named_parameters())
    pointers = {p.data_ptr() for p in model.target.parameters()}
    assert not pointers & {p.data_ptr() for p in (*model.backbone.parameters(), *model.projection_head.parameters())}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_updates_of_the_target_follow_the_papers_average(schedule: str) -> None:
    model = build(schedule)
    expected = {name: parameter.clone() for name, parameter in model.target.named_parameters()}
    for step in range(4):
        shake(model.backbone)
        shake(model.projection_head)
        decay = 0.9 if schedule == "constant" else 1 - (1 - 0.9) * (math.cos(math.pi * step / 4) + 1) / 2
        assert model.ema_decay(step, 4) == pytest.approx(decay)
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * model.get_parameter(name).detach()
        before = {name: buffer.clone() for name, buffer in model.target.named_buffers()}
        model.update_target(step, 4)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.target.named_buffers())
    for name, parameter in model.target.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-6)
        assert not parameter.requires_grad
    assert build("cosine").ema_decay(4, 4) == 1


def test_the_loss_has_no_side_effect_on_the_targets_weights_and_gives_them_no_gradient() -> None:
    model = build()
    before = copy.deepcopy(model)
    model(pixel_values=two_views()).loss.backward()
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in (*model.projection_head.parameters(), *model.predictor.parameters()))


def test_the_target_normalises_by_its_batch_and_counts_its_own_passes() -> None:
    model = build()
    shake(model.target)
    reference = copy.deepcopy(model.target)
    embeddings = model(pixel_values=two_views()).embeddings
    for view, images in enumerate(two_views().unbind(1)):
        features = reference["backbone"](pixel_values=images).pooler_output.flatten(1)
        torch.testing.assert_close(embeddings[:, 2 + view], reference["projection_head"](features), rtol=0, atol=1e-6)
    assert same_weights(model.target, reference)  # the running statistics have moved alike


def test_restart_copies_weights_and_statistics() -> None:
    model = build()
    shake(model.backbone)
    shake(model.projection_head)
    model.restart_target()
    assert all(torch.equal(tensor, online(model)[name]) for name, tensor in target(model).items())
    assert not any(parameter.requires_grad for parameter in model.target.parameters())


def test_from_backbone_starts_the_target_from_it() -> None:
    source = build().backbone
    shake(source)
    model = BYOLForPreTraining.from_backbone(source)
    assert same_weights(model.target["backbone"], source)
    assert same_weights(model.target["projection_head"], model.projection_head)


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (5, 4), (0, 0)])
def test_a_step_outside_the_training_is_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"step is {step} of {total}; it must be between 0 and total_steps"):
        build("cosine").update_target(step, total)


@pytest.mark.parametrize("train", [True, False])
def test_outputs_are_a_convex_form_of_the_loss(train: bool) -> None:
    """The same value and gradient; second derivatives of the loss in the outputs without a negative eigenvalue; and a
    forward-mode product, as the Gauss-Newton curvature takes it."""
    model = build().double().train(train)
    shake(model.target)
    views = two_views().double()
    parameters = [*model.backbone.parameters(), *model.projection_head.parameters()]
    loss = model(pixel_values=views).loss
    outputs = copy.deepcopy(model).outputs_for_loss(pixel_values=views)
    assert outputs.shape == (4, 4, 5)
    again = model.loss_from_outputs(model.outputs_for_loss(pixel_values=views))
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    for first, second in zip(*(torch.autograd.grad(value, parameters) for value in (loss, again)), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    form = convex_outputs(model)
    assert form is not None
    assert form.join is not None
    rows = form.rows(model, {"pixel_values": views})
    assert form.loss(form.join(rows), {}).item() == pytest.approx(loss.item(), rel=1e-12)
    hessian = torch.autograd.functional.hessian(model.loss_from_outputs, outputs.detach())
    assert torch.linalg.eigvalsh(hessian.reshape(outputs.numel(), outputs.numel())).min() > -1e-12


def test_outputs_have_a_forward_derivative_that_leaves_targets_alone() -> None:
    model = build().double().eval()
    views = two_views().double()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tangents = {name: torch.randn_like(tensor) for name, tensor in weights.items()}

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            return self.model.outputs_for_loss(pixel_values=views)

    def outputs(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(Outputs(), {f"model.{name}": value for name, value in values.items()}, ())

    value, tangent = jvp(outputs, (weights,), (tangents,))
    step = 1e-6
    ahead, behind = (
        outputs({name: weights[name] + sign * step * tangents[name] for name in weights}) for sign in (1, -1)
    )
    torch.testing.assert_close(tangent, ((ahead - behind) / (2 * step)).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(tangent[:, 2:], torch.zeros_like(value[:, 2:]))


@pytest.mark.parametrize("config", [resnet_config, vit_config])
def test_a_checkpoint_keeps_the_target_frozen(config: Any, tmp_path: Path) -> None:
    model = build(config=config())
    shake(model.target)
    model.save_pretrained(tmp_path)
    loaded = BYOLForPreTraining.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.target.parameters())
    # Another program may have made a file without the online heads: they are drawn anew, the target stays.
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith("predictor.")},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    partly = BYOLForPreTraining.from_pretrained(tmp_path)
    assert same_weights(partly.target, model.target)
    assert all(tensor.isfinite().all() for tensor in partly.predictor.state_dict().values())
