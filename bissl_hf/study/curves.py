"""How the test score develops in fine-tuning, to find how long it takes to settle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from ..cli.finetuning import FineTuning
from ..trainer.finetune_trainer import FineTuneTrainer

PREFIX = "curve"


@dataclass
class RecordedFineTuning(FineTuning):
    """Fine-tuning that records the test score; the training is the same.

    Args:
        every (`int`): steps between two records. There is one before the first step and one after the last too.
    """

    every: int = 0

    def build_trainer(self, model: PreTrainedModel | None = None, **changes: Any) -> FineTuneTrainer:
        trainer = super().build_trainer(model, **changes)
        trainer.add_callback(_Recorder(trainer, self.images.test, self.every))
        return trainer


class _Recorder(TrainerCallback):
    def __init__(self, trainer: FineTuneTrainer, dataset: Dataset, every: int) -> None:
        self.trainer = trainer
        self.dataset = dataset
        self.every = every

    def _record(self) -> None:
        self.trainer.evaluate(self.dataset, metric_key_prefix=PREFIX)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._record()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._record()


def train_with_curve(
    tuning: FineTuning, folder: Path, *, every: int, **chosen: Any
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Fine-tunes once, see [`FineTuning.train`], and records the test score every few steps; not if 0.

    Returns:
        `tuple`: the result, and the steps with their scores.
    """
    if not every:
        return tuning.train(folder, **chosen), []
    run = RecordedFineTuning(**vars(tuning), every=every).train(folder, **chosen)
    name = f"{PREFIX}_{tuning.metric}"
    return run, [(row["step"], row[name]) for row in run["log_history"] if name in row]


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """Returns the steps of the curves of some runs, and the mean score at each.

    Raises:
        `ValueError`: if their steps differ.
    """
    steps = [[step for step, _ in run["curve"]] for run in runs]
    if any(each != steps[0] for each in steps):
        raise ValueError("The curves of some runs have different steps; run them with the same curve_every.")
    scores = np.mean([[score for _, score in run["curve"]] for run in runs], axis=0)
    return steps[0], scores.tolist()


def settled_at(steps: Sequence[int], scores: Sequence[float], *, within: float = 0.005) -> int:
    """Returns the first step from which on a curve stays within a distance of its last score.

    Args:
        steps (`Sequence[int]`)
        scores (`Sequence[float]`): at these steps.
        within (`float`, *optional*, defaults to 0.005): half a percentage point.
    """
    far = [index for index, score in enumerate(scores) if abs(score - scores[-1]) > within]
    return steps[far[-1] + 1 if far else 0]
