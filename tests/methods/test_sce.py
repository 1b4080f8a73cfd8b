import torch

from harness.merge import merge_state_dicts


def merged(deltas: list[list[float]], factor: float = 1.0, **params) -> torch.Tensor:
    rows = torch.tensor(deltas, dtype=torch.float64).float() * factor
    experts = {f"e{index}": {"w": row} for index, row in enumerate(rows)}
    return merge_state_dicts({"w": torch.zeros_like(rows[0])}, experts, "sce", params)["w"]


def test_by_hand() -> None:
    """Energies 10 and 5 weigh two thirds and one third; of the second entry only the positive one counts."""
    expected = torch.tensor([(2 * 1 + 1 * 1) / 3, 3.0])
    torch.testing.assert_close(merged([[1.0, 3.0], [1.0, -2.0]], density=1.0), expected)


def test_the_entries_that_differ_most_are_selected() -> None:
    """Variances 0, 4, 1 and 0.25: of three that differ the share 0.4 is one; the weights are of what is selected."""
    found = merged([[5.0, 4.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0]], density=0.4)
    assert found.tolist() == [0.0, 4.0, 0.0, 0.0]


def test_no_cliff_for_small_changes() -> None:
    """mergekit gives equal weights once the energies sum to less than 1e-6."""
    rows = [[1.0, 3.0], [2.0, 1.0]]
    for factor in (1e-2, 1e-4, 1e-6):
        torch.testing.assert_close(merged(rows, factor, density=1.0) / factor, merged(rows, density=1.0))


def test_experts_that_agree_move() -> None:
    assert merged([[1.0, -2.0], [1.0, -2.0]]).tolist() == [1.0, -2.0]
    assert merged([[1.0, -2.0]]).tolist() == [1.0, -2.0]
