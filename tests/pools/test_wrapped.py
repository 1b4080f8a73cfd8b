import json

import pytest
import torch
from PIL import Image
from torch import nn

from pools.checkpoint import SINGLE
from pools.headers import CheckpointError
from pools.open import open_pool
from pools.wrapped import RECIPE, is_wrapped, load_wrapped, save_wrapped


class Mean(nn.Module):
    """A build of its own: the mean of several modules, and two names for one tensor."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.gate = nn.Parameter(torch.full((3,), 0.5))
        self.same_gate = self.gate
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(**inputs) for member in self.members]).mean(0) * self.gate.sum()


def rebuild(recipe, pool):
    return Mean([pool.skeleton() for _ in recipe["experts"]])


@pytest.fixture
def saved(tiny_pool, tmp_path):
    pool = open_pool("clip", tiny_pool.base, tiny_pool.experts, root=tiny_pool.root)
    module = Mean([pool.module(tensors) for tensors in pool.experts.values()]).eval()
    with torch.no_grad():
        module.gate.add_(torch.arange(3))
    names = save_wrapped(tmp_path / "built", module, {"method": "mean", "experts": list(pool.experts)}, pool, 50_000)
    return tmp_path / "built", module, pool, names


def test_what_is_loaded_answers_the_same(saved):
    directory, module, pool, names = saved
    assert {"base", RECIPE} <= {*names}
    assert is_wrapped(directory)
    assert not is_wrapped(directory / "base")
    loaded = load_wrapped(directory, rebuild)
    assert loaded.recipe == {"method": "mean", "experts": ["red", "green", "blue"]}
    images = [Image.new("RGB", (20, 20), (200, 30, index)) for index in range(4)]
    with torch.inference_mode():
        assert torch.equal(loaded.module(**loaded.pool.feed(images)), module(**pool.feed(images)))
    assert torch.equal(loaded.pool.head(["red"], ["{}"]), pool.head(["red"], ["{}"]))
    assert not loaded.module.training


def test_shared_tensors_are_kept_once(saved):
    facts = json.loads((saved[0] / RECIPE).read_text())
    assert facts["aliases"] == {"same_gate": "gate"}


def test_the_base_beside_it_is_a_whole_model(saved):
    from transformers import CLIPModel

    _, report = CLIPModel.from_pretrained(saved[0] / "base", output_loading_info=True)
    assert not any(report.values())


def test_another_structure_is_refused(saved):
    with pytest.raises(CheckpointError, match="do not fit what its recipe builds"):
        load_wrapped(saved[0], lambda recipe, pool: Mean([pool.skeleton()]))


def test_a_broken_recipe_is_refused(saved):
    for text, message in [("{", "no recipe"), ("{}", "no recipe"), ("[]", "no recipe")]:
        (saved[0] / RECIPE).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_wrapped(saved[0], rebuild)
    facts = {"format": 2, "family": "clip", "aliases": {}, "recipe": {}}
    (saved[0] / RECIPE).write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="has the format 2, known is 1"):
        load_wrapped(saved[0], rebuild)


def test_nothing_is_left_of_a_failure(tiny_pool, tmp_path):
    pool = open_pool("clip", tiny_pool.base, {}, root=tiny_pool.root)
    with pytest.raises(TypeError):
        save_wrapped(tmp_path / "built", nn.Linear(2, 2), {"not": object()}, pool)
    assert list(tmp_path.iterdir()) == []
    towers = open_pool("clip", None, {"red": "red"}, root=tiny_pool.root)
    with pytest.raises(CheckpointError, match="the pool has none"):
        save_wrapped(tmp_path / "built", nn.Linear(2, 2), {}, towers)


def test_no_file_is_a_pickle(saved):
    suffixes = {path.suffix for path in saved[0].rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".txt", ".md"}
    assert not (saved[0] / SINGLE).exists()  # cut into shards
