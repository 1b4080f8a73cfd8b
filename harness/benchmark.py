"""`crucible benchmark`: every method searched with the same budget of trials, the winners scored on test, in one table.

Each method is a study of its own under one parent run, so that what is finished is not repeated, and what was stopped
goes on: the runs in MLflow are the only memory. Methods without ranges have one trial.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.benchmark_table import Entry, in_words, is_finished, markdown, table_of
from harness.config import ConfigError, RunConfig, UserError
from harness.nested import Child, Children, point, runs_with
from harness.provenance import is_dead
from harness.record import Run
from harness.track import open_run
from methods.catalogue import CATALOGUE, FAMILIES, find

Compose = Callable[[Sequence[str]], RunConfig]
Study = Callable[[Sequence[str]], Any]

TAG, KIND = "benchmark", "kind"
OWN = {"methods": "all", "trials": "30", "name": "benchmark", "output": ""}  # keys of the command, and their defaults
# Where runs are made and how fast: what may change between two halves of a benchmark.
FREE = ("study.workers", "workers", "study.heartbeat_s", "study.plots", "fabric.", "tracking.", "engine.workers")


@dataclass(frozen=True)
class Asked:
    """What a benchmark is told."""

    methods: tuple[str, ...]
    trials: int
    name: str
    output: Path | None
    overrides: tuple[str, ...]  # of every study

    @property
    def command(self) -> str:
        """The command that makes it, or goes on with it."""
        every = self.methods == every_method()
        own = [f"methods={'all' if every else '[' + ','.join(self.methods) + ']'}", f"trials={self.trials}"]
        own += [] if self.name == OWN["name"] else [f"name={self.name}"]
        own += [] if self.output is None else [f"output={self.output}"]
        return shlex.join(["crucible", "benchmark", *own, *self.overrides])

    @property
    def fixed(self) -> str:
        """What must stay the same when it goes on."""
        return shlex.join([f"trials={self.trials}", *sorted(o for o in self.overrides if not o.startswith(FREE))])


def every_method() -> tuple[str, ...]:
    """All methods but the reference that is one expert, which there is no deciding for."""
    return tuple(row.name for row in CATALOGUE.values() if row not in FAMILIES["references"] or row.n_experts[0] == 0)


def asked_of(overrides: Sequence[str]) -> Asked:
    """The benchmark's own keys, and what is left for the studies.

    Raises:
        ConfigError: A key's value is none, or a method is not known.
    """
    own, rest, faults = dict(OWN), list[str](), list[str]()
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals and key in OWN:
            own[key] = value
        else:
            rest.append(text)
    closed = [text for text in rest if text.removeprefix("study.").partition("=")[0] in ("method", *OWN, "resume")]
    faults += [f"{text}: the benchmark sets this itself; its own keys are {', '.join(OWN)}" for text in closed]
    if not own["trials"].isdigit() or int(own["trials"]) < 1:
        faults.append(f"trials={own['trials']}: a whole number from 1 on, for every method alike")
    names = [name.strip() for name in own["methods"].strip("[]").split(",") if name.strip()]
    methods = every_method() if names == ["all"] else tuple(dict.fromkeys(names))
    for name in methods:
        try:
            find(name)
        except KeyError as error:
            faults.append(f"methods: {error.args[0]}")
    if not methods:
        faults.append("methods=[]: give all, or a list like [ties,dare]")
    if faults:
        raise ConfigError(faults)
    output = Path(own["output"]) if own["output"] else None
    return Asked(methods, int(own["trials"]), own["name"], output, tuple(rest))


def benchmark(overrides: Sequence[str], compose: Compose, study: Study) -> list[tuple[str, str]]:
    """Run what is not finished, then tell of all.

    Args:
        overrides: The benchmark's own keys (OWN), and overrides of every study (`study.KEY=value`) and its runs.
        compose: Composes a run's configuration, so that all methods are checked before any begins.
        study: Runs a study from its overrides.

    Raises:
        UserError: The input is bad, or the benchmark of this name was another one; at the end, if methods have failed.
    """
    asked = asked_of(overrides)
    planned = _plan(asked, compose)
    config = next(iter(planned.values())).config
    where = config.tracking.experiment
    earlier = _earlier(where, asked)
    if earlier is not None:
        _take_over(earlier.id, asked.name)
    tags = {KIND: "benchmark", TAG: asked.name, "pool": config.pool_name, "tasks": config.tasks_name}
    params = {"trials": asked.trials, "fixed": asked.fixed, "seed": config.seed}
    with open_run(where, asked.name, tags, params) as tracked:
        children = Children.of(str(tracked.id))
        failed = _studies(asked, planned, study, tracked, children)
        table = _table(asked, planned, children.all(), failed)
        _record(table, tracked, asked)
    if failed:
        told = "\n".join(f"  - {name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(asked.methods)} methods failed, all others are in the table:\n{told}")
    return [*((row["method"], in_words(row, table["metric"])) for row in table["rows"]), ("run", str(tracked.id))]


@dataclass(frozen=True)
class _Planned:
    """One method's study."""

    config: RunConfig
    overrides: tuple[str, ...]
    experts: tuple[str, ...] | None  # where the method takes no more than these


