import numpy as np
import torch

from harness.merge import merge_state_dicts


def test_against_numpy_with_sorted_importances() -> None:
    """All of it once more in float64, by a full sort."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, 13, generator=generator)
    expert = base + 0.1 * torch.randn(9, 13, generator=generator)
    merged = merge_state_dicts({"w": base}, {"a": {"w": expert}}, "arcee_fusion")["w"].numpy()

    start, end = base.double().numpy(), expert.double().numpy()
    p, q = (np.exp(rows) / np.exp(rows).sum(1, keepdims=True) + 1e-8 for rows in (end, start))
    importance = np.abs(end - start) * (p * np.log(p / q)).sum(1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, middle, third = (ordered[int(share * 116)] for share in (0.25, 0.5, 0.75))
    kept = importance >= middle + 1.5 * (third - first)
    assert 0 < kept.sum() < kept.size / 4
    np.testing.assert_allclose(merged, np.where(kept, end, start), atol=1e-6)


def test_a_model_that_differs_nowhere_by_its_rows_is_taken_whole() -> None:
    """Rows of one number have no divergence, so that all are as important."""
    base, expert = {"w": torch.tensor([[1.0], [2.0]])}, {"w": torch.tensor([[3.0], [2.5]])}
    assert torch.equal(merge_state_dicts(base, {"a": expert}, "arcee_fusion")["w"], expert["w"])
