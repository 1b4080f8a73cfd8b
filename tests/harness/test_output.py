"""Merges from disk to disk that are interrupted, resumed or refused half-way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import harness.pieces
from harness.crew import ALONE, crew
from harness.inputs import MergeError
from harness.merge import Merge
from harness.output import merge_key, merge_to_directory
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.partial import JOURNAL, Journal, find_partials, finished_files, partial_directory
from pools.picked import Picked, Selected
from pools.recast import Recast
from pools.write import Layout, Shards
from tests.harness.engine_parts import bits, files_of, on_disk, plain, start

N = 6
SHARD = 4 * 1000  # one tensor
WHO = {"base": 0, "a": 1, "b": 2}


@pytest.fixture
def place(tmp_path) -> Path:
    """A base and two experts of six tensors."""
    for name, seed in WHO.items():
        generator = torch.Generator().manual_seed(seed)
        on_disk(tmp_path / name, {f"layers.{i}.weight": torch.randn(40, 25, generator=generator) for i in range(N)})
    return tmp_path


def job_in(place: Path, method: str = "ties", order: tuple[str, ...] = ("a", "b"), seed: int = 0, **params) -> Merge:
    experts = {name: Checkpoint(place / name) for name in order}
    return plain(method, Checkpoint(place / "base"), experts, seed=seed, **params)


def write(job: Merge, out: Path, resume: bool = False, tick=lambda phase, n: None, hands=ALONE, shard_bytes=SHARD):
    layout = Layout(job.specs)
    return merge_to_directory(job, layout, out, crew=hands, shard_bytes=shard_bytes, resume=resume, tick=tick)


class Stop(Exception):  # noqa: N818
    """Ends a merge in its middle."""


def stop_after(n: int, error: BaseException | None = None):
    left = [n]

    def tick(phase: str, _: int) -> None:
        if phase == "merge":
            left[0] -= 1
            if left[0] == 0:
                raise error or Stop

    return tick


def interrupted(place: Path, n: int = 3, **given) -> Path:
    """The partial directory of a merge that was ended after n tensors, by a process that lives no more."""
    with pytest.raises(Stop):
        write(job_in(place, **given), place / "out", tick=stop_after(n))
    left = place / f".out.partial-{os.getpid()}"
    ended = subprocess.Popen(["true"])
    ended.wait()
    return left.rename(place / f".out.partial-{ended.pid}")


def identities(directory: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in directory.glob("*.safetensors")}


# -- resume ------------------------------------------------------------------------------------------------------------


def test_resume_keeps_finished_files_and_gives_the_same_bytes(place):
    write(job_in(place), place / "whole")
    left = interrupted(place)
    before = identities(left)
    finished = json.loads((left / JOURNAL).read_text())["finished"]
    assert len(finished) == 3
    assert not (place / "out").exists()
    done = write(job_in(place), place / "out", resume=True)
    after = identities(place / "out")
    assert all(after[file] == before[file] for file in finished)
    assert files_of(place / "out") == files_of(place / "whole")
    assert done.bytes_written == (N - 3) * SHARD
    assert not list(place.glob(".out*"))


def test_resume_of_a_merge_that_was_whole_but_for_its_name(place):
    interrupted(place, n=N)
    done = write(job_in(place), place / "out", resume=True)
    assert done.bytes_written == 0
    write(job_in(place), place / "whole")
    assert files_of(place / "out") == files_of(place / "whole")


def test_resume_by_a_process_that_has_the_same_number(place):
    """As in a container, where it always has."""
    left = interrupted(place)
    before = identities(left)
    left.rename(place / f".out.partial-{os.getpid()}")
    done = write(job_in(place), place / "out", resume=True)
    assert done.bytes_written == (N - 3) * SHARD
    assert before.items() & identities(place / "out").items()


def test_without_resume_all_is_made_anew_and_what_was_left_goes(place):
    left = interrupted(place)
    done = write(job_in(place), place / "out")
    assert done.bytes_written == N * SHARD
    assert not left.exists()


def test_of_several_leftovers_the_one_that_has_most_goes_on(place):
    few, many = interrupted(place, n=2), interrupted(place, n=4)
    other = interrupted(place, n=5, seed=9, method="dare")
    assert len({few, many, other}) == len(list(place.glob(".out.partial-*"))) == 3
    done = write(job_in(place), place / "out", resume=True)
    assert done.bytes_written == (N - 4) * SHARD
    assert not list(place.glob(".out*"))


def test_a_directory_of_another_name_is_let_alone(place):
    left = interrupted(place)
    other = left.rename(place / left.name.replace(".out.", ".out.partial-1."))  # the name `out.partial-1`
    assert write(job_in(place), place / "out", resume=True).bytes_written == N * SHARD
    assert other.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"density": 0.3},
        {"scale": 0.5},
        {"order": ("b", "a")},
        {"order": ("a",)},
        {"method": "task_arithmetic"},
        {"shard_bytes": 2 * SHARD},
        {"changed": "a"},
        {"changed": "base"},
    ],
    ids=str,
)
def test_nothing_of_another_merge_is_used(place, other):
    given = dict(other)
    shard_bytes, changed = given.pop("shard_bytes", SHARD), given.pop("changed", None)
    interrupted(place)
    if changed:
        shutil.rmtree(place / changed)
        on_disk(place / changed, {f"layers.{i}.weight": torch.randn(40, 25) for i in range(N)})
    done = write(job_in(place, **given), place / "out", resume=True, shard_bytes=shard_bytes)
    assert done.bytes_written == N * SHARD
    write(job_in(place, **given), place / "whole", shard_bytes=shard_bytes)
    assert files_of(place / "out") == files_of(place / "whole")


def test_the_seed_counts(place):
    interrupted(place, method="dare", seed=1)
    assert write(job_in(place, method="dare", seed=2), place / "out", resume=True).bytes_written == N * SHARD


def test_a_file_that_is_gone_is_made_again(place):
    left = interrupted(place)
    (left / json.loads((left / JOURNAL).read_text())["finished"][0]).unlink()
    write(job_in(place), place / "out", resume=True)
    write(job_in(place), place / "whole")
    assert files_of(place / "out") == files_of(place / "whole")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": null, "finished": 3}'])
def test_a_journal_that_cannot_be_read_is_none(place, text):
    left = interrupted(place)
    (left / JOURNAL).write_text(text)
    assert write(job_in(place), place / "out", resume=True).bytes_written == N * SHARD


def test_what_the_key_of_a_merge_covers(place):
    job = job_in(place, method="slerp")
    base, a, b = (Checkpoint(place / name) for name in WHO)
    names = list(base)

    def key(job: Merge = job, around=None, **inputs) -> str | None:
        job = dataclasses.replace(job, inputs=dataclasses.replace(job.inputs, **inputs))
        return merge_key(job, Layout(job.specs, around or {}), SHARD)

    def stacked(*order: int) -> Picked:
        return Picked({name: (a, names[index]) for name, index in zip(names, order, strict=True)}, "a")

    def rest(of: Checkpoint, dtype=None) -> Recast:
        return Recast(Selected(of, names[:1]), dtype)

    same = key(experts={"a": Checkpoint(place / "a"), "b": Checkpoint(place / "b")}, base=Checkpoint(place / "base"))
    assert key() == same is not None
    others = [
        key(experts={"b": b, "a": a}),
        key(experts={"b": a, "a": b}),
        key(experts={"a": stacked(0, 1, 2, 3, 4, 5), "b": b}),
        key(experts={"a": stacked(0, 0, 2, 3, 4, 5), "b": b}),
        key(around=rest(a)),
        key(around=rest(b)),
        key(seed=1),
        key(base=None),
        key(dtype=torch.bfloat16),
        key(dataclasses.replace(job, params=dataclasses.replace(job.params, t=0.2))),
        key(dataclasses.replace(job, params_of=lambda name: dataclasses.replace(job.params, t=0.2))),
    ]
    assert None not in others
    assert len({same, *others}) == len(others) + 1
    assert key(stats={"a": {}, "b": {}}) is None
    assert key(experts={"a": {name: a[name] for name in a}}) is None  # in memory
    assert key(around={names[0]: a[names[0]]}) is None


def test_what_cannot_be_resumed_leaves_nothing(place):
    job = job_in(place)
    experts = {name: {key: source[key] for key in source} for name, source in job.inputs.experts.items()}
    with pytest.raises(Stop):
        write(plain("ties", job.inputs.base, experts), place / "out", tick=stop_after(3))
    assert {path.name for path in place.iterdir()} == set(WHO)


# -- interruptions -----------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from harness import merge
rounded = merge.rounded
def slow(*given):
    time.sleep(0.15)
    return rounded(*given)
merge.rounded = slow
from harness.cli import main
sys.exit(main(["merge", *sys.argv[1:]]))
"""


