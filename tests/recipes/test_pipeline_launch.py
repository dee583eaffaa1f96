"""The stages before and after BiSSL on two processes, one after the other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from bissl_hf import SimCLRForPreTraining, load_image_dataset
from bissl_hf.data.augment import EvalTransform
from bissl_hf.data.decoded import DecodedImages

from .runs import as_arguments, launch, resnet_config, write_splits
from .watching import watched, writers

COMMON = {
    "image_size": 16, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 5, "num_train_epochs": 2,
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
# Fine-tuning with what each process has found in each call.
NOTING = """
import json, os, sys
from bissl_hf.cli.finetuning import FineTuning
from bissl_hf.cli import finetune

found = {"search": [], "train": [], "test": []}

def noting(name):
    method = getattr(FineTuning, name)
    def noted(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        found[name].append(vars(result) if name == "search" else result)
        return result
    return noted

for name in found:
    setattr(FineTuning, name, noting(name))
finetune.main(sys.argv[2:])
with open(f"{sys.argv[1]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


def numbers(content: Any) -> list[float]:
    """All numbers in what JSON holds."""
    if isinstance(content, dict | list):
        parts = content.values() if isinstance(content, dict) else content
        return [number for part in parts for number in numbers(part)]
    return [float(content)] if isinstance(content, int | float) else []


def written_twice(notes: Path) -> list[str]:
    return [path for path, ranks in writers(notes).items() if len(ranks) > 1]


@pytest.mark.slow
@pytest.mark.distributed
def test_pre_training_and_fine_tuning_with_a_search_on_two_processes(tmp_path: Path) -> None:
    images = write_splits(tmp_path / "images")
    resnet_config().save_pretrained(tmp_path / "backbone")
    simclr, tuned = tmp_path / "simclr", tmp_path / "tuned"
    options = {
        **COMMON, "dataset": images, "knn_dataset": images, "backbone": tmp_path / "backbone",
        "backbone_init": "random", "projection_dims": [6, 5], "output_dir": simclr,
    }  # fmt: skip
    printed = launch("pretrain.py", as_arguments(options), processes=2, **watched(simclr, tmp_path / "first"))
    assert printed.count("The pretext model is in") == printed.count("\nkNN accuracy") == 1
    assert (simclr / "checkpoint-6" / "rng_state_1.pth").is_file(), "there were two processes"
    assert written_twice(tmp_path / "first") == []
    assert SimCLRForPreTraining.from_pretrained(simclr).config.projection_dims == [6, 5]
    learned = json.loads((simclr / "all_results.json").read_text())
    assert learned["train_steps"] == 6, "36 images in batches of 2 x 6, twice"
    assert all(map(math.isfinite, numbers(learned)))

    (tmp_path / "noting.py").write_text(NOTING)
    options = {**COMMON, "dataset": images, "model": simclr, "output_dir": tuned, "search_trials": 2, "seed": 5}
    arguments = [str(tmp_path / "found"), *as_arguments(options)]
    printed = launch(tmp_path / "noting.py", arguments, processes=2, **watched(tuned, tmp_path / "second"))
    assert printed.count("Fine-tuning with seed 5") == printed.count("The model is in") == 1
    assert written_twice(tmp_path / "second") == []
    assert "6 steps were taken on 2 processes" in (tuned / "README.md").read_text()
    results = json.loads((tuned / "all_results.json").read_text())
    both = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert all(map(math.isfinite, numbers([results, *both])))
    for name in ("search", "test"):
        assert both[0][name] == both[1][name]
    trained = [found["train"][0] for found in both]
    assert trained[0]["eval_accuracy"] == trained[1]["eval_accuracy"] == results["eval_accuracy"]["mean"]
    assert trained[0]["eval_loss"] == trained[1]["eval_loss"]
    assert both[0]["search"][0]["trials"] == results["search"]

    # The metrics are those of the model that is left, on images that do not divide into batches of 2 x 5.
    test = DecodedImages.from_dataset(load_image_dataset(images)["test"], image_size=16)
    rows = [test[row] for row in range(len(test))]
    inputs = EvalTransform(16)({"pixel_values": torch.stack([row["pixel_values"] for row in rows])}, (0,))
    labels = torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        outputs = AutoModelForImageClassification.from_pretrained(tuned).eval()(**inputs, labels=labels)
    assert results["test_loss"]["mean"] == pytest.approx(float(outputs.loss), rel=1e-5)
    accuracy = (outputs.logits.argmax(-1) == labels).double().mean()
    assert results["test_accuracy"]["mean"] == pytest.approx(float(accuracy))
