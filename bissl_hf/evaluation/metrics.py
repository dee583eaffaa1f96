"""Metrics as `evaluate.Metric` classes that need no network."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Fraction of examples whose class is predicted."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of examples whose class is predicted.",
            citation="",
            inputs_description="predictions and references: class numbers, shape (examples,).",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def classification_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """Returns a `compute_metrics` for `transformers.Trainer`: the accuracy of the largest logit."""
    accuracy = Accuracy(keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        result = accuracy.compute(
            predictions=np.asarray(prediction.predictions).argmax(-1), references=prediction.label_ids
        )
        return result or {}

    return compute
