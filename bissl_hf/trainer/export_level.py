"""Which of the two downstream models of a run is saved."""

from collections.abc import Mapping, Sequence
from typing import Any


def better_level(
    log_history: Sequence[Mapping[str, Any]],
    metric: str | None = None,
    *,
    greater_is_better: bool | None = None,
    step: int | None = None,
) -> str:
    """Returns the level that did better in an evaluation.

    Args:
        log_history (`Sequence[Mapping]`): logs of a [`BiSSLTrainer`]; an evaluation logs a metric of the aligned model
            as `eval_NAME` and that of the upper one as `eval_upper_NAME`.
        metric (`str`, *optional*): NAME, with or without `eval_`. Accuracy if not given, or the loss where there is no
            accuracy.
        greater_is_better (`bool`, *optional*): of the metric; false for a loss if not given.
        step (`int`, *optional*): of the evaluation; the last one if not given.

    Returns:
        `str`: `"upper"` if it did better, else `"aligned"`.

    Raises:
        `ValueError`: if the evaluation has no such metric of both levels.
    """
    logs = [log for log in log_history if any(name.startswith("eval_upper_") for name in log)]
    log = next((log for log in reversed(logs) if step is None or log.get("step") == step), None)
    if log is None:
        return "aligned"
    name = (metric or ("accuracy" if "eval_accuracy" in log else "loss")).removeprefix("eval_")
    try:
        aligned, upper = float(log[f"eval_{name}"]), float(log[f"eval_upper_{name}"])
    except KeyError as error:
        known = sorted(key.removeprefix("eval_upper_") for key in log if key.startswith("eval_upper_"))
        raise ValueError(
            f"metric_for_best_model is {metric!r}, and an evaluation has no such metric of both levels; it has "
            f"{', '.join(known)}."
        ) from error
    greater = not name.endswith("loss") if greater_is_better is None else greater_is_better
    return "upper" if (upper > aligned if greater else upper < aligned) else "aligned"
