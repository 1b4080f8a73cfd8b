"""What is said of a merge before it: read off headers alone, and near enough to what then happens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.inputs import Inputs, MergeError
from harness.merge import Memory, Merge, merge_into, ready
from harness.preflight import preflight
from harness.veneers import Worn
from methods.catalogue import CATALOGUE, VENEERS
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.write import Layout
from tests.harness.engine_parts import on_disk, plain, run
from tests.methods.samples import CASES, SampleRoles, models, stats_for

STATE = {
    "layers.0.fc.weight": torch.ones(30, 20).bfloat16(),
    "layers.1.fc.weight": torch.ones(30, 20).bfloat16(),
    "bn.running_mean": torch.zeros(5),
    "position_ids": torch.arange(4),
}
AROUND = {"head.weight": torch.ones(7, 3)}


@pytest.fixture
def members(tmp_path) -> dict[str, Checkpoint]:
    return {name: on_disk(tmp_path / name, STATE) for name in ("base", "a", "b")}


def looked(members, method: str = "ties", tmp_path=None, dtype=None, workers: int = 2, params_of=None, **params):
    members = dict(members)
    job = plain(method, members.pop("base"), members, dtype, **params)
    job = dataclasses.replace(job, params_of=params_of)
    layout = Layout(specs_of(AROUND) | job.specs, AROUND)
    output = None if tmp_path is None else tmp_path / "not" / "there" / "yet"
    return job, preflight(job, layout, workers, output, {"a": ("a.inv_freq",)}, ("a note",))


def test_no_weight_is_read(members, monkeypatch):
    monkeypatch.setattr(Checkpoint, "_fill", None)
    for method in ("simple_average", "ties", "dare", "opcm", "base", "task_arithmetic"):
        looked(members, method)


def test_every_tensor_with_what_is_done_to_it(members):
    _, found = looked(members, density=0.4)
    rows = {row["tensor"]: row for row in found.rows}
    assert {name: row["how"] for name, row in rows.items()} == {
        "head.weight": "copied",
        "layers.0.fc.weight": "merged",
        "layers.1.fc.weight": "merged",
        "bn.running_mean": "buffer",
        "position_ids": "buffer",
    }
    assert rows["layers.0.fc.weight"]["density"] == 0.4
    assert rows["layers.0.fc.weight"]["shape"] == [30, 20]
    assert rows["layers.0.fc.weight"]["dtype"] == "bfloat16"
    assert "density" not in rows["head.weight"]
    columns, lines = found.table()
    assert columns[:4] == ("tensor", "shape", "dtype", "how")
    assert len(lines) == len(rows)
    summary = dict(found.summary())
    assert summary["tensors"] == "5, of which 2 are merged"
    assert summary["not in the output, of a"] == "a.inv_freq"
    assert summary["note"] == "a note"
    assert summary["free on the disk"] == "-"


def test_parameters_of_each_tensor_are_the_resolved_ones(members):
    def own(name: str):
        return dataclasses.replace(job.params, scale=0.5 if "layers.1" in name else 2.0)

    job, _ = looked(members, "task_arithmetic")
    _, found = looked(members, "task_arithmetic", params_of=own)
    scales = {row["tensor"]: row.get("scale") for row in found.rows}
    assert scales["layers.0.fc.weight"] == 2.0
    assert scales["layers.1.fc.weight"] == 0.5
    assert scales["position_ids"] is None


@pytest.mark.parametrize("method", ["simple_average", "ties", "opcm", "slerp"])
def test_bytes_are_those_that_are_then_read_and_written(members, method, tmp_path):
    if method == "slerp":
        members.pop("b")
    job, found = looked(members, method, tmp_path, torch.float32)
    done = merge_into(Memory(job.specs), job)
    assert found.nbytes_read == done.bytes_read
    assert found.nbytes_written == done.bytes_written + sum(tensor.nbytes for tensor in AROUND.values())
    assert found.nbytes_free > 0
    assert not (tmp_path / "not").exists()
    assert found.seconds > 0


def test_more_workers_and_experts_take_more_memory_and_larger_tensors_do_not(members, tmp_path):
    peaks = {workers: looked(members, workers=workers)[1].peak_bytes for workers in (1, 8)}
    assert peaks[8] >= peaks[1]
    big = {name: on_disk(tmp_path / f"big {name}", {"w": torch.ones(3 << 18)}) for name in ("base", "a", "b")}
    huge = {name: on_disk(tmp_path / f"huge {name}", {"w": torch.ones(12 << 18)}) for name in ("base", "a", "b")}
    one, other = (looked(each, "task_arithmetic")[1].peak_bytes for each in (big, huge))
    assert abs(one - other) < 16 << 20  # of the process itself
    one, other = (looked(each, "opcm")[1].peak_bytes for each in (big, huge))
    assert other - one > 16 << 20


def test_what_cannot_be_merged_is_refused_before(members):
    with pytest.raises(MergeError, match="nuslerp merges 2 experts"):
        looked({**members, "c": members["b"]}, "nuslerp")


PEAK = """
import sys
from pathlib import Path
from harness.crew import crew
from harness.merge import Memory, merge_into
from harness.output import merge_to_directory
from harness.preflight import preflight
from pools.checkpoint import Checkpoint
from pools.write import Layout
from tests.harness.engine_parts import plain
place, method = Path(sys.argv[1]), sys.argv[2]
job = plain(method, Checkpoint(place / "base"), {name: Checkpoint(place / name) for name in "ab"})
layout = Layout(job.specs)
found = preflight(job, layout, 2, place / method, {})
with crew(2) as hands:
    merge_to_directory(job, layout, place / method, crew=hands, shard_bytes=10**9)
print(found.peak_bytes)
print(1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "opcm"])
def test_the_peak_is_foretold_within_a_factor_of_two(method, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        state = {f"layers.{i}.weight": torch.randn(1024, 1024, generator=generator).bfloat16() for i in range(12)}
        on_disk(tmp_path / name, state)
    foretold, seen = map(int, run(PEAK, tmp_path, method).split())
    assert seen / 2 < foretold < seen * 2, (foretold, seen)


@pytest.mark.parametrize("case", {(case.row.name, *case.veneers): case for case in reversed(CASES)}.values(), ids=str)
def test_every_method_can_be_looked_at(case):
    """Alone and with what is put around it; made-up numbers must do for any rule."""
    base, experts = models(case.n_experts)
    worn = tuple(Worn(VENEERS[name], VENEERS[name].load_params()()) for name in case.veneers)
    inputs = Inputs(base, experts, SampleRoles(), stats_for(case.row, experts))
    job = ready(Merge(CATALOGUE[case.row.name], case.row.load_params()(**case.params), inputs, veneers=worn))
    assert preflight(job, Layout(job.specs), 1, None, {}).seconds >= 0
