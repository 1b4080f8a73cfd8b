"""mergekit's configurations as ours: what is imported, what is refused, and the same numbers as mergekit's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from harness.compose import compose, from_yaml, to_yaml
from harness.config import RunConfig, UserError
from harness.import_mergekit import import_config
from harness.inputs import Inputs
from harness.merge import Merge, merge
from harness.schedules import resolved
from methods.catalogue import CATALOGUE, find

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"

LINEAR = """\
models:
  - model: one/first
    parameters: {weight: 1.0}
  - model: two/second@v2
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
"""

TIES = """\
models:
  - model: one/first
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: two/second
    parameters: {density: 0.5, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: ties
base_model: one/base
parameters: {normalize: true, int8_mask: true}
"""

STACKED = """\
slices:
  - sources: [{model: one/first, layer_range: [0, 24]}]
  - sources: [{model: two/second, layer_range: [20, 40]}]
merge_method: passthrough
"""


def imported(text: str) -> dict[str, Any]:
    return yaml.safe_load(import_config(text).yaml)


def changed(text: str, **keys: Any) -> str:
    """A configuration with other keys at its top; None removes one."""
    top = yaml.safe_load(text) | keys
    return yaml.safe_dump({key: value for key, value in top.items() if value is not None}, sort_keys=False)


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        import_config(text)
    return str(caught.value)


def composed(text: str, folder: Path, *overrides: str) -> RunConfig:
    """Imported, written to a file, and composed as the command line does it."""
    (folder / "imported.yaml").write_text(import_config(text).yaml)
    return compose([f"experiment={folder / 'imported.yaml'}", *overrides])


# -- what is imported --------------------------------------------------------------------------------------------------


def test_models_weights_and_dtype() -> None:
    found = imported(LINEAR)
    assert found["pool"] == {
        "family": "causal_lm", "base": None, "experts": {"first": "one/first", "second": "two/second@v2"},
    }  # fmt: skip
    assert found["method"] == {"weights": [1.0, 0.5], "normalize": True}
    assert found["engine"] == {"dtype": "float16"}
    assert "arithmetic is in float32" in " ".join(import_config(LINEAR).notes)
    assert imported(changed(LINEAR, dtype="float32", out_dtype="bfloat16"))["engine"] == {"dtype": "bfloat16"}
    assert "engine" not in imported(changed(LINEAR, dtype=None))


def test_gradients_and_filters_of_each_model() -> None:
    found = imported(TIES)
    assert found["method"]["densities"] == [
        [{"at": "after", "value": 1.0, "strict": False}, {"value": [1.0, 0.7, 0.1]}],
        0.5,
    ]
    assert found["method"]["weights"] == [1.0, [{"match": "*mlp*", "value": 0.5, "strict": False}, {"value": 0.0}]]
    assert (found["method"]["scope"], found["method"]["disjoint"]) == ("tensor", "mean")
    assert any("int8_mask" in note for note in import_config(TIES).notes)


def test_one_density_for_all_is_one_number() -> None:
    found = imported(TIES.replace("[1, 0.7, 0.1]", "0.5"))
    assert found["method"]["density"] == 0.5
    assert "densities" not in found["method"]


def test_layers_that_are_stacked() -> None:
    found = imported(STACKED)
    assert found["pool"]["slices"] == [{"experts": {"first": [0, 24]}}, {"experts": {"second": [20, 40]}}]
    assert "method" not in found


def test_levels_come_in_mergekits_order() -> None:
    """Source, slice, global; where no filter of one fits, the next is asked; each slice has its own range of layers."""
    text = """\
slices:
  - sources:
      - {model: b, layer_range: [0, 2]}
      - {model: m, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 1}]}}
    parameters: {weight: [{filter: attn, value: 2}]}
  - sources:
      - {model: b, layer_range: [2, 4]}
      - {model: m, layer_range: [2, 4]}
    parameters: {weight: [4, 5]}
