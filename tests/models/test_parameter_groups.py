"""A learning rate of its own for the heads of a model."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from bissl_hf.models.parameter_groups import backbone_and_head_groups
from bissl_hf.optim.optimizers import build_optimizer

from ..conftest import tiny_model


def test_heads_have_their_own_rate_and_follow_the_schedule() -> None:
    model = tiny_model().lower
    next(iter(model.backbone.parameters())).requires_grad_(False)
    optimizer = build_optimizer(
        "sgd", backbone_and_head_groups(model, head_learning_rate=1e-4), learning_rate=0.01, weight_decay=0.0,
        options={}, field="optim",
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    backbone, heads = ({names[id(p)].split(".")[0] for p in group["params"]} for group in optimizer.param_groups)
    assert (backbone, heads) == ({"backbone"}, {"projection_head"})
    moved = sum(len(group["params"]) for group in optimizer.param_groups)
    assert moved == sum(parameter.requires_grad for parameter in model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 5e-5])


def test_a_tied_tensor_belongs_to_the_backbone_and_empty_groups_are_left_out() -> None:
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForMaskedLM(config)
    backbone, heads = backbone_and_head_groups(model, head_learning_rate=1.0)
    tied = model.get_input_embeddings().weight
    assert any(parameter is tied for parameter in backbone["params"])
    assert not any(parameter is tied for parameter in heads["params"])
    assert len(backbone_and_head_groups(model.bert, head_learning_rate=1.0)) == 1


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_learning_rate is -0\.1; it must be at least 0"):
        backbone_and_head_groups(tiny_model().lower, head_learning_rate=-0.1)
