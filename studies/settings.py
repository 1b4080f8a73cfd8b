"""What a study is told: every key of the section `study`; the values stand in conf/study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.compose_section import section, split_section
from harness.config import SPLITS, ConfigError, RunConfig, hold
from methods.parameters import at_least, one_of

GRANULARITIES = ("global", "expert", "layer", "expert_layer")
ComposeRun = Callable[[Sequence[str]], RunConfig]


@dataclass(frozen=True)
class StudySettings:
    """A study; see conf/study/default.yaml for the values."""

    name: str | None  # None: a name that says what is searched, with a number
    trials: int
    timeout_s: float | None  # no trial begins after so many seconds
    workers: int  # processes
    resume: bool  # go on with the study of this name
    from_study: str | None  # `study.from`: a study in the same storage whose best trial is tried first
    storage: str | None  # None: a SQLite file beside the tracking store
    run: list[str]  # overrides of the run's configuration, before those of the command line
    methods: list[str]  # several: the method is searched too; none: the configuration's
    space: dict[str, Any]  # key -> range, choices or a fixed value
    default_space: bool  # search the ranges beside the method's parameters too
    coefficients: str | None  # one of GRANULARITIES
    knots: int | None  # numbers of a curve over the depth, in the place of one for each layer
    coefficient_range: dict[str, float]  # low, high
    objectives: list[Any]  # metrics, or {metric, direction}
    constraints: dict[str, dict[str, float]]  # metric -> at_least, at_most
    split: str  # that trials are scored on
    search_on_test: bool
    repeats: int  # seeds of each trial, for methods that draw random numbers
    sampler: str
    sampler_settings: dict[str, Any]
    pruner: str
    pruner_settings: dict[str, Any]
    step_rows: int  # rows of a step, where a pruner looks on
    warm_start: bool  # defaults and published settings first
    starts: list[dict[str, Any]]  # values by key that are tried first too
    final_seeds: int  # with which the winner of a random method is scored again
    bootstrap: int  # resamplings of the winner's interval
    register: str | None  # name in the model registry
    alias: str
    heartbeat_s: int
    plots: bool

    def __post_init__(self) -> None:
        knotless = self.knots is not None and self.coefficients not in ("layer", "expert_layer")
        hold(
            (at_least, "trials", self.trials, 1),
            (at_least, "timeout_s", 1 if self.timeout_s is None else self.timeout_s, 0),
            (at_least, "workers", self.workers, 1),
            (at_least, "knots", 2 if self.knots is None else self.knots, 2),
            (one_of, "split", self.split, SPLITS),
            (at_least, "repeats", self.repeats, 1),
            (at_least, "step_rows", self.step_rows, 1),
            (at_least, "final_seeds", self.final_seeds, 0),
            (at_least, "bootstrap", self.bootstrap, 0),
            (at_least, "heartbeat_s", self.heartbeat_s, 1),
            (one_of, "coefficients", self.coefficients or "global", GRANULARITIES),
            (_refuse, knotless, "knots are of a curve over the depth: set study.coefficients=layer or expert_layer"),
            (
                _refuse,
                self.resume and not self.name,
                "resume goes on with a study by its name: give it as study.name=NAME",
            ),
            (_low_and_high, self.coefficient_range),
        )


def _refuse(wrong: bool, why: str) -> None:
    if wrong:
        raise ValueError(why)


def _low_and_high(given: dict[str, float]) -> None:
    if set(given) != {"low", "high"}:
        raise ValueError(f"coefficient_range has low and high, got {', '.join(given) or 'nothing'}")


@dataclass(frozen=True)
class Composed:
    """A study with the configurations that its trials vary."""

    settings: StudySettings
    configs: dict[str, RunConfig]  # method -> configuration, as it was asked for
    overrides: tuple[str, ...] = ()  # of the runs


def compose_study(overrides: Sequence[str], compose_run: ComposeRun, *, config_dir: Path | None = None) -> Composed:
    """Compose a study's settings, and a configuration for each of its methods.

    Args:
        overrides: Of both; `study.KEY=value` and, where a run has no such key, `KEY=value` are the study's.
        compose_run: Composes a run's configuration from overrides.
        config_dir: A directory laid out like conf/ whose choices are offered too.

    Raises:
        ConfigError: All that is wrong with any of them.
    """
    own, others = split_section(overrides, "study", StudySettings)
    settings = section(StudySettings, "study", own, config_dir=config_dir, spelled={"from": "from_study"})
    faults: list[str] = []
    configs: dict[str, RunConfig] = {}
    for chosen in [[f"method={method}"] for method in settings.methods] or [[]]:
        try:
            config = compose_run([*settings.run, *others, *chosen])
        except ConfigError as error:
            faults += error.faults
            continue
        configs[config.method_name] = config
    if faults:
        raise ConfigError(faults)
    return Composed(settings, configs, (*settings.run, *others))