parameters: {weight: 3, lambda: 0.5}
merge_method: task_arithmetic
base_model: b
"""
    found = imported(text)
    assert found["pool"]["slices"][1] == {"experts": {"m": [2, 4]}, "base": [2, 4]}
    assert found["method"]["scale"] == 0.5
    entries = [{**entry, "strict": None} for entry in found["method"]["weights"][0]]
    before = [("*mlp*", 1.0), ("*attn*", 2.0), (None, 3.0)]
    assert entries == [
        *({"match": part, "at": "before", "value": value, "strict": None} for part, value in before[:2]),
        {"at": "before", "value": 3.0, "strict": None},
        *({"match": part, "layers": [0, 2], "value": value, "strict": None} for part, value in before[:2]),
        {"layers": [0, 2], "value": 3.0, "strict": None},
        {"layers": [2, 4], "value": [4.0, 5.0], "strict": None},
        {"at": "after", "value": 4.0, "strict": None},
    ]


def test_adapters_are_experts_of_their_model() -> None:
    text = changed(
        LINEAR, models=[{"model": f"one/base+a/{name}", "parameters": {"weight": 1}} for name in ("x", "y.1")]
    )
    assert imported(text)["pool"]["base"] == "one/base"
    assert imported(text)["pool"]["experts"] == {"x": "a/x", "y_1": "a/y.1"}


def test_two_models_of_one_name_and_one_model_twice_in_a_slice() -> None:
    twice = {"model": "a/m", "layer_range": [0, 2], "parameters": {"weight": 1}}
    text = changed(STACKED, merge_method="linear", slices=[{"sources": [twice, {**twice, "layer_range": [2, 4]}]}])
    assert imported(text)["pool"]["experts"] == {"m": "a/m", "m_2": "a/m"}
    assert imported(text)["pool"]["slices"] == [{"experts": {"m": [0, 2], "m_2": [2, 4]}}]
    models = [{"model": model, "parameters": {"weight": 1}} for model in ("a/m", "b/m", "c/base")]
    assert list(imported(changed(LINEAR, models=models))["pool"]["experts"]) == ["m", "m_2", "m_base"]


def test_numbers_that_yaml_reads_as_texts() -> None:
    assert imported(LINEAR.replace("0.5", "1e-5"))["method"]["weights"] == [1.0, 1e-5]


def test_tokenizers() -> None:
    union = {"source": "union", "tokens": {"<s>": {"source": "two/second@v2"}, "<pad>": {"source": "one/first"}}}
    found = imported(changed(LINEAR, tokenizer=union))["pool"]
    assert (found["tokenizer"], found["tokens"]) == ("union", {"<s>": "second", "<pad>": "first"})
    assert imported(changed(TIES, tokenizer_source="base"))["pool"]["tokenizer"] == "base"
    assert imported(changed(TIES, tokenizer_source="one/base"))["pool"]["tokenizer"] == "base"
    assert "commonest" in " ".join(import_config(changed(TIES, chat_template="auto")).notes)


def test_normalised_sums_become_a_scale() -> None:
    text = changed(TIES, merge_method="dare_linear", parameters={"normalize": True, "lambda": 2})
    assert "weights or lambda that differ by tensor" in refusal(text)
    plain = text.replace("- filter: mlp\n      value: 0.5\n    - value: 0", "- value: 3.0")
    assert imported(plain)["method"]["scale"] == 0.5
    assert any("not mergekit's" in note for note in import_config(plain).notes)
    assert imported(plain)["method"]["rescale"] == "l1"


TWO = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("one/first", 1.0), ("two/second", 3.0))]
WEIGHTS = {"weights": [1.0, 3.0]}
SUM = {"scale": 1.0, **WEIGHTS}
UNWEIGHTED = ("model_stock", "nearswap", "sce", "ram", "ramplus_tl")


@pytest.mark.parametrize(
    ("method", "parameters", "name", "expected"),
    [
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, "nuslerp", {**WEIGHTS, "along": "first"}),
        ("nuslerp", {"nuslerp_row_wise": True}, "nuslerp", {**WEIGHTS, "along": "tensor"}),
        ("multislerp", {"eps": 1e-7}, "multislerp", {**WEIGHTS, "normalize": True}),
        ("model_stock", {"filter_wise": True}, "model_stock", {"filter_wise": True, "clamp": False}),
        ("nearswap", {"t": "1e-3"}, "nearswap", {"t": 1e-3}),
        ("della", {"density": 0.6, "epsilon": 0.1}, "della",
         {"epsilon": 0.1, "rescale": "l1", "disjoint": "mean", **SUM, "density": 0.6}),
        ("della_linear", {"density": 0.6, "rescale": False}, "della_linear",
         {"epsilon": 0.15, "rescale": "none", **SUM, "density": 0.6}),
        ("dare_ties", {"density": 0.6}, "dare_ties",
         {"rescale": "l1", "disjoint": "sum", **SUM, "density": 0.6, "scope": "tensor", "trim": 1.0}),
        ("breadcrumbs", {"normalize": True, "density": 0.9}, "breadcrumbs",
         {"gamma": 0.01, **SUM, "scale": 0.25, "density": 0.9}),
        ("breadcrumbs_ties", {"gamma": 0.02, "density": 0.9}, "breadcrumbs_ties",
         {"gamma": 0.02, "disjoint": "sum", **SUM, "density": 0.9}),
        ("sce", {"select_topk": 0.3}, "sce", {"density": 0.3}),
        ("ram", {}, "ram", {"epsilon": 1e-5}),
        ("ramplus_tl", {"r": 0.3}, "ramplus_tl", {"r": 0.3, "alpha": 0.2, "epsilon": 1e-5, "scope": "tensor"}),
    ],
)  # fmt: skip
def test_methods_with_a_base(method: str, parameters: dict, name: str, expected: dict, tmp_path: Path) -> None:
    models = TWO[1:] if method == "nearswap" else TWO
    if method in UNWEIGHTED:
        models = [{"model": one["model"]} for one in models]
    text = yaml.safe_dump({"merge_method": method, "base_model": "b", "models": models, "parameters": parameters})
    found = imported(text)
    assert found["defaults"][0] == {"override /method": name}
    assert found["method"] == expected
    assert composed(text, tmp_path).method_name == name


def test_methods_without_parameters() -> None:
    fusion = {"merge_method": "arcee_fusion", "base_model": "b", "models": [{"model": "b"}, {"model": "m"}]}
    assert imported(yaml.safe_dump(fusion))["defaults"][0] == {"override /method": "arcee_fusion"}
    mean = {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"tol": "1e-6"}}
    assert imported(yaml.safe_dump(mean))["method"] == {"steps": 10, "tolerance": 1e-6}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "no mergekit configuration"),
        ("{a: [", "the file is no YAML"),
        ("a: 1\n---\nb: 2\n", "2 YAML documents"),
        (changed(LINEAR, merge_method="nuslerp", models=TWO[:1]), "nuslerp merges 2 model(s), slice 0 has 1"),
        (changed(LINEAR, merge_method="nearswap", base_model="b"), "nearswap merges 1 model(s) besides the base"),
        (changed(LINEAR, merge_method="karcher", base_model="b"), "karcher averages it in like the others"),
        (changed(LINEAR, merge_method="karcher", parameters={"tol": [0.1, 0.2]}), "tol: one number for all tensors"),
        (changed(LINEAR, merge_method="karcher"), "karcher takes no 'weight'"),
        (changed(LINEAR, merge_method="model_stock"), "base_model: model_stock needs one"),
        (changed(TIES, merge_method="breadcrumbs_ties", parameters={"rescale": True}), "true has no counterpart"),
        (
            changed(TIES, merge_method="della").replace("weight: 1.0", "weight: 1.0\n    epsilon: 0.1"),
            "epsilon: one for all models has a counterpart",
        ),
        (changed(LINEAR, merge_method="linaer"), "linaer is no method; did you mean linear?"),
        (changed(LINEAR, models=None), "exactly one of models and slices"),
        (changed(LINEAR, modules={}), "modules: models of several modules"),
        (changed(LINEAR, dtpye="float16"), "dtpye: is no key that is known; did you mean dtype?"),
        (changed(LINEAR, dtype="int8"), "dtype: int8 is none of"),
        (changed(LINEAR, parameters={"wieght": 1}), "linear takes no 'wieght'"),
        (LINEAR.replace("weight: 0.5", "wt: 1"), "weight of two/second@v2: has no value; mergekit asks for one"),
        (LINEAR.replace("0.5", "[a]"), "weight of two/second@v2: expected a number, got 'a'"),
        (LINEAR.replace("0.5", "[{filter: x, vlue: 1}]"), "has the keys filter and value"),
        (LINEAR.replace("0.5", "[{filter: x, value: 1}]"), "has no value for what fits no filter"),
        (changed(LINEAR, base_model="b"), "mergekit stops at a base that is not"),
        (changed(TIES, base_model=None), "base_model: ties needs one"),
        (changed(TIES, merge_method="task_arithmetic", parameters={"rescale": True}), "true has no counterpart"),
        (changed(TIES, parameters={"normalize": [{"filter": "mlp", "value": True}]}), "normalize: one of true"),
        (TIES.replace("0.7", "1.7"), "density: 1.7 is no share in (0, 1]; to leave a model out give it the weight 0"),
        (TIES.replace("0.1]", "0]"), "density: 0.0 is no share"),
        (changed(TIES, tokenizer_source="two/second"), "the tokenizer of a member that is not the base"),
        (changed(TIES, tokenizer={"pad_to_multiple_of": 8}), "tokenizer.pad_to_multiple_of: has no counterpart"),
        (changed(TIES, tokenizer={"tokens": {"<s>": {"source": "x"}}}), "x is none of the models that are merged"),
        (changed(TIES, tokenizer={"tokens": {"<s>": {"source": "one/first", "force": True}}}), "<s>.force"),
        (changed(TIES, chat_template="chatml"), "chat_template: chatml is a template of mergekit's own"),
        (changed(TIES, base_model="one/base+a/x"), "is a model with an adapter"),
        (LINEAR.replace("one/first", "p+x").replace("two/second@v2", "q+y"), "here they are of p, q"),
        (LINEAR.replace("one/first", "p+x+y"), "'p+x+y' refers to no model"),
        (changed(LINEAR, models=[{"model": {"model": "a", "override_architecture": "B"}}]), "override_architecture"),
        (STACKED.replace("[0, 24]", "24"), "expected [first, last], got 24"),
        (STACKED.replace("passthrough", "slerp"), "base_model: slerp needs one"),
        (changed(TIES, slices=yaml.safe_load(STACKED)["slices"], models=None), "ties needs the base among its sources"),
        (changed(LINEAR, merge_method="passthrough"), "passthrough takes one model in each slice"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named(text: str, said: str) -> None:
    assert said in refusal(text)


def test_everything_is_refused_at_once() -> None:
    text = changed(TIES, dtpye="float16", parameters={"densty": 1}, chat_template="chatml")
    message = refusal(text.replace("0.7", "1.7"))
    for said in ("dtpye", "densty", "chat_template", "density: 1.7"):
        assert said in message, said


def test_a_models_own_filter_with_a_layers_number_is_refused_where_layers_move() -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {
            "sources": [
                {"model": "b", "layer_range": [4, 6], "parameters": {"scale": [{"filter": "layers.4.", "value": 0.5}]}}
            ]
        },
    ]
    assert "counts layers before they were stacked" in refusal(changed(STACKED, slices=slices))


# -- as the command line has it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [LINEAR, TIES, STACKED], ids=["linear", "ties", "stacked"])
def test_what_is_imported_composes_and_takes_overrides(text: str, tmp_path: Path) -> None:
    config = composed(text, tmp_path)
    assert config.pool_name == "imported"
    assert list(config.pool.experts) == ["first", "second"]
    assert config.pool.root is None
    assert from_yaml(to_yaml(config)) == config
    assert composed(text, tmp_path, "engine.dtype=bfloat16", "seed=3").engine.dtype == "bfloat16"


# -- the same numbers --------------------------------------------------------------------------------------------------


def _cases() -> list[dict[str, Any]]:
    if not GOLDENS.is_dir():
        return []
    cases = json.loads((GOLDENS / "cases.json").read_text())["cases"]
    return [case for case in cases if case["id"].startswith("mk_cli_")]


def _placed(tree: Any) -> Any:
    """The configuration with the models' paths."""
    if isinstance(tree, dict):
        places = ("model", "base_model")
        return {
            key: str(GOLDENS / "inputs_llama" / value) if key in places and isinstance(value, str) else _placed(value)
            for key, value in tree.items()
        }
    return [_placed(entry) for entry in tree] if isinstance(tree, list) else tree


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs ../shared/goldens beside the repository")
@pytest.mark.parametrize("case", _cases(), ids=lambda case: case["id"])
def test_the_same_numbers_as_mergekit(case: dict[str, Any], tmp_path: Path) -> None:
    """Imported, composed, opened and merged: within the golden's own tolerance."""
    from pools.open import open_pool

    config = composed(yaml.safe_dump(_placed(case["hyperparameters"]["config"])), tmp_path)
    pool = open_pool(**vars(config.pool))
    inputs = Inputs(pool.base, pool.experts, pool.roles)
    names = [name for name in inputs.specs if inputs.is_weight(name)]
    params_of = resolved(config.method, config.schedules, names, pool.roles.layer_of, pool.roles.n_layers)
    merged = merge(Merge(find(config.method_name), config.method, inputs, params_of))
    golden = load_file(GOLDENS / case["output"])
    assert set(merged) == set(golden)
    for name, tensor in golden.items():
        np.testing.assert_allclose(
            merged[name].numpy(), tensor.numpy(), rtol=1e-5, atol=case["precision"]["suggested_atol"], err_msg=name
        )


def test_goldens_are_of_every_form() -> None:
    if GOLDENS.is_dir():
        assert {case["id"] for case in _cases()} >= {
            "mk_cli_linear", "mk_cli_ties", "mk_cli_ties_gradient", "mk_cli_slerp", "mk_cli_slerp_filters",
            "mk_cli_passthrough_slices", "mk_cli_passthrough_scaled_slice", "mk_cli_nuslerp", "mk_cli_karcher",
            "mk_cli_model_stock", "mk_cli_sce",
        }  # fmt: skip


def test_every_counterpart_is_a_method_here() -> None:
    from harness.mergekit_methods import METHODS, NAMES

    assert set(METHODS) == set(NAMES)
    assert {imported(text)["defaults"][0]["override /method"] for text in (LINEAR, TIES, STACKED)} <= set(CATALOGUE)
