import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pools.checkpoint import INDEX, SINGLE, Checkpoint
from pools.faults import specs_of
from pools.headers import DTYPES, CheckpointError
from pools.write import Layout, write_directory

DTYPE_LIST = sorted(DTYPES.values(), key=str)


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
    }


def write_shards(directory: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
def test_reads_what_safetensors_wrote(tmp_path, dtype):
    tensor = torch.randint(0, 2, (3, 4)).to(dtype)
    save_file({"x": tensor}, tmp_path / SINGLE)
    found = Checkpoint(tmp_path)["x"]
    assert found.dtype == dtype
    assert found.shape == (3, 4)
    assert bits(found) == bits(tensor)


def test_is_a_mapping_known_from_headers(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, source="org/name")
    assert set(checkpoint) == set(tensors)
    assert len(checkpoint) == 5
    assert checkpoint.shapes["b.weight"] == (2, 3)
    assert checkpoint.dtypes["a.bias"] == torch.bfloat16
    assert checkpoint.nbytes == 24 + 4 + 4 + 3
    assert checkpoint.source == "org/name"
    assert "b.weight" in checkpoint
    assert "b" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["b"]
    for name, tensor in checkpoint.items():
        assert torch.equal(tensor, tensors[name])


def test_every_access_has_memory_of_its_own(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    checkpoint["x"].zero_()
    assert checkpoint["x"].tolist() == [1, 1, 1]


def test_not_a_number_is_read_as_it_is(tmp_path):
    save_file({"x": torch.tensor([float("nan"), float("inf"), 1.0])}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint["x"].isnan().tolist() == [True, False, False]
    assert checkpoint.fingerprint == Checkpoint(tmp_path).fingerprint


def test_a_file_is_opened_by_its_name(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "any.safetensors")
    assert list(Checkpoint(tmp_path / "any.safetensors")) == ["x"]
    assert list(Checkpoint(tmp_path)) == ["x"]


def test_names_are_selected_and_renamed(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.zeros(1), "c.position_ids": torch.arange(3)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, select=lambda names: {"new.a": "a"})
    assert list(checkpoint) == ["new.a"]
    assert checkpoint["new.a"].item() == 1
    assert set(checkpoint.others) == {"b", "c.position_ids"}
    assert checkpoint.dropped == ("c.position_ids",)


def test_the_fingerprint_tells_names_dtypes_shapes_and_values_apart(tmp_path):
    variants = [
        {"x": torch.zeros(4)},
        {"y": torch.zeros(4)},
        {"x": torch.zeros(2, 2)},
        {"x": torch.zeros(4, dtype=torch.int32)},
        {"x": torch.tensor([0.0, 0, 0, 1])},
    ]
    found = set()
    for index, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{index}.safetensors")
        found.add(Checkpoint(tmp_path / f"{index}.safetensors").fingerprint)
    assert len(found) == len(variants)


def test_the_fingerprint_of_a_large_tensor_covers_all_blocks(tmp_path):
    tensor = torch.zeros(3_000_000)
    save_file({"x": tensor}, tmp_path / "zeros.safetensors")
    tensor[-1] = 1
    save_file({"x": tensor}, tmp_path / "one.safetensors")
    assert (
        Checkpoint(tmp_path / "zeros.safetensors").fingerprint != Checkpoint(tmp_path / "one.safetensors").fingerprint
    )


tensors_of_any_kind = st.dictionaries(
    st.text("ab.c", min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPE_LIST), st.integers(0, 2**31)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(tensors_of_any_kind, st.integers(1, 400))
def test_any_sharding_reads_back_with_one_fingerprint(tmp_path_factory, plan, shard_bytes):
    tensors = {}
    for name, (shape, dtype, seed) in plan.items():
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(
            0, 2 if dtype == torch.bool else 256, (n_bytes,), generator=torch.Generator().manual_seed(seed)
        )
        tensors[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    place = tmp_path_factory.mktemp("any")
    save_file(tensors, place / "one.safetensors")
    write_directory(place / "cut", Layout(specs_of(tensors)), reversed(tensors.items()), shard_bytes=shard_bytes)
    whole, cut = Checkpoint(place / "one.safetensors"), Checkpoint(place / "cut")
    assert whole.fingerprint == cut.fingerprint
    assert {name: bits(tensor) for name, tensor in cut.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }
    assert cut.shapes == whole.shapes
    assert cut.dtypes == whole.dtypes
    for file in (place / "cut").glob("*.safetensors"):  # the format's own reader agrees
        assert {name: bits(tensor) for name, tensor in load_file(file).items()}.items() <= {
            name: bits(tensor) for name, tensor in tensors.items()
        }.items()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"x": torch.ones(1)}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=rf"{name}: pickles run code.*convert it"):
            Checkpoint(path)


def test_truncated_files_are_named_with_bytes(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    size = len(whole)
    for length, message in [
        (size - 7, rf"model.safetensors is truncated: its tensors end at byte {size}, the file has {size - 7}"),
        (20, r"truncated: its header ends at byte \d+, the file has 20 bytes"),
        (4, "truncated: 4 bytes"),
        (0, "truncated: 0 bytes"),
    ]:
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "header cannot be read"),
        (b"[]", "header cannot be read"),
        (b'{"x": {"dtype": "F32", "shape": [2]}}', "header cannot be read"),
        (b'{"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 1]}}', "x has the dtype Q4, known are"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"x \(2,\) takes 8 bytes.* 4"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}', "x"),
    ],
)
def test_broken_headers_are_refused(tmp_path, header, message):
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_a_text_file_is_no_safetensors(tmp_path):
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1 oid sha256:0")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint(tmp_path)


def test_all_faults_of_shards_come_at_once(tmp_path):
    write_shards(tmp_path, {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}})
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] |= {
        "c": "1.safetensors",
        "d": "3.safetensors",
        "e": "../secret.safetensors",
        "f": "/etc/passwd",
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "2.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    lines = str(caught.value).splitlines()
    for words in (
        "puts c into 1.safetensors, which lacks it",
        "lacks the shard 3.safetensors",
        "'../secret.safetensors', which leaves",
        "'/etc/passwd', which leaves",
        "2.safetensors is truncated",
    ):
        assert any(words in line for line in lines), words
    assert len(lines) == 5


def test_tensors_that_no_index_names_are_told(tmp_path):
    write_shards(tmp_path, {"1.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match="holds 1 tensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="no index of shards"):
        Checkpoint(tmp_path)


def test_what_is_not_there_is_answered_with_the_closest(tmp_path):
    (tmp_path / "digits").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*digit; .* has digits"):
        Checkpoint(tmp_path / "digit")
    with pytest.raises(CheckpointError, match=r"has digits"):
        Checkpoint(tmp_path / "digts" / "model")
    with pytest.raises(CheckpointError, match="it is empty"):
        Checkpoint(tmp_path / "digits")


def test_several_files_without_an_index_are_ambiguous(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        Checkpoint(tmp_path)


def test_a_file_that_changes_or_goes_is_noticed(tmp_path):
    save_file({"x": torch.ones(10)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    save_file({"x": torch.zeros(11)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint["x"]
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint["x"]
