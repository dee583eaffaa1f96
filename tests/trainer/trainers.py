"""Trainers of tiny models for the tests, and what they are watched and compared by."""

import math

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    TrainerCallback,
)

from bissl_hf import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments
from bissl_hf.data.alternation import keyed_random_state

from ..conftest import TinyImages, tiny_model

DEFAULTS = {
    "num_alternations": 2, "lower_steps": 3, "upper_steps": 2, "head_warmup_epochs": 1, "seed": 7,
    "per_device_lower_batch_size": 8, "per_device_train_batch_size": 5, "per_device_eval_batch_size": 4,
    "lower_optim": "sgd", "lower_learning_rate": 0.05, "learning_rate": 0.02, "proximal_weight": 20.0,
    "damping": 600.0, "lower_warmup_steps": 0, "warmup_steps": 0, "save_strategy": "no", "direct_weight": 0.5,
    "solver_max_iterations": 2,
}  # fmt: skip


def make_args(output_dir, **overrides) -> BiSSLTrainingArguments:
    fixed = {"output_dir": str(output_dir), "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return BiSSLTrainingArguments(**{**fixed, **DEFAULTS, **overrides})


def make_trainer(
    output_dir, *, model=None, cls=BiSSLTrainer, train_rows=12, lower_rows=24, eval_rows=0, dtype=torch.float32,
    callbacks=None, keywords=None, **overrides,
) -> BiSSLTrainer:  # fmt: skip
    """A trainer of a tiny ResNet pair; `keywords` are those of the trainer, `overrides` those of its arguments."""
    return cls(
        model or tiny_model().to(dtype),
        make_args(output_dir, **overrides),
        train_dataset=TinyImages(train_rows, dtype=dtype) if train_rows is not None else None,
        lower_dataset=TinyImages(lower_rows, pairs=True, dtype=dtype) if lower_rows is not None else None,
        eval_dataset=TinyImages(eval_rows, dtype=dtype, seed=5) if eval_rows else None,
        callbacks=callbacks,
        **(keywords or {}),
    )


def same_tensors(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def snapshot(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(first, second) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def flat_norm(tensors) -> float:
    return math.sqrt(sum(float((tensor.detach().double() ** 2).sum()) for tensor in tensors))


def minus(first, second) -> list[torch.Tensor]:
    return [one.detach() - other.detach() for one, other in zip(first, second, strict=True)]


def training_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "lower/loss" in log or "upper/loss" in log]


class Record(TrainerCallback):
    """Keeps what the trainer holds before and after each step, with the level of the step."""

    def __init__(self, look) -> None:
        self.look, self.trainer, self.steps, self._before = look, None, [], None

    def attach(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        return trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = self.look(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        place = (state.global_step - 1) % (args.lower_steps + args.upper_steps)
        level = "lower" if place < args.lower_steps else "upper"
        self.steps.append((level, self._before, self.look(self.trainer)))


def recorded(look, output_dir, **settings):
    record = Record(look)
    trainer = record.attach(make_trainer(output_dir, **settings))
    trainer.train()
    return trainer, record.steps


def momenta(optimizer) -> list[torch.Tensor]:
    return snapshot(state["momentum_buffer"] for state in optimizer.state.values())


def everything_of_both_levels(trainer):
    return {
        level: (
            snapshot(getattr(trainer.model, level).parameters()),
            momenta(getattr(trainer.two_level_optimizer, level)),
            snapshot(getattr(trainer.model, level).buffers()),
        )
        for level in ("lower", "upper")
    }


VOCABULARY, MASK = 40, 3


class TinyText(torch.utils.data.Dataset):
    """Sentences of different lengths, with labels or without."""

    def __init__(self, rows: int, *, labels: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed + rows)
        lengths = torch.randint(5, 10, (rows,), generator=generator)
        self.rows = [torch.randint(4, VOCABULARY, (int(n),), generator=generator) for n in lengths]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        words = self.rows[index]
        return {"input_ids": words, **({"labels": int(words[0]) % 2} if self.labels else {})}


def pad(rows):
    words = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    batch = {"input_ids": words, "attention_mask": (words != 0).long()}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else batch


def mask_words(inputs, key):
    """Masks words at random, as decided by the key alone, and the first word always."""
    words = inputs["input_ids"]
    with keyed_random_state(key):
        chosen = (torch.rand(words.shape) < 0.3) & (words != 0)
    chosen[:, 0] = True
    return {**inputs, "input_ids": words.masked_fill(chosen, MASK), "labels": words.masked_fill(~chosen, -100)}


def text_model() -> BiSSLModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, num_labels=2, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    return BiSSLModel.from_models(BertForMaskedLM(config), BertForSequenceClassification(config))


def make_text_trainer(output_dir, *, evaluate=False, **overrides) -> BiSSLTrainer:
    return BiSSLTrainer(
        text_model(),
        make_args(output_dir, **overrides),
        train_dataset=TinyText(12, labels=True),
        lower_dataset=TinyText(24, labels=False),
        eval_dataset=TinyText(7, labels=True) if evaluate else None,
        data_collator=pad,
        lower_data_collator=pad,
        lower_transform=mask_words,
    )
