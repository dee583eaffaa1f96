"""What of a run is pushed when. The trainer owns a [`Publisher`] and hands it what it cannot know."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy

from ..checkpoints import find_last_checkpoint
from .folder import LAST_CHECKPOINT, files_beside_checkpoint, files_of_checkpoint, lay_out, outputs_of_run
from .process import UploadJob
from .push_queue import PushQueue


class Progress(NamedTuple):
    """How far a run is.

    Args:
        step (`int`): steps taken.
        best_checkpoint (`str`, *optional*): name of the folder of the best checkpoint, where the end of the run loads
            it.
    """

    step: int
    best_checkpoint: str | None = None


class Publisher:
    """Pushes what users load, not what a checkpoint holds.

    At the root of the repository is the model that `write_model` writes; with `strategy="checkpoint"` the newest
    checkpoint in `last-checkpoint/`, with `"all_checkpoints"` each in a folder of its own name. Pushes run beside the
    training in processes of their own; one that fails stops nothing (see [`PushQueue`]). Nothing is pushed before
    [`~Publisher.prepare`], which one process of a run calls.

    Args:
        output_dir (`Path`): folder of the run.
        write_model (`Callable[[Path], None]`): writes the model, and what belongs beside it, into a folder.
        write_card (`Callable[[Path], None]`): writes the card of the run so far into a folder.
        progress (`Callable[[], Progress]`): says how far the run is.
        repo_id (`str`, *optional*): `user/name`, or a name in the user's own namespace; the folder's name if not
            given.
        private (`bool`, *optional*): whether a new repository is private; the namespace's default if not given.
        revision (`str`, *optional*): branch, created if need be; `main` if not given.
        strategy (`HubStrategy` or `str`, *optional*, defaults to `"every_save"`): what a save pushes.
        always_push (`bool`, *optional*, defaults to `False`): wait for the push under way rather than leave one out.

    Attributes:
        resume_files (`Sequence[str]`): files and folders of the output folder that a resume needs beside a checkpoint.
        outputs_follow (`bool`): whether `push_outputs` follows the training, so that its end pushes nothing.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        write_model: Callable[[Path], None],
        write_card: Callable[[Path], None],
        progress: Callable[[], Progress],
        repo_id: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        strategy: HubStrategy | str = HubStrategy.EVERY_SAVE,
        always_push: bool = False,
    ) -> None:
        self.output_dir = output_dir
        self._job = UploadJob(repo_id or output_dir.absolute().name, private=private, revision=revision)
        self._write_model, self._write_card, self._progress = write_model, write_card, progress
        self.strategy, self.always_push = HubStrategy(strategy), always_push
        self.resume_files: Sequence[str] = ()
        self.outputs_follow = False
        self.queue: PushQueue | None = None

    @property
    def repo_id(self) -> str:
        """The repository; with its namespace once the Hub has been asked."""
        return self.queue.repo_id if self.queue is not None else self._job.repo_id

    @property
    def pushes_saves(self) -> bool:
        """Whether a save is pushed."""
        return self.queue is not None and self.strategy != HubStrategy.END

    def prepare(self, *, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token and creates the repository. A Hub that does not answer is only warned about.

        Raises:
            `ValueError`: if the Hub refuses the token or the repository's name.
        """
        self.queue = self._open_queue(token, private, None)
        self.queue.prepare()

    def _open_queue(self, token: str | None, private: bool | None, revision: str | None) -> PushQueue:
        job = UploadJob(
            self._job.repo_id,
            private=self._job.private if private is None else private,
            revision=revision or self._job.revision,
        )
        return PushQueue(self.output_dir, job, token=token)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Starts to push after a save, as the strategy says.

        Args:
            checkpoint (`Path`): the whole checkpoint that was saved.
        """
        if self.queue is None or not self.pushes_saves:
            return
        with self.queue.laying_out() as tree:
            self._write_model(tree)
            self._write_card(tree)
            self._lay_out_checkpoint(checkpoint, tree)
        self.queue.push(self._message(), always=self.always_push)

    def finish(self) -> None:
        """Ends the training with everything at the Hub that is to be there, or a message on what is not."""
        if self.queue is None:
            return
        self.queue.wait()
        if self.queue.unpushed.is_dir() and not self.outputs_follow:
            self.queue.push_and_report(self._message(), quiet=True)

    def push_outputs(self, message: str) -> None:
        """Pushes the files of the run in the output folder, and prints what did not get there."""
        if self.queue is not None:
            self._lay_out_outputs(self.queue)
            self.queue.push_and_report(message)

    def push_now(
        self,
        message: str,
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo]:
        """Pushes the files of the run in the output folder, whether or not the run pushes.

        Args:
            message (`str`): of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to return only when it is done.
            token, revision, private (*optional*): in the place of those of the run.

        Raises:
            `RuntimeError`: if the push failed, with the command that pushes later.
        """
        if self.queue is not None:
            self.queue.wait()
        queue = self.queue
        if queue is None or (token, private, revision) != (None, None, None):
            queue = self.queue = self._open_queue(token, private, revision)
        self._lay_out_outputs(queue)
        return _commit(queue, message) if blocking else _in_background(lambda: _commit(queue, message))

    def _message(self) -> str:
        return f"Training in progress, step {self._progress().step}"

    def _lay_out_outputs(self, queue: PushQueue) -> None:
        with queue.laying_out() as tree:
            lay_out(outputs_of_run(self.output_dir, except_for=self.resume_files), tree)
            checkpoint, _ = find_last_checkpoint(self.output_dir)
            if checkpoint is not None:
                self._lay_out_checkpoint(checkpoint, tree)

    def _lay_out_checkpoint(self, checkpoint: Path, tree: Path) -> None:
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        if name := names.get(self.strategy):
            lay_out(files_of_checkpoint(checkpoint, name), tree)
            lay_out(files_beside_checkpoint(self.output_dir, self._beside(checkpoint), name), tree)

    def _beside(self, checkpoint: Path) -> Iterator[str]:
        """Yields what of the output folder a resume from a checkpoint needs beside it."""
        yield from self.resume_files
        best = self._progress().best_checkpoint
        if best is not None and best != checkpoint.name:
            yield best


def _commit(queue: PushQueue, message: str) -> CommitInfo:
    result = queue.push_and_wait(message)
    if result.outcome != "done":
        raise RuntimeError(queue.explain(result))
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