def ties(place: Path, *more: str) -> list[str]:
    members = [f"pool.base={place / 'base'}", *(f"+pool.experts.{name}={place / name}" for name in ("a", "b"))]
    return ["pool=state_dict", *members, "method=ties", f"engine.shard_bytes={SHARD}", *more]


def n_finished(place: Path) -> int:
    found = [json.loads(file.read_text()) for file in place.glob(f".out.partial-*/{JOURNAL}")]
    return max((len(journal["finished"]) for journal in found), default=0)


def halfway(place: Path, *more: str) -> subprocess.Popen[str]:
    """A slow merge of which some files are finished."""
    process = start(SLOW, *ties(place, f"output={place / 'out'}", *more))
    end = time.monotonic() + 60
    while n_finished(place) < 2:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"it did not come to that: {process.communicate()}")
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [
        (signal.SIGKILL, -9, 2),
        pytest.param(signal.SIGINT, 130, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.slow),
    ],
)
def test_a_merge_that_is_ended_by_a_signal_can_go_on(place, number, status, workers):
    from harness import cli

    process = halfway(place, f"engine.workers={workers}")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert not (place / "out").exists()
    (left,) = find_partials(place)
    finished, before = json.loads((left / JOURNAL).read_text())["finished"], identities(left)
    assert 2 <= len(finished) < N
    assert cli.main(["merge", *ties(place, f"output={place / 'out'}", "engine.resume=true")]) == 0
    after = identities(place / "out")
    assert all(after[file] == before[file] for file in finished)
    assert cli.main(["merge", *ties(place, f"output={place / 'whole'}")]) == 0
    assert files_of(place / "out") == files_of(place / "whole")
    assert not list(place.glob(".*partial*"))


