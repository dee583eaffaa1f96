"""The stage of fine-tuning: a search, several seeds, and the test split at the end."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from ..checkpoints import find_last_checkpoint
from ..data.augment import TrainTransform
from ..data.balanced import sampled
from ..data.preprocessing import Preprocessing
from ..tasks.downstream import DownstreamTask
from ..tasks.labelled import LabelledImages
from ..trainer.divergence import check_metrics
from ..trainer.finetune_trainer import FineTuneTrainer
from ..trainer.resumable_args import with_changes
from ..trainer.search import SearchResult, SearchSpace, search
from ..trainer.training_args import FineTuningArguments
from .parts import Stage

_DECISIVE = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "batch_norm", "bn_recalibration_images", "seed", "data_seed", "bf16", "fp16"),
)


@dataclass
class FineTuning:
    """Fine-tunes what `build_model` returns on one data set.

    Args:
        args ([`FineTuningArguments`]): of every run, but for the folder and what a run changes.
        images ([`LabelledImages`])
        build_model (`Callable[[], PreTrainedModel]`): returns the classifier to start from; a new head is drawn from
            torch's random state.
        train_transform ([`TrainTransform`])
        preprocessing ([`Preprocessing`]): of the evaluation transform and the image processor.
        settings (`Mapping`): what the images and the model come from, to distinguish runs.
        class_weights (`str` or `list[float]`, *optional*): of the loss, see [`DownstreamLoss`].
        class_sampling (`str`, *optional*): see [`sampled`].
    """

    args: FineTuningArguments
    images: LabelledImages
    build_model: Callable[[], PreTrainedModel]
    train_transform: TrainTransform
    preprocessing: Preprocessing
    settings: Mapping[str, Any]
    class_weights: str | list[float] | None = None
    class_sampling: str | None = None

    @property
    def metric(self) -> str:
        """Name of the metric by which models are compared."""
        return self.task.metric

    @property
    def task(self) -> DownstreamTask:
        """What is learned."""
        problem_type, class_names = self.images.problem_type, self.images.class_names
        return DownstreamTask(problem_type, class_names, self.preprocessing, self.train_transform, self.class_weights)

    @property
    def _writes(self) -> bool:
        return self.args.process_index == 0

    def build_trainer(self, model: PreTrainedModel | None = None, **changes: Any) -> FineTuneTrainer:
        """Returns a trainer.

        Args:
            model (`PreTrainedModel`, *optional*): a model that is fine-tuned already, in the place of the start.
            **changes: of the arguments.
        """
        start: dict[str, Any] = {"model_init": self.build_model} if model is None else {"model": model}
        return FineTuneTrainer(
            **start,
            args=with_changes(self.args, **changes),
            train_dataset=sampled(self.images.train, self.class_sampling),
            eval_dataset=self.images.validation,
            **self.task.trainer_arguments(),
        )

    def search_part(self, folder: Path, space: SearchSpace, *, begins: bool = True) -> Stage:
        """Returns the search of a folder; raises a `ValueError` if other settings have left something there."""
        settings = {**self._settings(self.args), "metric": self.metric}
        for name, values in vars(space).items():
            settings[name] = list(values)
        return Stage(folder, settings, writes=self._writes, begins=begins)

    def run_part(self, folder: Path, *, begins: bool = True, **changes: Any) -> Stage:
        """Returns the run of a folder likewise; for `changes` see [`train`]."""
        args = with_changes(self.args, **changes, output_dir=str(folder))
        return Stage(folder, self._settings(args), writes=self._writes, begins=begins)

    def search(self, folder: Path, space: SearchSpace, *, num_trials: int, backend: str = "optuna") -> SearchResult:
        """Chooses learning rate and weight decay on the validation split. What an earlier call has tried in the same
        folder is not tried again."""
        self.search_part(folder, space)
        trainer = self.build_trainer(
            eval_strategy="no", save_strategy="no", disable_tqdm=True, output_dir=str(folder.absolute())
        )
        return search(trainer, space, num_trials=num_trials, folder=folder, metric=self.metric, backend=backend)

    def train(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """Fine-tunes once and keeps the model in `folder/model`, or returns what an earlier call has found.

        Args:
            folder (`Path`): of this run.
            **changes: of the arguments: `seed`, `learning_rate`, ...

        Returns:
            `dict`: validation metrics (`eval_*`), `train_loss`, `train_seconds`, `log_history`.
        """
        part = self.run_part(folder, **changes)
        if part.result is not None:
            return part.result
        trainer = self.build_trainer(**changes, output_dir=str(folder))
        checkpoint, _ = find_last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = trainer.evaluate()
        check_metrics(metrics, of=f"the model in {folder}")
        history = [row for row in trainer.state.log_history if "step" in row]
        if trainer.is_world_process_zero():
            trainer.save_model(folder / "model")
        losses = [row["loss"] for row in history if "loss" in row]
        result = part.finish(
            {
                **without_times(metrics, "eval"),
                "train_loss": losses[-1] if losses else None,
                "train_seconds": trainer.training_seconds,
                "log_history": history,
            }
        )
        trainer.accelerator.wait_for_everyone()
        return result

    def test(self, folder: Path, dataset: Dataset | None = None) -> dict[str, float]:
        """Returns the metrics (`test_*`) of the model that `train` has left in `folder`.

        Args:
            folder (`Path`)
            dataset (*optional*): the test split if not given.
        """
        trainer = self.build_trainer(self.load(folder), output_dir=str(folder))
        found = trainer.evaluate(self.images.test if dataset is None else dataset, metric_key_prefix="test")
        return without_times(found, "test")

    def predict(self, folder: Path, dataset: Dataset) -> PredictionOutput:
        """Returns what the model that `train` has left in `folder` predicts, with the labels."""
        return self.build_trainer(self.load(folder), output_dir=str(folder)).predict(dataset)

    def load(self, folder: str | os.PathLike[str]) -> PreTrainedModel:
        """Loads the model that `train` has left in `folder`."""
        return AutoModelForImageClassification.from_pretrained(Path(folder) / "model")

    def rank(self, result: Mapping[str, Any]) -> tuple[float, float]:
        """Orders results by the validation split: the metric first, then the loss."""
        score, loss = float(result[f"eval_{self.metric}"]), float(result["eval_loss"])
        return (score, -loss) if math.isfinite(score) and math.isfinite(loss) else (-math.inf, -math.inf)

    def _settings(self, args: FineTuningArguments) -> dict[str, Any]:
        decisive = {name: getattr(args, name) for name in _DECISIVE}
        return {**self.settings, **{name: getattr(value, "value", value) for name, value in decisive.items()}}


def without_times(evaluation: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Returns the loss and the metrics of an evaluation under `prefix`, without the times that it took."""
    times = ("_time", "_runtime", "_per_second")
    return {name: v for name, v in evaluation.items() if name.startswith(f"{prefix}_") and not name.endswith(times)}


def summarise(values: list[float]) -> dict[str, Any]:
    """Returns mean, sample deviation (`None` for a single value) and all values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "values": values}
