"""A merge from disk to disk: laid out first, then every worker and process writes its parts in place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from harness.crew import Crew
from harness.inputs import MergeError, Tensors
from harness.job import Done, Merge, Tick
from harness.merge import merge_into
from harness.provenance import version
from harness.sparsity import Zeros
from pools.partial import Journal, finished_files, partial_directory
from pools.write import Layout, Shards, write_around, write_beside

_FLUSH_S = 0.5  # how often what was written is sent on to the disk


class Team(Protocol):
    """The processes that merge together."""

    rank: int
    size: int

    def agree(self, word: str) -> str:
        """Rank zero's word, in every process."""
        ...

    def wait(self) -> None:
        """Until all processes are here."""
        ...

    def add(self, numbers: list[float]) -> list[float]:
        """Sums over the processes, in every process."""
        ...

    def hear(self, word: str) -> list[str]:
        """What each process says, in every process."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def agree(self, word: str) -> str:
        """The word itself."""
        return word

    def wait(self) -> None:
        """There is nobody to wait for."""

    def add(self, numbers: list[float]) -> list[float]:
        """The numbers themselves."""
        return numbers

    def hear(self, word: str) -> list[str]:
        """The word alone."""
        return [word]


def merge_to_directory(
    job: Merge,
    layout: Layout,
    directory: Path,
    *,
    crew: Crew,
    shard_bytes: int,
    resume: bool = False,
    tick: Tick = lambda phase, n: None,
    team: Team | None = None,
) -> Done:
    """Merge into a model directory, which has its name only when it is complete.

    Args:
        job: What `harness.merge.ready` has passed.
        layout: What the pool writes.
        directory: Must not exist yet, or be empty.
        crew: Workers of this process.
        shard_bytes: Most bytes of one weights file.
        resume: Keep the finished files of an interrupted merge of the same inputs with the same parameters.
        tick: Told of the bytes that were read.
        team: The processes; each writes its part of the bytes.

    Raises:
        CheckpointError: The directory is taken, or the disk cannot hold it; nothing is left under its name.
        MergeError: The weights cannot be merged.
    """
    team = team or Alone()
    key = merge_key(job, layout, shard_bytes) or ""
    if team.rank:
        partial = Path(team.agree(""))
        with Shards(partial, layout.specs, shard_bytes, join=True) as shards:
            done = _merge_part(shards, job, crew, tick, team)
        done = _together(done, team)
        team.wait()
        return done
    with partial_directory(directory, layout.nbytes, key=key or None, resume=resume and team.size == 1) as partial:
        journal = Journal(partial, key, finished_files(partial, key))
        shards = Shards(
            partial, layout.specs, shard_bytes, finished=journal.finished, shared=team.size > 1, done=journal.finish
        )
        with _hint(journal, len(shards.files)), shards:
            team.agree(str(partial))
            done = _merge_part(shards, job, crew, tick, team)
            write_around(shards, layout)
            done = _together(done, team)
        write_beside(partial, layout)
    team.wait()
    return done


@contextmanager
def _hint(journal: Journal, n_files: int) -> Iterator[None]:
    """Say what an interruption has left to go on with."""
    try:
        yield
    except BaseException:
        if journal.finished:
            kept = f"{len(journal.finished)} of {n_files} weights files are finished and kept"
            print(f"crucible: {kept}: the same command with engine.resume=true goes on", file=sys.stderr)
        raise


def merge_key(job: Merge, layout: Layout, shard_bytes: int) -> str | None:
    """What two merges share that write the same bytes: inputs as they are on the disk, parameters, layout, version.

    None where statistics are used, or a member is not on the disk: nobody could tell whether they have changed. None
    also where the method prunes: zeros of what was finished before would not be counted.
    """
    inputs = job.inputs
    members: list[tuple[str | None, Tensors]] = [(None, inputs.base)] if inputs.base is not None else []
    members += [*inputs.experts.items()] + ([("around", layout.around)] if layout.around else [])
    stamps = [(name, getattr(tensors, "stamp", None)) for name, tensors in members]  # the order of experts may count
    if inputs.stats is not None or job.row.prunes or any(stamp is None for _, stamp in stamps):
        return None
    facts = {
        "version": [version("crucible"), version("torch")],
        "method": job.row.name,
        "params": [dataclasses.asdict(job.params), {name: dataclasses.asdict(job.of(name)) for name in job.specs}],
        "veneers": [[worn.veneer.name, dataclasses.asdict(worn.params)] for worn in job.veneers],
        "seed": inputs.seed,
        "device": inputs.device.type,
        "specs": {name: [list(spec.shape), str(spec.dtype)] for name, spec in layout.specs.items()},
        "merged": sorted(job.specs),
        "shard_bytes": shard_bytes,
        "members": stamps,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _merge_part(shards: Shards, job: Merge, crew: Crew, tick: Tick, team: Team) -> Done:
    """This process's part of the merge; what goes wrong in any of them ends all, with its own words.

    Raises:
        MergeError: The weights cannot be merged.
    """
    done, fault = Done(), None
    try:
        with _flushed(shards):
            done = merge_into(shards, job, crew, tick, (team.rank, team.size))
    except (ValueError, OSError) as error:
        if team.size == 1:
            raise
        fault = error
    said = [word for word in team.hear(str(fault or "")) if word]
    if isinstance(fault, OSError):
        raise fault
    if said:
        raise MergeError("\n".join(said)) from fault
    return done


def _together(done: Done, team: Team) -> Done:
    """What all processes came to."""
    read, written, error, square, *counts = team.add(
        [done.bytes_read, done.bytes_written, done.error, done.square, *dataclasses.astuple(done.zeros)]
    )
    zeros = Zeros(*map(int, counts))
    return dataclasses.replace(
        done, bytes_read=int(read), bytes_written=int(written), error=error, square=square, zeros=zeros
    )


@contextmanager
def _flushed(shards: Shards) -> Iterator[None]:
    """Send to the disk what is written while more of it is made: at the end there is little to wait for."""
    over = threading.Event()

    def flush() -> None:
        while not over.wait(_FLUSH_S):
            shards.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