# -- files that change, disks that fill --------------------------------------------------------------------------------


def _touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def _overwrite(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def _replace(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)
    os.replace(other, file)


def _remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [_touch, _overwrite, _truncate, _replace, _remove])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_changes_during_the_merge_is_named(place, change, workers, monkeypatch):
    monkeypatch.setattr(harness.pieces, "CHUNK", 64)
    times = []

    def tick(phase: str, n: int) -> None:
        if not times:
            change(place / "a" / "model.safetensors")
        times.append(n)

    message = "a/model.safetensors (has changed since it was opened|can no longer be read)"
    with crew(workers) as hands, pytest.raises(CheckpointError, match=message):
        write(job_in(place, method="task_arithmetic"), place / "out", tick=tick, hands=hands)
    assert not (place / "out").exists()


def test_a_change_while_the_last_part_is_read_is_noticed(place, monkeypatch):
    """It is asked for after reading: before, it would be too early for the last."""
    real, file = os.preadv, place / "a" / "model.safetensors"

    def changed_meanwhile(*given):
        done = real(*given)
        _touch(file)
        return done

    tensors = Checkpoint(place / "a")
    monkeypatch.setattr(os, "preadv", changed_meanwhile)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        tensors["layers.0.weight"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of one megabyte, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_on_the_way(place, small_disk):
    """Somebody else fills it when the merge has begun; what is finished is kept, and goes on when there is room."""
    big = {f"w{i}": torch.full((200, 100), float(i)) for i in range(10)}  # 800 kB
    for name in WHO:
        shutil.rmtree(place / name)
        on_disk(place / name, big)
    ballast = small_disk / "ballast"

    def tick(phase: str, n: int) -> None:
        if phase == "merge" and not ballast.exists() and len(list(small_disk.glob(f".out*/{JOURNAL}"))):
            with ballast.open("wb", buffering=0) as stream, suppress(OSError):
                while True:
                    stream.write(bytes(4096))

    with (
        crew(2) as hands,
        pytest.raises(CheckpointError, match=r"out could not be written: No space left .* nothing under that name"),
    ):
        write(job_in(place), small_disk / "out", tick=tick, hands=hands, shard_bytes=80_000)
    assert not (small_disk / "out").exists()
    with pytest.raises(CheckpointError, match="are needed, its disk has"):
        write(job_in(place), small_disk / "out", resume=True, shard_bytes=80_000)
    ballast.unlink()
    done = write(job_in(place), small_disk / "out", resume=True, shard_bytes=80_000)
    assert 0 < done.bytes_written < 800_000
    assert bits(Checkpoint(small_disk / "out")) == bits(big)


def test_a_disk_that_is_too_small_is_refused_before_a_weight_is_read(place, small_disk):
    big = {"w": torch.zeros(600_000)}
    for name in WHO:
        shutil.rmtree(place / name)
        on_disk(place / name, big)
    seen = []
    with pytest.raises(CheckpointError, match=r"out cannot be written: 0.00224 GiB are needed, its disk has"):
        write(job_in(place, method="simple_average"), small_disk / "out", tick=lambda phase, n: seen.append(n))
    assert (seen, list(small_disk.iterdir())) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, -1])
