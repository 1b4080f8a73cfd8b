"""Adapters as results, merged and extracted: loaded by peft and compared with the same merge of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.adapters import merge_adapters
from harness.crew import crew
from harness.extraction import extract_lora
from harness.inputs import Inputs, MergeError
from harness.merge import Merge, merge_state_dicts
from methods.catalogue import find
from pools.adapters import LoraExpert
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.picked import Selected
from pools.roles import NamedRoles
from tests.pools.language_models import write_model
from tests.pools.lora_adapters import loaded, trained, write_adapter_by_hand

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 5, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}},
    "embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj"]},
    "whole": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]},
    "bias": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of each of `CONFIGS`."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_model(root / "base", "llama", attention_bias=True)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        trained(loaded(base), root / name, seed, task_type="CAUSAL_LM", **config)
    return root


def job(place: Path, experts: list[str], method: str, **params: Any) -> Merge:
    base = Checkpoint(place / "base")
    row = find(method)
    found = {name: LoraExpert(place / name, name, base) for name in experts}
    return Merge(row, row.load_params()(**params), Inputs(base, found, NamedRoles(specs_of(base))))


def on_weights(merge: Merge) -> dict[str, torch.Tensor]:
    """The same merge of the whole weights."""
    experts = {name: dict(expert) for name, expert in merge.inputs.experts.items()}
    base = {name: tensor.float() for name, tensor in merge.inputs.base.items()}
    return merge_state_dicts(base, experts, merge.row.name, merge.params.__dict__)


def in_peft(place: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft makes of an adapter; it must have taken up all of its tensors."""
    from peft import PeftModel, get_peft_model_state_dict

    model = PeftModel.from_pretrained(loaded(place / "base"), adapter)
    file = load_file(adapter / "adapter_model.safetensors")
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {key for key in held if not key.endswith("base_layer.bias")} <= set(file) <= set(held)
    for key, tensor in file.items():
        assert torch.equal(held[key], tensor), key
    return model.merge_and_unload().state_dict()


def assert_near(merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            merged[name], tensor, rtol=1e-5, atol=atol, msg=lambda told, name=name: f"{name}: {told}"
        )


LINEAR = [
    ("task_arithmetic", {"scale": 0.4}),
    ("task_arithmetic", {"scale": 0.5, "weights": [1.0, -0.7, 0.3]}),
    ("simple_average", {}),
    ("weighted_average", {"weights": [0.5, 2.0, -1.0]}),
    ("weighted_average", {"weights": [0.7, -0.2, 0.5], "normalize": False}),
]


@pytest.mark.parametrize(("method", "params"), LINEAR)
def test_a_linear_merge_of_adapters_is_the_merge_of_their_weights(method, params, place, tmp_path):
    merge = job(place, ["plain", "rslora", "patterns"], method, **params)
    facts = merge_adapters(merge, tmp_path / "merged")
    assert_near(in_peft(place, tmp_path / "merged"), on_weights(merge))
    assert (facts["relative_error"], facts["rank_min"], facts["rank_max"]) == (0.0, 3, 12)
    assert LoraExpert(tmp_path / "merged", "merged", merge.inputs.base).config["task_type"] == "CAUSAL_LM"


def test_of_one_expert_the_adapter_is_the_same(place, tmp_path):
    merge = job(place, ["plain", "embedding"], "expert", expert="embedding")
    merge_adapters(merge, tmp_path / "merged")
    again = LoraExpert(tmp_path / "merged", "merged", merge.inputs.base)
    assert_near(dict(again), dict(merge.inputs.experts["embedding"]))


