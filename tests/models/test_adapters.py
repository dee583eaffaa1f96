"""LoRA in both levels: what is shared, what is stored, what users take away. The hypergradient and whole runs are in
`tests/trainer/test_adapters.py`."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.models import adapters
from bissl_hf.models.adapters import add_lora, usual_targets
from bissl_hf.models.configuration_byol import BYOLConfig
from bissl_hf.models.modeling_byol import BYOLForPreTraining

SIZE = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4, "num_channels": 1,
}  # fmt: skip


def vit_config(**settings) -> ViTConfig:
    return ViTConfig(**{**SIZE, "num_labels": 3, "hidden_dropout_prob": 0.0, **settings})


# Their names differ between releases of transformers.
TARGETS = list(usual_targets(ViTForImageClassification(vit_config())))


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **settings})


def pair(**settings):
    torch.manual_seed(0)
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=vit_config(**settings), projection_dims=(6, 5)))
    return lower, ViTForImageClassification(vit_config(**settings))


def adapted(way: str = "add_adapter", **settings) -> BiSSLModel:
    lower, upper = pair(**settings)
    if way == "get_peft_model":
        return BiSSLModel.from_models(get_peft_model(lower, lora()), get_peft_model(upper, lora()))
    lower.add_adapter(lora())
    upper.add_adapter(lora())
    return BiSSLModel.from_models(lower, upper)


def disturb(model: BiSSLModel) -> BiSSLModel:
    """Moves the levels apart, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def stored_bytes(*modules) -> int:
    """Bytes of the storages that the tensors of modules are in, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules
        for tensor in module.state_dict().values()
    }
    return sum(storages.values())


def images(rows: int = 3) -> torch.Tensor:
    return torch.rand((rows, 1, 8, 8), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_the_adapters_are_shared_and_heads_are_trained(way):
    model = adapted(way)
    assert len(model.shared_parameter_names) == 2 * 2 * 2
    assert all("lora_" in name for name in model.shared_parameter_names)
    for theta_p, theta_d in zip(model.backbone_parameters("lower"), model.backbone_parameters("upper"), strict=True):
        assert theta_p is not theta_d
        assert torch.equal(theta_p, theta_d)
    heads = {name for name, _ in model.lower.named_parameters() if not name.startswith("backbone.")}
    own = {id(parameter) for parameter in model.head_parameters("lower")}
    assert {name for name, p in model.lower.named_parameters() if id(p) in own} == heads
    assert [p.shape for p in model.head_parameters("upper")] == [(3, 8), (3,)]


def test_the_models_given_are_not_changed():
    lower, upper = pair()
    lower.add_adapter(lora())
    upper.add_adapter(lora())
    flags = [p.requires_grad for p in upper.parameters()]
    before = {name: value.clone() for name, value in upper.state_dict().items()}
    disturb(BiSSLModel.from_models(lower, upper))
    assert [p.requires_grad for p in upper.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in upper.state_dict().items())


def test_the_frozen_backbone_is_one_set_of_tensors_with_the_lower_values():
    lower, upper = pair()
    frozen = sum(p.numel() * p.element_size() for p in lower.backbone.parameters())
    for model in (lower, upper):
        model.add_adapter(lora())
    joined = BiSSLModel.from_models(lower, upper)
    assert stored_bytes(joined.lower) + stored_bytes(joined.upper) - stored_bytes(joined) == frozen
    assert stored_bytes(lower, upper) - stored_bytes(joined) == frozen
    names = [name for name, _ in lower.backbone.named_parameters() if name.endswith("base_layer.weight")]
    assert len(names) == 4
    for name in names:
        assert joined.upper.vit.get_parameter(name) is joined.lower.backbone.get_parameter(name)
        assert torch.equal(joined.lower.backbone.get_parameter(name), lower.backbone.get_parameter(name))


def test_a_move_to_another_dtype_keeps_one_set():
    model = adapted()
    before = stored_bytes(model.lower) + stored_bytes(model.upper) - stored_bytes(model)
    model.double()
    assert stored_bytes(model.lower) + stored_bytes(model.upper) - stored_bytes(model) == 2 * before > 0


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_round_trip_stores_the_frozen_backbone_once(way, tmp_path):
    model = disturb(adapted(way))
    model.save_pretrained(tmp_path)
    on_disk = sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "model.safetensors").values()
    )
    assert on_disk == stored_bytes(model)
    loaded, report = BiSSLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert stored_bytes(loaded) == stored_bytes(model)
    assert loaded.shared_parameter_names == model.shared_parameter_names
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == trained


def test_frozen_parts_without_adapters_are_stored_once_too(tmp_path):
    lower, upper = pair()
    for model in (lower, upper):
        model.base_model.embeddings.requires_grad_(False)
    joined = disturb(BiSSLModel.from_models(lower, upper))
    size = sum(p.numel() * p.element_size() for p in lower.backbone.embeddings.parameters())
    assert stored_bytes(joined.lower) + stored_bytes(joined.upper) - stored_bytes(joined) == size
    joined.save_pretrained(tmp_path)
    loaded = BiSSLModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in joined.state_dict().items())


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_export_merges_into_a_native_model(way, tmp_path):
    model = disturb(adapted(way)).eval()
    expected = model(pixel_values=images()).logits
    model.export(tmp_path)
    exported = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(exported) is ViTForImageClassification
    assert not [name for name in exported.state_dict() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(exported(pixel_values=images()).logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(model(pixel_values=images()).logits, expected), "the export has changed the model"


def test_export_opens_without_the_package_and_peft(tmp_path):
    disturb(adapted()).export(tmp_path)
    code = (
        "import sys; sys.modules['peft'] = sys.modules['bissl_hf'] = None\n"
        "from transformers import AutoModelForImageClassification\n"
        f"print(type(AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ViTForImageClassification"


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_the_adapter_alone_is_opened_by_peft(way, tmp_path):
    model = disturb(adapted(way)).eval()
    expected = model(pixel_values=images()).logits
    model.export(tmp_path, adapter_only=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    base = ViTForImageClassification(vit_config())
    base.vit.load_state_dict(pair()[0].backbone.state_dict(), strict=False)
    opened = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    torch.testing.assert_close(opened.eval()(pixel_values=images()).logits, expected, rtol=0, atol=1e-6)
    opened(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in opened.parameters() if p.requires_grad), "fine-tuning goes on from it"


def test_modules_to_save_are_heads_too(tmp_path):
    lower, upper = pair()
    lower.add_adapter(lora())
    peft_model = get_peft_model(upper, lora(modules_to_save=["classifier"]))
    model = disturb(BiSSLModel.from_models(lower, peft_model)).eval()
    expected = model(pixel_values=images()).logits
    assert [p.shape for p in model.head_parameters("upper")] == [(3, 8), (3,)]
    model.export(tmp_path)
    exported = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(exported(pixel_values=images()).logits, expected, rtol=0, atol=1e-6)


def test_adapters_keep_a_format_of_their_own(tmp_path):
    lower, upper = pair()
    for model in (lower, upper):
        model.to(torch.bfloat16).add_adapter(lora())
    joined = BiSSLModel.from_models(lower, upper)
    assert {p.dtype for p in joined.backbone_parameters("lower")} == {
        p.dtype for n, p in lower.named_parameters() if "lora_" in n
    }
    assert joined.upper.classifier.weight.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied_and_stored_once(tmp_path):
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    lower, upper = BertForMaskedLM(config), BertForSequenceClassification(config)
    for model in (lower, upper):
        add_lora(model, rank=2)
    joined = disturb(BiSSLModel.from_models(lower, upper))
    embeddings = joined.lower.bert.embeddings.word_embeddings.weight
    assert joined.lower.cls.predictions.decoder.weight is embeddings
    assert joined.upper.bert.embeddings.word_embeddings.weight is embeddings
    assert not embeddings.requires_grad
    joined.save_pretrained(tmp_path)
    loaded = BiSSLModel.from_pretrained(tmp_path)
    assert stored_bytes(loaded) == stored_bytes(joined)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in joined.state_dict().items())


def test_fixed_positions_of_a_decoder_stay_fixed():
    lower = ViTMAEForPreTraining(
        ViTMAEConfig(
            **SIZE,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=12,
        )
    )
    upper = ViTForImageClassification(vit_config())
    for model in (lower, upper):
        add_lora(model, rank=2)
    joined = BiSSLModel.from_models(lower, upper, unshared_parameters=("pooler.", "embeddings."))
    frozen = {
        name for name, p in joined.lower.named_parameters() if not p.requires_grad and name.startswith("decoder.")
    }
    assert frozen == {"decoder.decoder_pos_embed"}


# LoRA by its few settings


def test_add_lora_adapts_the_base_model_only():
    lower = ViTMAEForPreTraining(
        ViTMAEConfig(
            **SIZE,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=12,
        )
    )
    add_lora(lower, rank=4, alpha=8)
    names = [name for name, _ in lower.named_parameters() if "lora_" in name]
    assert len(names) == 8
    assert all(name.startswith("vit.") for name in names)
    config = lower.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"rank": 2, "dropout": 1.0}, "lora_dropout is 1.0; it must be at least 0 and below 1"),
        ({"rank": 2, "targets": ["qqq"]}, "lora_target is 'qqq', which is no layer with weights of ViTModel"),
    ],
)
def test_add_lora_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(ViTForImageClassification(vit_config()), **settings)


def test_usual_targets_refuses_a_model_without_attention():
    with pytest.raises(ValueError, match="has no layers of a name that LoRA usually adapts"):
        usual_targets(torch.nn.Linear(2, 2))


def test_refuses_adapters_without_peft(monkeypatch, tmp_path):
    adapted().save_pretrained(tmp_path)
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs peft, which is not installed; install the extra: bissl_hf\[peft\]"):
        BiSSLModel.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="LoRA needs peft"):
        add_lora(pair()[1], rank=2)


def test_refuses_adapters_in_one_level():
    lower, upper = pair()
    upper.add_adapter(lora())
    with pytest.raises(ValueError, match="upper has adapters and lower has none"):
        BiSSLModel.from_models(lower, upper)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_refuses_several_adapters():
    lower, upper = pair()
    lower.add_adapter(lora())
    for name in ("one", "two"):
        upper.add_adapter(lora(), name)
    with pytest.raises(ValueError, match=r"has 2 adapters \(one, two\); a level takes one"):
        BiSSLModel.from_models(lower, upper)


def test_refuses_a_moving_target():
    lower = BYOLForPreTraining(BYOLConfig(backbone_config=vit_config(), projection_dims=(6, 5), predictor_dims=(6, 5)))
    upper = pair()[1]
    for model in (lower, upper):
        add_lora(model, rank=2)
    with pytest.raises(ValueError, match="whose moving target does not follow adapters"):
        BiSSLModel.from_models(lower, upper)


def test_refuses_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="adapter_only is true, and ViTForImageClassification has no adapters"):
        BiSSLModel.from_models(*pair()).export(tmp_path, adapter_only=True)
