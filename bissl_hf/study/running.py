"""Runs what is missing of a study. Each part has a folder of its own; one that is finished is never run again, one
that was interrupted goes on from its checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import PartialState
from transformers import EvalPrediction, PreTrainedModel, set_seed

from ..checkpoints import find_last_checkpoint
from ..cli.finetuning import FineTuning
from ..cli.images import LabelledImages, build_train_transform, build_view_transform
from ..cli.models import StartArguments, classifier_builder, new_classifier
from ..cli.parts import RESULT_NAME, SETTINGS_NAME, Stage, read_mapping
from ..data.augment import image_processor
from ..evaluation.metrics import SINGLE_LABEL, classification_metrics
from ..models.modeling_bissl import BiSSLModel
from ..models.modeling_simclr import SimCLRForPreTraining
from ..models.saving import save_model
from ..trainer.bissl_trainer import BiSSLTrainer
from ..trainer.joint_trainer import JointTrainer
from ..trainer.pretext_trainer import PretextTrainer
from ..trainer.training_args import PretextTrainingArguments
from .alignment import measure_alignment
from .images import StudyImages
from .plan import COMMON_NAME, Arm, Plan, folder_name, naming

# Means over a run of BiSSL, and under which names its trainer logs them
_OF_SOLVES = {
    "solver_residual": "solver/residual",
    "solver_cosine": "solver/cosine",
    "solver_products": "solver/iterations",
}


@dataclass(frozen=True)
class StudyPart:
    """A part of a study.

    Args:
        title (`str`): for users.
        part ([`Stage`]): its folder, settings and result.
        run (`Callable[[], None]`): runs it, after which it has a result.
    """

    title: str
    part: Stage
    run: Callable[[], None]


class Study:
    """A plan with its images and its parts.

    Args:
        plan ([`Plan`])

    Raises:
        `ValueError`: for data that are missing or do not fit, a part that was begun with other settings, or damaged
            files.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.image_size = plan.study.image_size
        self.folder = Path(plan.study.output_dir) / "parts"
        self.writes = plan.finetune_arguments("unused", 0).process_index == 0
        self.views = build_view_transform(self.image_size, plan.views)
        self.crops = build_train_transform(self.image_size, plan.views)
        self.parts = list(self._list_parts())
        for file in sorted(self.folder.rglob("*.json")):
            if file.name in (RESULT_NAME, SETTINGS_NAME):
                read_mapping(file)
        self.images = StudyImages(plan.study)

    def try_out(self) -> None:
        """Builds what training will build, so that settings which do not fit come to light before it."""
        with naming("pretrain"):
            trainer = self._pretrainer(self._pretext_model(0), self.plan.pretrain_arguments(str(self.folder), 0))
            trainer.try_loss(rows=4)
        for dataset in self.plan.study.datasets:
            images = self.images.take(dataset, min(self.plan.study.train_examples), seed=0)
            for arm in self.plan.study.compared:
                with naming(f"arm {arm.name}"):
                    self._try_arm(self._arm_trainer(self.folder, arm, 0, self._pretext_model(0), images))
            with naming("finetune"):
                self._try_finetuning(images)

    def _try_arm(self, trainer: BiSSLTrainer | JointTrainer | PretextTrainer) -> None:
        if isinstance(trainer, BiSSLTrainer):
            trainer.create_optimizer()
            trainer.level_schedules()
            trainer.try_losses(rows=4)
        else:
            trainer.try_loss(rows=4)

    def _try_finetuning(self, images: LabelledImages) -> None:
        config = self.plan.pretext_config().backbone_config
        build = partial(new_classifier, config, images.class_names, problem_type=images.problem_type)
        trainer = self._tuning(self.folder, 0, images, build, {}).build_trainer()
        trainer.try_loss(rows=4)
        best = trainer.args.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in (names := metric_names(images)):
            raise ValueError(f"metric_for_best_model is {best!r}; it must be one of {', '.join(names)}.")

    def run(self) -> list[dict[str, Any]]:
        """Runs the parts that are not finished.

        Returns:
            `list[dict]`: the results of all runs: by set, number of labels, arm and seed.
        """
        for number, part in enumerate(self.parts, 1):
            place = f"part {number} of {len(self.parts)}: {part.title}"
            if part.part.result is not None:
                self._say(f"{place} is finished")
                continue
            self._say(place)
            part.part.begin()
            PartialState().wait_for_everyone()
            part.run()
        study = self.plan.study
        return [
            {"dataset": dataset, "train_examples": examples, "arm": arm.name, "seed": seed, **result}
            for dataset in study.datasets
            for examples in study.train_examples
            for arm in study.compared
            for seed in range(study.seeds)
            if (result := self._run_part(arm, dataset, examples, seed).result) is not None
        ]

    def _say(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    # Parts

    def _list_parts(self) -> Iterator[StudyPart]:
        study = self.plan.study
        # What is matched to the time of another arm comes after it.
        arms = sorted(study.compared, key=lambda arm: arm.match == "wall_clock")
        for seed in range(study.seeds):
            part = self._common_part(seed)
            yield StudyPart(f"pre-training, seed {seed}", part, partial(self._pretrain, seed))
            for arm in arms:
                if arm.is_step_matched:
                    title = f"{arm.name}, further pre-training, seed {seed}"
                    yield StudyPart(title, self._shared_part(arm, seed), partial(self._continue_shared, arm, seed))
            for dataset in study.datasets:
                for examples in study.train_examples:
                    for arm in arms:
                        title = f"{arm.name} on {dataset} with {examples} labels, seed {seed}"
                        part = self._run_part(arm, dataset, examples, seed)
                        yield StudyPart(title, part, partial(self._run, arm, dataset, examples, seed))

    def _common_part(self, seed: int) -> Stage:
        return self._part(f"{COMMON_NAME}-seed{seed}", self.plan.common_settings(seed))

    def _shared_part(self, arm: Arm, seed: int) -> Stage:
        """The backbone of an arm that is matched by steps, the same for all downstream sets."""
        return self._part(f"{arm.name}-seed{seed}", self.plan.arm_settings(arm, seed))

    def _run_part(self, arm: Arm, dataset: str, examples: int, seed: int) -> Stage:
        settings = self.plan.run_settings(arm, dataset, examples, seed)
        return self._part(f"{folder_name(dataset)}-{examples}/{arm.name}-seed{seed}", settings)

    def _part(self, name: str, settings: Mapping[str, Any]) -> Stage:
        return Stage(self.folder / name, settings, writes=self.writes, begins=False)

    # Pretext training

    def _pretext_model(self, seed: int) -> SimCLRForPreTraining:
        set_seed(seed)
        return SimCLRForPreTraining(self.plan.pretext_config())

    def _common_model(self, seed: int) -> SimCLRForPreTraining:
        return SimCLRForPreTraining.from_pretrained(self._common_part(seed).folder / "model")

    def _pretrainer(self, model: SimCLRForPreTraining, args: PretextTrainingArguments) -> PretextTrainer:
        return PretextTrainer(
            model,
            args,
            train_dataset=self.images.pretext,
            train_transform=self.views,
            processing_class=image_processor(self.image_size),
        )

    def _pretrain(self, seed: int) -> None:
        part = self._common_part(seed)
        args = self.plan.pretrain_arguments(str(part.folder), seed)
        trainer = self._pretrainer(self._pretext_model(seed), args)
        _train(trainer, part)

    # From the common pretext steps to the backbone of an arm

    def _arm_trainer(
        self,
        folder: Path,
        arm: Arm,
        seed: int,
        lower: SimCLRForPreTraining,
        images: LabelledImages | None = None,
        steps: int | None = None,
    ) -> BiSSLTrainer | JointTrainer | PretextTrainer:
        plan, steps = self.plan, steps or self.plan.matched_steps
        if images is None or arm.kind == "conventional":
            return self._pretrainer(lower, plan.continue_arguments(str(folder), seed, arm, steps))
        set_seed(seed)
        upper = new_classifier(lower.config.backbone_config, images.class_names, problem_type=images.problem_type)
        model = BiSSLModel.from_models(lower, upper)
        data: dict[str, Any] = {
            "train_dataset": images.train,
            "lower_dataset": self.images.pretext,
            "train_transform": self.crops,
            "lower_transform": self.views,
            "processing_class": image_processor(self.image_size),
        }
        if arm.kind == "bissl":
            return BiSSLTrainer(model, plan.bissl_arguments(str(folder), seed, arm), **data)
        return JointTrainer(model, plan.joint_arguments(str(folder), seed, arm, steps), **data)

    def _continue_shared(self, arm: Arm, seed: int) -> None:
        part = self._shared_part(arm, seed)
        _train(self._arm_trainer(part.folder, arm, seed, self._common_model(seed)), part)

    def _fitting_steps(self, arm: Arm, clock: Mapping[str, Any], seed: int) -> int:
        """How many further pretext steps of an arm fit into the time of another, by what an image took in the arm with
        which all are compared. On a CPU both are CPU time, which other work on the machine does not lengthen."""
        paced = _result_of(self._shared_part(self.plan.baseline, seed))
        name = "processor_seconds" if self.plan.study.use_cpu else "seconds"
        batch, paced_batch = (
            self.plan.continue_arguments("unused", seed, other, 1).per_device_train_batch_size
            for other in (arm, self.plan.baseline)
        )
        return max(1, int(clock[name] / (paced[name] / paced["steps"] * batch / paced_batch)))

    # One arm on one set

    def _backbone(self, arm: Arm, dataset: str, examples: int, seed: int, images: LabelledImages) -> Stage:
        """The finished part that holds the backbone of a run."""
        if arm.is_step_matched:
            return self._shared_part(arm, seed)
        folder = self._run_part(arm, dataset, examples, seed).folder / "backbone"
        part = Stage(folder, self.plan.arm_settings(arm, seed), writes=self.writes)
        if part.result is None:
            steps = None
            if arm.match == "wall_clock":
                clock = self._backbone(self.plan.clock_arm, dataset, examples, seed, images)
                steps = self._fitting_steps(arm, _result_of(clock), seed)
            _train(self._arm_trainer(part.folder, arm, seed, self._common_model(seed), images, steps), part)
        return part

    def _tuning(
        self,
        folder: Path,
        seed: int,
        images: LabelledImages,
        build_model: Callable[[], PreTrainedModel],
        settings: Mapping[str, Any],
    ) -> FineTuning:
        return FineTuning(
            args=self.plan.finetune_arguments(str(folder), seed),
            images=images,
            build_model=build_model,
            train_transform=self.crops,
            image_size=self.image_size,
            settings=settings,
        )

    def _run(self, arm: Arm, dataset: str, examples: int, seed: int) -> None:
        part = self._run_part(arm, dataset, examples, seed)
        images = self.images.take(dataset, examples, seed=seed)
        backbone = self._backbone(arm, dataset, examples, seed, images)
        start = StartArguments(model=str(backbone.folder / "model"))
        build = classifier_builder(start, images.class_names, problem_type=images.problem_type)
        settings = self.plan.run_settings(arm, dataset, examples, seed)
        tuning = self._tuning(part.folder, seed, images, build, settings)
        # Beside the same batch norm for all arms, as fine-tuning has it by itself, what each arm's training has left.
        without = {"bn_recalibration_images": 0, "output_dir": str(part.folder)}
        features = measure_alignment(tuning, output_dir=str(part.folder))
        features_without = measure_alignment(tuning, **without)
        study, chosen = self.plan.study, {}
        if study.search_trials:
            chosen = tuning.search(part.folder / "search", study.space, num_trials=study.search_trials).best
        run = tuning.train(part.folder / "finetuning", **chosen)
        test = tuning.test(part.folder / "finetuning")
        tuning.train(part.folder / "finetuning-own-statistics", **chosen, bn_recalibration_images=0)
        test_without = tuning.test(part.folder / "finetuning-own-statistics")
        learned = _result_of(backbone)
        part.finish(
            {
                "metric": tuning.metric,
                "score": test[f"test_{tuning.metric}"],
                **test,
                f"eval_{tuning.metric}": run[f"eval_{tuning.metric}"],
                "score_own_statistics": test_without[f"test_{tuning.metric}"],
                "features": features,
                "features_own_statistics": features_without,
                "learning_rate": chosen.get("learning_rate", tuning.args.learning_rate),
                "weight_decay": chosen.get("weight_decay", tuning.args.weight_decay),
                "pretext_steps": study.pretrain_steps + learned["steps"],
                "backbone_seconds": learned["seconds"],
                "backbone_processor_seconds": learned["processor_seconds"],
                **{name: learned[name] for name in ("pull", *_OF_SOLVES) if name in learned},
                "finetuning_seconds": run["train_seconds"],
            }
        )
        PartialState().wait_for_everyone()


def metric_names(images: LabelledImages) -> list[str]:
    """Returns the names of what an evaluation on these images measures."""
    classes = len(images.class_names)
    labels = np.arange(classes) if images.problem_type == SINGLE_LABEL else np.eye(classes)
    metrics = classification_metrics(images.problem_type, num_labels=classes)
    return ["loss", *metrics(EvalPrediction(np.eye(classes), labels))]


def _train(trainer: BiSSLTrainer | JointTrainer | PretextTrainer, part: Stage) -> None:
    """Trains from the newest checkpoint in the folder of a part, and finishes the part: the model with its batch-norm
    statistics as training has left them, and what it took."""
    checkpoint, _ = find_last_checkpoint(part.folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        model = trainer.model
        native = model.aligned_model() if isinstance(model, BiSSLModel) else model
        save_model(native.eval(), part.folder / "model", trainer.processing_class)
    result: dict[str, Any] = {
        "steps": trainer.args.max_steps,
        "seconds": trainer.training_seconds,
        "processor_seconds": trainer.processor_seconds,
    }
    if isinstance(trainer, BiSSLTrainer):
        result["steps"] = trainer.args.num_alternations * trainer.args.lower_steps
        result["pull"] = float(trainer.pull.total)
        rows = [*trainer.state.log_history, trainer.collect_logs()]  # those since the last log too
        for name, logged in _OF_SOLVES.items():
            values = [row[logged] for row in rows if logged in row]
            result[name] = sum(values) / len(values) if values else None
    part.finish(result)
    trainer.accelerator.wait_for_everyone()


def _result_of(part: Stage) -> dict[str, Any]:
    if part.result is None:
        raise RuntimeError(f"{part.folder} is not finished, and another part needs its result; start the study anew.")
    return part.result
