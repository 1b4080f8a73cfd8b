"""Parameters that differ by tensor: how they are written, what is refused, and what each tensor gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.compose import compose, flat, from_yaml, to_yaml
from harness.config import ConfigError, UserError
from harness.inputs import Inputs
from harness.merge import Merge, merge
from harness.schedules import resolved, table
from methods.catalogue import find
from pools.faults import specs_of
from pools.roles import NamedRoles

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
]
POOL = "family: clip\nbase: base\nroot: /somewhere\nexperts: {a: first, b: second}\n"


@pytest.fixture
def small(tmp_path: Path):
    """Compose with a pool of a base and two experts."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "two.yaml").write_text(POOL)
    return lambda *overrides: compose(["pool=two", *overrides], config_dir=tmp_path)


def values(config, field: str, names: list[str] = NAMES) -> list:
    """What each tensor gets of a field."""
    roles = NamedRoles(dict.fromkeys(names, None))
    params_of = resolved(config.method, config.schedules, names, roles.layer_of, roles.n_layers)
    return [getattr(params_of(name), field) for name in names]


# -- what each tensor gets ---------------------------------------------------------------------------------------------


def test_a_list_goes_from_the_first_block_to_the_last(small) -> None:
    found = values(small("method.scale=[0,1]"), "scale")
    assert found == [0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0]
    found = values(small("method.scale=[0,1,0,0.4,1]"), "scale")
    assert found == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_one_number_in_a_list_and_one_block() -> None:
    config = compose(["method.scale=[0.7]"])
    assert values(config, "scale") == [0.7] * 8
    one = ["embed.weight", "layers.0.weight", "head.weight"]
    assert values(compose(["method.scale=[0.2,0.7]"]), "scale", one) == [0.2, 0.7, 0.7]


def test_the_first_entry_that_fits_counts_and_the_default_is_left(small) -> None:
    config = small("method.scale=[{match:'*self_attn*',value:[0,1]},{match:'*.layers.1.*',value:0.9}]")
    assert values(config, "scale") == [0.3, 0.0, 0.3, 0.5, 0.9, 1.0, 0.3, 0.3]


def test_all_conditions(small) -> None:
    entries = (
        "{at:before,value:1},{at:after,value:2},{match:'*weight',not:'*mlp*',layers:[1,3],value:[3,4]},"
        "{match:'re:layers.[01]',value:5},{value:6}"
    )
    assert values(small(f"method.scale=[{entries}]"), "scale") == [1, 5, 5, 3, 5, 4, 6, 2]


def test_each_expert_has_a_number_or_a_schedule(small) -> None:
    config = small("method.weights=[0.5,[{match:'*mlp*',value:[1,3]},{value:0}]]")
    assert values(config, "weights") == [[0.5, w] for w in (0, 0, 1, 0, 2, 0, 3, 0)]
    assert config.method.weights == [0.5, 3.0]


def test_the_table_has_a_row_for_each_tensor_and_a_column_for_each_expert(small) -> None:
    config = small("method.weights=[0.5,[0,1]]", "method.scale=[1,2]")
    roles = NamedRoles(dict.fromkeys(NAMES, None))
    params_of = resolved(config.method, config.schedules, NAMES, roles.layer_of, roles.n_layers)
    rows = table(params_of, config.schedules, NAMES, roles.layer_of, ["a", "b"])
    assert rows[3] == {"tensor": NAMES[3], "layer": 2, "scale": 1.5, "weights/a": 0.5, "weights/b": 0.5}
    assert len(rows) == len(NAMES)


def test_a_merge_by_schedules_is_the_merge_of_its_parts(small) -> None:
    config = small("method.scale=[{match:'*mlp*',value:[0,1]},{value:0.25}]")
    generator = torch.Generator().manual_seed(0)
    base, a, b = ({name: torch.randn(4, generator=generator) for name in NAMES} for _ in range(3))
    roles = NamedRoles(specs_of(base))
    params_of = resolved(config.method, config.schedules, NAMES, roles.layer_of, roles.n_layers)
    row = find(config.method_name)
    merged = merge(Merge(row, config.method, Inputs(base, {"a": a, "b": b}, roles), params_of))
    for name, scale in zip(NAMES, values(config, "scale"), strict=True):
        torch.testing.assert_close(merged[name], base[name] + scale * (a[name] + b[name] - 2 * base[name]))


def test_without_schedules_every_tensor_gets_the_params() -> None:
    config = compose(["method=ties"])
    assert config.schedules == {}
    assert resolved(config.method, {}, NAMES, lambda name: 0, 0)("anything") is config.method


# -- saving ------------------------------------------------------------------------------------------------------------


