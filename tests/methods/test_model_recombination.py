import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

NAMES = [
    "embed.weight",
    *(f"layers.{layer}.{part}" for layer in range(6) for part in ("a.weight", "b.bias")),
    "norm.weight",
]
EXPERTS = {name: {key: torch.full((3,), float(index)) for key in NAMES} for index, name in enumerate(("x", "y", "z"))}


def recombined(seed: int = 0, **params) -> dict[str, float]:
    """Which expert gives each tensor."""
    merged = merge_state_dicts(None, EXPERTS, "model_recombination", params, seed=seed)
    return {name: float(tensor[0]) for name, tensor in merged.items()}


def test_a_layers_tensors_move_together() -> None:
    found = recombined()
    for layer in range(6):
        assert found[f"layers.{layer}.a.weight"] == found[f"layers.{layer}.b.bias"]
    assert len(set(found.values())) > 1


def test_all_models_together_have_every_layer_once() -> None:
    models = [recombined(model=index) for index in range(3)]
    for name in NAMES:
        assert sorted(model[name] for model in models) == [0.0, 1.0, 2.0]


def test_every_expert_comes_as_often() -> None:
    found = [value for seed in range(20) for name, value in recombined(seed).items() if name.endswith("a.weight")]
    for expert in (0.0, 1.0, 2.0):
        assert 20 < found.count(expert) < 60  # 40 of 120 are expected, 5 is their deviation


@pytest.mark.parametrize(("model", "error"), [(3, MergeError), (-1, ValueError)])
def test_another_model_is_refused(model: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="model is one of"):
        recombined(model=model)
