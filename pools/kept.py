"""Which tensors of a language model's checkpoint are weights of its own, without buffers, tied names, strange heads.

Checkpoints of one architecture differ in what was written beside the weights: masks and rotary tables that follow from
the configuration, an output head that is the embedding once more, the head of an earlier training, a prefix before all
names. What is left out is named, and nothing is read but a sample of an output head that may be the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pools.picked import Picked, Tensors, name_of
from pools.reading import read_into
from pools.roles import NamedRoles

_STALE = frozenset(
    {"inv_freq", "original_inv_freq", "masked_bias", "position_ids", "token_type_ids", "cos_cached", "sin_cached"}
)
_EMBEDDINGS = r"embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|word_embedding|shared"
_EMBEDDING = re.compile(rf"(^|\.)({_EMBEDDINGS})\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # T5's and BART's, which are `shared.weight`
_CLASSIFIER = re.compile(r"^(score|classifier|classification_head|pre_classifier|sequence_summary|logits_proj)\.")
_PRETRAINING = re.compile(
    r"^(cls|lm_head|embed_out|qa_outputs|mlm_head|discriminator_predictions|generator_\w+|mask_predictions|lm_predictions|"
    r"vocab_transform|vocab_layer_norm|vocab_projector|final_logits_bias)(\.|$)|(^|\.)pooler\."
)
_POOLER = re.compile(r"(^|\.)pooler\.")
_SAMPLE = 1 << 14  # elements compared at each of three places


@dataclass(frozen=True)
class Kept:
    """One member's tensors after the accounting."""

    tensors: Tensors
    dropped: tuple[str, ...] = ()  # names on disk that are not merged and not written
    notes: tuple[str, ...] = ()
    tied: bool = False  # the output head is the embedding


def is_classifier(name: str) -> bool:
    """Whether a name belongs to the head of a sequence classifier.

    >>> is_classifier("classifier.dense.weight"), is_classifier("bert.pooler.dense.weight")
    (True, False)
    """
    return bool(_CLASSIFIER.match(name))


def keep_own(tensors: Tensors, config: Mapping[str, Any]) -> Kept:
    """A member without buffers that follow from the configuration, and with each tied tensor once.

    Args:
        tensors: All of its tensors.
        config: Its config.json, or what of it is known.
    """
    roles = NamedRoles(_specs(tensors))
    dropped = [name for name in tensors if _is_stale(name, roles)]
    names = [name for name in tensors if name not in set(dropped)]
    owner = _embedding(names)
    heads = [name for name in names if _HEAD.search(name)]
    stacks = [name for name in names if owner and owner.endswith("shared.weight") and name.endswith(_STACKS)]
    says = _ties(config)
    notes: list[str] = []
    tied = says is not False and not heads
    aliases = [*stacks]
    if owner is not None and heads and says is not False:
        equal = [head for head in heads if _same(tensors, owner, head)]
        aliases += equal
        tied = len(equal) == len(heads)
        if says and not tied:
            notes.append(
                f"{name_of(tensors)}: config.json ties {heads[0]} to {owner}, but the file holds different weights for "
                "it; they are merged each by itself, as transformers 5 runs them"
            )
    gone = {*dropped, *aliases}
    kept = {name: name for name in names if name not in gone}
    return Kept(view(tensors, kept), (*dropped, *aliases), tuple(notes), tied and owner is not None)


def fit(member: Kept, reference: Kept) -> Kept:
    """A member under the reference's names: without a prefix, and with a head read from the embedding where it is tied.

    Args:
        member: An expert.
        reference: The base, or without one the first expert.
    """
    names = _reprefixed(list(member.tensors), list(reference.tensors))
    notes = list(member.notes)
    if any(name != inside for name, inside in names.items()):
        name, inside = next(pair for pair in names.items() if pair[0] != pair[1])
        notes.append(
            f"{name_of(member.tensors)}: {inside} is taken for {name}, and so on: the names differ by a prefix"
        )
    owner = _embedding(names)
    for head in [name for name in reference.tensors if _HEAD.search(name)]:
        if head not in names and member.tied and owner is not None:
            names[head] = names[owner]
            notes.append(f"{name_of(member.tensors)}: {head} is read from {names[owner]}, to which it is tied")
    return Kept(view(member.tensors, names), member.dropped, tuple(notes), member.tied)


