"""Both levels in one model, against models put together by hand."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
)

from bissl_hf import BiSSLConfig, BiSSLModel, SimCLRConfig, SimCLRForPreTraining

SIZE = 16


def resnet_config(**settings: Any) -> ResNetConfig:
    defaults = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return ResNetConfig(**{**defaults, **settings})


def vit_config(**settings: Any) -> ViTConfig:
    return ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIZE,
        patch_size=8,
        encoder_stride=8,
        num_labels=3,
        **settings,
    )


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=3,
        tie_word_embeddings=True,
    )


def simclr(backbone: Any) -> SimCLRForPreTraining:
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, projection_dims=(7, 5)))


Pair = tuple[PreTrainedModel, PreTrainedModel]
PAIRS: dict[str, Callable[[], Pair]] = {
    "resnet": lambda: (simclr(resnet_config()), ResNetForImageClassification(resnet_config())),
    "vit": lambda: (simclr(vit_config()), ViTForImageClassification(vit_config())),
    "bert": lambda: (BertForMaskedLM(bert_config()), BertForSequenceClassification(bert_config())),
}


def make_pair(name: str) -> Pair:
    torch.manual_seed(0)
    lower, upper = PAIRS[name]()
    with torch.no_grad():  # nothing at a special value: zero biases, unit norms and initial statistics all move
        for tensor in [*lower.parameters(), *upper.parameters()]:
            tensor += 0.05 * torch.randn_like(tensor)
        for tensor in [*lower.buffers(), *upper.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return lower, upper


def make_inputs(name: str, level: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "bert":
        ids = torch.randint(1, 20, (4, 6), generator=generator)
        return {"input_ids": ids, "labels": ids if level == "lower" else torch.tensor([0, 1, 2, 0])}
    if level != "lower":
        return {
            "pixel_values": torch.rand(4, 3, SIZE, SIZE, generator=generator),
            "labels": torch.tensor([0, 1, 2, 0]),
        }
    return {"pixel_values": torch.rand(4, 2, 3, SIZE, SIZE, generator=generator)}


@pytest.fixture(params=PAIRS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def joined(name: str, **settings: Any) -> BiSSLModel:
    return BiSSLModel.from_models(*make_pair(name), **settings)


def apart(name: str) -> BiSSLModel:
    """A model whose levels have gone separate ways, so that a mix-up shows; without dropout, so that runs agree."""
    model = joined(name)
    with torch.no_grad():
        for parameter in model.upper.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for buffer in model.upper.buffers():
            if buffer.is_floating_point():
                buffer += 1.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = snapshot(module)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def assembled(model: BiSSLModel) -> PreTrainedModel:
    """The aligned model by hand: the upper one with each common tensor below the base model from the lower one."""
    result = copy.deepcopy(model.upper)
    source = {**dict(model.lower.base_model.named_parameters()), **dict(model.lower.base_model.named_buffers())}
    with torch.no_grad():
        for key, tensor in [*result.base_model.named_parameters(), *result.base_model.named_buffers()]:
            if key in source:
                tensor.copy_(source[key])
    return result


# What is shared


def test_everything_below_the_base_models_is_shared_but_the_pooler(name: str) -> None:
    lower, upper = make_pair(name)
    model = BiSSLModel.from_models(lower, upper)
    below = [key for key, _ in lower.base_model.named_parameters()]
    assert model.shared_parameter_names == tuple(below)
    assert {k for k, _ in upper.base_model.named_parameters()} - set(below) == (
        {"pooler.dense.weight", "pooler.dense.bias"} if name == "bert" else set()
    )
    for parameters, level in (
        (model.backbone_parameters("lower"), "lower"),
        (model.backbone_parameters("upper"), "upper"),
    ):
        named = dict(getattr(model, level).base_model.named_parameters())
        assert all(p is named[key] for p, key in zip(parameters, model.shared_parameter_names, strict=True))


def test_heads_are_the_complement(name: str) -> None:
    model = joined(name)
    for level in ("lower", "upper"):
        backbone = model.backbone_parameters(level)
        head = model.head_parameters(level)
        assert {id(p) for p in head}.isdisjoint({id(p) for p in backbone})
        assert {id(p) for p in (*head, *backbone)} == {id(p) for p in getattr(model, level).parameters()}
        assert len(head) > 0


def test_a_tied_tensor_belongs_to_the_backbone() -> None:
    model = joined("bert")
    tied = model.lower.cls.predictions.decoder.weight
    assert tied is model.lower.bert.embeddings.word_embeddings.weight
    assert not any(p is tied for p in model.head_parameters("lower"))
    assert any(p is model.upper.bert.pooler.dense.weight for p in model.head_parameters("upper"))


def test_theta_d_starts_from_theta_p(name: str) -> None:
    lower, upper = make_pair(name)
    before = snapshot(lower), snapshot(upper)
    model = BiSSLModel.from_models(lower, upper)
    assert unchanged(model.lower, before[0])
    theirs = dict(model.lower.base_model.named_parameters()) | dict(model.lower.base_model.named_buffers())
    own = [*model.upper.base_model.named_parameters(), *model.upper.base_model.named_buffers()]
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in own if key in theirs)
    kept = dict(model.upper.named_parameters())
    assert all(torch.equal(kept[key], tensor) for key, tensor in before[1].items() if key.startswith("classifier"))
    storages = [{t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (model.lower, model.upper)]
    assert storages[0].isdisjoint(storages[1])


def test_frozen_common_parameters_are_copied_but_not_shared() -> None:
    lower, upper = make_pair("resnet")
    for model in (lower, upper):
        model.base_model.embedder.requires_grad_(False)
    frozen = {f"embedder.{key}" for key, _ in lower.base_model.embedder.named_parameters()}
    model = BiSSLModel.from_models(lower, upper)
    assert frozen.isdisjoint(model.shared_parameter_names)
    assert set(model.shared_parameter_names) | frozen == {key for key, _ in lower.base_model.named_parameters()}
    for level in (model.lower, model.upper):
        assert not any(p.requires_grad for p in level.base_model.embedder.parameters())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.upper.resnet.embedder.parameters(), model.lower.backbone.embedder.parameters(), strict=True
        )
    )
    heads = {id(p) for p in (*model.head_parameters("lower"), *model.head_parameters("upper"))}
    assert heads.isdisjoint({id(p) for p in model.lower.base_model.embedder.parameters()})


def test_refuses_backbones_of_different_depth() -> None:
    shallow, deep = resnet_config(), resnet_config(depths=[1, 2])
    names = [{k for k, _ in ResNetForImageClassification(c).resnet.named_parameters()} for c in (shallow, deep)]
    assert names[0] < names[1]  # every name of one is found in the other
    with pytest.raises(ValueError, match=r"in the upper model.* encoder\.stages\.1\.layers\.1.*unshared_parameters"):
        BiSSLModel.from_models(simclr(shallow), ResNetForImageClassification(deep))
    with pytest.raises(ValueError, match=r"in the lower model.* encoder\.stages\.1\.layers\.1.*unshared_parameters"):
        BiSSLModel.from_models(simclr(deep), ResNetForImageClassification(shallow))


def test_refuses_another_shape() -> None:
    other = vit_config()
    other.image_size = 2 * SIZE
    with pytest.raises(ValueError, match=r"embeddings\.position_embeddings \(1, 5, 8\).*\(1, 17, 8\)"):
        BiSSLModel.from_models(simclr(vit_config()), ViTForImageClassification(other))


@pytest.mark.parametrize("pattern", ["embeddings.position", "*position_embeddings"])
def test_unshared_parameters_permit_a_difference(pattern: str, tmp_path: Path) -> None:
    other = vit_config()
    other.image_size = 2 * SIZE
    model = BiSSLModel.from_models(
        simclr(vit_config()), ViTForImageClassification(other), unshared_parameters=("pooler.", pattern)
    )
    assert "embeddings.position_embeddings" not in model.shared_parameter_names
    assert any(p is model.upper.vit.embeddings.position_embeddings for p in model.head_parameters("upper"))
    model.save_pretrained(tmp_path)
    assert BiSSLModel.from_pretrained(tmp_path).shared_parameter_names == model.shared_parameter_names


def test_refuses_models_without_a_common_backbone() -> None:
    with pytest.raises(ValueError, match="share no backbone"):
        BiSSLModel.from_models(make_pair("bert")[0], make_pair("resnet")[1])


def test_refuses_what_is_no_model() -> None:
    lower, _ = make_pair("resnet")
    with pytest.raises(TypeError, match="upper is a Linear"):
        BiSSLModel.from_models(lower, nn.Linear(2, 2))
    for given in ("Trainer", "os", None):
        config = BiSSLConfig(lower.config, lower.config, lower_class="SimCLRForPreTraining", upper_class=given)
        with pytest.raises(
            ValueError, match=r"upper_class is .*, which is no model class of transformers or bissl_hf"
        ):
            BiSSLModel(config)


def test_keeps_dtype_and_attention() -> None:
    lower, upper = (ViTForMaskedImageModeling, ViTForImageClassification)
    pair = [c._from_config(vit_config(), attn_implementation="eager").double() for c in (lower, upper)]
    model = BiSSLModel.from_models(*pair, unshared_parameters=("embeddings.mask_token",))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    norms = [ResNetForImageClassification(resnet_config()).double() for _ in range(2)]
    mean = norms[0].resnet.embedder.embedder.normalization.running_mean.fill_(1 / 3)  # not a number of float32
    joined_mean = BiSSLModel.from_models(*norms).lower.resnet.embedder.embedder.normalization.running_mean
    assert torch.equal(joined_mean, mean)
    for module in (*pair, model.lower, model.upper):
        assert module.config._attn_implementation == "eager"


# Forward passes


def test_lower_and_upper_are_the_models_themselves(name: str) -> None:
    model = apart(name)
    for level in ("lower", "upper"):
        reference = copy.deepcopy(getattr(model, level))
        inputs = make_inputs(name, level)
        torch.testing.assert_close(model(level=level, **inputs).loss, reference(**inputs).loss, rtol=0, atol=0)
        assert unchanged(getattr(model, level), snapshot(reference))  # the same running statistics too


@pytest.mark.parametrize("training", [True, False])
def test_aligned_equals_a_model_put_together_by_hand(name: str, training: bool) -> None:
    model = apart(name).double().train(training)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make_inputs(name, "aligned").items()}
    reference = assembled(model)
    outputs, expected = model(**inputs), reference(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-12)
    assert (outputs.logits - copy.deepcopy(model.upper)(**inputs).logits).abs().max() > 1e-4

    outputs.loss.backward()
    expected.loss.backward()
    wanted = {id(p): q for p, q in zip(model.upper.parameters(), reference.parameters(), strict=True)}
    shared = zip(model.backbone_parameters("lower"), model.backbone_parameters("upper"), strict=True)
    pairs = [(below, wanted[id(above)]) for below, above in shared]
    pairs += [(p, wanted[id(p)]) for p in model.head_parameters("upper")]
    for own, other in pairs:  # theta_P itself, and phi_D
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-12)
    assert all(p.grad is None for p in (*model.backbone_parameters("upper"), *model.head_parameters("lower")))


@pytest.mark.parametrize("level", ["lower", "upper", "aligned"])
def test_pure_passes_move_nothing(name: str, level: str) -> None:
    model = apart(name)
    before, inputs = snapshot(model), make_inputs(name, level)
    first, second = (model.without_side_effects(level)(**inputs).loss for _ in range(2))
    assert torch.equal(first, second)
    assert unchanged(model, before)
    torch.testing.assert_close(first, model(level=level, **inputs).loss, rtol=0, atol=1e-6)


def test_aligned_passes_move_no_statistics() -> None:
    model = apart("resnet")
    before = snapshot(model)
    model(**make_inputs("resnet", "aligned"))
    assert unchanged(model, before)
    model(level="upper", **make_inputs("resnet", "upper"))
    assert not unchanged(model.upper, {k[6:]: v for k, v in before.items() if k.startswith("upper.")})


def test_refuses_an_unknown_level() -> None:
    model = joined("resnet")
    for call in (model.forward, model.without_side_effects):
        with pytest.raises(ValueError, match="level is 'middle'; it must be one of lower, upper, aligned"):
            call("middle")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # the older name, 2026-11
def test_layers_computed_again_see_the_weights_of_the_aligned_pass() -> None:
    """Activation checkpointing computes layers again in the backward pass: with theta_P, not with the live theta_D."""
    gradients = []
    for checkpointed in (False, True):
        model = joined("vit").train()
        with torch.no_grad():
            for parameter in model.backbone_parameters("lower"):
                parameter.add_(0.1)
        if checkpointed:
            model.upper.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = (*model.backbone_parameters("lower"), *model.head_parameters("upper"))
        loss = model(**make_inputs("vit", "aligned")).loss
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for plain, saving in zip(*gradients, strict=True):
        assert (plain is None) == (saving is None)
        if plain is not None:
            torch.testing.assert_close(saving, plain)


def test_trainer_must_not_scale_the_loss() -> None:
    assert BiSSLModel.accepts_loss_kwargs is False


# Saving and loading


def test_round_trip(name: str, tmp_path: Path) -> None:
    model = apart(name)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BiSSLConfig)
    loaded, report = BiSSLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert unchanged(loaded, snapshot(model))
    assert loaded.shared_parameter_names == model.shared_parameter_names
    inputs = make_inputs(name, "aligned")
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0)
    if name == "bert":
        assert loaded.lower.cls.predictions.decoder.weight is loaded.lower.bert.embeddings.word_embeddings.weight


def test_round_trip_keeps_frozen_parameters_frozen(tmp_path: Path) -> None:
    lower, upper = make_pair("resnet")
    for level in (lower, upper):
        level.base_model.embedder.requires_grad_(False)
    model = BiSSLModel.from_models(lower, upper)
    model.save_pretrained(tmp_path)
    loaded = BiSSLModel.from_pretrained(tmp_path)
    assert loaded.shared_parameter_names == model.shared_parameter_names
    flags = [[(k, p.requires_grad) for k, p in m.named_parameters()] for m in (model, loaded)]
    assert flags[0] == flags[1]


# What users take away


def test_aligned_model_is_a_native_copy(name: str) -> None:
    model = apart(name)
    before = snapshot(model)
    native = model.aligned_model()
    assert type(native) is type(model.upper)
    assert unchanged(native, snapshot(assembled(model)))
    with torch.no_grad():
        for tensor in [*native.parameters(), *native.buffers()]:
            tensor.zero_()
    assert unchanged(model, before)


def test_aligned_model_keeps_tied_weights_tied() -> None:
    lower, upper = BertForSequenceClassification(bert_config()), BertForMaskedLM(bert_config())
    native = BiSSLModel.from_models(lower, upper).aligned_model()
    assert native.cls.predictions.decoder.weight is native.bert.embeddings.word_embeddings.weight
    assert torch.equal(native.bert.embeddings.word_embeddings.weight, lower.bert.embeddings.word_embeddings.weight)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["bissl_hf"] = None
import torch, transformers
for number in range(1, len(sys.argv), 3):
    folder, auto, name = sys.argv[number : number + 3]
    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    bad = [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]]
    assert not bad, bad
    assert type(model).__name__ == name, type(model)
    transformers.AutoModel.from_pretrained(folder)
    torch.save(model.state_dict(), folder + ".pt")
"""
AUTO = {"resnet": "AutoModelForImageClassification", "bert": "AutoModelForSequenceClassification"}


