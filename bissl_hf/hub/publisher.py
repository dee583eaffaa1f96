"""The trainers at the Hub: what is pushed when."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from ..checkpoints import find_last_checkpoint
from ..models.saving import save_model
from .folder import LAST_CHECKPOINT, files_beside_checkpoint, files_of_checkpoint, lay_out, outputs_of_run
from .process import UploadJob
from .push_queue import PushQueue


class HubTrainer(Trainer):
    """A `transformers.Trainer` that pushes what users load, not what a checkpoint holds.

    At the root of the repository lies the model of [`~HubTrainer.write_model`]; with `hub_strategy="checkpoint"` the
    newest checkpoint in `last-checkpoint/`, with `"all_checkpoints"` each in a folder of its own name. Pushes run
    beside the training in processes of their own; one that fails stops nothing (see [`PushQueue`]).

    Attributes:
        resume_files (`tuple[str, ...]`): files and folders of the output folder that a resume needs beside a
            checkpoint.
        pushes_outputs_later (`bool`): whether `push_outputs` follows the training, so that its end pushes nothing.
    """

    model: PreTrainedModel
    resume_files: tuple[str, ...] = ()
    pushes_outputs_later = False
    pushes: PushQueue | None = None
    hub_model_id: str | None  # type: ignore[assignment] # Trainer's annotation is that of its first value

    def write_model(self, folder: str | os.PathLike[str]) -> None:
        """Writes what lies at the root of the model's repository. Called on one process. Subclasses write another
        model, or more."""
        save_model(self.model, folder, self.processing_class)

    def write_card(self, folder: Path) -> None:
        """Writes README.md beside the model. Subclasses that know what to say do."""

    # Called by Trainer

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token and creates the repository; unlike Trainer's own, goes on when the Hub does not answer.

        Raises:
            `ValueError`: if the Hub refuses the token or the repository's name.
        """
        self.push_in_progress = None
        if self.is_world_process_zero():
            pushes = self._open_queue(token, private, None)
            pushes.prepare()
            self.hub_model_id = pushes.repo_id

    def _open_queue(self, token: str | None, private: bool | None, revision: str | None) -> PushQueue:
        output_dir = Path(str(self.args.output_dir))
        job = UploadJob(
            repo_id=self.args.hub_model_id or output_dir.absolute().name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )
        self.pushes = PushQueue(output_dir, job, token=token)
        return self.pushes

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Leaves out the pickle of the arguments that Trainer writes beside the weights; nothing reads it."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls this before the checkpoint is whole, and would push its files as the model."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Starts to push after a save, as `hub_strategy` says.

        Args:
            checkpoint (`Path`): the whole checkpoint that was saved.
        """
        if self.pushes is None or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with self.pushes.laying_out() as tree:
            self.write_model(tree)
            self.write_card(tree)
            self._lay_out_checkpoint(checkpoint, tree)
        self.pushes.push(self._progress_message(), always=self.args.hub_always_push)

    def _lay_out_checkpoint(self, checkpoint: Path, tree: Path) -> None:
        names: dict[Any, str] = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        if name := names.get(self.args.hub_strategy):
            lay_out(files_of_checkpoint(checkpoint, name), tree)
            lay_out(files_beside_checkpoint(Path(str(self.args.output_dir)), self._beside(checkpoint), name), tree)

    def _beside(self, checkpoint: Path) -> Iterator[str]:
        """Yields what of the output folder a resume from a checkpoint needs beside it."""
        yield from self.resume_files
        best = Path(self.state.best_model_checkpoint or checkpoint)
        if self.args.load_best_model_at_end and best.name != checkpoint.name:
            yield best.name

    def _progress_message(self) -> str:
        return f"Training in progress, step {self.state.global_step}"

    def _finish_current_push(self) -> None:
        """Ends the training with everything at the Hub that is to be there, or a word about what is not."""
        if self.pushes is None:
            return
        self.pushes.wait()
        if self.pushes.unpushed.is_dir() and not self.pushes_outputs_later:
            self.pushes.push_and_tell(self._progress_message(), quiet=True)
            self.hub_model_id = self.pushes.repo_id

    # Called by users and recipes

    def push_outputs(self, commit_message: str = "End of training") -> None:
        """Pushes what lies in the output folder, and says what did not get there. Called on each process, it does
        nothing without `push_to_hub`."""
        if self.pushes is not None:
            self._lay_out_outputs(self.pushes)
            self.pushes.push_and_tell(commit_message)
            self.hub_model_id = self.pushes.repo_id

    def _lay_out_outputs(self, pushes: PushQueue) -> None:
        output_dir = Path(str(self.args.output_dir))
        with pushes.laying_out() as tree:
            lay_out(outputs_of_run(output_dir, except_for=self.resume_files), tree)
            checkpoint, _ = find_last_checkpoint(output_dir)
            if checkpoint is not None:
                self._lay_out_checkpoint(checkpoint, tree)

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
        if self.pushes is not None:
            self.pushes.wait()
        pushes = self.pushes
        if pushes is None or (token, private, revision) != (None, None, None):
            pushes = self._open_queue(token, private, revision)
        self.write_model(str(self.args.output_dir))
        self.create_model_card(**kwargs)
        self._lay_out_outputs(pushes)
        message = commit_message or "End of training"
        return self._commit(pushes, message) if blocking else _in_background(lambda: self._commit(pushes, message))

    def _commit(self, pushes: PushQueue, message: str) -> CommitInfo:
        result = pushes.push_and_wait(message)
        if result.outcome != "done":
            raise RuntimeError(pushes.explain(result))
        return CommitInfo(result.commit_url, message, "", result.commit_oid)


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future
