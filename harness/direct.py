"""`crucible merge`: from checkpoints to a checkpoint, without evaluation or a tracker, so that it starts at once."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.compress import is_packed, pack
from harness.config import PoolSettings, RunConfig, UserError
from harness.crew import Crew, count_workers, crew
from harness.inputs import Inputs, MergeError
from harness.job import Merge, Tick
from harness.merge import ready
from harness.output import merge_to_directory
from harness.packed import save_packed
from harness.preflight import Preflight, preflight
from harness.schedules import resolved
from harness.stacking import stacked
from harness.veneers import asked
from methods.catalogue import find
from methods.kinds import Kind
from pools.headers import CheckpointError
from pools.open import Pool, open_pool
from pools.partial import refuse_taken


def merge_only(config: RunConfig) -> list[tuple[str, str]]:
    """Merge into `config.output`; returns what it came to, in words.

    Raises:
        UserError: The input is bad, or the method needs data.
    """
    if config.output is None:
        raise UserError("output=DIR says where the merged model is written; or look first with dry_run=true")
    place = Path(config.output).expanduser()
    with refusals():
        refuse_taken(place)
        pool, job = _opened(config)
        for note in getattr(pool, "notes", ()):
            print(f"crucible: {note}", file=sys.stderr)
        nbytes = sum(job.width[name] * math.prod(spec.shape) for name, spec in job.inputs.specs.items())
        with crew(count_workers(config.engine.workers)) as hands, progress(nbytes, job.row.name) as tick:
            if is_packed(job.row, job.params):
                return as_packed(config, job, pool, place, hands, tick)
            if config.output_kind == "adapter":
                return as_adapter(config, job, place, hands, tick)
            done = merge_to_directory(
                job,
                pool.layout(lineage(config), job.inputs.dtype),
                place,
                crew=hands,
                shard_bytes=config.engine.shard_bytes,
                resume=config.engine.resume,
                tick=tick,
            )
    return done.summary()


def look(config: RunConfig) -> Preflight:
    """What `merge_only` would do, from headers alone.

    Raises:
        UserError: The input is bad, or the method needs data.
    """
    place = None if config.output is None else Path(config.output).expanduser()
    with refusals():
        if place is not None:
            refuse_taken(place)
        pool, job = _opened(config)
        layout = pool.layout(lineage(config), job.inputs.dtype)
        notes = tuple(getattr(pool, "notes", ()))
        if is_packed(job.row, job.params):
            kept = f"what {job.row.name} keeps of {len(job.inputs.experts)} experts"
            notes += (f"written are the base and {kept}, whose size shows when it is packed",)
        return preflight(job, layout, count_workers(config.engine.workers), place, dropped_by(pool), notes)


def as_packed(config: RunConfig, job: Merge, pool: Pool, place: Path, hands: Crew, tick: Tick) -> list[tuple[str, str]]:
    """Compress the experts into a directory with their base; returns what it came to, in words."""
    refuse_adapter(config)
    packed = pack(job, hands, tick)
    save_packed(place, packed, pool, lineage(config), config.engine.shard_bytes)
    return packed.summary()


def refuse_adapter(config: RunConfig) -> None:
    """Refuse to write compressed experts as an adapter.

    Raises:
        UserError: That is asked for.
    """
    if config.output_kind == "adapter":
        raise UserError(f"{config.method_name} keeps experts compressed, which is no adapter: leave output_kind out")


def as_adapter(config: RunConfig, job: Merge, place: Path, hands: Crew, tick: Tick) -> list[tuple[str, str]]:
    """Merge LoRA experts into one adapter; returns what it came to, in words."""
    from harness.adapters import merge_adapters

    if job.row.prunes:
        raise UserError(f"{job.row.name} makes weights zero, which no adapter does: leave output_kind out")
    rank, energy = config.adapter.rank, config.adapter.energy
    facts = merge_adapters(job, place, rank=rank, energy=energy, lineage=lineage(config), crew=hands, tick=tick)
    return [
        ("modules", str(facts["modules"])),
        ("ranks", f"{facts['rank_min']} to {facts['rank_max']}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("error of the cut", f"{facts['relative_error']:.2e}, relative"),
        ("whole tensors", ", ".join(facts["whole_tensors"]) or "none"),
    ]


def _opened(config: RunConfig) -> tuple[Pool, Merge]:
    """Pool and merge, all checked that headers tell."""
    row = find(config.method_name)
    if row.kind in (Kind.search, Kind.build) or row.stats:
        raise UserError(f"{row.name} is fed data: merge with `crucible run method={row.name}`, which has tasks")
    if row.learns and config.method.steps:
        raise UserError(f"{row.name} with method.steps is fed data: use `crucible run method={row.name}`, or steps=0")
    device = _device(config.fabric.accelerator)
    pool = open_checked(stacked(config), tracked_place)
    return pool, ready(job_of(config, pool, device))


def job_of(config: RunConfig, pool: Pool, device: torch.device) -> Merge:
    """The merge that a configuration asks for."""
    dtype = getattr(torch, config.engine.dtype) if config.engine.dtype else None
    inputs = Inputs(pool.base, pool.experts, pool.roles, seed=config.seed, device=device, dtype=dtype)
    return Merge(find(config.method_name), config.method, inputs, params_by_name(config, pool), asked(config))


def params_by_name(config: RunConfig, pool: Pool) -> Callable[[str], Any] | None:
    """The parameters for each tensor's name, where the configuration has them differ.

    Raises:
        UserError: A filter fits no tensor, or the method refuses a tensor's values.
    """
    if not config.schedules:
        return None
    inputs, roles = Inputs(pool.base, pool.experts, pool.roles), pool.roles
    names = [name for name in inputs.specs if inputs.is_weight(name)]
    return resolved(config.method, config.schedules, names, roles.layer_of, roles.n_layers)


def lineage(config: RunConfig, run_id: str | None = None) -> dict[str, Any]:
    """What a model card tells of how the model was made."""
    facts = {"method": config.method_name, "params": dataclasses.asdict(config.method), "seed": config.seed}
    if config.schedules:
        facts["schedules"] = config.schedules
    if config.veneers:
        facts["veneers"] = {worn.veneer.name: dataclasses.asdict(worn.params) for worn in asked(config)}
    return facts | ({"run_id": run_id} if run_id else {})


def dropped_by(pool: Pool) -> dict[str, tuple[str, ...]]:
    """Names of each member's tensors that do not reach the output, by member."""
    own = getattr(pool, "dropped", None)
    if own is None:
        members = {"base": pool.base} if pool.base is not None else {}
        own = {name: getattr(member, "dropped", ()) for name, member in {**members, **pool.experts}.items()}
    return {str(name): tuple(names) for name, names in own.items() if names}


