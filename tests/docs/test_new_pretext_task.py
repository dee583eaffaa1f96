"""The code of docs/new_pretext_task.md, run as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import ResNetForImageClassification

from bissl_hf import BiSSLModel
from bissl_hf.models.auto import PRETEXT_MODELS

from ..conftest import tiny_resnet_config

PAGE = Path(__file__).parents[2] / "docs" / "new_pretext_task.md"


def test_the_rotation_task_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    # The table finds the model in a module of this name, as it finds the others in theirs.
    module = types.ModuleType("bissl_hf.models.modeling_rotation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(PRETEXT_MODELS, "rotation", raising=False)
    monkeypatch.setitem(PRETEXT_MODELS, "rotation", "")  # restored in the end
    torch.manual_seed(0)
    source = ResNetForImageClassification(tiny_resnet_config())
    space = module.__dict__
    space.update(
        backbone=source, images=torch.rand(16, 1, 8, 8), labels=torch.arange(16) % 3, output_dir=str(tmp_path / "run")
    )
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), space)
    assert space["trainer"].state.global_step == 4
    assert space["lower_loss"].isfinite()
    assert space["upper_loss"].isfinite()

    images, lower = space["images"], space["pair"].lower.eval()
    with torch.no_grad():
        expected = []
        for turn in range(4):
            logits = lower.embed(torch.rot90(images, turn, dims=(2, 3)))
            expected += [-torch.log_softmax(row, dim=0)[turn] for row in logits]
        outputs = lower(pixel_values=images)
    assert outputs.loss.item() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert torch.equal(lower.loss_from_outputs(lower.outputs_from_embeddings(outputs.embeddings)), outputs.loss)
    space["pair"].save_pretrained(tmp_path / "pair")
    loaded = BiSSLModel.from_pretrained(tmp_path / "pair")
    assert torch.equal(loaded.eval()(level="lower", pixel_values=images).loss, outputs.loss)