def test_schedules_are_saved_and_come_back(small) -> None:
    config = small("method.scale=[{match:'*mlp*',value:[0,1],strict:false},{value:0.5}]", "method.weights=[1,[0,1]]")
    text = to_yaml(config)
    assert "schedules" not in text
    assert from_yaml(text) == config
    assert flat(config)["method.weights"] == "[1, [0, 1]]"
    assert "'*mlp*'" in flat(config)["method.scale"]


def test_a_number_laid_over_a_saved_schedule_replaces_it(small) -> None:
    again = from_yaml(to_yaml(small("method.scale=[0,1]")), ["method.scale=0.7"])
    assert again.schedules == {}
    assert again.method.scale == 0.7


# -- faults ------------------------------------------------------------------------------------------------------------


def faults(composing, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        composing(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.density=[0.5,20]", "density is a share in (0, 1], got 20.0"),
        ("method.density=[]", "method.density=[]: expected numbers"),
        ("method.density=[a]", "method.density=['a']: expected numbers"),
        ("method.density=[{match:x}]", "method.density[0].value=None: expected a finite number"),
        ("method.density=[{mtch:x,value:1}]", "method.density[0].mtch: there is no such key; did you mean match?"),
        ("method.density=[{match:'re:(',value:1}]", "method.density[0].match: the pattern 're:(' is no regular"),
        ("method.density=[{at:middle,value:1}]", "method.density[0].at=middle: it is one of before, blocks, after"),
        ("method.density=[{layers:[3,2],value:1}]", "method.density[0].layers=[3, 2]: expected [first, last]"),
        ("method.density=[{strict:3,value:1}]", "method.density[0].strict=3: expected true or false"),
        ("method.density=[{value:[a]}]", "method.density[0].value=['a']: expected a finite number"),
        ("method.density=[0.1,0.2]", "one value is needed for the whole model, it cannot differ by tensor; with"),
        ("method.density=[{match:x,value:0.5}]", "one value is needed for the whole model"),
        ("method.densities=[0.5,[0.1,0.9]]", "method.densities: one value is needed for the whole model"),
        ("method.weights=[1,[{vale:3}]]", "method.weights[1][0].vale: there is no such key; did you mean value?"),
        ("method.weights=[1,[1,2],3]", "method.weights lists 3 numbers for 2 experts"),
        ("method.scope=[a]", "method.scope=['a']: expected a text"),
        ("+schedules={}", "schedules: there is no such key"),
    ],
)
def test_a_fault_is_named_with_its_key(small, override: str, said: str) -> None:
    assert said in faults(small, "method=ties", override)


def test_with_scope_tensor_what_the_first_pass_reads_may_differ(small) -> None:
    config = small("method=ties", "method.scope=tensor", "method.density=[0.1,0.9]")
    assert values(config, "density")[-1] == 0.9
    assert small("method=ties", "method.density=[0.4]").method.density == 0.4
    assert small("method=dare", "method.density=[0.4,0.5]").schedules
    assert "cannot differ" in faults(small, "method=dare", "method.base_rule=ties", "method.density=[0.4,0.5]")
    assert "cannot differ" in faults(small, "method=fisher", "method.weights=[1,[1,2]]", "adaptation.split=test")


def test_only_rules_take_schedules(small) -> None:
    assert "method.alpha=[0, 1]: expected a number" in faults(small, "method=opcm", "method.alpha=[0,1]")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("[{match:'*q_porj*',value:1}]", r"method.scale\[0\]: no tensor fits match: \*q_porj\*; strict: false allows"),
        ("[{layers:[0,9],value:1}]", r"method.scale\[0\].layers=\[0, 9\]: the model has 3 blocks, \[0, 3\] is all"),
    ],
)
def test_what_fits_no_tensor_is_refused(small, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        values(small(f"method.scale={override}"), "scale")


def test_an_entry_that_is_not_strict_may_fit_nothing(small) -> None:
    assert values(small("method.scale=[{match:'*q_porj*',value:1,strict:false}]"), "scale") == [0.3] * 8


def test_an_expert_that_some_tensor_has_no_value_for_is_named(small) -> None:
    with pytest.raises(UserError, match=r"method.weights\[1\]: 5 tensors fit no entry, the first model.embed_tokens"):
        values(small("method.weights=[1,[{match:'*mlp*',value:1}]]"), "weights")


def test_what_the_method_refuses_of_a_tensors_values_names_the_tensor(small) -> None:
    config = small("method=weighted_average", "method.weights=[1,[-1,1]]")
    with pytest.raises(
        UserError, match=r"the parameters for model.embed_tokens.weight: weights .* must not sum to zero"
    ):
        values(config, "weights")
