"""LoRA adapters by the arguments of a command."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..models.adapters import add_lora


@dataclass
class LoraArguments:
    """Low-rank adapters in the place of the whole backbone."""

    lora_rank: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank on a frozen backbone; needs the extra peft."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank; lora_rank if not given."}
    )
    lora_target: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt; the projections of queries and values if not given."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})

    def adapt(self, *models: PreTrainedModel) -> None:
        """Adds adapters to each model, in place, where they are asked for.

        Raises:
            `ValueError`: for settings of adapters without a rank, or that do not fit a model.
            `RuntimeError`: if `peft` is not installed.
        """
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_target"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is {getattr(self, name)}, and lora_rank is not given: set it, too.")
            return
        for model in models:
            add_lora(
                model,
                rank=self.lora_rank,
                alpha=self.lora_alpha,
                targets=self.lora_target,
                dropout=self.lora_dropout,
            )
