"""The engine's promise: the same bits however the work is cut, shared, read and written; and what it says of them."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import pytest
import torch

import harness.pieces
from harness.crew import crew
from harness.inputs import Inputs
from harness.merge import Done, Memory, Merge, MergeError, merge, merge_into, ready
from harness.output import merge_to_directory
from methods.catalogue import find
from pools.checkpoint import Checkpoint
from pools.write import Layout
from tests.harness.engine_parts import ROOT, bits, files_of, on_disk, plain, run
from tests.methods.samples import CASES, Case, SampleRoles, State, models, stats_for


def job_of(case: Case, base: Mapping | None, experts: Mapping, stats=None, dtype=None) -> Merge:
    params = case.row.load_params()(**case.params)
    return ready(Merge(case.row, params, Inputs(base, experts, SampleRoles(), stats, 7, dtype=dtype)))


def summed(job: Merge) -> tuple[State, Done]:
    sink = Memory(job.specs)
    return sink.tensors, merge_into(sink, job)


DTYPES = (torch.float32, torch.bfloat16)
INPUT_SHARDS = (100, 10**6)


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict:
    """(dtype, bytes of a shard) -> base and experts on the disk, by name."""
    found = {}
    for dtype in DTYPES:
        base, experts = models(3, dtype=dtype)
        for shard_bytes in INPUT_SHARDS:
            place = tmp_path_factory.mktemp("members")
            opened = {name: on_disk(place / name, state, shard_bytes) for name, state in {"": base, **experts}.items()}
            found[dtype, shard_bytes] = opened
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_however_it_is_cut_shared_read_and_written(case, dtype, members, tmp_path, monkeypatch):
    base, experts = models(case.n_experts, dtype=dtype)
    stats = stats_for(case.row, experts)
    expected = bits(merge(job_of(case, base, experts, stats)))
    for workers, chunk, read, written in ((1, 16, 100, 10**6), (2, 48, 10**6, 333), (5, 32, 100, 1200)):
        monkeypatch.setattr(harness.pieces, "CHUNK", chunk)
        opened = members[dtype, read]
        job = job_of(case, opened[""], {name: opened[name] for name in experts}, stats)
        with crew(workers) as hands:
            assert bits(merge(job, hands)) == expected
            out = tmp_path / str(chunk)
            merge_to_directory(job, Layout(job.specs), out, crew=hands, shard_bytes=written)
        assert bits(Checkpoint(out)) == expected


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("ties", {}),
        ("ties", {"scope": "tensor"}),
        ("dare", {"base_rule": "ties"}),
        ("dare", {"density": 0.1}),
        ("slerp", {"t": 0.3}),
    ],
)
def test_the_same_bits_of_a_tensor_of_many_chunks(method, params, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(130, 301, generator=generator), "v": torch.randn(7, generator=generator)}
    experts = {
        name: {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        for name in ("a", "b")
    }
    expected = bits(merge(plain(method, base, experts, **params)))
    for chunk in (160, 1024, 8192):
        monkeypatch.setattr(harness.pieces, "CHUNK", chunk)
        with crew(3) as hands:
            assert bits(merge(plain(method, base, experts, **params), hands)) == expected


TWO = """
import sys
from pathlib import Path
import torch
import harness.pieces
harness.pieces.CHUNK = 64
from lightning.fabric import Fabric
from harness.crew import crew
from harness.execute import FabricTeam
from harness.inputs import Inputs
from harness.merge import Merge, ready
from harness.output import merge_to_directory
from methods.catalogue import find
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.roles import NamedRoles
from pools.write import Layout
place, processes = Path(sys.argv[1]), int(sys.argv[2])
fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
fabric.launch()
for method in ("ties", "dare", "slerp", "opcm"):
    members = {name: Checkpoint(place / name) for name in ("base", "ant", "bee")}
    base = members.pop("base")
    if method == "slerp":
        members.pop("bee")
    row = find(method)
    job = ready(Merge(row, row.load_params()(), Inputs(base, members, NamedRoles(specs_of(base)), seed=3)))
    with crew(2) as hands:
        out, team = place / f"{method}{processes}", FabricTeam(fabric)
        done = merge_to_directory(job, Layout(job.specs), out, crew=hands, shard_bytes=20000, team=team)
    if fabric.global_rank == 0:
        print(method, done.bytes_read, done.bytes_written, f"{done.rounding_error:.6e}")
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "ant", "bee"):
        state = {f"layers.{i}.weight": torch.randn(50, 41, generator=generator).bfloat16() for i in range(5)}
        on_disk(tmp_path / name, state)
    (tmp_path / "two.py").write_text(TWO)
    told = [
        subprocess.run(
            [sys.executable, tmp_path / "two.py", tmp_path, n_processes], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=150, check=True,
        ).stdout.splitlines()
        for n_processes in ("1", "2")
    ]  # fmt: skip
    assert len(told[0]) == 4
    assert told[0] == told[1]
    for method in ("ties", "dare", "slerp", "opcm"):
        one, two = (files_of(tmp_path / f"{method}{n_processes}") for n_processes in (1, 2))
        assert len(one) > 2
        assert one == two
    assert not list(tmp_path.glob(".*partial*"))


