"""The running check of pre-training."""

import numpy as np
import pytest
import torch

from bissl_hf.trainer.knn_check import KnnCheck

from ..conftest import TinyImages
from .test_pretext_trainer import make_trainer

REFERENCE, HELD_OUT = TinyImages(14, seed=1), TinyImages(9, seed=2)


def features(model, dataset: TinyImages) -> np.ndarray:
    with torch.no_grad():
        pooled = model.backbone.eval()(dataset.images).pooler_output.flatten(1).double().numpy()
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def accuracy_by_loops(model, neighbors: int) -> float:
    """The vote of the nearest neighbours, each weighted by exp(similarity / 0.07)."""
    known, asked, right = features(model, REFERENCE), features(model, HELD_OUT), 0
    for row, label in zip(asked, HELD_OUT.labels.tolist(), strict=True):
        similarity = known @ row
        votes = np.zeros(3)
        for index in np.argsort(-similarity)[:neighbors]:
            votes[REFERENCE.labels[index]] += np.exp((similarity[index] - similarity.max()) / 0.07)
        right += int(votes.argmax() == label)
    return right / len(asked)


def test_it_measures_the_backbone_by_nearest_neighbours(tmp_path):
    trainer = make_trainer(tmp_path)
    for neighbors in (1, 5):
        check = KnnCheck(trainer, REFERENCE, HELD_OUT, neighbors=neighbors)
        assert check.measure() == {"knn_accuracy": pytest.approx(accuracy_by_loops(trainer.model, neighbors))}


def test_it_logs_every_so_many_epochs_and_at_the_end_and_changes_nothing(tmp_path):
    plain, checked = (make_trainer(tmp_path / name, num_train_epochs=5) for name in ("plain", "checked"))
    checked.add_callback(KnnCheck(checked, REFERENCE, HELD_OUT, every=2))
    for trainer in (plain, checked):
        trainer.train()
    assert [row["epoch"] for row in checked.state.log_history if "knn_accuracy" in row] == [2, 4, 5]
    assert [row["epoch"] for row in checked.state.log_history if "loss" in row] == [1, 2, 3, 4, 5]
    first, second = plain.model.state_dict(), checked.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["every", "neighbors"])
def test_it_refuses_counts_below_one(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        KnnCheck(make_trainer(tmp_path), REFERENCE, HELD_OUT, **{name: 0})


def test_it_measures_another_model_and_other_figures_of_the_held_out_features(tmp_path):
    trainer, other = make_trainer(tmp_path / "one"), make_trainer(tmp_path / "other")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    check = KnnCheck(
        trainer, REFERENCE, HELD_OUT, neighbors=3, model=lambda: other.model, feature_figures={"rows": len}
    )
    assert check.measure() == {"knn_accuracy": pytest.approx(accuracy_by_loops(other.model, 3)), "rows": 9}
