"""Does the merge and keeps what came out: in the run, in a directory, or in memory only; hands on the module."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import nn

from harness.bench import Bench
from harness.compress import Packed, Restored, is_packed, pack
from harness.config import RunConfig, UserError
from harness.crew import Crew, count_workers, crew
from harness.direct import as_adapter, dropped_by, lineage, progress, refuse_adapter
from harness.execute import FabricTeam
from harness.job import Done, Memory, Merge, Tick
from harness.make import Made
from harness.merge import merge_into, ready
from harness.output import merge_to_directory
from harness.packed import save_packed
from harness.preflight import preflight
from harness.rebuild import recipe
from harness.track import Run
from methods.catalogue import find
from pools.adapters import LoraExpert
from pools.checkpoint import Checkpoint
from pools.open import Pool
from pools.partial import linked
from pools.wrapped import save_wrapped


@dataclass(frozen=True)
class Keeper:
    """What all ways of keeping a merge ask."""

    config: RunConfig
    bench: Bench
    tracked: Run
    fabric: Fabric

    @property
    def leads(self) -> bool:
        """Whether this process records."""
        return self.fabric.is_global_zero

    @property
    def scores(self) -> bool:
        """Whether anything is scored, so that a module is wanted."""
        return bool(self.bench.tasks) or self.bench.asked is not None

    def facts(self, kind: str) -> dict[str, Any]:
        """What a logged model is to know."""
        own = self.config.pool
        told = {"tasks": known_tasks(self.bench), "kind": kind, "family": own.family}
        return told | ({"trust_remote_code": True} if own.trust_remote_code else {})


def keep(made: Made, keeper: Keeper, kind: str) -> nn.Module | None:
    """Do the merge, write it into the run and to `config.output`, as far as either is asked for.

    Args:
        made: A merge to be done, or a module.
        keeper: Configuration, pool and tasks, run, devices.
        kind: Of the method.

    Returns:
        The merged module; None where nothing is scored.
    """
    if made.module is not None:
        return _keep_built(made.module.cpu(), keeper, kind)
    assert made.merge is not None
    if is_packed(made.merge.row, made.merge.params):
        return _keep_packed(made.merge, made.packed, keeper, kind)
    config, job = keeper.config, ready(made.merge)
    if config.output_kind == "adapter":
        job = _with_adapter(job, keeper)
    if keeper.leads:
        layout = keeper.bench.pool.layout({}, job.inputs.dtype)
        found = preflight(job, layout, 1, None, dropped_by(keeper.bench.pool))
        keeper.tracked.table([{key: str(value) for key, value in row.items()} for row in found.rows], "tensors.json")
    nbytes = sum(job.width[name] * math.prod(spec.shape) for name, spec in job.inputs.specs.items())
    workers = count_workers(config.engine.workers, keeper.fabric.world_size)
    with crew(workers) as hands, progress(nbytes, job.row.name, _silent(keeper)) as tick:
        if (config.output is not None and config.output_kind == "model") or config.tracking.log_model:
            module, done = _keep_written(job, keeper, kind, hands, tick)
        else:
            sink = Memory(job.specs)
            with keeper.tracked.phase("merge"):
                done = merge_into(sink, job, hands, tick)
            module = keeper.bench.pool.module(sink.tensors) if keeper.scores else None
    _record(done, keeper.tracked)
    return module


def _keep_written(job: Merge, keeper: Keeper, kind: str, hands: Crew, tick: Tick) -> tuple[nn.Module | None, Done]:
    """Merge into a directory that every process helps to write, and open it again."""
    config, pool, team = keeper.config, keeper.bench.pool, FabricTeam(keeper.fabric)
    layout = pool.layout(lineage(config, keeper.tracked.id), job.inputs.dtype)
    result: list[tuple[nn.Module | None, Done]] = []

    def write(directory: Path) -> None:
        with keeper.tracked.phase("merge"):
            done = merge_to_directory(
                job,
                layout,
                directory,
                crew=hands,
                shard_bytes=config.engine.shard_bytes,
                resume=config.engine.resume,
                tick=tick,
                team=team,
            )
        place = Path(team.agree(str(directory)))
        with keeper.tracked.phase("load"):
            result.append((_opened(place, job, pool) if keeper.scores else None, done))
        team.wait()

    if not keeper.leads:
        write(Path())
        return result[0]
    output = Path(config.output) if config.output is not None and config.output_kind == "model" else None
    if output is not None:
        write(output)
    if config.tracking.log_model:
        keeper.tracked.log_model(write if output is None else lambda path: linked(output, path), keeper.facts(kind))
    return result[0]


def _keep_packed(job: Merge, packed: Packed | None, keeper: Keeper, kind: str) -> nn.Module | None:
    """Compress the experts, write them with their base, and hand on the module that becomes any of them."""
    config, pool, tracked = keeper.config, keeper.bench.pool, keeper.tracked
    refuse_adapter(config)
    workers = count_workers(config.engine.workers, keeper.fabric.world_size)
    with crew(workers) as hands, progress(0, job.row.name, _silent(keeper)) as tick, tracked.phase("merge"):
        packed = packed or pack(job, hands, tick)  # by each process for itself
    for name, value in packed.metrics().items():
        tracked.metric(name, value)
    told = lineage(config, tracked.id)
    if keeper.leads and config.output is not None:
        save_packed(Path(config.output), packed, pool, told, config.engine.shard_bytes)
    if keeper.leads and config.tracking.log_model:
        facts = {**keeper.facts(kind), "experts": list(packed.experts)}
        tracked.log_model(lambda path: save_packed(path, packed, pool, told, config.engine.shard_bytes), facts)
    return Restored(packed, pool) if keeper.scores else None


def _with_adapter(job: Merge, keeper: Keeper) -> Merge:
    """Write the merged adapter to `config.output`; returns the merge that puts it on the base, to be scored."""
    config, pool = keeper.config, keeper.bench.pool
    if config.output is None:
        raise UserError("output_kind=adapter writes the merged adapter to a directory: name it as output=DIR")
    if keeper.leads:
        workers = count_workers(config.engine.workers)
        with crew(workers) as hands, progress(0, job.row.name, _silent(keeper)) as tick:
            told = as_adapter(config, job, Path(config.output), hands, tick)
        keeper.tracked.table([dict(told)], "adapter.json")
    FabricTeam(keeper.fabric).wait()
    merged = LoraExpert(Path(config.output), config.output, pool.base)  # type: ignore[arg-type]
    row = find("expert")
    return ready(Merge(row, row.load_params()(), replace(job.inputs, base=None, experts={"adapter": merged})))


def _opened(directory: Path, job: Merge, pool: Pool) -> nn.Module:
    """The module of what was written: weights are read once, into it."""
    return pool.module(Checkpoint(directory, select=lambda names: {name: name for name in names if name in job.specs}))


def _keep_built(module: nn.Module, keeper: Keeper, kind: str) -> nn.Module:
    """Write a module that is no checkpoint of the pool's architecture."""
    with keeper.tracked.phase("write"):
        return _write_built(module, keeper, kind)


