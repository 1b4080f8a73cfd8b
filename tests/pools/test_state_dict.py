import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from pools.checkpoint import Checkpoint
from pools.headers import CheckpointError
from pools.open import open_pool
from pools.pickled import PickledCheckpoint
from pools.reading import Source

SHAPES = {"stem.weight": (4, 3, 2, 2), "blocks.0.weight": (4, 4), "blocks.1.weight": (4, 4), "scale": ()}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"bn.num_batches_tracked": torch.tensor(seed)}


@pytest.fixture
def files(tmp_path):
    """A base as safetensors, an expert as a torch file, one inside a trainer's checkpoint."""
    save_file(tensors(0), tmp_path / "base.safetensors")
    torch.save(tensors(1), tmp_path / "plain.pt")
    torch.save({"state_dict": tensors(2), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "trained.ckpt")
    return tmp_path


def test_files_of_all_kinds_are_merged_and_written(files):
    (files / "deep").mkdir()
    torch.save({"model": tensors(3)}, files / "deep" / "weights.bin")
    experts = {"plain": "plain.pt", "trained": "trained.ckpt", "deep": "deep"}
    pool = open_pool("state_dict", "base.safetensors", experts, root=files)
    assert pool.faults() == []
    assert pool.notes == []
    assert pool.dropped == {"trained": ("epoch", "optimizer")}
    for seed, member in enumerate([pool.base, *pool.experts.values()]):
        assert all(torch.equal(member[name], tensor) for name, tensor in tensors(seed).items())
    names = pool.write(files / "out", pool.experts["trained"].items(), {"method": "expert"})
    assert names == ["README.md", "model.safetensors"]
    written = load_file(files / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors(2).items())
    assert "trained.ckpt" in (files / "out" / "README.md").read_text()


def test_a_torch_file_is_a_source(files):
    kept = tensors(1) | {"turned": torch.arange(12.0).view(3, 4).t(), "half": torch.ones(3).bfloat16()}
    torch.save(kept, files / "turned.pt")
    opened = PickledCheckpoint(files / "turned.pt")
    assert isinstance(opened, Source)
    assert opened.nbytes == sum(tensor.nbytes for tensor in kept.values())
    for name, tensor in kept.items():
        if not tensor.is_floating_point():
            continue
        for start in range(tensor.numel()):
            part = torch.empty(tensor.numel() - start)
            opened.read(name, start, part)
            assert torch.equal(part, tensor.contiguous().float().view(-1)[start:])
    assert torch.equal(opened["turned"], kept["turned"])
    opened["turned"].zero_()  # nobody else's memory
    assert torch.equal(opened["turned"], kept["turned"])


def test_a_torch_files_fingerprint_is_of_its_contents(files):
    torch.save({"state_dict": tensors(1), "epoch": 9}, files / "again.pt")
    prints = [PickledCheckpoint(files / name).fingerprint for name in ("plain.pt", "again.pt", "trained.ckpt")]
    assert prints[0] == prints[1] != prints[2]


def test_a_torch_file_that_changes_is_noticed(files):
    opened = PickledCheckpoint(files / "plain.pt")
    stamp = opened.stamp
    torch.save(tensors(5) | {"more": torch.ones(9)}, files / "new.pt")
    os.replace(files / "new.pt", files / "plain.pt")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        opened["scale"]
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        opened.read("scale", 0, torch.empty(1))
    assert PickledCheckpoint(files / "plain.pt").stamp != stamp


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("never-made",))


def test_what_would_run_code_is_refused(files, monkeypatch):
    monkeypatch.chdir(files)
    torch.save({"w": torch.ones(2), "more": Harmful()}, "harmful.pt")
    (files / "plain.pkl.pt").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(CheckpointError) as caught:
        open_pool("state_dict", None, {"harmful": "./harmful.pt", "plain": "./plain.pkl.pt"})
    text = str(caught.value)
    assert "expert harmful: harmful.pt holds more than tensors and plain values, and reading it would run code" in text
    assert "torch.save(model.state_dict(), FILE)" in text
    assert "expert plain: " in text
    assert not (files / "never-made").exists()


def test_files_without_tensors_are_told(files):
    torch.save({"epoch": 1}, files / "empty.pt")
    torch.save([torch.ones(2)], files / "list.pt")
    (files / "cut.pt").write_bytes((files / "plain.pt").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="holds no tensors; its entries are epoch"):
        PickledCheckpoint(files / "empty.pt")
    with pytest.raises(CheckpointError, match="holds a list, wanted tensors by name"):
        PickledCheckpoint(files / "list.pt")
    with pytest.raises(CheckpointError, match="is no torch file, or is truncated"):
        PickledCheckpoint(files / "cut.pt")


def test_differences_and_packed_numbers_are_told(files):
    other = tensors(1)
    del other["scale"]
    torch.save(other | {"blocks.0.weight": torch.ones(4, 4, dtype=torch.int8)}, files / "plain.pt")
    faults = open_pool("state_dict", "base.safetensors", {"plain": "plain.pt"}, root=files).faults()
    assert "expert plain misses scale (), which the base has" in faults
    assert any("is quantised: torch.int8 weights (it has blocks.0.weight)" in fault for fault in faults)


def test_some_tensors_are_merged_and_layers_stacked(files):
    experts = {"plain": "plain.pt", "trained": "trained.ckpt"}
    pool = open_pool("state_dict", "base.safetensors", experts, root=files, merge=["blocks.*"], rest="trained")
    assert pool.faults() == []
    assert list(pool.base) == ["blocks.0.weight", "blocks.1.weight"]
    pool.write(files / "out", pool.experts["plain"].items(), {"method": "expert"})
    written = Checkpoint(files / "out")
    assert torch.equal(written["blocks.1.weight"], tensors(1)["blocks.1.weight"])
    assert torch.equal(written["stem.weight"], tensors(2)["stem.weight"])
    slices = [{"experts": {"plain": [0, 2]}}, {"experts": {"trained": [0, 1]}}]
    pool = open_pool("state_dict", None, experts, root=files, slices=slices)
    assert pool.faults() == []
    (stacked,) = pool.experts.values()
    assert torch.equal(stacked["blocks.2.weight"], tensors(2)["blocks.0.weight"])


def test_a_state_dict_is_not_run(files):
    pool = open_pool("state_dict", "base.safetensors", {"plain": "plain.pt"}, root=files)
    for call in (pool.module, pool.skeleton, lambda: pool.feed([]), lambda: pool.head([], [])):
        with pytest.raises(CheckpointError, match=r"state_dict has no module .* `crucible merge`"):
            call()
    assert pool.roles.is_linear("blocks.0.weight")
    assert not pool.roles.is_linear("stem.weight")
