"""The commands of the pages on families of backbones run, on tiny models under the names that the pages give."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTMAEConfig, ViTMAEForPreTraining

from bissl_hf.cli import align, finetune, predict, pretrain

from .pages import ROOT
from .test_commands import commands_of
from .test_examples import workspace, write_images  # noqa: F401

FAMILIES = ("dino.md", "resnet_from_scratch.md", "vit_mae.md")
SIZE = 28
_RUN = {"image_size": SIZE, "use_cpu": True, "disable_tqdm": True}
_TINY = {
    "pretrain": {
        **_RUN, "num_train_epochs": 1, "per_device_train_batch_size": 8, "backbone": "microsoft/resnet-18",
        "projection_dims": "6 5", "knn_images": 16,
    },
    "align": {
        **_RUN, "num_alternations": 1, "lower_steps": 2, "upper_steps": 1, "per_device_lower_batch_size": 8,
        "per_device_train_batch_size": 8, "head_warmup_epochs": 1,
    },
    "finetune": {**_RUN, "num_train_epochs": 1, "seeds": 1},
    "predict": {"use_cpu": True},
}  # fmt: skip
_MAINS = {"pretrain": pretrain.main, "align": align.main, "finetune": finetune.main, "predict": predict.main}


def write_models() -> None:
    """Writes tiny models into the working directory, under the names that the Hub has."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size, mlp_ratio=2)).save_pretrained("facebook/dinov2-small")
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**size, **decoder, intermediate_size=12, decoder_intermediate_size=12)
    ViTMAEForPreTraining(config).save_pretrained("facebook/vit-mae-base")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("page", FAMILIES)
def test_the_commands_of_a_family_run(page: str, workspace: Path) -> None:  # noqa: F811
    write_models()
    shutil.rmtree(workspace / "outputs")
    write_images(workspace / "path/to/new_images", 3, seed=3)
    for name, given in commands_of(ROOT / "docs" / page):
        smaller = [word for field, value in _TINY[name].items() for word in (f"--{field}", *str(value).split())]
        _MAINS[name]([*given, *smaller])
    for folder in ("outputs/dino", "outputs/aligned", "outputs/mae"):
        if folder in (ROOT / "docs" / page).read_text(encoding="utf-8"):
            assert (workspace / folder / "model.safetensors").exists()
