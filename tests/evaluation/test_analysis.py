"""The report puts together what its parts measure."""

import numpy as np
import pytest

from bissl_hf.evaluation.analysis import cka_matrix, report_features
from bissl_hf.evaluation.features import with_one_class
from bissl_hf.evaluation.geometry import class_scatter, linear_cka, mean_silhouette
from bissl_hf.evaluation.metrics import eleven_point_map
from bissl_hf.evaluation.probes import knn_accuracy, knn_scores, linear_probe


def splits(*, several: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    made = {}
    for name, rows in (("train", 60), ("validation", 30), ("test", 40)):
        labels = np.arange(rows) % 3
        features = random.normal(size=(rows, 4)) + np.eye(4)[labels]
        hot = np.eye(3)[labels]
        hot[::4] = np.maximum(hot[::4], np.roll(hot[::4], 1, axis=1))
        made[name] = (features, hot if several else labels)
    return made


def test_report_of_one_class_per_image() -> None:
    data = splits(several=False)
    report = report_features(data, num_classes=3, neighbors=5)
    assert report.knn == knn_accuracy(*data["train"], *data["test"], neighbors=5)
    assert report.probe == linear_probe(data["train"], data["validation"], data["test"]).score
    assert report.silhouette == mean_silhouette(*data["test"])
    scatter = class_scatter(*data["test"])
    assert report.within_class_scatter == scatter.within
    assert report.scatter_ratio == scatter.between / scatter.within


def test_report_of_several_classes_per_image() -> None:
    data = splits(several=True)
    report = report_features(data, num_classes=3, neighbors=5)
    scores = knn_scores(*data["train"], data["test"][0], neighbors=5)
    assert report.knn == eleven_point_map(scores, data["test"][1])
    assert 0.4 < report.probe <= 1
    # The images with one class are all but every fourth.
    alone = np.arange(40) % 4 != 0
    features, labels = with_one_class(*data["test"])
    np.testing.assert_array_equal(features, data["test"][0][alone])
    np.testing.assert_array_equal(labels, (np.arange(40) % 3)[alone])
    assert report.silhouette == mean_silhouette(features, labels)


def test_cka_of_each_with_each() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 20, 3))
    found = cka_matrix([first, second[:, :2]])
    assert found.shape == (2, 2)
    np.testing.assert_allclose(np.diag(found), 1)
    assert found[0, 1] == pytest.approx(linear_cka(first, second[:, :2]))
