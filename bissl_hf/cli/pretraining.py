"""The stage of pre-training, on its own or before BiSSL."""

import sys
from pathlib import Path

from ..checkpoints import STAGING_FOLDER, find_defect, find_last_checkpoint, publish, write_manifest
from ..trainer.pretext_trainer import PretextTrainer

FINISHED_NAME = "model"


def pretrain(trainer: PretextTrainer) -> None:
    """Trains the pretext model of a trainer, or takes over what an earlier start has left: a folder `model` with the
    finished model in the trainer's folder, else its newest whole checkpoint."""
    folder = Path(str(trainer.args.output_dir))
    finished = folder / FINISHED_NAME
    defect = find_defect(finished) if finished.is_dir() else None
    if defect and trainer.is_world_process_zero():
        print(f"Passing over {finished}, which is not whole: {defect}.", file=sys.stderr)
    if trainer.args.max_steps > 0 and (defect or not finished.is_dir()):
        checkpoint, _ = find_last_checkpoint(folder)
        if trainer.is_world_process_zero():
            print(f"Pre-training of {type(trainer.model).__name__} for {trainer.args.max_steps} steps")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.is_world_process_zero():
            trainer.model.save_pretrained(folder / STAGING_FOLDER)
            write_manifest(folder / STAGING_FOLDER)
            publish(folder / STAGING_FOLDER, finished)
        trainer.accelerator.wait_for_everyone()
    if finished.is_dir():
        trainer.model.load_state_dict(type(trainer.model).from_pretrained(finished).state_dict())