def set_heads_aside(members: Mapping[str | None, Kept]) -> tuple[dict[str | None, Kept], dict[str | None, Tensors]]:
    """Classifiers without their heads, and the heads.

    A pooler that some members lack goes with the head. Heads of other trainings (of a masked language model, say) that
    not all members have are dropped.

    Args:
        members: All that are merged; some may have no head.
    """
    common = set.intersection(*(set(kept.tensors) for kept in members.values()))
    bodies: dict[str | None, Kept] = {}
    heads: dict[str | None, Tensors] = {}
    for member, kept in members.items():
        classifies = any(map(is_classifier, kept.tensors))
        strange = {name for name in kept.tensors if name not in common and _PRETRAINING.search(name)}
        own = {name for name in strange if classifies and _POOLER.search(name)}
        own |= {name for name in kept.tensors if is_classifier(name)}
        if own:
            heads[member] = view(kept.tensors, {name: name for name in kept.tensors if name in own})
        body = {name: name for name in kept.tensors if name not in own | strange}
        dropped = (*kept.dropped, *(name for name in kept.tensors if name in strange - own))
        bodies[member] = Kept(view(kept.tensors, body), dropped, kept.notes, kept.tied)
    return bodies, heads


def view(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """The tensors under these names (name -> name there); themselves where nothing changes."""
    if list(tensors) == list(names) == list(names.values()):
        return tensors
    return Picked({name: (tensors, inside) for name, inside in names.items()}, name_of(tensors))


def _specs(tensors: Tensors) -> Any:
    from pools.faults import specs_of

    return specs_of(tensors)


def _is_stale(name: str, roles: NamedRoles) -> bool:
    """Whether a tensor is a buffer that current models make from the configuration."""
    leaf = name.rpartition(".")[2]
    return leaf in _STALE or (leaf == "bias" and roles.is_buffer(name))


def _embedding(names: Iterable[str]) -> str | None:
    """The input embedding: the shared one where there is one, else the first."""
    found = [name for name in names if _EMBEDDING.search(name)]
    return min(found, key=lambda name: (not name.endswith("shared.weight"), found.index(name)), default=None)


def _ties(config: Mapping[str, Any]) -> bool | None:
    """What the configuration says of tied embeddings, also where it nests the text model's; None: nothing."""
    for place in (config, config.get("text_config") or {}, config.get("decoder") or {}):
        if isinstance(place, Mapping) and isinstance(place.get("tie_word_embeddings"), bool):
            return bool(place["tie_word_embeddings"])
    return None


def _same(tensors: Tensors, one: str, other: str) -> bool:
    """Whether two tensors are equal at the start, the middle and the end; training moves every row of a head."""
    specs = _specs(tensors)
    if specs[one] != specs[other]:
        return False
    size = torch.Size(specs[one].shape).numel()
    n = min(_SAMPLE, size)
    for start in (0, (size - n) // 2, size - n):
        mine, theirs = torch.empty(n), torch.empty(n)
        read_into(tensors, one, start, mine)
        read_into(tensors, other, start, theirs)
        if not torch.equal(mine, theirs):
            return False
    return True


def _reprefixed(names: list[str], reference: list[str]) -> dict[str, str]:
    """Name of the reference -> the member's, where all of one are all of the other's behind `<word>.`.

    >>> _reprefixed(["transformer.h.0.w", "lm_head.weight"], ["h.0.w"])
    {'h.0.w': 'transformer.h.0.w', 'lm_head.weight': 'lm_head.weight'}
    """
    plain, known = {name: name for name in names}, set(reference)
    if not names or not reference or known & {name for name in names if not _is_head(name)}:
        return plain
    for prefix in dict.fromkeys(f"{name.partition('.')[0]}." for name in [*names, *reference]):
        less = {name.removeprefix(prefix): name for name in names}
        more = {name if _is_head(name) else prefix + name: name for name in names}
        for renamed in (less, more):
            if len(renamed) == len(names) and sum(name in known for name in renamed) > len(reference) // 2:
                return renamed
    return plain


def _is_head(name: str) -> bool:
    return bool(_HEAD.search(name) or _CLASSIFIER.match(name) or _PRETRAINING.match(name))
