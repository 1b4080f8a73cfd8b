"""What the files of a LoRA adapter say: which tensors of a base it changes, and how; found from headers alone.

The layout is peft's: `adapter_config.json` beside `adapter_model.safetensors`, whose keys are
`base_model.model.<module>.lora_A.weight` and the like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pools.faults import Spec
from pools.lora_config import CONFIG, scaling_of

PREFIX = "base_model.model."

# How the factors A (r, in) and B (out, r) make the change of a tensor as it stands on the disk.
LINEAR = "linear"  # (out, in): B A
TRANSPOSED = "transposed"  # (in, out), as GPT-2's layers: (B A)^T
EMBEDDING = "embedding"  # (tokens, width), A (r, tokens), B (width, r): (B A)^T
CONV = "conv"  # (out, in, *kernel): B A, both flattened

_FACTOR = re.compile(r"^(.+)\.lora_(embedding_)?([AB])(?:\.([^.]+?))??(?:\.(weight|bias))?$")
_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.([^.]+?))??(?:\.weight)?$")
_WHOLE = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.")
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose adapters bring a head that the base may lack


@dataclass(frozen=True)
class Factors:
    """The low-rank change of one tensor: scale * B A, put the way the tensor stands on the disk."""

    a: str  # keys in the adapter's file
    b: str
    rank: int
    scale: float
    kind: str  # LINEAR, TRANSPOSED, EMBEDDING or CONV
    magnitude: str = ""  # DoRA: the key of the norms that the rows (of an (out, in) matrix) are brought to

    @property
    def flipped(self) -> bool:
        """Whether the tensor stands on the disk as (in, out)."""
        return self.kind in (TRANSPOSED, EMBEDDING)


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: put another in its place, then add."""

    module: str  # as the adapter calls it
    whole: str = ""  # key of a tensor that takes the base's place
    factors: Factors | None = None
    bias: tuple[str, float] | None = None  # key of a vector that is added, and what it is multiplied by


@dataclass
class _Module:
    """Keys of the file that belong to one module."""

    a: str = ""
    b: str = ""
    bias: str = ""
    magnitude: str = ""
    embedding: bool = False


@dataclass
class Read:
    """What was found out."""

    changes: dict[str, Change] = field(default_factory=dict)  # by the base's names
    own: dict[str, str] = field(default_factory=dict)  # tensors of a head that the base lacks -> their keys
    faults: list[str] = field(default_factory=list)


def read_changes(config: Mapping[str, Any], adapter: Mapping[str, Spec], base: Mapping[str, Spec]) -> Read:
    """Find the base's tensor for everything in the adapter.

    Args:
        config: In which `config_faults` finds nothing.
        adapter: Keys of the adapter's file.
        base: The base's names; they may have a prefix less or more than the adapter's.
    """
    read = Read()
    modules, wholes, names = _sorted_keys(adapter, read)
    if len(names) > 1:
        read.faults.append(f"its file holds several adapters, {', '.join(sorted(names))}; save one of them alone")
    find = _Finder(base)
    for module, keys in modules.items():
        _read_module(module, keys, config, adapter, base, find, read)
    for told, key in wholes.items():
        _read_whole(told, key, config, adapter, base, find, read)
    if not adapter:
        read.faults.append("its file holds no tensors")
    _settle_squares(config, base, read)
    return read


def _sorted_keys(keys: Iterable[str], read: Read) -> tuple[dict[str, _Module], dict[str, str], set[str]]:
    """Keys by module; whole tensors by the name they stand for; names of adapters that the keys bear."""
    modules: dict[str, _Module] = {}
    wholes: dict[str, str] = {}
    names: set[str] = set()
    for key in keys:
        short = key.removeprefix(PREFIX)
        if match := _FACTOR.match(short):
            module, embedding, which, name, leaf = match.groups()
            found = modules.setdefault(_WHOLE.sub(".", module + ".").rstrip("."), _Module())
            slot = "bias" if leaf == "bias" else which.lower()
            setattr(found, slot, key)
            found.embedding |= bool(embedding)
        elif match := _MAGNITUDE.match(short):
            module, name = match.groups()
            modules.setdefault(module, _Module()).magnitude = key
        elif "lora_" in short or ".token_adapter." in short:
            read.faults.append(f"{key} is of no known kind; merge the adapter into its base with peft first")
            continue
        else:
            wholes[_WHOLE.sub(".", short)] = key
            continue
        names |= {name} if name else set()
    return modules, wholes, names


class _Finder:
    """Finds the base's name for an adapter's, which may have a prefix more or less."""

    def __init__(self, base: Iterable[str]) -> None:
        self._names = set(base)
        self._by_suffix: dict[str, list[str]] = {}
        for name in self._names:
            for suffix in _suffixes(name):
                self._by_suffix.setdefault(suffix, []).append(name)

    def __call__(self, told: str) -> list[str]:
        """All names that it may mean; one, unless it is not there or ambiguous."""
        if told in self._names:
            return [told]
        longer = sorted(self._by_suffix.get(told, []))
        return longer or [
            suffix
            for suffix in _suffixes(told)
            if suffix in self._names and "." in suffix.removesuffix(".weight").removesuffix(".bias")
        ]