def _write_built(module: nn.Module, keeper: Keeper, kind: str) -> nn.Module:
    config, pool = keeper.config, keeper.bench.pool
    facts = recipe(config.method_name, config.method, list(pool.experts), module.merged_names)  # type: ignore[arg-type]
    if keeper.leads and config.output is not None:
        save_wrapped(Path(config.output), module, facts, pool)
    if keeper.leads and config.tracking.log_model:
        told = keeper.facts(kind) | ({"experts": list(pool.experts)} if hasattr(module, "of") else {})
        told |= {"preference": list(pool.experts)} if hasattr(module, "preference") else {}
        keeper.tracked.log_model(lambda path: save_wrapped(path, module, facts, pool), told)
    return module


def _record(done: Done, tracked: Run) -> None:
    """What the merge has read and written, how fast, and what rounding has cost."""
    seconds = done.seconds or {}
    tracked.metric("merge/bytes_read", done.bytes_read)
    tracked.metric("merge/bytes_written", done.bytes_written)
    tracked.metric("merge/bytes_per_s", (done.bytes_read + done.bytes_written) / max(sum(seconds.values()), 1e-9))
    tracked.metric("merge/rounding_error", done.rounding_error)
    for name, value in done.zeros.metrics().items():
        tracked.metric(name, value)
    for phase, value in seconds.items():
        tracked.metric(f"time/merge_{phase}_s", value)


def _silent(keeper: Keeper) -> bool | None:
    """Bars are for rank zero at a terminal."""
    return None if keeper.leads else True


def refuse_taken(output: str | None) -> None:
    """Say before work starts what the writer would say after it.

    Raises:
        UserError: `output` is there already, and not empty.
    """
    place = Path(output) if output is not None else None
    if place is not None and place.exists() and (place.is_file() or any(place.iterdir())):
        raise UserError(f"output={output}: it exists already and is not overwritten; name another directory")


def known_tasks(bench: Bench) -> dict[str, dict[str, list[str]]]:
    """Labels and templates by task, kept with the model so that it can be asked by a task's name."""
    return {
        name: {"labels": list(task.labels), "templates": list(task.templates)} for name, task in bench.tasks.items()
    }


def members(pool: Pool) -> dict[str, dict[str, Any]]:
    """Where base and experts come from, and their content; what a merge has read is not read again for it."""
    found: dict[str, Any] = {"base": pool.base} if pool.base is not None else {}
    return {
        name: {"source": member.source, "fingerprint": member.fingerprint, "bytes": member.nbytes}
        for name, member in {**found, **pool.experts}.items()
    }
