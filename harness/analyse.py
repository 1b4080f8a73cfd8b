"""`crucible analyse`: what the experts of a pool have in common and where they differ, as one MLflow run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from lightning.fabric import Fabric

from harness.analysis_lines import ends_of
from harness.analysis_parts import Session, Told, looked_at
from harness.analysis_settings import BASE, SCORED, SUM, WEIGHTS, AnalysisSettings
from harness.bench import open_bench
from harness.compose import flat, to_yaml
from harness.config import RunConfig, TasksSettings, UserError, closest
from harness.execute import describe, launch, together
from harness.keep import members
from harness.run import record_inputs, refusals
from harness.track import Run, local_path, open_run


def analyse(config: RunConfig, settings: AnalysisSettings) -> Told:
    """Look at a pool's experts; returns what was found, in words.

    Args:
        config: Pool, tasks (for lines and planes), seed, device, tracking.
        settings: What is looked at.

    Raises:
        UserError: The input is bad; nothing was computed.
    """
    settings = _filled(config, settings)
    fabric = launch(config.fabric.accelerator, 1, config.fabric.precision, config.seed)
    with together(fabric), _tracked(config, settings, fabric) as tracked:
        with tracked.phase("open"):
            scored = any(part in SCORED for part in settings.parts)
            bench = open_bench(config.pool, config.tasks if scored else TasksSettings(), local_path)
            record_inputs(tracked, bench, config)
        session = Session(config, settings, bench, fabric, tracked)
        told = looked_at(session)
        tracked.lineage(members(bench.pool))
        lines = [f"Analysis of the pool {config.pool_name}: {', '.join(settings.parts)}.", "", "| | |", "|---|---|"]
        tracked.describe("\n".join(lines + [f"| {name} | {words} |" for name, words in told]))
        return [*told, ("run", str(tracked.id))]


def _filled(config: RunConfig, settings: AnalysisSettings) -> AnalysisSettings:
    """The settings with what they leave to the pool filled in.

    Raises:
        UserError: All that the pool or the tasks do not have, a line each.
    """
    experts = list(config.pool.experts)
    plane = settings.plane or (experts[:2] if len(experts) > 1 else [])
    settings = replace(settings, lines=settings.lines or _lines(experts), plane=plane)
    faults = [*_unfit_pool(config, settings), *_unfit_tasks(config, settings), *_unknown_ends(experts, settings)]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return settings


def _unfit_pool(config: RunConfig, settings: AnalysisSettings) -> Iterator[str]:
    """What the pool lacks."""
    n, called = len(config.pool.experts), f"the pool {config.pool_name}"
    several = [part for part in settings.parts if part in ("cosine", "signs", "plane")]
    if config.pool.base is None:
        yield f"changes are looked at beside a base, and {called} has none; pool.base=PATH"
    if not n:
        yield f"{called} has no experts; +pool.experts.NAME=PATH adds one"
    elif several and n < 2:
        yield f"analyse.parts: {', '.join(several)} compare two experts or more, {called} has {n}"
    if config.fabric.devices != 1:
        yield f"fabric.devices={config.fabric.devices}: an analysis runs on one device; leave it out"


def _unfit_tasks(config: RunConfig, settings: AnalysisSettings) -> Iterator[str]:
    """What the tasks lack, where models are scored."""
    scored = [part for part in settings.parts if part in SCORED]
    if scored and not config.tasks.tasks:
        rest = ",".join(part for part in settings.parts if part not in SCORED) or ",".join(WEIGHTS)
        yield f"analyse.parts: {', '.join(scored)} score models on tasks, and there are none; parts=[{rest}]"
    for name, task in config.tasks.tasks.items() if scored else ():
        if config.evaluation.split not in task.splits:
            known = ", ".join(task.splits)
            yield f"evaluation.split={config.evaluation.split}: task {name} has no such split; it has {known}"


def _unknown_ends(experts: list[str], settings: AnalysisSettings) -> Iterator[str]:
    """Experts that are asked for and not there."""
    known = [BASE, SUM, *experts]
    for end in (end for line in settings.lines for end in ends_of(line) if "line" in settings.parts):
        if end not in known:
            yield f"analyse.lines: {end!r} is no end of a line; {closest(end, known)}"
    for name in settings.plane if "plane" in settings.parts else ():
        if name not in experts:
            yield f"analyse.plane: the pool has no expert {name!r}; {closest(name, experts)}"


def _lines(experts: list[str]) -> list[str]:
    """Base to the first expert, it to the second, base to the sum."""
    first, second = experts[:1], experts[1:2]
    return [
        *(f"{BASE}:{name}" for name in first),
        *(f"{first[0]}:{name}" for name in second),
        *(f"{BASE}:{SUM}" for _ in second),
    ]


@contextmanager
def _tracked(config: RunConfig, settings: AnalysisSettings, fabric: Fabric) -> Iterator[Run]:
    """The MLflow run."""
    tags = {
        "kind": "analysis",
        "method": "analyse",
        "pool": config.pool_name,
        "tasks": config.tasks_name,
        "seed": str(config.seed),
        "device": describe(fabric),
        **config.tracking.tags,
    }
    title = config.tracking.run_name or f"analyse {config.pool_name}"
    params = flat(config) | {f"analyse.{key}": value for key, value in asdict(settings).items()}
    params["method"] = "analyse"
    with open_run(config.tracking.experiment, title, tags, params, config=to_yaml(config)) as tracked, refusals():
        yield tracked
