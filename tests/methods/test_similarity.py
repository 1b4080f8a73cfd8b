import torch

from methods.kinds import Piece
from methods.similarity import cosine_similarities


def test_by_hand() -> None:
    """Over two pieces: changes (1, 0, 0), (0, 2, 0), (3, 3, 0) and none."""
    base = torch.tensor([1.0, 1.0, 1.0])
    experts = base + torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [3.0, 3.0, 0], [0, 0, 0]])
    pieces = [Piece("w", base[:1], experts[:, :1]), Piece("v", base[1:], experts[:, 1:])]
    half = 0.5**0.5
    expected = [[1, 0, half, 0], [0, 1, half, 0], [half, half, 1, 0], [0, 0, 0, 0]]
    found = cosine_similarities(lambda function, limit=None: map(function, pieces))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
