"""What the trainers of this package share: batches and random numbers by key, whole checkpoints, figures without
waiting."""

import inspect
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, RemoveColumnsCollator
from transformers.utils import logging

from ..cards.card import build_model_card
from ..cards.facts import ModelFacts
from ..cards.record import RunRecord
from ..cards.writing import write_model_card
from ..checkpoints import (
    STAGING_FOLDER,
    CheckpointStore,
    find_defect,
    find_last_checkpoint,
    publish,
    read_run_state,
    rotate_checkpoints,
    write_manifest,
)
from ..data.alternation import AlternatingDataLoader, KeyedSource, StepKey, Stream, keyed_random_state
from ..data.batches import batch_rows, rows_between
from ..data.decoded import decoded_for
from ..data.shared_memory import check_shared_memory, processes_here
from ..data.streams import Streams, Transform
from ..data.workers import explaining_lost_workers
from ..distributed import average_flat, copy_from_first, world_size
from ..hub.publisher import Progress, Publisher
from ..models.adapters import adapter_of, read_state, write_state
from ..models.finite import check_finite_weights
from ..models.memory_format import to_channels_last
from ..models.saving import save_model
from ..optim.precision import LossScale, ScheduleFollowsSteps, check_master_weights
from .callbacks import BestCheckpoint, EpochBoundary, OneRunInFolder
from .clocks import StepClock, TrainingClock
from .console import ShortPrinterCallback, ShortProgressCallback
from .data_parallel import check_whole_model, num_own_rows, pad_rows, reduce_gradients_of
from .divergence import DivergenceGuard
from .given import check_arguments
from .metrics_buffer import MetricsBuffer
from .resumable_args import ResumableTrainingArguments
from .run_record import record_run, size_of
from .same_arguments import check_same_arguments
from .signals import StopSignals, leave_signals_to_the_run
from .state_files import find_refused_file, read_trainer_state

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """A `transformers.Trainer` whose runs can be interrupted anywhere.

    Which rows a step reads, how they are augmented and which units dropout takes out follow from the step's key, not
    from a random state that earlier steps have moved. A checkpoint appears under its name only when it is whole.

    Args:
        args ([`ResumableTrainingArguments`])
        eval_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, applied on the device in
            evaluation.
        **trainer_kwargs: arguments of `transformers.Trainer`.

    Attributes:
        streams ([`Streams`]): where batches come from. Subclasses add theirs.
        checkpoints ([`CheckpointStore`]): what a resume needs registers with it.
        facts ([`ModelFacts`]): what the model card should say and the trainer cannot know.
        publisher ([`Publisher`]): what pushes to the Hub.
        step_clock ([`StepClock`]): what the steps of each level take.

    Raises:
        `ValueError`: if several GPUs would be driven by one process, or optimizers are passed in.
    """

    args: ResumableTrainingArguments
    model: PreTrainedModel
    train_dataset: Any
    data_collator: Callable[[list[Any]], dict[str, Any]]
    hub_model_id: str | None  # type: ignore[assignment] # Trainer's annotation is that of its first value

    def __init__(
        self, *, args: ResumableTrainingArguments, eval_transform: Transform | None = None, **trainer_kwargs: Any
    ) -> None:
        check_arguments(args, ResumableTrainingArguments, type(self))
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs and would split batches by DataParallel, which is not supported. "
                f"Start with `accelerate launch --multi_gpu --num_processes {args.n_gpu}`, or set "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if trainer_kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError("optimizers is not supported: name them in the arguments, or override create_optimizer.")
        check_master_weights(trainer_kwargs.get("model"))
        self.facts = ModelFacts()
        self.publisher = self._build_publisher(args)
        self.metrics_buffer = MetricsBuffer(average_flat)
        self._clock, self._best, self.step_clock = TrainingClock(), BestCheckpoint(), StepClock(args)
        self._staging: Path | None = None
        self._resumed_step = 0
        self._evaluated: nn.Module | None = None
        self._samples, self._samples_since = 0, time.perf_counter()
        self.divergence, self._stop_signals = DivergenceGuard(self), StopSignals()
        observers = trainer_kwargs.pop("callbacks", None) or []
        callbacks = [OneRunInFolder(), self._clock, self.step_clock, self._best, *observers]
        callbacks += [self._stop_signals, EpochBoundary(), self.divergence]
        if args.fp16:
            callbacks.append(ScheduleFollowsSteps())
        eval_dataset = trainer_kwargs.pop("eval_dataset", None)
        self._eval_transform = eval_transform
        super().__init__(args=args, callbacks=callbacks, eval_dataset=self._decoded(eval_dataset), **trainer_kwargs)
        self.pop_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(ShortPrinterCallback() if args.disable_tqdm else ShortProgressCallback(self.step_clock))
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # of which torch warns in each evaluation
        # Losses are means over the rows of one process; Trainer would scale them by the number of processes.
        self.model_accepts_loss_kwargs = False
        check_same_arguments(args)
        check_whole_model(self.model, second_order=args.takes_second_derivatives)
        copy_from_first([*self.model.parameters(), *self.model.buffers()], args.device)
        if args.channels_last:
            to_channels_last(self.model)
        self.streams = Streams(device=args.device, seed=args.key_seed, rank=args.process_index)
        self.streams.add(Stream.EVALUATION, None, eval_transform)
        if eval_transform is not None:
            # The transform may need columns that forward does not name.
            args.remove_unused_columns = False
        self.loss_scale = LossScale(lambda: self.accelerator.scaler)
        self.checkpoints = CheckpointStore()
        for name, owner in (
            ("metrics", self.metrics_buffer),
            ("seconds", self._clock),
            ("step_seconds", self.step_clock),
            ("best", self._best),
            ("divergence", self.divergence),
        ):
            self.checkpoints.register(name, owner)

    def _build_publisher(self, args: ResumableTrainingArguments) -> Publisher:
        return Publisher(
            Path(str(args.output_dir)),
            write_model=self.save_model,
            write_card=self.write_card,
            progress=self._progress,
            repo_id=args.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            strategy=args.hub_strategy,
            always_push=args.hub_always_push,
        )

    # Several processes

    def module_under_ddp(self) -> nn.Module:
        """Returns the part of the model whose gradients come from `backward` and are averaged by DDP."""
        return self.model

    def first_gradients(self) -> list[torch.Tensor | None]:
        """Returns the gradients of the first step in the parameters of `module_under_ddp`, without side effects;
        `None` for a parameter that the loss does not use."""
        raise NotImplementedError(f"{type(self).__name__} must say which gradients its first step computes.")

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Tells DDP what to average, and spares it the search for unused parameters in each pass, with the exchange
        of what it found, where the first step has none."""
        if training and world_size() > 1:
            # 2026-11: an evaluation before training marks the model as prepared (transformers 5.23), and accelerate
            # 1.15 then leaves it without DDP, so that each process would train on its own.
            model._is_accelerate_prepared = False  # type: ignore[assignment]
            reduce_gradients_of(self.model, self.module_under_ddp())
            if self.args.ddp_find_unused_parameters is None:
                unused = torch.tensor(float(any(g is None for g in self.first_gradients())), device=self.args.device)
                self.accelerator.ddp_handler.find_unused_parameters = bool(average_flat([unused])[0] > 0)
        return super()._wrap_model(model, training, dataloader)

    # Precision

    def create_accelerator_and_postprocess(self) -> None:
        """Turns fp16 on on a CPU, where Accelerate ignores it silently (2026-11, accelerate 1.15)."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu":
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    # Divergence

    def inputs_of_step(self, key: StepKey) -> list[dict[str, Any]]:
        """Returns the batches of a step again, to check whether they were finite."""
        return [self.streams.read(key)]

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        """The norm of every step's gradient passes here (a private hook of transformers 5.23, 2026-11)."""
        size = super()._get_grad_norm(model, grad_norm)
        self.divergence.note_gradient(size)
        return size

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A metric that is not finite is never the best (a private hook of transformers 5.23, 2026-11)."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if not math.isfinite(metrics.get(name, 0.0)):
            return False
        return super()._determine_best_metric(metrics, trial)

    # Batches

    def keyed_loader(self, *phases: tuple[Stream, int]) -> AlternatingDataLoader:
        """Returns a loader of tagged batches of some streams, each with its steps in an epoch."""
        return self.streams.loader(
            phases,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_the_run,
            timeout=self.args.dataloader_timeout if self.args.dataloader_num_workers else 0,
            multiprocessing_context=(
                self.args.dataloader_multiprocessing_context if self.args.dataloader_num_workers else None
            ),
        )

    def check_workers(self, *streams: Stream) -> None:
        """Refuses loader workers whose batches, of some streams or of the evaluation, shared memory has no room for.

        Raises:
            `ValueError`: with the room that is needed and that there is.
        """
        args, sources = self.args, [self.streams.sources[stream] for stream in streams]
        given: Any = self.eval_dataset
        evaluated = given.values() if isinstance(given, dict) else [given]
        batches = [(source.dataset, source.batch_size // args.world_size) for source in sources]
        batches += [(d, min(args.per_device_eval_batch_size, len(d))) for d in evaluated if hasattr(d, "__len__")]
        check_shared_memory(
            batches,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            num_processes=processes_here(),
        )

    def dropping_columns(
        self, collator: Callable[[list[Any]], dict[str, Any]], model: PreTrainedModel
    ) -> Callable[[list[Any]], dict[str, Any]]:
        """Returns a collator without the columns that a model's forward pass does not take, as `remove_unused_columns`
        says; the same in training and in evaluation, where Trainer would take them out of the data set (and out of
        what a `with_transform` reads)."""
        if not self.args.remove_unused_columns:
            return collator
        columns = [*inspect.signature(model.forward).parameters, "label", "label_ids"]
        return RemoveColumnsCollator(collator, columns, logger=logger, model_name=type(model).__name__)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Leaves data sets whole: see `dropping_columns` (a private hook of transformers 5.23, 2026-11)."""
        return dataset

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        """Likewise."""
        return data_collator

    def _decoded(self, dataset: Any) -> Any:
        """Returns evaluation data whose images are decoded; of a dictionary of data sets each."""
        if isinstance(dataset, dict):
            return {name: decoded_for(part, self._eval_transform, crops=False) for name, part in dataset.items()}
        return decoded_for(dataset, self._eval_transform, crops=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Takes a `datasets.Dataset` with a column of images, too."""
        return self._with_timeout(super().get_eval_dataloader(self._decoded(eval_dataset)))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Takes a `datasets.Dataset` with a column of images, too."""
        return self._with_timeout(super().get_test_dataloader(self._decoded(test_dataset)))

    def _with_timeout(self, loader: DataLoader) -> DataLoader:
        """Sets how long a loader that Trainer has made waits for its workers."""
        loader.timeout = self.args.dataloader_timeout if loader.num_workers else 0
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Says what to do where no batch comes."""
        with explaining_lost_workers(self.args.dataloader_timeout if self.args.dataloader_num_workers else 0):
            return super().get_batch_samples(*args, **kwargs)

    def set_initial_training_values(
        self, args: Any, dataloader: Any
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """Leaves no epoch to a run that is resumed after its last step: Trainer (2026-11, transformers 5.23) takes one
        more step where that was inside an epoch."""
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(args, dataloader)
        resumed_step, self._resumed_step = self._resumed_step, 0  # a later call may start anew
        if resumed_step >= max_steps:
            epochs = resumed_step // steps_per_epoch
        return epochs, steps_per_epoch, *others, max_steps  # type: ignore[return-value]

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures collected since the last log to a log of training. The loss is among them: Trainer's own
        forgets the steps before a resume."""
        if "loss" in logs:
            logs.update(self.collect_logs())
        super().log(logs, start_time)

    def collect_logs(self) -> dict[str, float]:
        """Returns the figures collected since the last call and forgets them."""
        now = time.perf_counter()
        speed = self._samples * self.args.world_size / max(now - self._samples_since, 1e-9)
        self._samples, self._samples_since = 0, now
        return {**self.metrics_buffer.pop_averages(), "samples_per_second": round(speed, 1)}

    def count_samples(self, inputs: dict[str, Any]) -> None:
        """Counts the rows of a batch for the figure of samples per second."""
        self._samples += batch_rows(inputs)

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Keeps the random state: a run with and one without evaluation are the same run. Leaves out the time that
        Trainer took to place the model, which says nothing of it."""
        with keyed_random_state((self.args.key_seed, int(Stream.EVALUATION))), explaining_lost_workers():
            output = super().evaluation_loop(*args, **kwargs)
        metrics = output.metrics or {}
        for name in [name for name in metrics if name.endswith("_model_preparation_time")]:
            del metrics[name]
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Applies the evaluation transform on the device, and runs the model of [`~ResumableTrainer.evaluating`] if
        there is one. The loss is that of this process's own rows, without those that fill up the last batch."""
        rows = batch_rows(inputs)
        own = rows_between(inputs, 0, max(num_own_rows(self.accelerator, rows), 1))
        own = self.streams.prepare(own, self.streams.key(Stream.EVALUATION))
        with self.accelerator.autocast():
            loss, logits, labels = super().prediction_step(
                self._evaluated or model, own, prediction_loss_only, ignore_keys
            )
        return loss, pad_rows(logits, rows), pad_rows(labels, rows)

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Has evaluation run `model`, on the device, in the place of the model that is trained."""
        self._evaluated = model
        try:
            yield
        finally:
            self._evaluated = None

    def calibration_batches(self, num_images: int, source: KeyedSource | None = None) -> Iterator[dict[str, Any]]:
        """Yields the batches from which batch-norm statistics are estimated: the same training examples in each call
        and on each process, with the evaluation transform.

        Args:
            num_images (`int`): about how many; whole batches of at most `per_device_eval_batch_size`.
            source ([`KeyedSource`], *optional*): of the labelled examples; `train_dataset` if not given.
        """
        dataset, collator = (
            (self.train_dataset, self.data_collator) if source is None else (source.dataset, source.collator)
        )
        if num_images == 0 or len(dataset) == 0:
            return
        # A single row has no batch statistics.
        total = min(max(num_images, 2), len(dataset))
        batch = min(max(self.args.per_device_eval_batch_size, 2), total)
        ordered = KeyedSource(dataset, batch, collator, steps_per_alternation=total // batch)
        for position in range(total // batch):
            key = self.streams.key(Stream.EVALUATION, step=position)._replace(rank=0)
            yield self.streams.prepare(ordered.read(key), key)

    # Hub. The overrides of Trainer's methods with a leading underscore: 2026-11, transformers 5.23.

    def save_model(self, output_dir: str | os.PathLike[str] | None = None, _internal_call: bool = False) -> None:
        """Writes the model that users load, which is also the root of its repository; Trainer's own calls write what a
        checkpoint holds. It pushes nothing.

        Args:
            output_dir (`str` or `os.PathLike`, *optional*): the output folder of the run if not given.
        """
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        if _internal_call:
            super().save_model(folder, _internal_call=True)
        elif self.args.should_save:
            check_finite_weights(self.model, "the training has diverged, and no model is written")
            self.write_final_model(folder)

    def write_final_model(self, folder: str) -> None:
        """Writes what [`~ResumableTrainer.save_model`] is asked for. Called on one process. Subclasses write another
        model, or more."""
        save_model(self.model, folder, self.processing_class)

    def _progress(self) -> Progress:
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return Progress(self.state.global_step, Path(best).name if best else None)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token and creates the repository; unlike Trainer's own, goes on when the Hub does not answer.

        Raises:
            `ValueError`: if the Hub refuses the token or the repository's name.
        """
        self.push_in_progress = None
        if self.is_world_process_zero():
            self.publisher.prepare(token=token, private=private)
            self.hub_model_id = self.publisher.repo_id

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Leaves out the pickle of the arguments that Trainer writes beside the weights; nothing reads it. Of a model
        with adapters all weights are written: `save_pretrained` would write the adapters without the trained head."""
        folder = Path(output_dir or str(self.args.output_dir))
        if adapter_of(self.model) is not None:
            write_state(self.model, folder)
            return
        super()._save(output_dir, state_dict)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls this before the checkpoint is whole, and would push its files as the model."""

    def _finish_current_push(self) -> None:
        """Ends the training with everything at the Hub that is to be there, or a message on what is not; and the
        process, if a signal has ended the training."""
        self.publisher.finish()
        self._stop_signals.exit_if_stopped(self.state, speaks=self.is_world_process_zero())

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Starts to push a whole checkpoint that was saved, as `hub_strategy` says."""
        if self.publisher.pushes_saves:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.publisher.push_checkpoint(checkpoint)

    def push_outputs(self, commit_message: str = "End of training") -> None:
        """Pushes the files of the run in the output folder, and prints what did not get there. Called on each process,
        it does nothing without `push_to_hub`."""
        self.publisher.push_outputs(commit_message)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Writes the model into the output folder and pushes that folder, as `transformers.Trainer` does.

        Args:
            commit_message (`str`, *optional*)
            blocking (`bool`, *optional*, defaults to `True`): whether to return only when it is done.
            token, revision, private: in the place of `HF_TOKEN`, `hub_revision` and `hub_private_repo`.
            **kwargs: arguments of `create_model_card`.

        Returns:
            `CommitInfo`, a `Future` of it if `blocking` is false, or `None` on processes that do not push.

        Raises:
            `RuntimeError`: if the push failed, with the command that pushes later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self.save_model()
        self.create_model_card(**kwargs)
        message = commit_message or "End of training"
        return self.publisher.push_now(message, blocking=blocking, token=token, revision=revision, private=private)

    # Model card

    def record(self) -> RunRecord:
        """Returns what a card says of this run. Subclasses say of which kind it is, and which data it has read."""
        return record_run(self, "classifier", examples={"train": size_of(self.train_dataset)})

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes README.md into the output folder, see [`write_model_card`]. Trainer's own card reports an optimizer
        that is not used. Arguments take the place of what `facts` says; of two data sets the second is the lower
        level's."""
        if not self.is_world_process_zero():
            return
        facts = self.facts.with_card_arguments(
            language, license, tags, finetuned_from, tasks, dataset_tags or dataset, dataset_args
        )
        self._write_card(Path(str(self.args.output_dir)), facts, model_name)

    def write_card(self, folder: Path) -> None:
        """Writes a card of the run so far into a folder."""
        self._write_card(folder, self.facts)

    def _write_card(self, folder: Path, facts: ModelFacts, model_name: str | None = None) -> None:
        card = build_model_card(self.record(), facts, folder=folder, model_name=model_name)
        write_model_card(card, folder)

    # Checkpoints

    @property
    def training_seconds(self) -> float:
        """Seconds that training has taken so far, those before a resume included."""
        return self._clock.read().wall

    @property
    def processor_seconds(self) -> float:
        """Likewise, CPU seconds of this process; unlike wall time, unaffected by other load."""
        return self._clock.read().processor

    def resume_settings(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must share: those that decide which examples a step reads, what
        these are where the data can tell, how they are prepared, what kind of model is trained and the numbers of
        its loss, and the shape of what a checkpoint holds. Subclasses add to it."""
        data = {
            f"checksum of the {stream.name.lower()} data": source.dataset.checksum()
            for stream, source in self.streams.sources.items()
            if stream in (Stream.LOWER, Stream.UPPER) and hasattr(source.dataset, "checksum")
        }
        views = {
            f"{name} of the {stream.name.lower()} data": value
            for stream in (Stream.LOWER, Stream.UPPER)
            if stream in self.streams.sources
            for name, value in getattr(self.streams.transform(stream), "settings", {}).items()
        }
        config = getattr(self.model, "lower", self.model).config.to_dict()
        model = {name: value for name, value in config.items() if isinstance(value, float) or name == "model_type"}
        return {
            **data,
            **views,
            **model,
            "seed": self.args.key_seed,
            "number of processes": self.args.world_size,
            "number of parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "optim": str(self.args.optim),
        }

    def check_checkpoint(self, checkpoint: str | Path) -> None:
        """Refuses a checkpoint that is not whole or belongs to a run with other settings.

        Raises:
            `ValueError`: with what is wrong and what to do.
        """
        checkpoint = Path(checkpoint)
        if defect := find_defect(checkpoint):
            whole, _ = find_last_checkpoint(checkpoint.parent)
            advice = f"the newest whole one is {whole}" if whole else "there is no whole one beside it"
            raise ValueError(f"The checkpoint {checkpoint} is not whole: {defect}; {advice}.")
        if refused := find_refused_file(checkpoint):
            raise ValueError(f"The checkpoint {checkpoint} cannot be resumed: {refused}. Resume from one of your own.")
        content = read_run_state(checkpoint, owners=self.checkpoints.owners)
        read_trainer_state(checkpoint)
        then = content["settings"]
        changed = [
            f"{name} was {then.get(name)} and is {now}"
            for name, now in self.resume_settings().items()
            if name in then and then[name] != now
        ]
        if changed:
            raise ValueError(
                f"The checkpoint belongs to another run: {'; '.join(changed)}. Resume with the settings it was made "
                "with."
            )
        best = content["state"].get("best", {}).get("name")
        if self.args.load_best_model_at_end and best and (defect := find_defect(checkpoint.with_name(best))):
            raise ValueError(
                f"{best} is the best checkpoint so far by what {checkpoint} says, and load_best_model_at_end needs it "
                f"at the end; but {checkpoint.with_name(best)} is not whole: {defect}. Put it there, or set "
                "load_best_model_at_end to false."
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Leads Trainer to the staging folder while a checkpoint is being written."""
        output_dir = super()._get_output_dir(trial)
        return str(Path(output_dir) / STAGING_FOLDER) if self._staging else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Has Trainer write the checkpoint aside, and renames it once it is whole. Of weights that are not finite none
        is written."""
        self.divergence.check()
        if self.divergence.found is not None:
            return
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging, final = run_dir / STAGING_FOLDER, run_dir / name
        if self.is_local_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        self._best.name = Path(best).name if (best := self.state.best_model_checkpoint) else None
        state = self.checkpoints.collect()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # A path would be wrong elsewhere; run_state.json keeps the name.
            replace(self.state, best_model_checkpoint=None).save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.checkpoints.write(staging / name, state, self.resume_settings())
            write_manifest(staging / name)
            publish(staging / name, final)
            keep = {self._best.name} if self._best.name else set()
            rotate_checkpoints(run_dir, self.args.save_total_limit, keep=keep)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and (staging / name).is_dir():
            # Another machine with a disk of its own: these are the random states of its processes.
            publish(staging / name, final)
        if self.is_local_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.push_checkpoint(final)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Refuses a checkpoint that is not whole, and reads what Trainer does not know."""
        self.check_checkpoint(resume_from_checkpoint)
        self._resumed_step = read_trainer_state(Path(resume_from_checkpoint)).global_step
        self._restore_weights(resume_from_checkpoint)
        self.checkpoints.load(Path(resume_from_checkpoint), self.args.device)
        self._best.find_beside(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Loads the weights of the best checkpoint."""
        self._restore_weights(str(self.state.best_model_checkpoint))

    def _restore_weights(self, checkpoint: str) -> None:
        """Trainer reads a state dict leniently. Checkpoints of some models (ViT) hold other names than the model,
        which only `from_pretrained` translates back; the weights would stay as they are without an error."""
        if adapter_of(self.model) is not None:
            read_state(self.model, Path(checkpoint))
            check_finite_weights(self.model, f"{checkpoint} is of a run that has diverged; resume from an earlier one")
            return
        # In the widest format among them, so that adapters in float32 on a backbone in bfloat16 lose nothing.
        floating = {p.dtype for p in self.model.parameters() if p.dtype.is_floating_point}
        widest = max(floating, key=lambda dtype: torch.finfo(dtype).bits)
        restored = type(self.model).from_pretrained(checkpoint, dtype=widest)
        check_finite_weights(restored, f"{checkpoint} is of a run that has diverged; resume from an earlier one")
        self.model.load_state_dict(restored.state_dict())
