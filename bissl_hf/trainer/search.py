"""Random search over learning rate and weight decay, through `Trainer.hyperparameter_search`.

The pairs to try are drawn beforehand, as a function of the seed, so that Optuna and Ray try the same ones, several
models can be compared on them, and an interrupted search knows which are missing.
"""

import importlib.util
import json
import logging
import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from ..checkpoints import DamagedFileError
from ..distributed import from_first_process
from .divergence import DivergenceError
from .resumable_trainer import ResumableTrainer

BACKENDS = {"optuna": "optuna", "ray": "ray[tune]"}
STUDY_NAME = "search"


@dataclass(frozen=True)
class SearchSpace:
    """Ranges of values, each drawn log-uniformly; the paper's by default.

    Args:
        learning_rate (`tuple[float, float]`, *optional*, defaults to `(1e-4, 1.0)`)
        weight_decay (`tuple[float, float]`, *optional*, defaults to `(1e-5, 1e-2)`)

    Raises:
        `ValueError`: for a range that is not two positive numbers, the lower one first.
    """

    learning_rate: tuple[float, float] = (1e-4, 1.0)
    weight_decay: tuple[float, float] = (1e-5, 1e-2)

    @classmethod
    def usual(cls, optim: str) -> "SearchSpace":
        """Returns the usual ranges for an optimizer: the paper's, which are those of SGD, or smaller steps and more
        decay where Adam scales each step.

        Args:
            optim (`str`): name of the optimizer.
        """
        return cls((1e-6, 1e-3), (1e-3, 0.3)) if "adam" in optim else cls()

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if len(values) != 2 or not 0 < values[0] <= values[1] < math.inf:
                raise ValueError(
                    f"The range of {name} is {list(values)}; it must be two numbers above 0, lower first."
                )

    def draw(self, count: int, *, seed: int) -> list[dict[str, float]]:
        """Returns pairs of values; a larger count starts with the pairs of a smaller one."""
        generator = np.random.default_rng(seed)
        ranges = {name: np.log(values) for name, values in vars(self).items()}
        return [
            {name: float(np.exp(generator.uniform(*values))) for name, values in ranges.items()} for _ in range(count)
        ]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        best (`dict`): the chosen values.
        trials (`list[dict]`): the values tried, each with the figures of its evaluation, in the order they were drawn.
    """

    best: dict[str, float]
    trials: list[dict[str, float]]


def check_backend(backend: str, *, field: str) -> None:
    """Refuses a backend that is unknown or not installed.

    Raises:
        `ValueError`: with what to install.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{field} is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    if importlib.util.find_spec(backend) is None:
        raise ValueError(
            f"{field} is {backend!r}, which is not installed: run `pip install -e '.[search]'` in the repository or "
            f"`pip install '{BACKENDS[backend]}'`."
        )


def search(
    trainer: ResumableTrainer,
    space: SearchSpace,
    *,
    num_trials: int,
    folder: str | Path,
    metric: str,
    backend: str = "optuna",
) -> SearchResult:
    """Trains once per pair of values and chooses the pair whose model is best on the evaluation data: by the metric,
    then by the loss, then the pair that was drawn first. Pairs that an earlier call has tried are not tried again.

    Args:
        trainer ([`ResumableTrainer`]): with a `model_init` and evaluation data; the trials change its arguments.
        space ([`SearchSpace`])
        num_trials (`int`): how many pairs to try in all.
        folder (`str` or `Path`): keeps what has been tried: `search.db`, an Optuna study in SQLite, or `ray/`.
        metric (`str`): to be maximised, under its name in `compute_metrics`.
        backend (`str`, *optional*, defaults to `"optuna"`): or `"ray"`, which distributes the trials over a cluster
            and, to be resumed, needs its folder on a disk that all of it shares.

    Raises:
        `ValueError`: for an unknown or missing backend, or less than one trial.
    """
    check_backend(backend, field="backend")
    if num_trials < 1:
        raise ValueError(f"num_trials is {num_trials}; it must be at least 1.")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    trainer.divergence.raises = False  # a trial that diverges is a bad one, and no end of the search
    planned = space.draw(num_trials, seed=trainer.args.key_seed)
    run = _search_with_optuna if backend == "optuna" else _search_with_ray
    found = run(trainer, space, planned, folder, f"eval_{metric}")
    trials = [{**values, **found[_key(values)]} for values in planned]
    best = max(trials, key=lambda trial: (trial[f"eval_{metric}"], -trial["eval_loss"]))
    if not math.isfinite(best["eval_loss"]):
        raise DivergenceError(f"All {num_trials} trials of the search diverged; search lower learning rates.")
    return SearchResult({name: best[name] for name in vars(space)}, trials)


Found = dict[tuple[float, ...], dict[str, float]]


