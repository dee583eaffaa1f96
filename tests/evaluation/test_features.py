"""Features of a backbone: rows, order, mode; and their layout."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ResNetForImageClassification

from bissl_hf.evaluation.features import extract_features, tsne_layout
from tests.conftest import tiny_resnet_config


@pytest.fixture
def classifier() -> ResNetForImageClassification:
    torch.manual_seed(0)
    model = ResNetForImageClassification(tiny_resnet_config()).train()
    # Statistics that differ from those of any batch, so that the mode shows.
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-1, 1)
    return model


def batches(sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    images = torch.rand(sum(sizes), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(sum(sizes)).flip(0)
    for image_part, label_part in zip(images.split(sizes), labels.split(sizes), strict=True):
        yield {"pixel_values": image_part, "labels": label_part}


def test_features_are_rows_in_order_from_evaluation_mode(classifier: ResNetForImageClassification) -> None:
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    features, labels = extract_features(classifier, batches((3, 4, 1)))
    np.testing.assert_array_equal(labels, np.arange(8)[::-1])
    assert classifier.training
    assert classifier.base_model.training
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    (whole,) = batches((8,))
    with torch.no_grad():
        # In evaluation mode rows do not depend on each other, so one at a time is the same.
        maps = [classifier.eval().resnet(image[None]).last_hidden_state[0] for image in whole["pixel_values"]]
    expected = torch.stack([m.mean(dim=(1, 2)) for m in maps]).numpy()
    assert features.shape == (8, 4)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_features_leave_a_model_in_evaluation_mode(classifier: ResNetForImageClassification) -> None:
    classifier.eval()
    extract_features(classifier, batches((4,)))
    assert not classifier.training
    assert not classifier.base_model.training


def test_features_have_no_gradient_and_are_float32(classifier: ResNetForImageClassification) -> None:
    classifier.to(torch.bfloat16)
    (batch,) = batches((4,))
    features, _ = extract_features(classifier, [{**batch, "pixel_values": batch["pixel_values"].bfloat16()}])
    assert features.dtype == np.float32
    assert all(parameter.grad is None for parameter in classifier.parameters())


def clusters(rows: int = 30) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    return random.normal(size=(rows, 6)) + 40 * np.eye(6)[labels], labels


def test_layout_keeps_clusters_together_and_is_the_same_again() -> None:
    features, labels = clusters()
    layout = tsne_layout(features, seed=3)
    assert layout.shape == (30, 2)
    np.testing.assert_array_equal(layout, tsne_layout(features, seed=3))
    distances = np.linalg.norm(layout[:, None] - layout[None], axis=-1) + 1e9 * np.eye(30)
    np.testing.assert_array_equal(labels[distances.argmin(axis=1)], labels)


def test_layout_of_four_rows() -> None:
    layout = tsne_layout(clusters(4)[0])
    assert layout.shape == (4, 2)
    assert np.isfinite(layout).all()


def test_layout_refuses_fewer_than_four_rows() -> None:
    with pytest.raises(ValueError, match="There are 3 rows; t-SNE needs at least 4"):
        tsne_layout(np.zeros((3, 5)))
