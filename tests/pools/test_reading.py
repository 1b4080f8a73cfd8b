"""Checkpoints read in parts: the same numbers and fingerprint, whatever was read before and however it was cut."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pools.checkpoint
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.reading import is_source, read_into
from pools.write import Layout, write_directory

BLOCK = 32
TENSORS = {
    "double": torch.linspace(-1, 1, 100, dtype=torch.float64),
    "float": torch.linspace(-3, 3, 130).reshape(13, 10),
    "half": torch.linspace(-3, 3, 77).half(),
    "brain": torch.linspace(-3, 3, 64).bfloat16().reshape(8, 8),
    "eight": torch.linspace(-3, 3, 33).to(torch.float8_e4m3fn),
    "five": torch.linspace(-3, 3, 33).to(torch.float8_e5m2),
    "long": torch.arange(-20, 21),
    "flags": torch.arange(40) % 3 == 0,
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools.checkpoint, "BLOCK", BLOCK)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reading")
    write_directory(directory / "one", Layout(specs_of(TENSORS)), TENSORS.items())
    write_directory(directory / "shards", Layout(specs_of(TENSORS)), reversed(TENSORS.items()), shard_bytes=300)
    return directory


@pytest.mark.parametrize("kind", ["one", "shards"])
@pytest.mark.parametrize("name", TENSORS)
def test_any_part_is_the_tensors_as_float32(place, kind, name):
    checkpoint = Checkpoint(place / kind)
    assert is_source(checkpoint)
    whole = TENSORS[name].float().reshape(-1)
    for start in range(0, len(whole), 7):
        for n in (0, 1, 31, 32, 33, 64, 200):
            n = min(n, len(whole) - start)
            out = torch.full((n,), float("nan"))
            read_into(checkpoint, name, start, out)
            assert torch.equal(out, whole[start : start + n])
    assert torch.equal(checkpoint[name], TENSORS[name])


@given(
    parts=st.lists(st.tuples(st.sampled_from(sorted(TENSORS)), st.integers(0, 129), st.integers(0, 129)), max_size=20),
    whole=st.sets(st.sampled_from(sorted(TENSORS))),
)
def test_the_fingerprint_is_that_of_reading_from_scratch(place, parts, whole):
    fresh = Checkpoint(place / "one").fingerprint
    for kind in ("one", "shards"):
        checkpoint = Checkpoint(place / kind)
        for name, start, n in parts:
            size = TENSORS[name].numel()
            start = min(start, size)
            checkpoint.read(name, start, torch.empty(min(n, size - start)))
        for name in whole:
            assert checkpoint[name].shape == TENSORS[name].shape
        assert checkpoint.fingerprint == fresh


def test_what_was_read_in_whole_blocks_is_not_read_for_the_fingerprint(place, monkeypatch):
    checkpoint = Checkpoint(place / "shards")
    for name, tensor in TENSORS.items():
        for start in range(0, tensor.numel(), BLOCK):
            checkpoint.read(name, start, torch.empty(min(BLOCK, tensor.numel() - start)))
    monkeypatch.setattr(checkpoint._files, "fill", None)
    assert checkpoint.fingerprint == Checkpoint(place / "one").fingerprint


def test_every_bit_name_shape_and_dtype_counts_for_the_fingerprint(tmp_path):
    def fingerprint(**tensors: torch.Tensor) -> str:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        write_directory(directory, Layout(specs_of(tensors)), tensors.items())
        return Checkpoint(directory).fingerprint

    one = torch.arange(100.0)
    last, first = one.clone(), one.clone()
    last[-1] += 1e-5
    first[0] = -0.0
    swapped = torch.cat([one[BLOCK : 2 * BLOCK], one[:BLOCK], one[2 * BLOCK :]])
    found = [
        fingerprint(a=one),
        fingerprint(b=one),
        fingerprint(a=one.reshape(10, 10)),
        fingerprint(a=one.view(torch.int32)),
        fingerprint(a=last),
        fingerprint(a=first),
        fingerprint(a=swapped),
        fingerprint(a=one, b=torch.zeros(0)),
        fingerprint(a=one[:50], b=one[50:]),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(a=one.clone()) == found[0]


def test_many_threads_read_at_once(place):
    checkpoint = Checkpoint(place / "shards")
    gate = threading.Barrier(8)

    def read(number: int) -> bool:
        gate.wait(10)
        good = True
        for _ in range(30):
            for name, tensor in TENSORS.items():
                start = number % max(tensor.numel(), 1)
                out = torch.empty(tensor.numel() - min(start, tensor.numel()))
                checkpoint.read(name, min(start, tensor.numel()), out)
                good &= torch.equal(out, tensor.float().reshape(-1)[start:])
        return good

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(8)))
    assert checkpoint.fingerprint == Checkpoint(place / "one").fingerprint


def test_a_stamp_is_of_files_and_needs_no_weights(tmp_path, monkeypatch):
    write_directory(tmp_path / "m", Layout(specs_of(TENSORS)), TENSORS.items())
    one, again = Checkpoint(tmp_path / "m"), Checkpoint(tmp_path / "m")
    monkeypatch.setattr(Checkpoint, "_fill", None)
    assert one.stamp == again.stamp
    (tmp_path / "m" / "model.safetensors").touch()
    assert Checkpoint(tmp_path / "m").stamp != one.stamp == again.stamp


def test_a_file_that_has_changed_gives_no_fingerprint(tmp_path):
    write_directory(tmp_path / "m", Layout(specs_of(TENSORS)), TENSORS.items())
    checkpoint = Checkpoint(tmp_path / "m")
    assert checkpoint["float"].shape == (13, 10)
    (tmp_path / "m" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        assert checkpoint.fingerprint


def test_a_file_that_ends_too_early_is_named(tmp_path, monkeypatch):
    """As where a network's file system still tells the old size."""
    write_directory(tmp_path / "m", Layout(specs_of(TENSORS)), TENSORS.items())
    checkpoint = Checkpoint(tmp_path / "m")
    monkeypatch.setattr("pools.headers._stamp", lambda file: checkpoint._stamps[file])
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors ended while half was read; it was truncated"):
        checkpoint.read("half", 0, torch.empty(3))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {},
        [],
    ],
    ids=str,
)
def test_headers_that_lie_are_refused(tmp_path, entry):
    raw = json.dumps({"w": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        Checkpoint(tmp_path / "m.safetensors")