def test_embeddings_are_merged_on_their_factors(place, tmp_path):
    merge = job(place, ["plain", "embedding"], "task_arithmetic", scale=0.8)
    merge_adapters(merge, tmp_path / "merged")
    assert_near(in_peft(place, tmp_path / "merged"), on_weights(merge))


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.6}, {"rank": 50}])
def test_a_cut_merge_is_the_best_of_its_rank_and_says_what_it_lost(cut, place, tmp_path):
    merge = job(place, ["plain", "rslora"], "task_arithmetic", scale=1.0, weights=[1.0, -0.5])
    facts = merge_adapters(merge, tmp_path / "merged", **cut)
    merged, expected, base = in_peft(place, tmp_path / "merged"), on_weights(merge), dict(merge.inputs.base)
    square = lost = 0.0
    for name, error in facts["relative_errors"].items():
        delta = (expected[name] - base[name]).double()
        values = torch.linalg.svdvals(delta)
        difference = float((merged[name] - expected[name]).double().norm())
        assert difference / float(delta.norm()) == pytest.approx(error, abs=1e-5)
        kept = LoraExpert(tmp_path / "merged", "m", merge.inputs.base).changes[name].factors.rank
        assert difference == pytest.approx(float(values[kept:].norm()), abs=1e-5)
        square, lost = square + float(delta.square().sum()), lost + difference**2
    assert facts["relative_error"] == pytest.approx((lost / square) ** 0.5, abs=1e-5)
    if cut == {"rank": 50}:
        assert_near(merged, expected, atol=3e-6)


@pytest.mark.parametrize(
    ("method", "params"),
    [("ties", {"density": 0.4, "scale": 0.9}), ("dare", {"density": 0.5}), ("slerp", {"t": 0.3}), ("opcm", {})],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_other_rules_are_merged_in_weights_and_cut(method, params, workers, place, tmp_path):
    merge = job(place, ["plain", "rslora"], method, **params)
    with pytest.raises(MergeError, match=rf"{method} is not linear.*set adapter.rank \(the experts' are 3, 5\)"):
        merge_adapters(merge, tmp_path / "merged")
    with crew(workers) as hands:
        facts = merge_adapters(merge, tmp_path / "merged", rank=16, crew=hands)
    assert_near(in_peft(place, tmp_path / "merged"), on_weights(merge), atol=1e-5)
    assert facts["relative_error"] < 1e-3
    assert facts["rank_max"] == 16


def test_workers_change_no_bit(place, tmp_path):
    merge = job(place, ["plain", "rslora"], "ties")
    merge_adapters(merge, tmp_path / "one", rank=4)
    with crew(2) as hands:
        merge_adapters(merge, tmp_path / "two", rank=4, crew=hands)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one | two)


def test_dora_needs_a_rank_and_keeps_its_norms(place, tmp_path):
    merge = job(place, ["dora", "plain"], "simple_average")
    with pytest.raises(MergeError, match="changed by DoRA, whose change has full rank"):
        merge_adapters(merge, tmp_path / "merged")
    merge_adapters(merge, tmp_path / "merged", rank=16)
    assert_near(in_peft(place, tmp_path / "merged"), on_weights(merge), atol=5e-6)


@pytest.mark.parametrize("other", ["whole", "bias"])
def test_what_was_saved_whole_is_merged_whole(other, place, tmp_path):
    merge = job(place, ["plain", other], "task_arithmetic", scale=0.6)
    facts = merge_adapters(merge, tmp_path / "merged")
    assert_near(in_peft(place, tmp_path / "merged"), on_weights(merge))
    wanted = {
        "whole": ["lm_head.weight", "model.norm.weight"],
        "bias": [f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(2)],
    }
    assert facts["whole_tensors"] == wanted[other]


def test_parameters_may_differ_by_tensor(place, tmp_path):
    merge = job(place, ["plain", "rslora"], "task_arithmetic", scale=1.0)
    params = {0: find("task_arithmetic").load_params()(scale=0.2), 1: find("task_arithmetic").load_params()(scale=0.9)}
    own = Merge(merge.row, merge.params, merge.inputs, lambda name: params[int(".layers.1." in name)])
    merge_adapters(own, tmp_path / "merged")
    merged, base, full = in_peft(place, tmp_path / "merged"), dict(merge.inputs.base), on_weights(merge)
    for name, scale in (
        ("model.layers.0.self_attn.q_proj.weight", 0.2),
        ("model.layers.1.self_attn.q_proj.weight", 0.9),
    ):
        torch.testing.assert_close(merged[name], base[name] + scale * (full[name] - base[name]), rtol=1e-5, atol=1e-6)


