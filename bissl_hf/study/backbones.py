"""From the common pretext steps to the backbone of an arm: what trains, in which part, and for how many steps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..checkpoints import find_last_checkpoint
from ..cli.images import build_train_transform, build_view_transform
from ..cli.parts import Stage
from ..data.augment import image_processor
from ..models.classifier import new_classifier
from ..models.modeling_bissl import BiSSLModel
from ..models.modeling_simclr import SimCLRForPreTraining
from ..models.saving import save_model
from ..tasks.labelled import LabelledImages
from ..trainer.bissl_trainer import BiSSLTrainer
from ..trainer.joint_trainer import JointTrainer
from ..trainer.pretext_trainer import PretextTrainer
from ..trainer.training_args import (
    BiSSLTrainingArguments,
    JointTrainingArguments,
    PretextTrainingArguments,
    ResumableTrainingArguments,
)
from .arms import COMMON_NAME, Arm
from .images import StudyImages
from .plan import Plan, folder_name

ArmTrainer = BiSSLTrainer | JointTrainer | PretextTrainer
# Means over a run of BiSSL, and under which names its trainer logs them
OF_SOLVES = {
    "solver_residual": "solver/residual",
    "solver_cosine": "solver/cosine",
    "solver_products": "solver/iterations",
}
_FIRST_ORDER = ("identity", "none", "mfac")


class Backbones:
    """Trains backbones, each in a part of its own.

    Args:
        plan ([`Plan`])
        folder (`Path`): of the parts.
        writes (`bool`): whether this process writes their files.
        chosen (`Callable[[Arm, str, int], Arm]`): returns an arm with the setting that was chosen for a set and a
            number of labels.
    """

    images: StudyImages

    def __init__(self, plan: Plan, folder: Path, *, writes: bool, chosen: Callable[[Arm, str, int], Arm]) -> None:
        self.plan = plan
        self.folder = folder
        self.writes = writes
        self.chosen = chosen
        self.image_size = plan.study.image_size
        self.views = build_view_transform(self.image_size, plan.views)
        self.crops = build_train_transform(self.image_size, plan.views)

    # Parts

    def part(self, name: str, settings: Mapping[str, Any], *, begins: bool = False) -> Stage:
        """Returns a part of the study by the name of its folder."""
        return Stage(self.folder / name, settings, writes=self.writes, begins=begins)

    def common_part(self, seed: int) -> Stage:
        """Returns the pretext steps that all arms have in common."""
        return self.part(f"{COMMON_NAME}-seed{seed}", self.plan.common_settings(seed))

    def shared_part(self, arm: Arm, seed: int) -> Stage:
        """Returns the backbone of an arm that is the same for all downstream sets."""
        return self.part(f"{arm.name}-seed{seed}", self.plan.arm_settings(arm, seed))

    def run_part(self, arm: Arm, dataset: str, examples: int, seed: int) -> Stage:
        """Returns the run of an arm on a set."""
        settings = self.plan.run_settings(arm, dataset, examples, seed)
        return self.part(f"{folder_name(dataset)}-{examples}/{arm.name}-seed{seed}", settings)

    # Training

    def pretext_model(self, seed: int) -> SimCLRForPreTraining:
        """Returns a new pretext model."""
        set_seed(seed)
        return SimCLRForPreTraining(self.plan.pretext_config())

    def pretrainer(self, model: SimCLRForPreTraining, args: PretextTrainingArguments) -> PretextTrainer:
        """Returns a trainer on the pretext task alone."""
        return PretextTrainer(
            model,
            args,
            train_dataset=self.images.pretext,
            train_transform=self.views,
            processing_class=image_processor(self.image_size),
        )

    def pretrain(self, seed: int) -> None:
        """Takes the common steps."""
        part = self.common_part(seed)
        trainer = self.pretrainer(self.pretext_model(seed), self.plan.pretrain_arguments(str(part.folder), seed))
        _train(trainer, part)

    def arm_trainer(
        self,
        folder: Path,
        arm: Arm,
        seed: int,
        lower: SimCLRForPreTraining,
        images: LabelledImages | None = None,
        steps: int | None = None,
    ) -> ArmTrainer:
        """Returns what trains an arm without a search: for `steps`, or as many as BiSSL takes."""
        args = self.plan.arm_arguments(str(folder), seed, arm, steps or self.plan.matched_steps)
        if isinstance(args, PretextTrainingArguments) and not isinstance(args, JointTrainingArguments):
            return self.pretrainer(lower, args)
        if images is None:
            raise RuntimeError(f"The arm {arm.name} needs labelled images.")
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
        if isinstance(args, BiSSLTrainingArguments):
            return BiSSLTrainer(model, args, **data)
        return JointTrainer(model, args, **data)  # type: ignore[arg-type]

    def continue_shared(self, arm: Arm, seed: int) -> Stage:
        """Returns the finished backbone of a conventional arm that is matched by steps."""
        part = self.shared_part(arm, seed)
        if part.result is None:
            part.begin()
            _train(self.arm_trainer(part.folder, arm, seed, self._common_model(seed)), part)
        return part

    def _common_model(self, seed: int) -> SimCLRForPreTraining:
        return SimCLRForPreTraining.from_pretrained(self.common_part(seed).folder / "model")

    def train(self, run: Stage, arm: Arm, dataset: str, examples: int, seed: int, images: LabelledImages) -> Stage:
        """Returns the finished backbone of a run.

        Args:
            run ([`Stage`]): the run, in whose folder the backbone is kept if it depends on the set.
            arm ([`Arm`]): without a search, or with the setting chosen.
            dataset, examples, seed: of the run.
            images ([`LabelledImages`]): likewise.
        """
        if arm.is_step_matched:
            return self.continue_shared(arm, seed)
        part = Stage(run.folder / "backbone", self.plan.arm_settings(arm, seed), writes=self.writes)
        if part.result is None:
            arm, steps = self._matched(arm, dataset, examples, seed, images)
            trainer = self.arm_trainer(part.folder, arm, seed, self._common_model(seed), images, steps)
            _train(trainer, part, labelled=len(images.train))
        return part

    def _matched(
        self, arm: Arm, dataset: str, examples: int, seed: int, images: LabelledImages
    ) -> tuple[Arm, int | None]:
        """Returns an arm as it is matched to others, and its steps if they are not those of BiSSL."""
        if arm.match == "steps":
            return arm, None
        clock = self.chosen(self.plan.clock_arm, dataset, examples)
        if arm.match == "rows":
            return self.plan.row_matched(arm, clock), None
        pace = self.chosen(self.plan.pace_arm(arm), dataset, examples)
        seconds, paced = (
            self.train(self.run_part(whose, dataset, examples, seed), setting, dataset, examples, seed, images)
            for whose, setting in ((self.plan.clock_arm, clock), (self.plan.pace_arm(arm), pace))
        )
        if pace.match == "rows":
            pace = self.plan.row_matched(pace, clock)
        timed = self.plan.timed(arm, pace)
        return timed, self.fitting_steps(timed, pace, _result_of(seconds), _result_of(paced), seed)

    def fitting_steps(self, arm: Arm, pace: Arm, clock: Mapping[str, Any], paced: Mapping[str, Any], seed: int) -> int:
        """Returns how many steps of an arm fit into the time of another, by what a pretext image took in a third. On a
        CPU both are CPU time, which other work on the machine does not lengthen.

        Args:
            arm, pace ([`Arm`]): the arm, and the one that sets the pace.
            clock, paced (`Mapping`): results of the backbone whose time it gets, and of the one that sets the pace.
            seed (`int`)
        """
        name = "processor_seconds" if self.plan.study.use_cpu else "seconds"
        batch, paced_batch = (
            self.plan.arm_arguments("unused", seed, each, 1).per_device_train_batch_size for each in (arm, pace)
        )
        return max(1, int(clock[name] / (paced[name] / paced["steps"] * batch / paced_batch)))


def _train(trainer: ArmTrainer, part: Stage, *, labelled: int = 0) -> None:
    """Trains from the newest checkpoint in the folder of a part, and finishes the part: the model with its batch-norm
    statistics as training has left them, and what it took."""
    checkpoint, _ = find_last_checkpoint(part.folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        model = trainer.model
        native = model.aligned_model() if isinstance(model, BiSSLModel) else model
        save_model(native.eval(), part.folder / "model", trainer.processing_class)
    pretext, rows = rows_read(trainer.args, labelled=labelled)
    result: dict[str, Any] = {
        "steps": trainer.args.max_steps,
        "pretext_images": pretext,
        "labelled_rows": rows,
        "seconds": trainer.training_seconds,
        "processor_seconds": trainer.processor_seconds,
    }
    if isinstance(trainer, BiSSLTrainer):
        result["steps"] = trainer.args.num_alternations * trainer.args.lower_steps
        result["pull"] = float(trainer.pull.total)
        log = [*trainer.state.log_history, trainer.collect_logs()]  # what came since the last log too
        for name, logged in OF_SOLVES.items():
            values = [row[logged] for row in log if logged in row]
            result[name] = sum(values) / len(values) if values else None
    part.finish(result)
    trainer.accelerator.wait_for_everyone()


def rows_read(args: ResumableTrainingArguments, *, labelled: int) -> tuple[int, int]:
    """Returns how many pretext images (pairs of views) and labelled images a run reads, those of its head warm-up and
    of the curvature included.

    Args:
        args ([`ResumableTrainingArguments`]): of a run of a given number of steps.
        labelled (`int`): size of the labelled set; a batch is at most as large.
    """
    processes = args.world_size
    if isinstance(args, BiSSLTrainingArguments):
        lower = args.per_device_lower_batch_size * processes
        curvature = 0 if args.solver in _FIRST_ORDER else args.curvature_batch_size or lower
        upper = min(args.per_device_train_batch_size * processes, labelled)
        per_alternation = args.lower_steps * lower + curvature
        rows = args.num_alternations * args.upper_steps * upper + args.head_warmup_epochs * labelled
        return args.num_alternations * per_alternation, rows
    pretext = args.max_steps * args.per_device_train_batch_size * processes
    if isinstance(args, JointTrainingArguments):
        return pretext, args.max_steps * min(args.per_device_labelled_batch_size * processes, labelled)
    return pretext, 0


def _result_of(part: Stage) -> dict[str, Any]:
    if part.result is None:
        raise RuntimeError(f"{part.folder} is not finished, and another part needs its result; start the study anew.")
    return part.result
