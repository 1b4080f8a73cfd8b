"""Which tensors of a model have a row for each token: known by name, and by their number of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pools.headers import CheckpointError

_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|shared|word_embeddings|embed_in|tok_embeddings|token_embedding"
    r"|backbone\.embeddings|transformer\.embeddings)\.weight$"
)
_HEADS = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|generator_lm_head|vocab_projector|proj_out|pred_layer\.proj"
    r"|predictions\.decoder)\.(weight|bias)$"
    r"|(^|\.)(predictions\.bias|final_logits_bias)$|^output\.weight$"
)
_LAYER = re.compile(r"(^|\.)\d+\.")


def vocabulary_rows(shapes: Mapping[str, tuple[int, ...]], said: int | None = None) -> int | None:
    """Rows of a model's embedding; None where it has no embedding of tokens.

    Args:
        shapes: Name -> shape.
        said: `vocab_size` of the configuration, which settles it where several tensors could be the embedding.
    """
    found = [shape[0] for name, shape in shapes.items() if _EMBEDDINGS.search(name) and len(shape) == 2]
    found = found or [shape[0] for name, shape in shapes.items() if _HEADS.search(name) and len(shape) == 2]
    if not found:
        return None
    return said if said in found else found[0]


def vocabulary_tensors(shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, int]:
    """Tensors with a row for each token: name -> elements of a row.

    Raises:
        CheckpointError: A head has another number of rows than the embedding.
    """
    found: dict[str, int] = {}
    faults: list[str] = []
    for name, shape in shapes.items():
        head = _HEADS.search(name)
        if not shape or not (head or _EMBEDDINGS.search(name)):
            continue
        length = shape[-1] if name.endswith("final_logits_bias") else shape[0]
        if length == rows:
            found[name] = math.prod(shape) // rows
        elif head and "lm_head" in name:
            faults.append(f"{name} has {length} rows, but the embedding {rows}; resize one of them")
    if faults:
        raise CheckpointError("\n".join(faults))
    return found


def suspects(shapes: Mapping[str, tuple[int, ...]], rows: int) -> list[str]:
    """Tensors outside the layers with as many rows as the vocabulary, whose names do not say that they belong to it."""
    known = vocabulary_tensors(shapes, rows)
    return [n for n, shape in shapes.items() if shape and shape[0] == rows and n not in known and not _LAYER.search(n)]
