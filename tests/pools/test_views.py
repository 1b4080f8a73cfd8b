"""Which tensors are merged, and layers stacked by ranges; on small files, nothing read before it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pools.checkpoint import Checkpoint
from pools.headers import CheckpointError
from pools.reading import Source
from pools.views import Selected, layer_config_changes, restack, select

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.{part}" for i in range(3) for part in ("mlp.w", "attn.w")),
         "model.norm.weight", "lm_head.weight"]  # fmt: skip


def checkpoint(folder: Path, value: float, names: list[str] = NAMES) -> Checkpoint:
    """Every tensor is the value, plus a tenth of its place among the names."""
    folder.mkdir()
    tensors = {name: torch.full((4, 5), value + index / 10) for index, name in enumerate(names)}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Checkpoint]:
    return {name: checkpoint(tmp_path / name, value) for name, value in (("a", 10.0), ("b", 20.0), ("c", 30.0))}


def worth(tensors, name: str) -> float:
    """What a tensor is filled with."""
    return round(float(tensors[name].mean()), 3)


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["*"], 9),
        (["model.*"], 8),
        (["*.mlp.*", "lm_head.weight"], 4),
        (["*", "!*embed*", "!lm_head.*"], 7),
        (["!*.layers.*"], 3),
        ([r"re:layers\.[02]\."], 4),
        (["*.layers.*", r"!re:\.1\."], 4),
    ],
)
def test_globs_expressions_and_exclusions(patterns: list[str], count: int) -> None:
    found = select(NAMES, patterns)
    assert len(found) == count
    assert list(found) == [name for name in NAMES if name in found]


def test_every_pattern_that_fits_nothing_is_named_with_the_closest_name() -> None:
    with pytest.raises(CheckpointError) as caught:
        select(NAMES, ["*", "lm_haed.*", "!model.layers.7.*"])
    message = str(caught.value)
    assert "the pattern 'lm_haed.*' fits none of the 9 tensors; the closest name is lm_head.weight" in message
    assert "the pattern '!model.layers.7.*' fits none" in message


def test_patterns_that_leave_nothing_and_broken_expressions_are_refused() -> None:
    with pytest.raises(CheckpointError, match="leave no tensor to merge"):
        select(NAMES, ["*", "!*"])
    with pytest.raises(CheckpointError, match=r"'re:\(' is no regular expression"):
        select(NAMES, ["re:("])


# -- selected ----------------------------------------------------------------------------------------------------------


def test_selected_tensors_are_those_of_the_source(members: dict[str, Checkpoint]) -> None:
    source = members["a"]
    view = Selected(source, ["lm_head.weight", "model.norm.weight"])
    assert list(view) == ["lm_head.weight", "model.norm.weight"]
    assert torch.equal(view["lm_head.weight"], source["lm_head.weight"])
    assert view.shapes == {"lm_head.weight": (4, 5), "model.norm.weight": (4, 5)}
    assert view.dtypes["lm_head.weight"] is torch.float32
    assert (view.nbytes, view.source) == (2 * 20 * 4, source.source)
    assert isinstance(view, Source)
    part = torch.empty(3)
    view.read("lm_head.weight", 7, part)
    assert torch.equal(part, source["lm_head.weight"].reshape(-1)[7:10])


def test_a_name_that_the_source_lacks_is_refused(members: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="lacks 1 of the wanted tensors, the first nothing"):
        Selected(members["a"], ["lm_head.weight", "nothing"])


def test_fingerprint_and_stamp_follow_contents_and_names(members: dict[str, Checkpoint]) -> None:
    one, same = (Selected(members["a"], NAMES[:2]) for _ in range(2))
    other, another = Selected(members["b"], NAMES[:2]), Selected(members["a"], NAMES[1:3])
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, another.fingerprint}) == 3
    assert one.stamp == same.stamp
    assert len({one.stamp, other.stamp, another.stamp}) == 3


def test_making_views_reads_no_weights(members: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "__getitem__", refuse)
    view = restack(None, members, [{"experts": {"a": [0, 2]}}, {"experts": {"b": [1, 3]}}]).experts["a-b"]
    assert (len(view.shapes), view.nbytes) == (3 + 8, 11 * 80)
    assert view.stamp


# -- slices ------------------------------------------------------------------------------------------------------------


def test_layers_of_two_models_in_a_row(members: dict[str, Checkpoint]) -> None:
    found = restack(None, members, [{"experts": {"a": [0, 2]}}, {"experts": {"b": [1, 3]}}])
    assert (found.base, found.n_layers, found.stack) == (None, 4, "model.layers")
    assert found.origins == (("a", 0), ("a", 1), ("b", 1), ("b", 2))
    view = found.experts["a-b"]
    assert list(found.experts) == ["a-b"]
    layers = [(worth(view, f"model.layers.{i}.mlp.w"), worth(view, f"model.layers.{i}.attn.w")) for i in range(4)]
    assert layers == [(10.1, 10.2), (10.3, 10.4), (20.3, 20.4), (20.5, 20.6)]
    assert worth(view, "model.embed_tokens.weight") == 10.0
    assert (worth(view, "model.norm.weight"), worth(view, "lm_head.weight")) == (20.7, 20.8)
    part = torch.empty(6)
    view.read("model.layers.3.attn.w", 9, part)
    assert torch.equal(part, members["b"]["model.layers.2.attn.w"].reshape(-1)[9:15])


def test_layers_may_repeat(members: dict[str, Checkpoint]) -> None:
    view = restack(None, members, [{"experts": {"a": [0, 3]}}, {"experts": {"a": [1, 3]}}]).experts["a"]
    assert [worth(view, f"model.layers.{i}.mlp.w") for i in range(5)] == [10.1, 10.3, 10.5, 10.3, 10.5]


def test_several_sources_and_the_base_in_each_slice(members: dict[str, Checkpoint]) -> None:
    """The i-th expert of every slice makes the i-th of the result, whoever it is."""
    base = members.pop("c")
    slices = [
        {"experts": {"a": [0, 1], "b": [2, 3]}, "base": [1, 2]},
        {"experts": {"a": [1, 3], "b": [0, 2]}, "base": [0, 2]},
    ]
    found = restack(base, members, slices)
    assert list(found.experts) == ["a", "b"]
    assert [worth(found.experts["b"], f"model.layers.{i}.mlp.w") for i in range(3)] == [20.5, 20.1, 20.3]
    assert [worth(found.base, f"model.layers.{i}.mlp.w") for i in range(3)] == [30.3, 30.1, 30.3]
    swapped = [{"experts": {"a": [0, 1], "b": [0, 1]}}, {"experts": {"b": [1, 2], "a": [1, 2]}}]
    mixed = restack(None, members, swapped).experts
    assert list(mixed) == ["a-b", "b-a"]
    assert worth(mixed["b-a"], "model.layers.1.mlp.w") == 10.3


def test_a_second_stack_has_to_be_chosen(tmp_path: Path) -> None:
    names = [f"{stem}.{i}.w" for stem in ("decoder.block", "encoder.block") for i in range(2)] + ["shared.weight"]
    source = {"a": checkpoint(tmp_path / "t5", 1.0, names)}
    with pytest.raises(CheckpointError, match=r"several stacks of layers \(decoder.block, encoder.block\)"):
        restack(None, source, [{"experts": {"a": [0, 1]}}])
    chosen = restack(None, source, [{"experts": {"a": [0, 1]}, "stack": "encoder.block"}])
    assert {name for name in chosen.experts["a"] if "encoder" in name} == {"encoder.block.0.w"}
    assert {name for name in chosen.experts["a"] if "decoder" in name} == {"decoder.block.0.w", "decoder.block.1.w"}
    assert restack(None, source, [{"experts": {"a": [0, 1]}}], "decoder.block").n_layers == 1
    with pytest.raises(CheckpointError, match=r"no stack of layers 'model\.layers'"):
        restack(None, source, [{"experts": {"a": [0, 1]}, "stack": "model.layers"}])


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        ([], "slices is an empty list"),
        ([{"experts": {}}], r"slices\[0\] is written {experts: "),
        (["a"], r"slices\[0\] is written {experts: "),
        ([{"experts": {"a": [0, 3], "x": [0, 3]}}], r"slices\[0\] names the expert 'x', which the pool lacks"),
        ([{"experts": {"a": [0, 3]}, "bse": [0, 3]}], "unknown key 'bse'"),
        ([{"experts": {"a": 3}}], r"a is a range \[first, last\], got 3"),
        ([{"experts": {"a": [0, 1.5]}}], r"a is a range \[first, last\]"),
        ([{"experts": {"a": [1, 1]}}], r"the range \[1, 1\] of expert a is empty"),
        ([{"experts": {"a": [2, 1]}}], "is empty"),
        ([{"experts": {"a": [0, 4]}}], r"expert a has 3 layers, the range \[0, 4\] leaves it; .* \[0, 3\] is all"),
        ([{"experts": {"a": [-4, 2]}}], "leaves it"),
        ([{"experts": {"a": [0, 2], "b": [0, 3]}}], "different numbers of layers: a 2, b 3"),
        ([{"experts": {"a": [0, 1]}}, {"experts": {"a": [0, 1], "b": [0, 1]}}], "as the others, got 1, 2"),
        ([{"experts": {"a": [0, 1]}, "base": [0, 1]}], "name layers of the base, and the pool has none"),
        ([{"experts": {"a": [0, 1]}, "base": [0, 1]}, {"experts": {"a": [0, 1]}}], "name them in all, or in none"),
    ],
)  # fmt: skip
def test_slices_that_make_no_sense_are_refused(members: dict[str, Checkpoint], slices: list, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        restack(None, members, slices)


def test_all_ranges_are_checked_at_once(members: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError) as caught:
        restack(None, members, [{"experts": {"a": [0, 9]}}, {"experts": {"b": [2, 2]}}])
    assert len(str(caught.value).splitlines()) == 2


def test_what_has_no_layers_cannot_be_stacked(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "flat", 1.0, ["w", "b"])
    with pytest.raises(CheckpointError, match="has no layers with numbers in their names"):
        restack(None, {"a": source}, [{"experts": {"a": [0, 1]}}])


def test_what_changes_in_a_configuration() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "rope": [1, 2, 3], "vocab_size": 8}
    assert layer_config_changes(config, [0, 2, 2, 1]) == {
        "num_hidden_layers": 4, "layer_types": ["x", "z", "z", "y"],
    }  # fmt: skip
    assert layer_config_changes({"text_config": {"n_layer": 2, "k": 1}}, [0]) == {"text_config": {"n_layer": 1, "k": 1}}
    with pytest.raises(CheckpointError, match="no number of layers"):
        layer_config_changes({"vocab_size": 8}, [0])


def test_ranges_that_count_from_the_end(members) -> None:
    stacked = restack(None, members, [{"experts": {"a": [0, -1]}}, {"experts": {"a": [1, None]}}])
    plain = restack(None, members, [{"experts": {"a": [0, 2]}}, {"experts": {"a": [1, 3]}}])
    assert stacked.origins == plain.origins == (("a", 0), ("a", 1), ("a", 1), ("a", 2))
    with pytest.raises(CheckpointError, match="takes different numbers of layers: a 2, b 3"):
        restack(None, members, [{"experts": {"a": [0, -1], "b": [0, None]}}])
    with pytest.raises(CheckpointError, match="is a range"):
        restack(None, members, [{"experts": {"a": [None, 2]}}])