def open_checked(pool: PoolSettings, resolve: Callable[[str], Path]) -> Pool:
    """Open a pool; all that headers tell is checked.

    Raises:
        CheckpointError: All that is wrong, a line each.
    """
    opened = open_pool(**vars(pool), resolve=resolve)
    faults = opened.faults()
    if faults:
        raise CheckpointError("\n".join(faults))
    return opened


@contextmanager
def refusals() -> Iterator[None]:
    """What pool and engine refuse is for the user to put right: the message alone reaches the terminal."""
    try:
        yield
    except (CheckpointError, MergeError) as error:
        raise UserError(str(error)) from error


@contextmanager
def progress(nbytes: int, what: str, silent: bool | None = None) -> Iterator[Tick]:
    """Bars in bytes, with rate and time left: one for the look ahead that some methods take, one for the merge."""
    bars: dict[str, tqdm] = {}
    titles = {"prepare": f"{what}: looking at all weights", "merge": f"merging by {what}"}

    def tick(phase: str, n: int) -> None:
        if phase not in bars:
            total = nbytes if phase == "merge" else None
            bars[phase] = tqdm(
                total=total, desc=titles[phase], unit="B", unit_scale=True, unit_divisor=1024, disable=silent, delay=0.5
            )
        bars[phase].update(n)

    try:
        yield tick
    finally:
        for bar in bars.values():
            bar.close()


def _device(accelerator: str) -> torch.device:
    """One device of the kind that is asked for."""
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator in ("auto", "cpu"):
        return torch.device("cpu")
    raise UserError(f"fabric.accelerator={accelerator} is not on this machine; auto takes what there is")


def tracked_place(uri: str) -> Path:
    """The directory of a model that MLflow knows."""
    from harness.track import local_path

    return local_path(uri)
