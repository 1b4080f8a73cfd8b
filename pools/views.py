"""Views of a pool's members: some of their tensors (sub-modules), or their layers stacked anew by ranges (slices).

The views are sources themselves: nothing is read until a tensor, or a part of one, is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pools.headers import CheckpointError
from pools.picked import Picked, Selected, Tensors, name_of, select
from pools.roles import depths

__all__ = ["Restacked", "Selected", "layer_config_changes", "restack", "select"]

_BLOCK = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.+)$")  # stack, number, the name within the block
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what a configuration calls its number of layers
_SLICE_KEYS = ("experts", "base", "stack")


@dataclass(frozen=True)
class Restacked:
    """Base and experts after their layers were stacked by ranges."""

    base: Picked | None  # None where the slices name no layers of the base
    experts: dict[str, Picked]  # the i-th holds the i-th expert of every slice
    n_layers: int
    stack: str  # what stands before the layers' numbers: "model.layers"
    origins: tuple[tuple[str, int], ...]  # of each layer: the first expert that gives it, and its number there


def restack(
    base: Tensors | None,
    experts: Mapping[str, Tensors],
    slices: Sequence[Mapping[str, Any]],
    layer_stem: str | None = None,
) -> Restacked:
    """Stack ranges of layers of one or several models into models of another depth.

    Each slice is `{experts: {name: [first, last], ...}, base: [first, last]}`, ranges half-open, all of one length
    within a slice; an end that is negative counts from the last layer, a last one of None is all that follow.
    The slices' first experts make the first of the results' experts, and so on; layers may repeat.
    Tensors before the layers (embeddings) come from the first slice's members, those after them (final norm, head) from
    the last's.

    Args:
        base: The pool's base, if the slices name ranges of it.
        experts: The pool's experts.
        slices: As above; `stack` in any of them says which stack of layers is meant, where a model has several.
        layer_stem: The stack, where the caller knows it.

    Raises:
        CheckpointError: All that is wrong with the slices, a line each.
    """
    stems = {str(piece["stack"]) for piece in slices if isinstance(piece, Mapping) and piece.get("stack")}
    if len(stems) > 1:
        raise CheckpointError(f"slices name several stacks, {', '.join(sorted(stems))}; layers of one can be restacked")
    faults = _faults_of_form(base, experts, slices)
    if faults:
        raise CheckpointError("\n".join(faults))
    used = [experts[name] for piece in slices for name in piece["experts"]]
    used += [base] if base is not None and "base" in slices[0] else []
    found = {id(source): _stack_of(source, next(iter(stems), layer_stem)) for source in used}
    differing = sorted({stem for stem, _ in found.values()})
    if len(differing) > 1:
        raise CheckpointError(f"the members' layers have different names: {', '.join(differing)}")
    lengths = {key: n_layers for key, (_, n_layers) in found.items()}
    slices = [_resolved(piece, base, experts, lengths) for piece in slices]
    faults = _faults_of_form(base, experts, slices) or _faults_of_ranges(base, experts, slices, lengths)
    if faults:
        raise CheckpointError("\n".join(faults))
    return _restacked(base, experts, slices, differing[0])


def _resolved(
    piece: Mapping[str, Any], base: Tensors | None, experts: Mapping[str, Tensors], lengths: Mapping[int, int]
) -> dict[str, Any]:
    """A slice whose ranges count from the first layer."""

    def counted(span: Sequence[int | None], source: Tensors) -> list[int]:
        n_layers = lengths[id(source)]
        first, last = span[0] or 0, n_layers if span[1] is None else span[1]
        return [end + n_layers if end < 0 else end for end in (first, last)]

    own = {name: counted(span, experts[name]) for name, span in piece["experts"].items()}
    of_base = {"base": counted(piece["base"], base)} if base is not None and "base" in piece else {}
    return {**piece, "experts": own, **of_base}


def _restacked(
    base: Tensors | None, experts: Mapping[str, Tensors], slices: Sequence[Mapping[str, Any]], stem: str
) -> Restacked:
    """Of slices in which nothing is wrong."""
    columns = [list(column) for column in zip(*(piece["experts"].items() for piece in slices), strict=True)]
    stacked: dict[str, Picked] = {}
    for column in columns:
        name = "-".join(dict.fromkeys(name for name, _ in column))
        if name in stacked:
            name = f"{name}-{len(stacked) + 1}"
        stacked[name] = _stacked([(experts[member], span) for member, span in column], stem)
    origins = tuple((name, layer) for name, span in columns[0] for layer in range(*span))
    virtual = None
    if base is not None and "base" in slices[0]:
        virtual = _stacked([(base, piece["base"]) for piece in slices], stem)
    return Restacked(virtual, stacked, len(origins), stem, origins)


def _stacked(column: Sequence[tuple[Tensors, Sequence[int]]], stem: str) -> Picked:
    """One model out of ranges of layers: (source, [first, last]) each."""
    first, last = column[0][0], column[-1][0]
    parts: dict[str, tuple[Tensors, str]] = {}
    before, after = _outside(first, stem)[0], _outside(last, stem)[1]
    parts |= {name: (first, name) for name in before}
    layer = 0
    for source, span in column:
        inside = _layers(source, stem)
        for number in range(*span):
            parts |= {_named(stem, layer, rest): (source, _named(stem, number, rest)) for rest in inside[number]}
            layer += 1
    parts |= {name: (last, name) for name in after}
    called = ", ".join(f"{name_of(source)} {span[0]}-{span[1]}" for source, span in column)
    return Picked(parts, f"layers of {called}")


def _named(stem: str, layer: int, rest: str) -> str:
    return f"{stem}.{layer}.{rest}" if stem else f"{layer}.{rest}"


def _layers(names: Iterable[str], stem: str) -> dict[int, list[str]]:
    """Number of a layer of the stack -> the names within it."""
    found: dict[int, list[str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        if match and (match[1] or "") == stem:
            found.setdefault(int(match[2]), []).append(match[3])
    return found


def _outside(names: Iterable[str], stem: str) -> tuple[list[str], list[str]]:
    """Names that are in no layer of the stack: before it, after it."""
    names = list(names)
    depth, _ = depths(names)
    inside = {name for name in names if (match := _BLOCK.match(name)) and (match[1] or "") == stem}
    start = min(depth[name] for name in inside)
    outside = [name for name in names if name not in inside]
    return [name for name in outside if depth[name] < start], [name for name in outside if depth[name] > start]


def _stack_of(source: Tensors, stem: str | None) -> tuple[str, int]:
    """What stands before the layers' numbers, and how many there are.

    Raises:
        CheckpointError: There are no layers, several stacks of them, or numbers are missing.
    """
    stems = list(dict.fromkeys((match[1] or "") for name in source if (match := _BLOCK.match(name))))
    if not stems:
        raise CheckpointError(
            f"{name_of(source)} has no layers with numbers in their names, so there is nothing to stack"
        )
    if stem is not None and stem not in stems:
        raise CheckpointError(
            f"{name_of(source)} has no stack of layers {stem!r}; it has {', '.join(map(repr, stems))}"
        )
    if stem is None and len(stems) > 1:
        raise CheckpointError(
            f"{name_of(source)} has several stacks of layers ({', '.join(stems)}); "
            f"say in the first slice which is meant: stack: {stems[0]}"
        )
    stem = stems[0] if stem is None else stem
    numbers = sorted(_layers(source, stem))
    if numbers != list(range(len(numbers))):
        raise CheckpointError(f"the layers of {name_of(source)} ({stem}) are not numbered 0 to n-1: {numbers}")
    return stem, len(numbers)


def _faults_of_form(base: Tensors | None, experts: Mapping[str, Tensors], slices: Sequence[Any]) -> list[str]:
    """What is wrong with slices whatever the models' depths."""
    if not slices:
        return ["slices is an empty list; leave it null to keep all layers"]
    faults: list[str] = []
    for index, piece in enumerate(slices):
        where = f"slices[{index}]"
        if not isinstance(piece, Mapping) or not isinstance(piece.get("experts"), Mapping) or not piece["experts"]:
            faults.append(f"{where} is written {{experts: {{NAME: [first, last]}}}}, got {piece!r}")
            continue
        faults += [f"{where} has an unknown key {key!r}; known are experts, base, stack" for key in _unknown(piece)]
        faults += [
            f"{where} names the expert {name!r}, which the pool lacks; it has {', '.join(experts)}"
            for name in piece["experts"]
            if name not in experts
        ]
        spans = dict(piece["experts"]) | ({"the base": piece["base"]} if "base" in piece else {})
        bad = [f"{where}: {name} is a range [first, last], got {span!r}" for name, span in spans.items() if _no(span)]
        faults += bad
        whole = not bad and all(last is not None and first >= 0 <= last for first, last in spans.values())
        if whole and len({last - first for first, last in spans.values()}) > 1:
            told = ", ".join(f"{name} {last - first}" for name, (first, last) in spans.items())
            faults.append(f"{where} takes different numbers of layers: {told}; all of a slice must be of one length")
    if faults:
        return faults
    if len({len(piece["experts"]) for piece in slices}) > 1:
        told = ", ".join(str(len(piece["experts"])) for piece in slices)
        faults.append(f"every slice must name as many experts as the others, got {told}")
    if len({"base" in piece for piece in slices}) > 1:
        faults.append("some slices name layers of the base and others do not; name them in all, or in none")
    if "base" in slices[0] and base is None:
        faults.append("slices name layers of the base, and the pool has none")
    return faults