def _suffixes(name: str) -> list[str]:
    """The name without its first part, without its first two, and so on."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _one(told: str, find: _Finder, read: Read, what: str) -> str | None:
    """The one tensor of the base that is meant; a fault where there is none, or several."""
    found = find(told)
    if len(found) == 1:
        return found[0]
    if found:
        read.faults.append(f"{what} {told}, which may be any of the base's {', '.join(found[:4])}")
    else:
        tied = "; the base may tie it to its embeddings: untie and save the base first" if "lm_head" in told else ""
        read.faults.append(f"{what} {told}, and the base has no tensor of that name{tied}")
    return None


def _read_module(
    module: str,
    keys: _Module,
    config: Mapping[str, Any],
    adapter: Mapping[str, Spec],
    base: Mapping[str, Spec],
    find: _Finder,
    read: Read,
) -> None:
    """The low-rank change of one module's weight, and of its bias."""
    if not keys.a or not keys.b:
        read.faults.append(f"{module} has lora_{'B' if keys.b else 'A'} without lora_{'A' if keys.b else 'B'}")
        return
    name = _one(f"{module}.weight", find, read, "it changes")
    if name is None:
        return
    rank, scale = scaling_of(config, module)
    a, b = adapter[keys.a].shape, adapter[keys.b].shape
    kind = _kind(base[name].shape, a, b, keys.embedding)
    if not kind:
        read.faults.append(f"{module} has factors {a} and {b}, which do not fit the base's {name} {base[name].shape}")
    elif a[0] != rank:
        read.faults.append(f"{module} has lora_A {a}, where {CONFIG} gives it rank {rank}")
    elif not base[name].dtype.is_floating_point:
        read.faults.append(f"the base's {name} is {base[name].dtype}: a quantised base; take the one it was made from")
    elif (
        keys.magnitude
        and math.prod(adapter[keys.magnitude].shape) != (base[name].shape[-1 if kind in (TRANSPOSED, EMBEDDING) else 0])
    ):
        read.faults.append(
            f"{keys.magnitude} {adapter[keys.magnitude].shape} does not fit the base's {name} {base[name].shape}"
        )
    elif config.get("use_dora") and not keys.magnitude:
        read.faults.append(f"{module} has no lora_magnitude_vector, where {CONFIG} says use_dora")
    elif name in read.changes:
        read.faults.append(f"{name} is changed twice, by {read.changes[name].module} and {module}")
    else:
        read.changes[name] = Change(module, factors=Factors(keys.a, keys.b, rank, scale, kind, keys.magnitude))
    if keys.bias:
        biased = _one(f"{module}.bias", find, read, "it changes")
        if biased is not None and base[biased].shape != adapter[keys.bias].shape:
            read.faults.append(f"{keys.bias} {adapter[keys.bias].shape} does not fit {biased} {base[biased].shape}")
        elif biased is not None:
            read.changes[biased] = Change(module, bias=(keys.bias, scale))


def _kind(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], embedding: bool) -> str:
    """How the factors make a change of that shape; empty where they do not."""
    if len(a) != len(b) or len(a) < 2 or a[0] != b[1]:
        return ""
    if embedding:
        return EMBEDDING if shape == (a[1], b[0]) else ""
    if len(shape) > 2:
        fits = a[1:] == shape[1:] and b == (shape[0], a[0], *[1] * (len(shape) - 2))
        return CONV if fits else ""
    if shape == (b[0], a[1]):
        return LINEAR  # or transposed, where it is square: see `_settle_squares`
    return TRANSPOSED if shape == (a[1], b[0]) else ""


def _settle_squares(config: Mapping[str, Any], base: Mapping[str, Spec], read: Read) -> None:
    """A square matrix fits both ways: it stands as the others do, or as `fan_in_fan_out` says where they disagree.

    peft goes by the class of the layer and corrects `fan_in_fan_out` to it, so that what the shapes tell comes first.
    """
    square, told = [], set()
    for name, change in read.changes.items():
        if change.factors is not None and change.factors.kind in (LINEAR, TRANSPOSED):
            if base[name].shape[0] == base[name].shape[1]:
                square.append(name)
            else:
                told.add(change.factors.kind)
    kind = told.pop() if len(told) == 1 else TRANSPOSED if config.get("fan_in_fan_out") else LINEAR
    for name in square:
        change = read.changes[name]
        assert change.factors is not None
        read.changes[name] = replace(change, factors=replace(change.factors, kind=kind))


def _read_whole(
    told: str,
    key: str,
    config: Mapping[str, Any],
    adapter: Mapping[str, Spec],
    base: Mapping[str, Spec],
    find: _Finder,
    read: Read,
) -> None:
    """A tensor that takes the base's place (modules_to_save, biases); or one of a head that is the adapter's own."""
    found = find(told)
    head = config.get("task_type") in _HEADS and ".base_layer." not in key
    if head and (not found or (len(found) == 1 and base[found[0]].shape != adapter[key].shape)):
        read.own[told] = key
        return
    name = _one(told, find, read, "it replaces")
    if name is None:
        return
    if base[name].shape != adapter[key].shape:
        read.faults.append(f"it replaces {told} {adapter[key].shape}, where the base has {name} {base[name].shape}")
    else:
        before = read.changes.get(name)
        read.changes[name] = replace(before, whole=key) if before else Change(told.rpartition(".")[0], whole=key)