def _plan(asked: Asked, compose: Compose) -> dict[str, _Planned]:
    """What every method's study is told.

    Raises:
        ConfigError: All that is wrong, of any of them.
    """
    found, faults = dict[str, _Planned](), list[str]()
    runs = [text for text in asked.overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] != "study"]
    pool = tuple(compose([*runs, "method=simple_average"]).pool.experts)
    for name in asked.methods:
        row = find(name)
        most = row.n_experts[1]
        experts = pool[:most] if most and len(pool) > most else None
        few = [f"experts=[{','.join(experts)}]"] if experts else []
        own = ["tracking.log_model=false", *(["adaptation.split=train"] if row.data else [])]
        try:
            config = compose([*own, *runs, *few, f"method={name}"])
        except ConfigError as error:
            faults += error.faults
            continue
        ranges = any(field.metadata.get("range") for field in dataclasses.fields(config.method))
        alone = [] if ranges else [f"study.space={{seed: {{choices: [{config.seed}]}}}}"]
        found[name] = _Planned(config, (*own, *alone, *asked.overrides, *few, f"method={name}"), experts)
    if faults:
        raise ConfigError(faults)
    return found


def _earlier(experiment: str, asked: Asked) -> Child | None:
    """The run of this benchmark, if it was begun before.

    Raises:
        UserError: That one was told something else, so that its methods could not be compared with these.
    """
    found = runs_with(experiment, {KIND: "benchmark", TAG: asked.name})
    if not found:
        return None
    before = found[0].params.get("fixed", "")
    if before != asked.fixed:
        raise UserError(
            f"benchmark {asked.name} was begun with {before}, and this is {asked.fixed}: its methods could not be "
            f"compared; give it as it was, or begin another one with name=NAME"
        )
    if found[0].status == "RUNNING" and not is_dead(dict(found[0].tags)):
        raise UserError(
            f"benchmark {asked.name} is running, as process {found[0].tags.get('crucible.pid')}; end it first"
        )
    return found[0]


def _take_over(run_id: str, name: str) -> None:
    """Have the next run that is opened be this one."""
    other = os.environ.pop("MLFLOW_RUN_ID", None)  # of `mlflow run`
    if other is not None and other != run_id:
        point(other, run_id, f"resumes {name}")
    os.environ["MLFLOW_RUN_ID"] = run_id


def _studies(
    asked: Asked, planned: Mapping[str, _Planned], study: Study, tracked: Run, children: Children
) -> dict[str, str]:
    """Run the studies that are not finished; returns why methods failed."""
    failed: dict[str, str] = {}
    with tqdm(planned.items(), desc="methods", unit="method", disable=None) as bar:
        for name, one in bar:
            bar.set_postfix_str(name)
            known = {child.tags.get("method"): child for child in children.all() if child.tags.get(KIND) == "study"}
            if name in known and is_finished(known[name]):
                continue
            title = f"{asked.name} {name}"
            told = [*one.overrides, f"study.name={title}", f"study.trials={asked.trials}"]
            told.append(f"+tracking.tags={{mlflow.parentRunId: {tracked.id}, {TAG}: {asked.name}}}")
            try:
                try:
                    study([*told, f"study.resume={json.dumps(name in known)}"])
                except UserError as error:  # it ended before its run was there
                    if "there is such a study" not in str(error):
                        raise
                    study([*told, "study.resume=true"])
            except Exception as error:  # one method must not take the others' hours with it: told at the end
                failed[name] = str(error).strip().splitlines()[-1].strip() if str(error).strip() else repr(error)
                tracked.text(traceback.format_exc(), f"failed/{name}.txt")
                print(f"crucible: {name} failed: {error}", file=sys.stderr)
    return failed


def _table(
    asked: Asked, planned: Mapping[str, _Planned], children: Sequence[Child], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Facts and rows, without a date or an id."""
    studies = {child.tags["method"]: child for child in children if is_finished(child)}
    entries = [Entry(name, studies[name], one.experts) for name, one in planned.items() if name in studies]
    config = next(iter(planned.values())).config
    split = [text.partition("=")[2] for text in asked.overrides if text.startswith("study.split=")]
    facts = {"command": asked.command, "trials": asked.trials, "seed": config.seed, "pool": config.pool_name}
    facts |= {"tasks": config.tasks_name, "searched_on": (split or ["validation"])[-1]}
    return facts | table_of(entries, config.evaluation.split, list(config.tasks.tasks), failed)


def _record(table: Mapping[str, Any], tracked: Run, asked: Asked) -> None:
    """Leave the table on the benchmark's run and, where asked for, in files."""
    from harness.plots import ranking

    text, data = markdown(table), json.dumps(table, indent=2) + "\n"
    tracked.text(text, "benchmark.md")
    tracked.text(data, "benchmark.json")
    tracked.describe(text)
    rows = [row for row in table["rows"] if "failed" not in row]
    for row in rows:
        tracked.metric(f"{row['method']}/{table['metric']}", row["mean"])
    if rows:
        tracked.figure(ranking(rows, table["metric"]), "benchmark.png")
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(text, encoding="utf-8")
        asked.output.with_suffix(".json").write_text(data, encoding="utf-8")
