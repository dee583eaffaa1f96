"""Pairs of tasks: for each the hypergradient against a dense solve in float64, a short run, and its export."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from bissl_hf import BiSSLModel, BiSSLTrainer, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.data.alternation import Stream
from bissl_hf.data.streams import model_randomness

from .trainers import make_args

ROWS, LENGTH = 12, 6
VIT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "hidden_dropout_prob": 0.0,
}  # fmt: skip
BERT = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": LENGTH, "num_labels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 8, "n_positions": LENGTH, "num_labels": 3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
SEGFORMER = {
    "num_channels": 1, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 6],
    "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1],
    "decoder_hidden_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip


class Rows(torch.utils.data.Dataset):
    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


@dataclass
class Pair:
    """Two models and the rows that they take."""

    models: Callable[[], tuple[Any, Any]]
    lower: Callable[[], Rows]
    upper: Callable[[], Rows]
    opened_by: Any
    unshared: tuple[str, ...] = ("pooler.",)


def views() -> Rows:
    return Rows(pixel_values=torch.rand(ROWS, 2, 1, 8, 8, dtype=torch.float64))


def single() -> Rows:
    return Rows(pixel_values=torch.rand(ROWS, 1, 8, 8, dtype=torch.float64))


def labelled(labels: torch.Tensor) -> Rows:
    return Rows(**single().columns, labels=labels)


def classes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, (ROWS, *shape))


def tokens() -> torch.Tensor:
    return torch.randint(2, 20, (ROWS, LENGTH))


def masked() -> Rows:
    ids = tokens()
    labels = ids.clone()
    labels[:, ::2] = -100
    return Rows(input_ids=ids.masked_fill(labels != -100, 1), labels=labels)


def simclr(config: Any, **settings: Any) -> SimCLRForPreTraining:
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(6, 5), **settings))


def mae() -> ViTMAEForPreTraining:
    decoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTMAEForPreTraining(ViTMAEConfig(**VIT, **{f"decoder_{name}": value for name, value in decoder.items()}))


def bert(model_class: Any) -> Any:
    return model_class(BertConfig(**BERT))


PAIRS = {
    "mae+classification": Pair(
        lambda: (mae(), ViTForImageClassification(ViTConfig(**VIT, num_labels=3))),
        single,
        lambda: labelled(classes()),
        AutoModelForImageClassification,
        ("pooler.", "*position_embeddings"),
    ),
    "masked_lm+sequence": Pair(
        lambda: (bert(BertForMaskedLM), bert(BertForSequenceClassification)),
        masked,
        lambda: Rows(input_ids=tokens(), labels=classes()),
        AutoModelForSequenceClassification,
    ),
    "masked_lm+tokens": Pair(
        lambda: (bert(BertForMaskedLM), bert(BertForTokenClassification)),
        masked,
        lambda: Rows(input_ids=tokens(), labels=classes(LENGTH)),
        AutoModelForTokenClassification,
    ),
    "causal_lm+sequence": Pair(
        lambda: (GPT2LMHeadModel(GPT2Config(**GPT2)), GPT2ForSequenceClassification(GPT2Config(**GPT2))),
        lambda: Rows(input_ids=(ids := tokens()), labels=ids),
        lambda: Rows(input_ids=tokens(), labels=classes()),
        AutoModelForSequenceClassification,
    ),
    "simclr+regression": Pair(
        lambda: (
            simclr(ViTConfig(**VIT)),
            ViTForImageClassification(ViTConfig(**VIT, num_labels=1, problem_type="regression")),
        ),
        views,
        lambda: labelled(torch.rand(ROWS, dtype=torch.float64)),
        AutoModelForImageClassification,
    ),
    "simclr+segmentation": Pair(
        lambda: (
            simclr(SegformerConfig(**SEGFORMER), feature_size=6),
            SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER)),
        ),
        views,
        lambda: labelled(classes(8, 8)),
        AutoModelForSemanticSegmentation,
    ),
}


def build(name: str, folder: Any, **settings: Any) -> BiSSLTrainer:
    torch.manual_seed(0)
    pair = PAIRS[name]
    model = BiSSLModel.from_models(*pair.models(), unshared_parameters=pair.unshared).double()
    steps = {"num_alternations": 2, "lower_steps": 2, "upper_steps": 1, "head_warmup_epochs": 1}
    return BiSSLTrainer(
        model, make_args(folder, **{**steps, **settings}), train_dataset=pair.upper(), lower_dataset=pair.lower()
    )


def dense_hypergradient(trainer: BiSSLTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """(I + H / (lambda + delta))^-1 of the upper gradient at theta_P plus gamma times that at theta_D, H built from
    gradients of the gradient; and the same with H = 0. delta is set so that the system is definite: models with new
    weights embed all images alike, where the pretext loss is steep and bent both ways."""
    model, args = trainer.model.train(), trainer.args
    theta = model.backbone_parameters("lower")
    key = trainer.streams.key(Stream.CURVATURE)
    with sdpa_kernel(SDPBackend.MATH), model_randomness(key):  # the other kernels have no second derivative
        loss = model.without_side_effects("lower")(**trainer.streams.read(key)).loss
    found = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True, materialize_grads=True)
    gradient = torch.cat([part.reshape(-1) for part in found])
    # All rows at once: entry i of the gradient is differentiated with the i-th unit vector.
    units = torch.eye(len(gradient), dtype=gradient.dtype)
    rows = torch.autograd.grad(
        gradient, theta, units, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
    batch = trainer.streams.read(trainer.streams.key(Stream.UPPER))

    def gradient_at(level: str, parameters: Any) -> torch.Tensor:
        upper_loss = model.without_side_effects(level)(**batch).loss
        parts = torch.autograd.grad(upper_loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    rhs = gradient_at("aligned", theta)
    direct = args.direct_weight * gradient_at("upper", model.backbone_parameters("upper"))
    hessian = torch.cat([part.reshape(len(rhs), -1) for part in rows], dim=1)
    args.damping = 2 * float(torch.linalg.matrix_norm(hessian, 2))
    system = torch.eye(len(rhs), dtype=rhs.dtype) + hessian / (args.proximal_weight + args.damping)
    return torch.linalg.solve(system, rhs) + direct, rhs + direct


@pytest.mark.parametrize("name", PAIRS)
def test_hypergradient_against_a_dense_solve(name: str, tmp_path: Any) -> None:
    trainer = build(name, tmp_path, solver_max_iterations=100)
    expected, without_curvature = dense_hypergradient(trainer)
    key = trainer.streams.key(Stream.UPPER)
    trainer.create_optimizer()
    trainer.training_step(trainer.model, {"key": key, "inputs": trainer.streams.sources[Stream.UPPER].read(key)})
    found = torch.cat([p.grad.reshape(-1) for p in trainer.model.backbone_parameters("upper")])
    by_curvature = (expected - without_curvature).norm()
    assert by_curvature > 1e-7 * expected.norm()
    assert (found - expected).norm() < 1e-5 * by_curvature


@pytest.mark.filterwarnings("ignore:The aligned model has batch norm")
@pytest.mark.parametrize("name", PAIRS)
def test_two_alternations_and_the_export(name: str, tmp_path: Any) -> None:
    trainer = build(name, tmp_path)
    before = [p.detach().clone() for p in trainer.model.backbone_parameters("lower")]
    trainer.train()
    moved = zip(before, trainer.model.backbone_parameters("lower"), strict=True)
    assert any(not torch.equal(one, other) for one, other in moved)
    trainer.save_model(tmp_path / "final")
    opened = PAIRS[name].opened_by.from_pretrained(tmp_path / "final", dtype=torch.float64)
    assert type(opened) is type(trainer.model.upper)
    assert all(tensor.isfinite().all() for tensor in opened.state_dict().values())
