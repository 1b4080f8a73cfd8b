"""What keeps checkpoints from being merged, found from names, shapes and dtypes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

_SHOWN = 8  # faults named for each member; the rest is counted
_VOCABULARY = re.compile(  # a row for each token
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings|tokens_embed|lm_head|embed_out)\.(weight|bias)$"
)


class Spec(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    """Name -> shape and dtype; from the headers where the mapping knows them, so that nothing is read."""
    shapes, dtypes = getattr(tensors, "shapes", None), getattr(tensors, "dtypes", None)
    if shapes is not None and dtypes is not None:
        return {name: Spec(tuple(shapes[name]), dtypes[name]) for name in tensors}
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def recast(specs: Mapping[str, Spec], dtype: torch.dtype | None) -> dict[str, Spec]:
    """The same specs with another dtype of the floating tensors; None leaves all as they are."""
    return {
        name: Spec(spec.shape, dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype)
        for name, spec in specs.items()
    }


def header_faults(
    base: Mapping[str, torch.Tensor] | None, experts: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[str]:
    """All that keeps experts from being merged with the base, or without one with the first expert, a line each."""
    members = {f"expert {name}": specs_of(tensors) for name, tensors in experts.items()}
    if base is not None:
        whose, reference = "the base", specs_of(base)
    elif members:
        whose, reference = next(iter(members.items()))
    else:
        return []
    faults = [] if reference else [f"{whose} has no tensors"]
    for member, specs in members.items():
        faults += _short(member, _differences(specs, reference, whose))
    return faults


def _differences(specs: Mapping[str, Spec], reference: Mapping[str, Spec], whose: str) -> list[str]:
    """Missing, extra and differently shaped tensors, and integers against floats."""
    missing = [name for name in reference if name not in specs]
    extra = [name for name in specs if name not in reference]
    found = [f"misses {name} {reference[name].shape}, which {whose} has" for name in missing]
    found += [f"has {name} {specs[name].shape}, which {whose} lacks" for name in extra]
    hint = _prefix_hint(missing, extra)
    rows = _vocabulary(specs, reference)
    found += _vocabulary_fault(specs, reference, rows, whose)
    for name in reference:
        if name not in specs or name in rows:
            continue
        mine, theirs = specs[name], reference[name]
        if mine.shape != theirs.shape:
            found.append(f"has {name} of shape {mine.shape}, where {whose} has {theirs.shape}")
        elif mine.dtype.is_floating_point != theirs.dtype.is_floating_point:
            found.append(f"has {name} as {mine.dtype}, where {whose} has {theirs.dtype}")
    return [hint, *found] if hint else found


def dtype_notes(members: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    """What is worth knowing of dtypes: members, or tensors of one member, that differ in theirs."""
    kinds = {}
    for member, tensors in members.items():
        counts = Counter(spec.dtype for spec in specs_of(tensors).values() if spec.dtype.is_floating_point)
        kinds[member] = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in counts))
    if len(set(kinds.values())) < 2 and not any(" and " in kind for kind in kinds.values()):
        return []
    told = ", ".join(f"{member} in {kind}" for member, kind in kinds.items())
    return [f"dtypes differ: {told}; arithmetic is in float32, and the merged model has the first one's dtypes"]


def _vocabulary(specs: Mapping[str, Spec], reference: Mapping[str, Spec]) -> list[str]:
    """Embeddings and heads that differ in their number of rows alone."""
    return [
        name
        for name, spec in reference.items()
        if _VOCABULARY.search(name) and name in specs and spec.shape[1:] == specs[name].shape[1:]
        if spec.shape[:1] != specs[name].shape[:1]
    ]


def _vocabulary_fault(
    specs: Mapping[str, Spec], reference: Mapping[str, Spec], rows: list[str], whose: str
) -> list[str]:
    """One line on vocabularies of different sizes, instead of one for each tensor that has a row for each token."""
    if not rows:
        return []
    mine, theirs = specs[rows[0]].shape[0], reference[rows[0]].shape[0]
    return [
        f"has a vocabulary of {mine} rows ({', '.join(rows)}), where {whose} has {theirs}: "
        "pool.tokenizer=union or pool.tokenizer=base brings them together"
    ]


def _prefix_hint(missing: Iterable[str], extra: Iterable[str]) -> str:
    """Names that differ by what stands before them only."""
    missing, extra = list(missing), list(extra)
    if not missing or not extra:
        return ""
    for short, long in ((missing[0], extra), (extra[0], missing)):
        for name in long:
            if name.endswith("." + short):
                return f"names differ by a prefix: {name!r} against {short!r}"
    return ""


def _short(member: str, differences: list[str]) -> list[str]:
    """A few of a member's differences, and how many more there are."""
    shown = [f"{member} {difference}" for difference in differences[:_SHOWN]]
    more = len(differences) - _SHOWN
    return [*shown, f"{member}: and {more} more"] if more > 0 else shown
