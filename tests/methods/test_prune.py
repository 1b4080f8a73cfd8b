import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.kinds import Place
from methods.prune import PruneMagnitudeParams, is_pruned, prune_magnitude
from pools.faults import specs_of
from pools.roles import NamedRoles

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, -6.0, 5.0]])
NAME = "layers.0.fc.weight"
LINEAR = Place(1, 1, linear=True)


def pruned(weight: torch.Tensor, method: str = "prune_magnitude", **params) -> torch.Tensor:
    return merge_state_dicts(None, {"one": {NAME: weight}}, method, params)[NAME]


def test_by_hand() -> None:
    """The larger half of each row, of the tensor, and the largest of every two."""
    assert pruned(WEIGHT).tolist() == [[0, 0, 3, -4], [8, 7, 0, 0]]
    assert pruned(WEIGHT, scope="tensor").tolist() == [[0, 0, 0, 0], [8, 7, -6, 5]]
    assert pruned(WEIGHT, n=1, m=2).tolist() == [[0, -2, 0, -4], [8, 0, -6, 0]]
    assert pruned(WEIGHT, density=0.26).tolist() == [[0, 0, 0, -4], [8, 0, 0, 0]]
    assert torch.equal(pruned(WEIGHT, density=1.0), WEIGHT)


def test_over_the_model() -> None:
    """Four of twelve weights, wherever they are; what is in no block is left alone."""
    state = {NAME: WEIGHT, "layers.1.fc.weight": torch.tensor([[9.0, 0.5, 0.25, 0.1]]), "head.weight": torch.ones(1, 2)}
    found = merge_state_dicts(None, {"one": state}, "prune_magnitude", {"scope": "model", "density": 1 / 3})
    assert found[NAME].tolist() == [[0, 0, 0, 0], [8, 7, -6, 0]]
    assert found["layers.1.fc.weight"].tolist() == [[9, 0, 0, 0]]
    assert torch.equal(found["head.weight"], state["head.weight"])


def test_what_m_does_not_divide() -> None:
    """Of the two that are left over in each row one is kept, 2 * 2 / 4; groups never reach into the next row."""
    weight = torch.arange(1.0, 13.0).reshape(2, 6)
    found = pruned(weight, n=2)
    assert found.tolist() == [[0, 0, 3, 4, 0, 6], [0, 0, 9, 10, 0, 12]]


@pytest.mark.parametrize("method", ["prune_random", "prune_magnitude"])
@pytest.mark.parametrize(
    ("params", "per_row"),
    [({"density": 0.25}, 10), ({"n": 2}, 20), ({"n": 1, "m": 8}, 5), ({"n": 0, "density": 0.5}, 20)],
)
def test_as_many_are_kept_in_each_row_as_is_asked(method: str, params: dict, per_row: int) -> None:
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    found = pruned(weight, method, **params)
    assert (found.count_nonzero(dim=1) == per_row).all()
    kept = found != 0
    assert torch.equal(found[kept], weight[kept])
    if params.get("n"):
        groups = found.reshape(30, -1, params.get("m", 4)).count_nonzero(dim=2)
        assert (groups == params["n"]).all()


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_random_masks_keep_the_share_and_differ_by_seed(scope: str) -> None:
    state = {NAME: torch.ones(64, 64), "layers.1.fc.weight": torch.ones(64, 64)}
    params = {"scope": scope, "density": 0.3}
    one, other = (merge_state_dicts(None, {"one": state}, "prune_random", params, seed=seed) for seed in (1, 2))
    assert one[NAME].mean() == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(one[NAME], other[NAME])
    assert not torch.equal(one[NAME], one["layers.1.fc.weight"])


def test_of_several_experts_the_mean_is_pruned_or_the_one_that_is_named() -> None:
    experts = {"a": {NAME: WEIGHT}, "b": {NAME: WEIGHT.flip(1)}}
    mean = (WEIGHT + WEIGHT.flip(1)) / 2
    assert torch.equal(merge_state_dicts(None, experts, "prune_magnitude")[NAME], pruned(mean))
    found = merge_state_dicts(None, experts, "prune_magnitude", {"expert": "b"})[NAME]
    assert torch.equal(found, pruned(WEIGHT.flip(1)))
    with pytest.raises(MergeError, match=r"got 'aa'; did you mean a\?"):
        merge_state_dicts(None, experts, "prune_magnitude", {"expert": "aa"})


def test_transposed_layers_are_pruned_by_output_too() -> None:
    """As GPT-2 has them: (in, out)."""
    state = {"h.0.mlp.c_fc.weight": WEIGHT.T.contiguous(), "h.0.ln_1.weight": torch.ones(4)}
    roles = NamedRoles(specs_of(state), transposed=True)
    found = merge_state_dicts(None, {"one": state}, "prune_magnitude", roles=roles)
    assert torch.equal(found["h.0.mlp.c_fc.weight"], pruned(WEIGHT).T)


def test_what_is_pruned() -> None:
    params, linear = PruneMagnitudeParams(), PruneMagnitudeParams(matrices="linear")
    assert is_pruned((2, 4), LINEAR, params)
    assert is_pruned((2, 4), Place(1, 1, transposed=True), params)
    assert not is_pruned((2, 4), Place(2, 1, linear=True), params), "behind the blocks"
    assert is_pruned((2, 4), Place(2, 1, linear=True), linear)
    assert not is_pruned((2, 4), Place(1, 1), linear), "an embedding"
    assert is_pruned((2, 4), Place(1, 1), PruneMagnitudeParams(matrices="all"))
    assert not is_pruned((4,), LINEAR, params)
    experts = torch.stack([WEIGHT, 3 * WEIGHT])
    rest = prune_magnitude(None, experts, params, numbers=None, place=Place(1, 1))
    assert torch.equal(rest, 2 * WEIGHT)


def test_bad_input_is_named() -> None:
    for params, said in (
        ({"n": 5}, r"n in \[0, m\], got n 5 and m 4"),
        ({"n": -1}, r"n in \[0, m\], got n -1 and m 4"),
        ({"m": 0}, "m must be at least 1"),
        ({"density": 50.0}, r"density is a share in \(0, 1\], got 50.0"),
        ({"matrices": "conv"}, "matrices is one of blocks, linear, all, experts; got 'conv'"),
        ({"scope": "layer"}, "scope is one of row, tensor, model; got 'layer'"),
    ):
        with pytest.raises(ValueError, match=said):
            PruneMagnitudeParams(**params)


@pytest.mark.parametrize("state", [{"bias": torch.ones(3)}, {"embed_tokens.weight": torch.ones(3, 2)}])
def test_a_model_without_linear_layers_is_refused(state: dict[str, torch.Tensor]) -> None:
    name, n = next((name, tensor.numel()) for name, tensor in state.items())
    said = f"prune_magnitude prunes weights of linear layers in blocks.* 1 tensors with {n} weights none .*{name}"
    with pytest.raises(MergeError, match=said):
        merge_state_dicts(None, {"one": state}, "prune_magnitude")
