"""A checkpoint is replaced as a whole."""

import pytest
from transformers import BitImageProcessorPil, ResNetForImageClassification

from bissl_hf.models.saving import save_model

from ..conftest import tiny_resnet_config


def test_a_failure_leaves_what_was_there(tmp_path):
    model = ResNetForImageClassification(tiny_resnet_config())
    save_model(model, tmp_path / "model", BitImageProcessorPil())
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "preprocessor_config.json"}

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "model", Broken())
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files
    save_model(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != files["model.safetensors"]