def test_an_error_in_one_of_two_processes_ends_both(workplace, tiny_pool, tmp_path, where):
    """Each merges its part of the bytes: what is wrong with a tensor is found by one of them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_pool.root / "blue", tmp_path / "blue")
    file = tmp_path / "blue" / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[where]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    given = [f"pool.experts.blue={tmp_path / 'blue'}", f"output={tmp_path / 'out'}", "evaluation.references=false"]
    quick = ["tracking.log_model=false", "evaluation.plots=false", "fabric.accelerator=cpu", "fabric.devices=2"]
    done = workplace.cli("run", "method=task_arithmetic", *given, *quick)
    assert done.returncode == 2, done.stderr
    assert f"{name} has NaN or infinite weights in expert blue" in done.stderr
    assert done.stderr.count("crucible: ") == 1
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"blue"}
    assert "RUNNING" not in {run.info.status for run in workplace.runs().values()}


# -- threads and files -------------------------------------------------------------------------------------------------


def test_files_that_are_finished_at_once_are_all_noted(tmp_path):
    journal = Journal(tmp_path, "key")
    names = [f"{i}.safetensors" for i in range(40)]
    for name in names:
        (tmp_path / name).touch()
    faults: list[BaseException] = []

    def finish(own: list[str]) -> None:
        try:
            for name in own:
                journal.finish(name)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=finish, args=(names[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sorted(finished_files(tmp_path, "key")) == sorted(names)
    assert finished_files(tmp_path, "another") == []


def test_parts_in_any_order_from_many_threads(tmp_path):
    tensors = {f"w{i}": torch.randn(1000) for i in range(5)}
    parts = [(name, start) for name in tensors for start in range(0, 1000, 10)]
    parts = [parts[i] for i in torch.randperm(len(parts)).tolist()]
    finished: list[str] = []
    with (
        partial_directory(tmp_path / "out") as partial,
        Shards(partial, specs_of(tensors), 4000, done=finished.append) as shards,
        crew(6) as hands,
    ):
        flusher = threading.Thread(target=lambda: [shards.flush() for _ in range(50)])
        flusher.start()
        list(hands.map(lambda part: shards.put_part(*part, tensors[part[0]][part[1] : part[1] + 10]), parts))
        flusher.join()
    assert sorted(finished) == shards.files
    assert bits(Checkpoint(tmp_path / "out")) == bits(tensors)


def test_an_error_of_the_disk_in_the_background_reaches_the_one_who_finishes(place, monkeypatch):
    """The system tells an error of writing once to each that has a file open; the flusher must not swallow it."""
    real, told = os.fdatasync, []

    def failing(descriptor: int) -> None:
        if threading.current_thread() is threading.main_thread():
            told.append(descriptor)
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(CheckpointError, match="out could not be written: Input/output error"):
        write(job_in(place), place / "out")
    assert len(told) == 1
    assert {path.name for path in place.iterdir()} == set(WHO)


def test_nan_found_late_keeps_what_was_finished_out_of_sight(place):
    state = {name: Checkpoint(place / "a")[name] for name in Checkpoint(place / "a")}
    state["layers.5.weight"][3, 3] = float("nan")
    shutil.rmtree(place / "a")
    on_disk(place / "a", state)
    with pytest.raises(MergeError, match=r"layers\.5\.weight has NaN or infinite weights in expert a"):
        write(job_in(place), place / "out")
    assert not (place / "out").exists()


def test_memory_of_chunks_is_used_again(place, monkeypatch):
    monkeypatch.setattr(harness.pieces, "CHUNK", 128)
    made = []
    empty = torch.empty

    def counted(*given, **named):
        made.append(given)
        return empty(*given, **named)

    monkeypatch.setattr(harness.pieces._kept, "buffers", {}, raising=False)
    monkeypatch.setattr(torch, "empty", counted)
    write(job_in(place, method="task_arithmetic"), place / "out")
    assert len([size for size in made if size in ((128,), (256,))]) == 2  # the base's and the experts'