def test_a_selection_of_tensors_is_merged_alone(place, tmp_path):
    merge = job(place, ["plain", "rslora"], "simple_average")
    base = merge.inputs.base
    names = [name for name in base if "layers.0" in name]
    experts = {name: Selected(expert, names) for name, expert in merge.inputs.experts.items()}
    part = Merge(merge.row, merge.params, Inputs(Selected(base, names), experts, merge.inputs.roles))
    merge_adapters(part, tmp_path / "merged")
    merged, full = in_peft(place, tmp_path / "merged"), on_weights(merge)
    assert_near(merged, {name: full[name] if name in names else tensor for name, tensor in base.items()})


def test_the_files_say_where_it_comes_from(place, tmp_path):
    merge = job(place, ["plain", "rslora"], "task_arithmetic")
    facts = merge_adapters(
        merge, tmp_path / "m", lineage={"method": "task_arithmetic", "params": {"scale": 0.3}, "seed": 1}
    )
    assert facts["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (tmp_path / "m" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "scale: `0.3`" in card
    assert merge.inputs.experts["rslora"].adapter_fingerprint[:16] in card
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    with pytest.raises(CheckpointError, match="exists already"):
        merge_adapters(merge, tmp_path / "m")


def test_what_gives_no_adapter_is_refused(place, tmp_path):
    merge = job(place, ["plain", "rslora"], "weighted_average", weights=[0.5, 0.1], normalize=False)
    with pytest.raises(MergeError, match=r"multiplies the base by 0.6, which no adapter can hold"):
        merge_adapters(merge, tmp_path / "m")
    with pytest.raises(MergeError, match=r"multiplies the base by 0\.5"):
        merge_adapters(job(place, ["plain"], "passthrough", scale=0.5), tmp_path / "m")
    full = {"full": Checkpoint(place / "base"), **merge.inputs.experts}
    mixed = Merge(find("simple_average"), None, Inputs(merge.inputs.base, full, merge.inputs.roles))
    with pytest.raises(MergeError, match="output_kind=adapter merges adapters, and full is none"):
        merge_adapters(mixed, tmp_path / "m")
    with pytest.raises(MergeError, match="adapter"):
        merge_adapters(job(place, ["plain"], "base"), tmp_path / "m")
    with pytest.raises(MergeError, match="exclude each other"):
        merge_adapters(job(place, ["plain"], "simple_average"), tmp_path / "m", rank=2, energy=0.5)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("method", ["simple_average", "ties"])
def test_factors_that_are_no_numbers_are_named(method, tmp_path):
    save_file({"x.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    factors = {"x.lora_A.weight": torch.full((2, 4), torch.nan), "x.lora_B.weight": torch.ones(6, 2)}
    write_adapter_by_hand(tmp_path / "one", factors)
    base = Checkpoint(tmp_path / "base.safetensors")
    inputs = Inputs(base, {"one": LoraExpert(tmp_path / "one", "one", base)}, NamedRoles(specs_of(base)))
    with pytest.raises(MergeError, match=r"x.weight has NaN or infinite .* in .*one"):
        merge_adapters(Merge(find(method), find(method).load_params()(), inputs), tmp_path / "m", rank=1)
    assert not (tmp_path / "m").exists()


def test_square_and_transposed_layers_of_gpt2(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    for seed, name in enumerate(("one", "two")):
        trained(loaded(base), tmp_path / name, seed, r=2, lora_alpha=3, target_modules=["c_attn", "c_proj"])
    merge = job(tmp_path, ["one", "two"], "task_arithmetic", scale=0.7)
    merge_adapters(merge, tmp_path / "merged")
    merged = {
        name.removeprefix("transformer."): tensor for name, tensor in in_peft(tmp_path, tmp_path / "merged").items()
    }
    assert_near(merged, {name.removeprefix("transformer."): tensor for name, tensor in on_weights(merge).items()})


def test_a_module_that_peft_would_take_for_another_is_not_saved_whole(tmp_path):
    base = {"x.weight": torch.zeros(6, 4), "norm.weight": torch.ones(4), "layernorm.weight": torch.ones(4)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {"x.weight": torch.ones(6, 4), "norm.weight": torch.zeros(4), "layernorm.weight": torch.ones(4)},
        tmp_path / "tuned.safetensors",
    )
    places = str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")
    with pytest.raises(CheckpointError, match="norm cannot be saved whole: peft would take layernorm for it"):
        extract_lora(*places, tmp_path / "lora", 1, None, save_rest=True)
    assert extract_lora(*places, tmp_path / "lora", 1, None)["left_out"] == {"norm.weight": pytest.approx(4 / 28)}


# -- extraction ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(place, tmp_path) -> Path:
    """A fine-tuned model: three ranks in each linear layer, and a little in an embedding, a norm and a bias."""
    import shutil

    shutil.copytree(place / "base", tmp_path / "tuned")
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embed" not in name:
            tensor += (
                0.1
                * torch.randn(len(tensor), 3, generator=generator)
                @ torch.randn(3, tensor.shape[1], generator=generator)
            )
        elif name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
            tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    return tmp_path / "tuned"


REST = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]


def test_an_adapter_is_extracted_and_the_rest_is_named(place, tuned, tmp_path):
    facts = extract_lora(str(place / "base"), str(tuned), tmp_path / "lora", 3, None)
    made, full = in_peft(place, tmp_path / "lora"), load_file(tuned / "model.safetensors")
    base = load_file(place / "base" / "model.safetensors")
    assert_near(made, {name: base[name] if name in REST else tensor for name, tensor in full.items()})
    assert sorted(facts["left_out"]) == REST
    total = sum(float((full[name] - base[name]).double().square().sum()) for name in full)
    for name, share in facts["left_out"].items():
        assert share == pytest.approx(float((full[name] - base[name]).double().square().sum()) / total, rel=1e-4)
    assert facts["relative_error"] < 1e-4
    assert facts["rank_max"] == 3
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_rest_can_be_saved_whole(place, tuned, tmp_path):
    facts = extract_lora(str(place / "base"), str(tuned), tmp_path / "lora", None, 0.999999, save_rest=True)
    assert facts["left_out"] == {}
    assert facts["whole_tensors"] == REST
    full = load_file(tuned / "model.safetensors")
    assert_near(in_peft(place, tmp_path / "lora"), full, atol=5e-3)
    expert = LoraExpert(tmp_path / "lora", "lora", Checkpoint(place / "base"))
    for name in REST:
        assert torch.equal(expert[name], full[name])


def test_less_rank_loses_what_it_says(place, tuned, tmp_path):
    facts = extract_lora(str(place / "base"), str(tuned), tmp_path / "lora", 1, None)
    made, full = in_peft(place, tmp_path / "lora"), load_file(tuned / "model.safetensors")
    base = load_file(place / "base" / "model.safetensors")
    for name, error in facts["relative_errors"].items():
        delta = full[name] - base[name]
        assert float((made[name] - full[name]).norm() / delta.norm()) == pytest.approx(error, abs=1e-4)
        assert error > 0.1


def test_transposed_layers_are_extracted(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    write_model(tmp_path / "tuned", "gpt2", seed=1)
    tensors, tuned = load_file(base / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    mixed = {name: tuned[name] if name.endswith("c_proj.weight") else tensor for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    extract_lora(str(base), str(tmp_path / "tuned"), tmp_path / "lora", 16, None)
    made = {name.removeprefix("transformer."): tensor for name, tensor in in_peft(tmp_path, tmp_path / "lora").items()}
    assert_near(made, {name.removeprefix("transformer."): tensor for name, tensor in mixed.items()}, atol=5e-6)


def test_what_cannot_be_extracted_is_refused(place, tuned, tmp_path):
    base = str(place / "base")
    with pytest.raises(CheckpointError, match="none of the base's matrices is changed"):
        extract_lora(base, base, tmp_path / "lora", 3, None)
    with pytest.raises(CheckpointError, match="is an adapter already"):
        extract_lora(base, str(place / "plain"), tmp_path / "lora", 3, None)
    with pytest.raises(MergeError, match="a rank is needed"):
        extract_lora(base, str(tuned), tmp_path / "lora", None, None)
    other = write_model(tmp_path / "other", "llama", attention_bias=True, vocab_size=300)
    with pytest.raises(CheckpointError, match="vocabulary of 300 rows"):
        extract_lora(base, str(other), tmp_path / "lora", 3, None)
    assert not (tmp_path / "lora").exists()


# -- what peft computes on the same inputs ---------------------------------------------------------------------------

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
CASES = (
    {case["id"]: case for case in json.loads((GOLDENS / "cases.json").read_text())["cases"]} if GOLDENS.is_dir() else {}
)
needs_goldens = pytest.mark.skipif(not CASES, reason="needs ../shared/goldens beside the repository")


def golden(name: str) -> tuple[Merge, dict[str, torch.Tensor], dict[str, Any]]:
    """The merge of a case as we put it, peft's change of each weight, and the case."""
    case = CASES[name]
    base = Checkpoint(GOLDENS / "inputs_llama" / "base")
    experts = {
        adapter: LoraExpert(GOLDENS / "inputs_lora" / adapter, adapter, base) for adapter in case["inputs"]["adapters"]
    }
    row = find("task_arithmetic")
    params = row.load_params()(scale=1.0, weights=case["hyperparameters"]["weights"])
    deltas = load_file(GOLDENS / case["output"])
    return Merge(row, params, Inputs(base, experts, NamedRoles(specs_of(base)))), deltas, case


def changes_of(adapter: Path, base: Checkpoint) -> dict[str, torch.Tensor]:
    made = LoraExpert(adapter, "made", base)
    found = {}
    for name in made.changes:
        left, right, scale = made.factors(name)
        found[name] = scale * left @ right
    return found


def compared(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of one module each, whatever stands around its name."""
    pairs = [
        (tensor, theirs[key]) for name, tensor in ours.items() for key in theirs if name.removesuffix(".weight") in key
    ]
    assert len(pairs) == len(ours) == len(theirs)
    return pairs


@needs_goldens
@pytest.mark.parametrize("name", ["peft_cat", "peft_cat_mixed_ranks", "peft_svd", "peft_svd_mixed_rank3"])
def test_where_peft_works_on_the_changes_its_result_is_ours(name, tmp_path):
    merge, theirs, case = golden(name)
    rank = case["merged_adapter"]["r"] if "svd" in name else None
    merge_adapters(merge, tmp_path / "merged", rank=rank)
    for mine, peft in compared(changes_of(tmp_path / "merged", merge.inputs.base), theirs):
        torch.testing.assert_close(mine, peft, rtol=1e-5, atol=case["precision"]["suggested_atol"])


@needs_goldens
@pytest.mark.parametrize("name", ["peft_linear", "peft_linear_negative"])
def test_where_peft_sums_the_factors_apart_it_is_far_from_the_sum_of_changes(name, tmp_path):
    merge, theirs, _ = golden(name)
    merge_adapters(merge, tmp_path / "merged")
    errors = [
        float((peft - mine).norm() / mine.norm())
        for mine, peft in compared(changes_of(tmp_path / "merged", merge.inputs.base), theirs)
    ]
    assert min(errors) > 0.3


def test_ranks_that_differ_reload_where_a_name_ends_in_another(tmp_path):
    base = {f"{tower}q.weight": torch.zeros(6, 4) for tower in ("", "a.", "b.a.")}
    save_file(base, tmp_path / "base.safetensors")
    factors = {
        f"{tower}q.{key}": torch.full(shape, 0.5)
        for r, tower in enumerate(("", "a.", "b.a."), start=1)
        for key, shape in (("lora_A.weight", (r, 4)), ("lora_B.weight", (6, r)))
    }
    patterns = {"b.a.q": 3, "a.q": 2}
    write_adapter_by_hand(
        tmp_path / "one", factors, r=1, lora_alpha=1, rank_pattern=patterns, base_model_name_or_path="x"
    )
    source = Checkpoint(tmp_path / "base.safetensors")
    expert = LoraExpert(tmp_path / "one", "one", source)
    inputs = Inputs(source, {"one": expert}, NamedRoles(specs_of(source)))
    merge_adapters(Merge(find("simple_average"), None, inputs), tmp_path / "merged")
    again = LoraExpert(tmp_path / "merged", "merged", source)
    assert_near(dict(again), dict(expert))
    assert [change.factors.rank for _, change in sorted(again.changes.items())] == [2, 3, 1]