# -- dtypes and rounding -----------------------------------------------------------------------------------------------


def test_a_chosen_dtype_is_of_what_floats():
    base, experts = models(2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        merged = merge(job_of(Case(find("task_arithmetic")), base, experts, dtype=dtype))
        for name, tensor in merged.items():
            assert tensor.dtype is (dtype if base[name].is_floating_point() else base[name].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_error_is_the_one_found_by_hand(dtype):
    base, experts = models(2)
    row = Case(find("task_arithmetic"))
    exact = merge(job_of(row, base, experts))
    names = [name for name in base if base[name].is_floating_point() and not SampleRoles().is_buffer(name)]
    lost = sum(float((exact[name].to(dtype).double() - exact[name].double()).square().sum()) for name in names)
    whole = sum(float(exact[name].double().square().sum()) for name in names)
    _, done = summed(job_of(row, base, experts, dtype=dtype))
    assert done.rounding_error == pytest.approx(math.sqrt(lost / whole), rel=1e-5)
    assert done.rounding_error > 1e-5
    assert summed(job_of(row, base, experts))[1].rounding_error == 0


def test_numbers_whose_squares_overflow_are_merged_and_their_rounding_told():
    state = {"w": torch.full((1000,), 1.0001e30)}
    merged, done = summed(plain("simple_average", None, {"a": state, "b": state}))
    assert torch.equal(merged["w"], state["w"])
    _, done = summed(plain("simple_average", None, {"a": state, "b": state}, dtype=torch.bfloat16))
    expected = abs(float(state["w"][0].bfloat16()) / float(state["w"][0]) - 1)
    assert done.rounding_error == pytest.approx(expected, rel=1e-4)


def test_what_is_beyond_the_range_of_the_output_is_named():
    base = {"fc.weight": torch.full((3,), 6e4).half()}
    experts = {"a": {"fc.weight": torch.full((3,), 6.4e4).half()}}
    with pytest.raises(MergeError, match=r"fc.weight \(3,\) came out beyond the range of torch.float16; a smaller"):
        merge(plain("task_arithmetic", base, experts, scale=4.0))
    assert merge(plain("task_arithmetic", base, experts, torch.bfloat16, scale=4.0))["fc.weight"].isfinite().all()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "opcm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_whose_weights_are_not_finite_is_said(method, value, tmp_path):
    base, experts = models(2)
    experts["ant"]["layers.0.fc1.weight"][3, 2] = value
    members = {name: on_disk(tmp_path / name, state) for name, state in {"base": base, **experts}.items()}
    job = plain(method, members.pop("base"), members)
    with (
        crew(2) as hands,
        pytest.raises(MergeError, match=r"layers.0.fc1.weight has NaN or infinite weights in expert ant"),
    ):
        merge_to_directory(job, Layout(job.specs), tmp_path / "out", crew=hands, shard_bytes=10**6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ant", "base", "bee"]


def test_float8_in_and_out():
    state = {"w": torch.linspace(-2, 2, 64)}
    base = {"w": state["w"].to(torch.float8_e4m3fn)}
    merged = merge(plain("simple_average", base, {"a": base, "b": base}))
    assert torch.equal(merged["w"].float(), base["w"].float())
    merged = merge(plain("simple_average", base, {"a": state, "b": state}))
    assert torch.equal(merged["w"].float(), base["w"].float())


def test_tensors_of_every_sort_reach_the_disk(tmp_path):
    state = {
        "scalar": torch.tensor(2.0),
        "empty.weight": torch.zeros(0, 3),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "counts": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "turns": torch.tensor([1 + 2j]),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    members = {name: on_disk(tmp_path / name, state) for name in ("a", "b")}
    job = plain("simple_average", None, members)
    with crew(2) as hands:
        merge_to_directory(job, Layout(job.specs), tmp_path / "out", crew=hands, shard_bytes=20)
    found = Checkpoint(tmp_path / "out")
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].shape == tensor.shape
        wanted = tensor.float().double() if tensor.dtype is torch.float64 else tensor  # arithmetic is in float32
        assert torch.equal(found[name], wanted)


# -- how the work is done ----------------------------------------------------------------------------------------------


class Counting(Mapping[str, torch.Tensor]):
    """Counts how often each tensor is asked for."""

    def __init__(self, tensors: State) -> None:
        self._tensors, self.seen = tensors, dict.fromkeys(tensors, 0)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen[name] += 1
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_what_is_no_weight_is_read_once_however_large(monkeypatch):
    monkeypatch.setattr(harness.pieces, "CHUNK", 16)
    base, expert = ({"table": torch.arange(100), "bn.running_mean": torch.ones(100)} for _ in range(2))
    job = plain("task_arithmetic", base, {"a": expert})
    counted = Counting(expert)
    merged = merge(dataclasses.replace(job, inputs=dataclasses.replace(job.inputs, experts={"a": counted})))
    assert torch.equal(merged["table"], base["table"])
    assert max(counted.seen.values()) == 1


def test_bytes_read_are_those_that_the_bars_are_told(tmp_path):
    base, experts = models(3, dtype=torch.bfloat16)
    told: dict[str, int] = {}

    def tick(phase: str, n: int) -> None:
        told[phase] = told.get(phase, 0) + n

    for method in ("simple_average", "ties", "opcm"):
        told.clear()
        job = plain(method, base, experts)
        done = merge_into(Memory(job.specs), job, tick=tick)
        sizes = [tensor.nbytes for tensor in base.values()]
        members = 3 if method == "simple_average" else 4
        assert done.bytes_read == members * sum(sizes)
        assert done.bytes_written == sum(sizes)
        if method != "opcm":  # tells of its weights alone
            assert told["merge"] == done.bytes_read
        assert set(done.seconds) == {"prepare", "merge"}


def test_after_an_error_nobody_works_on_and_the_first_one_is_told():
    working, seen = threading.Semaphore(0), []

    def work(item: int) -> int:
        seen.append(item)
        if item == 2:
            raise MergeError("the second")
        if item == 3:
            raise MergeError("the third, and sooner")
        if item > 3:
            working.acquire(timeout=0.2)
        seen.append(-item)
        return item

    with crew(4) as hands:
        with pytest.raises(MergeError, match="the second"):
            list(hands.map(work, range(100)))
        started = [item for item in seen if item > 3]
        assert started
        assert {-item for item in started} <= set(seen)  # all that began has ended
        told = len(seen)
        time.sleep(0.3)
        assert len(seen) == told


def test_an_interrupted_merge_stops_its_workers_before_it_returns(tmp_path, monkeypatch):
    """Otherwise they would write into files that are closed, or into others that have their numbers now."""
    monkeypatch.setattr(harness.pieces, "CHUNK", 64)
    base = {"w": torch.zeros(64 * 200)}
    job = plain("simple_average", None, {"a": base, "b": base})
    writing = 0

    class Slow(Memory):
        def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
            nonlocal writing
            writing += 1
            time.sleep(0.02)
            super().put_part(name, start, part)
            writing -= 1

    def tick(phase: str, n: int) -> None:
        raise KeyboardInterrupt

    with crew(1 + 2) as hands:
        with pytest.raises(KeyboardInterrupt) as caught:
            merge_into(Slow(job.specs), job, hands, tick)
        assert caught.value.__traceback__ is not None  # which keeps the frames, and so what they hold
        assert writing == 0


def test_torchs_threads_are_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with crew(3) as hands:
            assert list(hands.map(lambda _: torch.get_num_threads(), range(6))) == [1] * 6
        assert torch.get_num_threads() == 2
        with crew(2) as hands:
            assert list(hands.map(abs, [-1, 2])) == [1, 2]
    finally:
        torch.set_num_threads(before)


PEAK = """
import sys
from pathlib import Path
from harness.crew import crew
from harness.inputs import Inputs
from harness.merge import Merge, ready
from harness.output import merge_to_directory
from methods.catalogue import find
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.roles import NamedRoles
from pools.write import Layout
import numpy, torch
place, method = Path(sys.argv[1]), sys.argv[2]
base, expert = Checkpoint(place / "base"), Checkpoint(place / "expert")
row = find(method)
job = ready(Merge(row, row.load_params()(), Inputs(base, {"a": expert}, NamedRoles(specs_of(base)))))
with crew(2) as hands:
    merge_to_directory(job, Layout(job.specs), place / method, crew=hands, shard_bytes=10**9)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_size_of_tensors_and_of_the_model(tmp_path):
    """64 MB in one tensor, 512 MB in eight; and 256 MB in one: none of it shows."""
    sizes = ((1, 8192), (8, 8192), (1, 32768))
    for n, rows in sizes:
        for member, factor in {"base": 0.0, "expert": 1.0}.items():
            state = {f"w{i}": torch.full((rows, 4096), 1.0 + i).bfloat16() for i in range(n)}
            for tensor in state.values():
                tensor += factor * torch.linspace(-1, 1, 4096).bfloat16()
            on_disk(tmp_path / f"{n}-{rows}" / member, state)
    for method in ("task_arithmetic", "ties", "slerp"):
        peaks = {(n, rows): int(run(PEAK, tmp_path / f"{n}-{rows}", method)) // 1024 for n, rows in sizes}
        assert max(peaks.values()) - min(peaks.values()) < 60, (method, peaks)  # MiB
