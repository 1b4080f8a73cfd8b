"""Parts of products of thin matrices, whose bits do not depend on which part is asked for.

A matrix product's last bit depends on how many rows, columns and threads it has. Here each element has one
multiplication and addition for each rank, one after the other, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

BLOCK = 1 << 18  # most elements to work on at a time
_scratch = threading.local()


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, start: int) -> None:
    """Add elements [start, start + len(out)) of scale * left @ right, (m, r) @ (r, n) flattened, to `out`."""
    change = _buffer(len(out))
    for part, row, n_rows, column, n_columns in _rows_of(start, len(out), right.shape[1]):
        piece = change[part : part + n_rows * n_columns].view(n_rows, n_columns)
        rows, columns = left[row : row + n_rows], right[:, column : column + n_columns]
        torch.mul(rows[:, :1], columns[0], out=piece)
        for k in range(1, right.shape[0]):
            torch.addcmul(piece, rows[:, k : k + 1], columns[k], out=piece)
    out.add_(change.mul_(scale))


def multiply(out: torch.Tensor, factors: torch.Tensor, start: int, columns: int, by_column: bool) -> None:
    """Multiply each row, or column, of elements [start, start + len(out)) of an (m, columns) tensor by its factor."""
    for part, row, n_rows, column, n_columns in _rows_of(start, len(out), columns):
        piece = out[part : part + n_rows * n_columns].view(n_rows, n_columns)
        piece.mul_(factors[column : column + n_columns] if by_column else factors[row : row + n_rows, None])


def _rows_of(start: int, n: int, columns: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Rectangles that n elements from `start` on are made of: (offset, first row, rows, first column, columns)."""
    done = 0
    while done < n:
        row, column = divmod(start + done, columns)
        n_rows = (n - done) // columns if column == 0 else 0
        if n_rows:
            yield done, row, n_rows, 0, columns
            done += n_rows * columns
        else:
            n_columns = min(columns - column, n - done)
            yield done, row, 1, column, n_columns
            done += n_columns


def folded(squares: torch.Tensor) -> torch.Tensor:
    """Sum of each row, (m, n) -> (m,), by adding one half to the other: always in the same order; uses up its input."""
    n = squares.shape[1]
    while n > 1:
        half = n // 2
        squares[:, :half] += squares[:, n - half : n]
        n -= half
    return squares[:, 0].clone()


def _buffer(n: int) -> torch.Tensor:
    """Memory of this thread for n float32 numbers."""
    held = getattr(_scratch, "held", None)
    if held is None or len(held) < n:
        held = _scratch.held = torch.empty(max(n, BLOCK))
    return held[:n]
