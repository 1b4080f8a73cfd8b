import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pools.checkpoint import INDEX, Checkpoint
from pools.faults import Spec, specs_of
from pools.headers import CheckpointError
from pools.partial import find_partials, partial_directory
from pools.write import Layout, write_directory

TENSORS = {f"layers.{i}.weight": torch.full((10, 10), float(i)) for i in range(5)}
SPECS = specs_of(TENSORS)


def test_one_file_when_it_fits(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names = write_directory(
        tmp_path / "out",
        Layout(SPECS, copies=(tmp_path / "config.json",), texts=lambda: {"README.md": "é"}),
        TENSORS.items(),
    )
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("layers.3.weight"), TENSORS["layers.3.weight"])


def test_shards_with_an_index_that_transformers_reads(tmp_path):
    names = write_directory(tmp_path / "out", Layout(SPECS), TENSORS.items(), shard_bytes=900)
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert set(index["weight_map"]) == set(TENSORS)
    assert torch.equal(Checkpoint(tmp_path / "out")["layers.4.weight"], TENSORS["layers.4.weight"])


def test_tensors_of_odd_sizes_are_aligned(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(1, dtype=torch.float64),
        "c": torch.ones(1).bfloat16(),
    }
    write_directory(tmp_path / "out", Layout(specs_of(tensors)), tensors.items())
    for name, entry in Checkpoint(tmp_path / "out").entries.items():
        assert entry.offset % tensors[name].element_size() == 0


def test_tensors_that_are_views_are_written_whole(tmp_path):
    square = torch.arange(9.0).reshape(3, 3)
    tensors = {"t": square.T, "column": square[:, 1], "grad": torch.ones(2, requires_grad=True)}
    write_directory(tmp_path / "out", Layout(specs_of(tensors)), tensors.items())
    found = Checkpoint(tmp_path / "out")
    assert torch.equal(found["t"], square.T)
    assert torch.equal(found["column"], square[:, 1])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (list(TENSORS.items())[:-1], "1 tensors of the model never came: layers.4.weight"),
        ([*TENSORS.items(), ("layers.0.weight", torch.ones(10, 10))], "layers.0.weight came twice"),
        ([("other", torch.ones(1))], r"other \(1,\) is none of the model's"),
        ([("layers.0.weight", torch.ones(10, 9))], r"came as \(10, 9\) torch.float32, wanted \(10, 10\)"),
        ([("layers.0.weight", torch.ones(10, 10).half())], "came as .* torch.float16, wanted .* torch.float32"),
    ],
)
def test_wrong_tensors_leave_nothing(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        write_directory(tmp_path / "out", Layout(SPECS), tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_merge_passes_and_leaves_nothing(tmp_path):
    def failing():
        yield from list(TENSORS.items())[:2]
        raise ArithmeticError("layers.2.weight is no number")

    with pytest.raises(ArithmeticError, match="no number"):
        write_directory(tmp_path / "out", Layout(SPECS), failing())
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    def watching():
        for pair in TENSORS.items():
            assert not (tmp_path / "out").exists()
            assert (tmp_path / f".out.partial-{os.getpid()}").is_dir()
            yield pair

    write_directory(tmp_path / "out", Layout(SPECS), watching())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_taken_directory_is_refused_before_the_merge(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        write_directory(tmp_path / "out", Layout(SPECS), iter(lambda: pytest.fail("the merge was started"), None))
    assert (tmp_path / "out" / "file").exists()


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write_directory(tmp_path / "out", Layout(SPECS), TENSORS.items())
    assert len(Checkpoint(tmp_path / "out")) == 5


def test_a_disk_too_small_is_refused_before_the_merge(tmp_path):
    specs = {"x": Spec((10**9, 10**9), torch.float32)}
    with pytest.raises(CheckpointError, match=r"e\+09 GiB are needed, its disk has .* GiB free; make room"):
        write_directory(tmp_path / "out", Layout(specs), iter(lambda: pytest.fail("the merge was started"), None))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_on_the_way_leaves_nothing(tmp_path):
    """The system's limit on a file's size fails like a full disk, in the middle of writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"out could not be written: File too large .*nothing under"):
            write_directory(tmp_path / "out", Layout(SPECS), TENSORS.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write_directory(tmp_path / "file" / "out", Layout(SPECS), TENSORS.items())


def test_a_killed_writer_leaves_no_final_name_and_is_found(tmp_path):
    script = (
        "import sys, os, signal, pathlib, torch\n"
        "from pools.write import Layout, write_directory\n"
        "from pools.faults import Spec\n"
        "def dying():\n"
        "    yield 'a', torch.ones(4)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "specs = {name: Spec((4,), torch.float32) for name in 'ab'}\n"
        "write_directory(pathlib.Path(sys.argv[1]), Layout(specs), dying())\n"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], cwd=root, check=False)
    assert ended.returncode == -9
    assert not (tmp_path / "out").exists()
    (left,) = find_partials(tmp_path)
    assert left.name.startswith(".out.partial-")
    with partial_directory(tmp_path / "other"):
        assert find_partials(tmp_path) == [left]  # not the one that is being written
    assert find_partials(tmp_path / "nowhere") == []
