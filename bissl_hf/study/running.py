"""Runs what is missing of a study. Each part has a folder of its own; one that is finished is never run again, one
that was interrupted goes on from its checkpoint."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import PartialState
from transformers import EvalPrediction, PreTrainedModel

from ..checkpoints import read_mapping
from ..cli.finetuning import FineTuning
from ..cli.models import StartArguments, classifier_builder
from ..cli.parts import RESULT_NAME, SETTINGS_NAME, Stage
from ..evaluation.metrics import SINGLE_LABEL, classification_metrics
from ..models.classifier import new_classifier
from ..tasks.labelled import LabelledImages
from ..trainer.bissl_trainer import BiSSLTrainer
from .alignment import measure_alignment
from .arms import Arm
from .backbones import OF_SOLVES, ArmTrainer, Backbones
from .choices import choose, describe_choice
from .curves import train_with_curve
from .fields import naming
from .images import StudyImages
from .plan import Plan

TUNED = ("learning_rate", "weight_decay")


@dataclass(frozen=True)
class StudyPart:
    """A part of a study.

    Args:
        title (`str`): for users.
        part ([`Stage`]): its folder, settings and result.
        run (`Callable[[], Any]`): runs it, after which it has a result.
    """

    title: str
    part: Stage
    run: Callable[[], Any]


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
        self.folder = Path(plan.study.output_dir) / "parts"
        self.writes = plan.finetune_arguments("unused", 0).process_index == 0
        self.backbones = Backbones(plan, self.folder, writes=self.writes, chosen=self.chosen)
        self.parts = list(self._list_parts())
        for file in sorted(self.folder.rglob("*.json")):
            if file.name in (RESULT_NAME, SETTINGS_NAME):
                read_mapping(file)
        self.images = self.backbones.images = StudyImages(plan.study)

    def try_out(self) -> None:
        """Builds what training will build, so that settings which do not fit come to light before it."""
        train = self.backbones
        with naming("pretrain"):
            args = self.plan.pretrain_arguments(str(self.folder), 0)
            train.pretrainer(train.pretext_model(0), args).try_loss(rows=4)
        for dataset in self.plan.study.datasets:
            images = self.images.take(dataset, min(self.plan.study.train_examples), seed=0)
            for variant in [variant for arm in self.plan.study.compared for variant in arm.variants]:
                with naming(f"arm {variant.name}"):
                    self._try_arm(train.arm_trainer(self.folder, variant, 0, train.pretext_model(0), images))
            with naming("finetune"):
                self._try_finetuning(images)

    def _try_arm(self, trainer: ArmTrainer) -> None:
        if isinstance(trainer, BiSSLTrainer):
            trainer.create_optimizer()
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
        # Trainer collects garbage several times in a run, and would go through all that the imports have left: a sixth
        # of a short fine-tuning.
        gc.freeze()
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
            for dataset, examples in self._places()
            for arm in study.compared
            for seed in range(study.seeds)
            if (result := self.backbones.run_part(arm, dataset, examples, seed).result) is not None
        ]

    def _say(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    # Parts

    def _places(self) -> list[tuple[str, int]]:
        study = self.plan.study
        return [(dataset, examples) for dataset in study.datasets for examples in study.train_examples]

    def _list_parts(self) -> Iterator[StudyPart]:
        train = self.backbones
        for seed in self.plan.choice_seeds:
            yield self._common_step(seed)
        for dataset, examples in self._places() if self.plan.choice_seeds else ():
            for arm in self.plan.ordered_arms:
                for variant in arm.variants if self.plan.chooses(arm) else ():
                    for seed in self.plan.choice_seeds:
                        title = (
                            f"{variant.name} of {len(arm.variants)} on {dataset} with {examples} labels, seed {seed}"
                        )
                        part = train.run_part(variant, dataset, examples, seed)
                        yield StudyPart(title, part, partial(self._try, variant, dataset, examples, seed))
        for seed in range(self.plan.study.seeds):
            yield self._common_step(seed)
            for arm in self.plan.ordered_arms:
                if arm.is_step_matched and not arm.search:
                    title = f"{arm.name}, further pre-training, seed {seed}"
                    yield StudyPart(title, train.shared_part(arm, seed), partial(train.continue_shared, arm, seed))
            for dataset, examples in self._places():
                for arm in self.plan.ordered_arms:
                    title = f"{arm.name} on {dataset} with {examples} labels, seed {seed}"
                    part = train.run_part(arm, dataset, examples, seed)
                    yield StudyPart(title, part, partial(self._run, arm, dataset, examples, seed))

    def _common_step(self, seed: int) -> StudyPart:
        part = self.backbones.common_part(seed)
        return StudyPart(f"pre-training, seed {seed}", part, partial(self.backbones.pretrain, seed))

    # The settings of arms

    def chosen(self, arm: Arm, dataset: str, examples: int) -> Arm:
        """Returns an arm with the setting that was chosen for a set and a number of labels."""
        if not arm.search:
            return arm
        tries = self._tries(arm, dataset, examples)
        return arm.variants[choose(tries, tries[0][0]["metric"])]

    def _pair(self, arm: Arm, dataset: str, examples: int) -> dict[str, Any]:
        """The best run on the validation split of those that chose the setting of an arm; of an arm that gets the time
        of another those of the arm that sets its pace."""
        if arm.match == "wall_clock":
            arm = self.plan.pace_arm(arm)
        tries = self._tries(arm, dataset, examples)
        metric = tries[0][0]["metric"]
        return max(tries[choose(tries, metric)], key=lambda run: (run[f"eval_{metric}"], -run["eval_loss"]))

    def choices(self) -> list[dict[str, Any]]:
        """Returns for each set, number of labels and arm with a search what was tried and chosen, see
        [`describe_choice`]."""
        return [
            {
                "dataset": dataset,
                "train_examples": examples,
                "arm": arm.name,
                **describe_choice(arm.search, tries, tries[0][0]["metric"]),
            }
            for dataset, examples in self._places()
            for arm in self.plan.study.compared
            if arm.search and (tries := self._tries(arm, dataset, examples))
        ]

    def _tries(self, arm: Arm, dataset: str, examples: int) -> list[list[dict[str, Any]]]:
        found: list[list[dict[str, Any]]] = []
        for variant in arm.variants:
            parts = [self.backbones.run_part(variant, dataset, examples, seed) for seed in self.plan.choice_seeds]
            results = [part.result for part in parts]
            if missing := [str(part.folder) for part, result in zip(parts, results, strict=True) if result is None]:
                raise RuntimeError(f"{missing[0]} is not finished, and the choice for {arm.name} needs it.")
            found.append([result for result in results if result is not None])
        return found

    # One arm on one set

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
            train_transform=self.backbones.crops,
            image_size=self.plan.study.image_size,
            settings=settings,
        )

    def _start(self, arm: Arm, setting: Arm, dataset: str, examples: int, seed: int) -> tuple[Stage, FineTuning]:
        """Returns the finished backbone of an arm in a setting, and how to fine-tune it."""
        run = self.backbones.run_part(arm, dataset, examples, seed)
        images = self.images.take(dataset, examples, seed=seed)
        backbone = self.backbones.train(run, setting, dataset, examples, seed, images)
        start = StartArguments(model=str(backbone.folder / "model"))
        build = classifier_builder(start, images.class_names, problem_type=images.problem_type)
        settings = self.plan.run_settings(arm, dataset, examples, seed)
        return backbone, self._tuning(run.folder, seed, images, build, settings)

    def _fine_tune(self, tuning: FineTuning, folder: Path) -> dict[str, float]:
        """Returns the learning rate and weight decay that are best on the validation split, with its figures; nothing
        where none are searched for."""
        study = self.plan.study
        if not study.search_trials:
            return {}
        found = tuning.search(folder / "search", study.space, num_trials=study.search_trials)
        return next(trial for trial in found.trials if found.best.items() <= trial.items())

    def _try(self, variant: Arm, dataset: str, examples: int, seed: int) -> None:
        """Runs a setting of a search; the test split has no part in it."""
        part = self.backbones.run_part(variant, dataset, examples, seed)
        backbone, tuning = self._start(variant, variant, dataset, examples, seed)
        pair = self._fine_tune(tuning, part.folder)
        found = pair or tuning.train(part.folder / "finetuning")
        figures = {name: value for name, value in found.items() if name.startswith("eval_")}
        chosen = {name: pair[name] for name in TUNED if pair}
        part.finish({"metric": tuning.metric, **figures, **chosen, **_cost(backbone)})
        PartialState().wait_for_everyone()

    def _run(self, arm: Arm, dataset: str, examples: int, seed: int) -> None:
        part = self.backbones.run_part(arm, dataset, examples, seed)
        backbone, tuning = self._start(arm, self.chosen(arm, dataset, examples), dataset, examples, seed)
        features = {"features": measure_alignment(tuning, output_dir=str(part.folder))}
        if self.plan.study.search_once:
            found = self._pair(arm, dataset, examples)
        else:
            found = self._fine_tune(tuning, part.folder)
        chosen = {name: found[name] for name in TUNED if found}
        folder = part.folder / "finetuning"
        run, curve = train_with_curve(tuning, folder, every=self.plan.study.curve_every, **chosen)
        test = tuning.test(folder)
        cost = _cost(backbone)
        part.finish(
            {
                "metric": tuning.metric,
                "score": test[f"test_{tuning.metric}"],
                **test,
                f"eval_{tuning.metric}": run[f"eval_{tuning.metric}"],
                **features,
                **(self._with_own_statistics(tuning, part.folder, chosen) if self.plan.study.own_statistics else {}),
                "learning_rate": chosen.get("learning_rate", tuning.args.learning_rate),
                "weight_decay": chosen.get("weight_decay", tuning.args.weight_decay),
                "pretext_steps": self.plan.study.pretrain_steps + cost.pop("steps"),
                **cost,
                "finetuning_seconds": run["train_seconds"],
                **({"curve": curve} if curve else {}),
            }
        )
        PartialState().wait_for_everyone()

    def _with_own_statistics(self, tuning: FineTuning, folder: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Beside the same batch norm for all arms, as fine-tuning has it by itself, what each arm's training has
        left."""
        features = measure_alignment(tuning, bn_recalibration_images=0, output_dir=str(folder))
        tuning.train(folder / "finetuning-own-statistics", **chosen, bn_recalibration_images=0)
        test = tuning.test(folder / "finetuning-own-statistics")
        return {"score_own_statistics": test[f"test_{tuning.metric}"], "features_own_statistics": features}


def _cost(backbone: Stage) -> dict[str, Any]:
    """What a backbone took after the common steps, and the figures of its solves."""
    learned = backbone.result or {}
    renamed = {"seconds": "backbone_seconds", "processor_seconds": "backbone_processor_seconds"}
    names = ("steps", "pretext_images", "labelled_rows", *renamed, "pull", *OF_SOLVES)
    return {renamed.get(name, name): learned[name] for name in names if name in learned}


def metric_names(images: LabelledImages) -> list[str]:
    """Returns the names of what an evaluation on these images measures."""
    classes = len(images.class_names)
    labels = np.arange(classes) if images.problem_type == SINGLE_LABEL else np.eye(classes)
    metrics = classification_metrics(images.problem_type, num_labels=classes)
    return ["loss", *metrics(EvalPrediction(np.eye(classes), labels))]