def _unknown(piece: Mapping[str, Any]) -> list[str]:
    return [key for key in piece if key not in _SLICE_KEYS]


def _no(span: Any) -> bool:
    """Whether something is no pair of whole numbers, the second of which may be missing."""
    whole = isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2
    ends = [0 if place and end is None else end for place, end in enumerate(span)] if whole else []
    return not whole or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends)


def _faults_of_ranges(
    base: Tensors | None,
    experts: Mapping[str, Tensors],
    slices: Sequence[Mapping[str, Any]],
    lengths: Mapping[int, int],
) -> list[str]:
    """Ranges that are empty or leave the model."""
    faults = []
    for index, piece in enumerate(slices):
        spans = [(f"expert {name}", experts[name], span) for name, span in piece["experts"].items()]
        spans += [("the base", base, piece["base"])] if base is not None and "base" in piece else []
        for whose, source, (first, last) in spans:
            n_layers = lengths[id(source)]
            if first >= last:
                faults.append(f"slices[{index}]: the range [{first}, {last}] of {whose} is empty")
            elif first < 0 or last > n_layers:
                faults.append(
                    f"slices[{index}]: {whose} has {n_layers} layers, the range [{first}, {last}] leaves it; "
                    f"ranges are half-open, [0, {n_layers}] is all"
                )
    return faults


def layer_config_changes(config: Mapping[str, Any], origins: Sequence[int]) -> dict[str, Any]:
    """What of a model's configuration changes with its layers: their number, and lists that have an entry for each.

    Args:
        config: The content of config.json.
        origins: The number that each layer of the result had in the model whose configuration this is.

    Raises:
        CheckpointError: The configuration does not say how many layers it has.

    >>> layer_config_changes({"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "n": 1}, [0, 1, 1])
    {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding']}
    """
    counted = [key for key in _COUNTS if isinstance(config.get(key), int)]
    if not counted and isinstance(config.get("text_config"), Mapping):
        text = dict(config["text_config"])
        return {"text_config": text | layer_config_changes(text, origins)}
    if not counted:
        raise CheckpointError(f"the configuration has no number of layers under {', '.join(_COUNTS)}; slices need one")
    before = config[counted[0]]
    changes: dict[str, Any] = {key: len(origins) for key in counted if config[key] == before}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == before and "layer" in key:
            changes[key] = [value[number] for number in origins]
    return changes
