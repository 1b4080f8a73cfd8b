"""The contract of compressed experts, run against every row that packs them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from harness.compress import OWN, Expert, Packed, pack
from harness.inputs import Inputs, MergeError
from harness.merge import Merge, merge_state_dicts
from methods.catalogue import CATALOGUE
from methods.kinds import Kind, Row
from tests.methods import test_every_method as laws
from tests.methods.samples import BUFFERS, EXPERTS, SHAPES, Case, SampleRoles, State, models, stats_for

ROWS = [row for row in CATALOGUE.values() if row.kind is Kind.compression]
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "emr": ({"dtype": "float16"},),
    "tall_mask": ({"selectivities": [0.2, 0.4, 0.6]},),
    "tsv_compress": ({"share": 0.5, "matrices": "conv"},),
    "bitdelta": ({"matrices": "all", "rows": True},),
    "randes": ({"matrices": "all", "scale": 1.0},),
    "sparse_low_rank": ({"n": 1, "m": 3, "rank": 2}, {"solver": "pursuit"}),
    "sparse_low_rank_random": ({"solver": "once", "steps": 2},),
    "sparse_low_rank_wanda": ({"of": "weights"},),
}
CASES = [Case(row, {"expert": "bee", **own}) for row in ROWS for own in ({}, *VARIANTS[row.name])]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

# Of the laws of every merge those that hold for one restored expert as well.
LAWS = (
    laws.test_copies_of_the_base_merge_to_the_base,
    laws.test_names_shapes_and_dtypes_are_kept,
    laws.test_inputs_are_untouched_and_not_shared,
    laws.test_order_of_tensors_is_irrelevant,
    laws.test_number_of_threads_is_irrelevant,
    laws.test_bfloat16_in_bfloat16_out,
    laws.test_any_shapes,
)


def packed(case: Case | Row, base: State, experts: dict[str, State], seed: int = 0, **params: Any) -> Packed:
    row = case if isinstance(case, Row) else case.row
    own = params if isinstance(case, Row) else {**case.params, "expert": None}
    inputs = Inputs(base, experts, SampleRoles(), stats_for(row, experts), seed)
    return pack(Merge(row, row.load_params()(**own), inputs))


def merged(row: Row, base: State | None, experts: dict[str, State], params: dict[str, Any], **more: Any) -> State:
    """One expert, packed and restored tensor by tensor."""
    given = {"stats": stats_for(row, experts), "roles": SampleRoles(), **more}
    return merge_state_dicts(base, experts, row.name, params, **given)


def restored(row: Row, base: State, experts: dict[str, State], **params: Any) -> State:
    """The one expert, packed and restored."""
    found = packed(row, base, experts, **params)
    return dict(Expert(found, base, SampleRoles(), found.experts[0]))


@every_case
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
def test_the_laws_of_every_merge(law: Any, case: Case) -> None:
    law(case=case)


@pytest.mark.parametrize("case", [case for case in CASES if not case.ordered], ids=str)
def test_order_of_experts_is_irrelevant(case: Case) -> None:
    laws.test_order_of_experts_is_irrelevant(case)


@pytest.mark.parametrize("case", [case for case in CASES if case.row.elementwise], ids=str)
def test_chunked_equals_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    laws.test_chunked_equals_whole(case, 16, monkeypatch)


@every_case
def test_packed_and_restored_is_what_is_merged_for_that_expert(case: Case) -> None:
    base, experts = models()
    found = packed(case, base, experts, seed=3)
    for name in EXPERTS:
        params = {**case.params, "expert": name}
        whole = merged(case.row, base, experts, params, seed=3)
        laws.assert_same_bits(dict(Expert(found, base, SampleRoles(), name)), whole)


@every_case
def test_inputs_are_untouched_by_packing_and_nothing_is_shared(case: Case) -> None:
    base, experts = models()
    before = copy.deepcopy((base, experts))
    found = packed(case, base, experts)
    for tensor in found.tensors.values():
        tensor.zero_()
    for tensor in dict(Expert(found, base, SampleRoles(), "bee")).values():
        tensor.fill_(5)
    laws.assert_same_bits(base, before[0])
    for name, expert in experts.items():
        laws.assert_same_bits(expert, before[1][name])


@every_case
def test_same_seed_same_bits(case: Case) -> None:
    base, experts = models()
    one, same, other = (packed(case, base, experts, seed=seed).tensors for seed in (1, 1, 2))
    laws.assert_same_bits(one, same)
    assert case.row.random != all(torch.equal(one[key], other[key]) for key in one)


@every_case
def test_bytes_and_bits_are_those_of_what_is_packed(case: Case) -> None:
    base, experts = models()
    found = packed(case, base, experts)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in found.tensors.values())
    n = sum(tensor.numel() for name, tensor in base.items() if name not in BUFFERS)
    own = sum(tensor.nbytes for tensor in base.values())
    assert found.nbytes == nbytes
    told = found.metrics()
    assert ("prune/sparsity" in told) == bool(case.row.entries)
    told.pop("prune/sparsity", None)
    assert told == {
        "compression/bytes": nbytes,
        "compression/bits_per_parameter": pytest.approx(8 * nbytes / (3 * n)),
        "compression/ratio": pytest.approx(3 * own / nbytes),
    }
    assert {key.rpartition("/")[0] for key in found.tensors} <= set(base)


@every_case
def test_half_precision_takes_half_the_bytes_of_numbers(case: Case) -> None:
    base, experts = models()
    wide = packed(Case(case.row, {**case.params, "dtype": "float32"}), base, experts).tensors
    half = packed(Case(case.row, {**case.params, "dtype": "bfloat16"}), base, experts).tensors
    assert {tensor.dtype for tensor in half.values()} >= {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in half.values()) < sum(tensor.nbytes for tensor in wide.values())


@every_row
def test_buffers_are_each_experts_own(row: Row) -> None:
    base, experts = models()
    found = packed(row, base, experts)
    assert f"embeddings.position_ids/{OWN}" not in found.tensors  # the same in all
    for name in EXPERTS:
        one = Expert(found, base, SampleRoles(), name)
        whole = merged(row, base, experts, {"expert": name})
        for buffer in BUFFERS:
            assert torch.equal(one[buffer], experts[name][buffer])
            assert torch.equal(whole[buffer], experts[name][buffer])


EXACT = {"emr": {}, "tall_mask": {}, "tsv_compress": {}, "randes": {"scale": 1.0}}


@pytest.mark.parametrize("name", EXACT)
def test_one_expert_alone_is_restored(name: str) -> None:
    base, experts = models(1)
    laws.assert_close(restored(CATALOGUE[name], base, experts, **EXACT[name]), experts["ant"], atol=2e-6)


@pytest.mark.parametrize("name", sorted({row.name for row in ROWS} - set(EXACT)))
def test_what_is_not_exact_for_one_expert_is_no_farther_than_the_base(name: str) -> None:
    base, experts = models(1)
    found = restored(CATALOGUE[name], base, experts)
    for key in SHAPES:
        far = torch.linalg.vector_norm(found[key] - experts["ant"][key])
        assert far <= torch.linalg.vector_norm(base[key] - experts["ant"][key]) + 1e-6, key


@every_row
def test_more_experts_take_fewer_bits_each_or_as_many(row: Row) -> None:
    shapes = {"layers.0.fc1.weight": (64, 48)}
    per_expert = []
    for n_experts in (1, 3):
        base, experts = models(n_experts, shapes=shapes)
        per_expert.append(packed(row, base, experts).metrics()["compression/bits_per_parameter"])
    assert per_expert[1] <= per_expert[0]


@every_row
def test_bad_input_is_named(row: Row) -> None:
    base, experts = models()
    with pytest.raises(MergeError, match=f"{row.name} makes no single model: expert=NAME .* ant, bee, cat"):
        merged(row, base, experts, {})
    with pytest.raises(MergeError, match=r"got 'be'; did you mean bee\?"):
        merged(row, base, experts, {"expert": "be"})
    with pytest.raises(MergeError, match=f"{row.name} needs a base"):
        merged(row, None, experts, {"expert": "bee"})
    with pytest.raises(ValueError, match="dtype is one of float32, float16, bfloat16; got 'int8'"):
        row.load_params()(dtype="int8")
    with pytest.raises(ValueError, match=r"lines cannot go around .* keeps the experts apart"):
        merged(row, base, experts, {"expert": "bee"}, veneers={"lines": {}})
    with pytest.raises(ValueError, match="got 'dog'; there are ant, bee, cat"):
        Expert(packed(row, base, experts), base, SampleRoles(), "dog")


@every_row
def test_what_is_not_finite_is_refused(row: Row) -> None:
    base, experts = models()
    experts["bee"]["layers.0.fc1.weight"][3, 2] = float("nan")
    with pytest.raises(MergeError, match=r"layers.0.fc1.weight has NaN or infinite weights in expert bee"):
        packed(row, base, experts)
    experts["bee"]["layers.0.fc1.weight"][3, 2] = 1e9
    experts["bee"]["single"][0] = 1e9
    with pytest.raises(MergeError, match=r"is beyond the range of torch\.float16; set dtype=float32"):
        packed(row, base, experts, dtype="float16")