@pytest.mark.slow
def test_exports_open_without_the_package(tmp_path: Path) -> None:
    expected, arguments = {}, []
    for name, auto in AUTO.items():
        model, folder = apart(name), tmp_path / name / "out"
        before = snapshot(model)
        exported = model.export(folder, recalibrate_on=[make_inputs(name, "upper")] * 2)
        assert unchanged(model, before)
        assert not exported.training
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        expected[f"{folder}.pt"] = exported.state_dict()
        arguments += [str(folder), auto, type(model.upper).__name__]
    code = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for file, wanted in expected.items():
        state = torch.load(file, weights_only=True)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_export_estimates_batch_norm_statistics_anew(tmp_path: Path) -> None:
    model = apart("resnet").double()
    images = [torch.rand(4, 3, SIZE, SIZE, dtype=torch.float64) for _ in range(3)]
    exported = model.export(tmp_path, recalibrate_on=[{"pixel_values": image} for image in images])
    convolution = model.lower.backbone.embedder.embedder.convolution
    means = torch.stack([convolution(image).mean(dim=(0, 2, 3)) for image in images]).mean(dim=0)
    norm = exported.resnet.embedder.embedder.normalization
    torch.testing.assert_close(norm.running_mean, means, rtol=0, atol=1e-12)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert unchanged(loaded, snapshot(exported))


def test_export_warns_of_statistics_of_pretext_views(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="pass recalibrate_on"):
        joined("resnet").export(tmp_path)
    joined("vit").export(tmp_path)  # no batch norm, no warning


def test_export_writes_the_processor_and_replaces_an_older_export(tmp_path: Path) -> None:
    first, second = apart("vit"), joined("vit")
    (tmp_path / "notes.txt").write_text("kept")
    first.export(tmp_path, processing_class=ViTImageProcessor())
    exported = second.export(tmp_path, processing_class=ViTImageProcessor())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("notes.txt", "config.json", "model.safetensors", "preprocessor_config.json")
    }
    assert unchanged(AutoModelForImageClassification.from_pretrained(tmp_path), snapshot(exported))


class FailingProcessor:
    def save_pretrained(self, directory: str) -> None:
        raise OSError("disk full")


def test_a_failed_export_leaves_the_older_one(tmp_path: Path) -> None:
    apart("vit").export(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        joined("vit").export(tmp_path, processing_class=FailingProcessor())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_export_refuses_no_batch_for_batch_norm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass at least one"):
        joined("resnet").export(tmp_path / "out", recalibrate_on=[])
    assert not (tmp_path / "out").exists()
