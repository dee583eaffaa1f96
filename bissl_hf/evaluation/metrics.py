"""Metrics as `evaluate.Metric` classes that need no network, and the `compute_metrics` of each kind of task."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score, precision_recall_curve
from transformers import EvalPrediction

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
# The figure by which models are compared, for each `problem_type`; higher is better.
MAIN_METRIC = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "map", REGRESSION: "r2"}
_CLASS = datasets.Value("int64")
_SCORES = datasets.Sequence(datasets.Value("float32"))
_MULTI_HOT = datasets.Sequence(datasets.Value("int8"))


class _ClassificationMetric(evaluate.Metric):
    """What the metrics below share: what they are called, and what they take."""

    inputs_description = "predictions and references: class numbers, shape (examples,)."
    input_features: ClassVar[dict[str, Any]]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description=self.inputs_description,
            features=datasets.Features(self.input_features),
        )


class Accuracy(_ClassificationMetric):
    """Fraction of examples whose class is predicted."""

    input_features: ClassVar[dict[str, Any]] = {"predictions": _CLASS, "references": _CLASS}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(_ClassificationMetric):
    """Fraction of examples whose class is among the k with the highest scores; of equal scores the first counts as
    higher."""

    inputs_description = "predictions: scores, shape (examples, classes); references: class numbers; k (default 5)."
    input_features: ClassVar[dict[str, Any]] = {"predictions": _SCORES, "references": _CLASS}

    def _compute(self, predictions: Any, references: Any, k: int = 5) -> dict[str, float]:
        scores = np.asarray(predictions)
        if not 1 <= k <= scores.shape[1]:
            raise ValueError(f"k is {k} for {scores.shape[1]} classes; it must be between 1 and their number.")
        highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return {f"top{k}_accuracy": float((highest == np.asarray(references)[:, None]).any(axis=1).mean())}


class MeanClassAccuracy(_ClassificationMetric):
    """Mean over classes of the fraction of a class's examples that are predicted; classes without examples do not
    count."""

    input_features: ClassVar[dict[str, Any]] = {"predictions": _CLASS, "references": _CLASS}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = np.asarray(predictions) == np.asarray(references)
        _, rows = np.unique(np.asarray(references), return_inverse=True)
        return {"mean_class_accuracy": float(np.mean(np.bincount(rows, weights=right) / np.bincount(rows)))}


class MacroF1(_ClassificationMetric):
    """Mean over classes of F1, the harmonic mean of precision and recall; a class that is neither present nor
    predicted does not count, and one that is never predicted rightly counts as 0."""

    input_features: ClassVar[dict[str, Any]] = {"predictions": _CLASS, "references": _CLASS}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class ElevenPointMAP(_ClassificationMetric):
    """Mean over classes of the 11-point interpolated average precision of PASCAL VOC 2007 (Everingham et al., 2010,
    section 4.2)."""

    inputs_description = "predictions: scores; references: 0 or 1; both of shape (examples, classes)."
    input_features: ClassVar[dict[str, Any]] = {"predictions": _SCORES, "references": _MULTI_HOT}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"map": eleven_point_map(np.asarray(predictions), np.asarray(references))}


def eleven_point_map(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over classes of AP = 1/11 sum over t in {0, 0.1, ..., 1} of the highest precision at a recall
    of at least t. Examples of equal score enter together. Classes without positive examples do not count.

    Args:
        scores (`np.ndarray`): shape `(examples, classes)`.
        labels (`np.ndarray`): 0 or 1, shape `(examples, classes)`.

    Returns:
        `float`: NaN if a score is not finite.

    Raises:
        `ValueError`: if the shapes differ, a label is neither 0 nor 1, or no class has a positive example.
    """
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(
            f"The scores have the shape {scores.shape} and the labels {labels.shape}; both must be (examples, "
            "classes)."
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"Labels hold {np.setdiff1d(labels, (0, 1))[:3].tolist()}; each must be 0 or 1.")
    present = np.flatnonzero(labels.any(axis=0))
    if len(present) == 0:
        raise ValueError("No class has a positive example; the mean average precision needs at least one.")
    if not np.isfinite(scores).all():
        return float("nan")
    return float(np.mean([_eleven_point_precision(scores[:, column], labels[:, column]) for column in present]))


def per_class_scores(
    problem_type: str, scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, float]:
    """Returns for each class the fraction of its examples that is predicted, or with several labels its 11-point
    average precision; classes without (positive) examples are left out.

    Args:
        problem_type (`str`): one label or several.
        scores (`np.ndarray`): shape `(examples, classes)`.
        labels (`np.ndarray`): class numbers, shape `(examples,)`, or 0 and 1, shape `(examples, classes)`.
        class_names (`Sequence[str]`)
    """
    if problem_type == MULTI_LABEL:
        present = np.flatnonzero(labels.any(axis=0))
        return {class_names[c]: _eleven_point_precision(scores[:, c], labels[:, c]) for c in present.tolist()}
    right = scores.argmax(-1) == labels
    return {class_names[c]: float(right[labels == c].mean()) for c in np.unique(labels).tolist()}


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Returns `r2`, the coefficient of determination, `mae` and `rmse` of a model with one output; `r2` is NaN where
    all labels are the same."""
    found = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    labels = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    squared, spread = np.mean((found - labels) ** 2), np.var(labels)
    r2 = float(1 - squared / spread) if spread else float("nan")
    return {"r2": r2, "mae": float(np.abs(found - labels).mean()), "rmse": float(np.sqrt(squared))}


def _eleven_point_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    # The last point, precision 1 at recall 0, belongs to no threshold. 1e-9: recalls are quotients, such as 3 / 10.
    precision, recall = precision[:-1], recall[:-1] + 1e-9
    return float(np.mean([precision[recall >= t / 10].max() for t in range(11)]))


def classification_metrics(
    problem_type: str = SINGLE_LABEL, *, num_labels: int | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Returns the `compute_metrics` of a kind of task for `transformers.Trainer`, which calls it with the predictions
    of all processes.

    Args:
        problem_type (`str`, *optional*): as in the configuration of a model. `"single_label_classification"`:
            `accuracy`, `mean_class_accuracy`, `macro_f1`, and `top5_accuracy` above 5 classes.
            `"multi_label_classification"`: `map`, the 11-point mean average precision.
        num_labels (`int`, *optional*): number of classes; without it there is no `top5_accuracy`.

    Raises:
        `ValueError`: for another kind of task.
    """
    if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
        raise ValueError(f"problem_type is {problem_type!r}; it must be {SINGLE_LABEL} or {MULTI_LABEL}.")

    def of_scores(prediction: EvalPrediction) -> dict[str, float]:
        scores, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if problem_type == MULTI_LABEL:
            return _compute(ElevenPointMAP, scores, labels.astype(np.int8))
        results = _compute(Accuracy, scores.argmax(-1), labels)
        if num_labels is not None and num_labels > 5:
            results |= _compute(TopKAccuracy, scores, labels)
        results |= _compute(MeanClassAccuracy, scores.argmax(-1), labels)
        return results | _compute(MacroF1, scores.argmax(-1), labels)

    return of_scores


def _compute(metric: type[_ClassificationMetric], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return metric(keep_in_memory=True).compute(predictions=predictions, references=references) or {}
