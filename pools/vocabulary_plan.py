"""Which row of whom stands at each row of the output's embedding and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pools.headers import CheckpointError
from pools.reading import Source
from pools.revocabulary import BASE, LACKS, MEAN, MEMBER, OWNER, PADDING, Plan
from pools.vocabulary_tensors import vocabulary_tensors

RULES = {"owner": OWNER, "mean": MEAN, "base": BASE}
_MULTIPLES = (128, 64, 32, 16, 8)  # that models pad their vocabulary to

Ids = Mapping[str, int]


@dataclass(frozen=True)
class Fill:
    """What fills the rows of tokens that a member lacks; see `pools.vocabulary.unify`."""

    mode: str
    new_tokens: str
    tokens: Mapping[str, str]
    reference: str | None


def union_ids(base: Ids, others: Iterable[Ids]) -> dict[str, int]:
    """Token -> id of all tokens: the base's as they are, then the others', by their lowest id anywhere and by spelling.

    >>> union_ids({"a": 0}, [{"x": 0, "a": 1, "z": 5}, {"y": 0, "z": 1}])
    {'a': 0, 'x': 1, 'y': 2, 'z': 3}
    """
    lowest: dict[str, int] = {}
    for ids in others:
        for token in ids.keys() - base.keys():
            lowest[token] = min(ids[token], lowest.get(token, ids[token]))
    first = 1 + max(base.values(), default=-1)
    order = sorted(lowest, key=lambda token: (lowest[token], token))
    return dict(base) | {token: first + place for place, token in enumerate(order)}


def padded(rows: int, own: int, wanted: int) -> int:
    """Rows of an embedding that is to hold `wanted` tokens, where the base's has `rows` for its `own` tokens.

    A base with more rows than tokens pads: to the largest of 128, 64, 32, 16, 8 that divides its rows; so will the
    output.

    >>> padded(152064, 151665, 151700), padded(128, 100, 129), padded(100, 100, 129)
    (152064, 256, 129)
    """
    if wanted <= rows:
        return rows
    multiple = next((m for m in _MULTIPLES if rows % m == 0), 1) if rows > own else 1
    return -(-wanted // multiple) * multiple


def make_plan(
    sources: Mapping[str | None, Source],
    vocabularies: Mapping[str | None, Ids],
    sizes: Mapping[str | None, int | None],
    ids: Ids,
    n_rows: int,
    fill: Fill,
) -> Plan:
    """Find for each member and each row of the output where the row comes from.

    Args:
        sources: Member -> tensors.
        vocabularies: Member -> its tokens' ids.
        sizes: Member -> rows of its embedding; None without one.
        ids: Token -> id in the output.
        n_rows: Rows of the output.
        fill: The rules.

    Raises:
        CheckpointError: A token, rule or member that is not known; members with other vocabulary tensors.
    """
    inside = {token: at for token, at in ids.items() if at < n_rows}
    places = np.fromiter(inside.values(), np.int64, len(inside))
    known = np.zeros(n_rows, dtype=bool)
    known[places] = True
    rows = {member: np.full(n_rows, LACKS, dtype=np.int32) for member in sources}
    for member, found in vocabularies.items():
        at = np.fromiter((found.get(token, LACKS) for token in inside), np.int32, len(inside))
        at[at >= (sizes[member] or 0)] = LACKS  # a tokenizer may know tokens that the embedding has no row for
        rows[member][places] = at
    tensors = _tensors(sources, sizes, fill.reference)
    padding = np.flatnonzero(~known)
    inherited = padding[padding < (sizes[fill.reference] or 0)]
    rows[fill.reference][inherited] = inherited
    rules = _rules(rows, inside, ids, fill)
    rules[padding] = PADDING
    rules[inherited] = BASE
    return Plan(sources, fill.reference, rows, known, rules, tensors)


def _rules(rows: Mapping[str | None, np.ndarray], inside: Ids, ids: Ids, fill: Fill) -> np.ndarray:
    """What fills each token's row where it is lacking, (V,); the words that a row cannot follow give way."""
    owner = BASE if fill.mode == "base" else OWNER
    words = RULES | {"owner": owner}
    reference = rows[fill.reference]
    rules = np.full(len(reference), words[fill.new_tokens], dtype=np.int32)
    members = {name: place for place, name in enumerate(rows) if name is not None}
    faults = []
    for token, word in fill.tokens.items():
        if token not in inside:
            faults.append(f"pool.tokens: {token!r} {_why_unknown(token, ids, fill.mode)}")
        elif word in words:
            rules[inside[token]] = words[word]
        elif word not in members:
            faults.append(
                f"pool.tokens: {token!r} is given {word!r}; give owner, mean, base or an expert ({', '.join(members)})"
            )
        elif rows[word][inside[token]] == LACKS:
            faults.append(f"pool.tokens: expert {word} has no row for {token!r} to give")
        else:
            rules[inside[token]] = MEMBER + members[word]
    if faults:
        raise CheckpointError("\n".join(faults))
    nobody = np.logical_and.reduce([found == LACKS for found in rows.values()])
    rules[(rules == BASE) & (reference == LACKS)] = OWNER
    rules[(rules == OWNER) & nobody] = PADDING
    return rules


def _why_unknown(token: str, ids: Ids, mode: str) -> str:
    if token in ids:
        return "has an id beyond the base's rows"
    return "is not in the base's vocabulary" if mode == "base" else "is in no member's vocabulary"


def _tensors(
    sources: Mapping[str | None, Source], sizes: Mapping[str | None, int | None], reference: str | None
) -> dict[str, int]:
    """The tensors with a row for each token, which must be the same in all members: name -> elements of a row."""
    own = vocabulary_tensors(sources[reference].shapes, sizes[reference] or 0)
    faults = []
    for member, source in sources.items():
        size = sizes[member]
        if size is None:
            continue
        found = vocabulary_tensors(source.shapes, size)
        faults += [
            f"{name} has {found.get(name, 'no')} elements a row in expert {member} and {own.get(name, 'none')} in the "
            "base; members whose vocabularies differ need the same embeddings and heads (tied or not)"
            for name in sorted(found.keys() | own.keys())
            if found.get(name) != own.get(name)
        ]
    if faults:
        raise CheckpointError("\n".join(faults))
    return own