def _key(values: dict[str, float]) -> tuple[float, ...]:
    return tuple(values[name] for name in SearchSpace.__dataclass_fields__)


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation; those of a model that has diverged are the worst there are."""
    worst = {True: math.inf, False: 0.0}
    figures = {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    }
    diverged = not all(math.isfinite(value) for value in figures.values())
    return {name: worst[name.endswith("loss")] if diverged else value for name, value in figures.items()}


def _search_with_optuna(
    trainer: ResumableTrainer, space: SearchSpace, planned: list[dict[str, float]], folder: Path, objective: str
) -> Found:
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _check_database(folder / "search.db")
    storage = f"sqlite:///{folder / 'search.db'}"
    options: dict[str, Any] = {"study_name": STUDY_NAME, "storage": storage, "load_if_exists": True}

    def finished(study: optuna.Study) -> Found:
        done = study.get_trials(states=(TrialState.COMPLETE,))
        kept = [(_key(trial.params), trial.user_attrs) for trial in done]
        return {
            key: attributes["figures"]
            for key, attributes in kept
            if attributes.get("checksum") in (None, _checksum(key, attributes["figures"]))
        }

    missing = 0
    if trainer.is_world_process_zero():
        study = optuna.create_study(direction="maximize", **options)
        # What an earlier call was interrupted in, and what it had still before it, is put into the queue anew.
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        for _ in study.get_trials(states=(TrialState.WAITING,)):
            study.tell(study.ask(), state=TrialState.FAIL)
        done = finished(study)
        for values in planned:
            if _key(values) not in done:
                study.enqueue_trial(values)
                missing += 1
    missing = from_first_process(missing)

    def suggest(trial: optuna.Trial) -> dict[str, float]:
        return {name: trial.suggest_float(name, *values, log=True) for name, values in vars(space).items()}

    def compute_objective(metrics: dict[str, float]) -> float:
        diverged = trainer.divergence.found is not None
        figures = _figures({**metrics, "eval_loss": math.nan} if diverged else metrics)
        trial: Any = trainer._trial
        trial.set_user_attr("figures", figures)
        trial.set_user_attr("checksum", _checksum(_key(trial.params), figures))
        return figures[objective]

    if missing:
        with _counting_trials(trainer, len(planned), missing):
            trainer.hyperparameter_search(
                suggest, compute_objective, n_trials=missing, direction="maximize", backend="optuna", **options
            )
    return from_first_process(finished(optuna.load_study(study_name=STUDY_NAME, storage=storage)))


def _checksum(key: tuple[float, ...], figures: dict[str, float]) -> str:
    return xxhash.xxh3_64(json.dumps([key, figures], sort_keys=True).encode()).hexdigest()


def _check_database(path: Path) -> None:
    """Refuses a damaged file of SQLite."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            found = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise DamagedFileError(f"{path} is damaged ({found}). Move it away: what it held is tried anew.")


@contextmanager
def _counting_trials(trainer: ResumableTrainer, total: int, missing: int) -> Iterator[None]:
    """Shows a bar that counts trials in the place of their figures."""
    disable = not trainer.is_world_process_zero()
    trainer.pop_callback(PrinterCallback)
    with tqdm(total=total, initial=total - missing, desc="Search", unit="trial", disable=disable) as bar:
        counter = _OnTrainEnd(bar.update)
        trainer.add_callback(counter)
        try:
            yield
        finally:
            trainer.remove_callback(counter)


class _OnTrainEnd(TrainerCallback):
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call()


class _EvaluateAtEnd(TrainerCallback):
    """Evaluates after the last step. Without an evaluation in training, each trial would save a checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step >= state.max_steps


def _search_with_ray(
    trainer: ResumableTrainer, space: SearchSpace, planned: list[dict[str, float]], folder: Path, objective: str
) -> Found:
    import ray
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    storage = folder / "ray"

    def finished() -> Found:
        rows = [_last_row(file) for file in _results_of_ray(storage)]
        return {_key(row["config"]): _figures(row) for row in rows if "objective" in row}

    done = finished()
    missing = [values for values in planned if _key(values) not in done]
    if not missing:
        return done
    ranges: dict[str, Any] = {name: tune.loguniform(*values) for name, values in vars(space).items()}
    trainer.add_callback(_EvaluateAtEnd())
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        trainer.hyperparameter_search(
            partial(_same, ranges),
            partial(_objective_of, objective),
            n_trials=len(missing),
            direction="maximize",
            backend="ray",
            search_alg=BasicVariantGenerator(points_to_evaluate=missing),
            resources_per_trial={"cpu": 1, "gpu": 1 if trainer.args.device.type == "cuda" else 0},
            storage_path=str(storage),
            name=f"search-{len(list(storage.glob('search-*')))}",
        )
    finally:
        if started:
            ray.shutdown()
    return finished()


def _results_of_ray(storage: Path) -> list[Path]:
    """The files, one per trial, in which Ray keeps what a trial reports."""
    return [file for file in sorted(storage.glob("search-*/*/result.json")) if file.stat().st_size > 0]


def _last_row(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8").splitlines()[-1]))
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{file} is damaged ({error}). Move it away: its trial is tried anew.") from error


def _same(ranges: dict[str, Any], _: Any) -> dict[str, Any]:
    return dict(ranges)


def _objective_of(name: str, metrics: dict[str, float]) -> float:
    return _figures(metrics)[name]
