"""How a mergekit configuration is written: its models and slices brought to one form, unknown keys named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from harness.config import UserError, closest

_TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip
_FORMS = {"modules": "models of several modules (vision and language) have no counterpart; merge their language part"}


class Reference(NamedTuple):
    """A model as mergekit refers to it: `path@revision+adapter`."""

    model: str
    adapter: str | None = None


@dataclass
class Input:
    """A model, or a range of its layers, with parameters of its own."""

    reference: Reference
    span: tuple[int, int] | None
    parameters: Mapping[str, Any]


@dataclass
class Slice:
    """What is merged into one run of layers; a configuration without slices has one without ranges."""

    inputs: list[Input]
    parameters: Mapping[str, Any]

    def without(self, base: Reference | None) -> list[Input]:
        """The inputs but for the base."""
        return [given for given in self.inputs if given.reference != base]

    @property
    def length(self) -> int:
        """How many layers come out."""
        span = self.inputs[0].span
        return span[1] - span[0] if span else 0


@dataclass
class Form:
    """A configuration in one form, and what was found wrong with it."""

    top: Mapping[str, Any]
    method: str = ""
    base: Reference | None = None
    pieces: list[Slice] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_form(text: str) -> Form:
    """Read the YAML; what is wrong with its form is among the form's faults.

    Raises:
        UserError: It is no YAML, or no single mapping.
    """
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise UserError(f"the file is no YAML: {error}") from error
    if len(documents) != 1:
        raise UserError(f"the file has {len(documents)} YAML documents; a chain of merges is imported one by one")
    top = documents[0]
    if not isinstance(top, dict) or "merge_method" not in top:
        raise UserError("the file is no mergekit configuration: it has no merge_method")
    form = Form(top, str(top["merge_method"]))
    for key in top:
        if key not in _TOP:
            form.faults.append(
                f"{key}: {_FORMS.get(str(key)) or f'is no key that is known; {closest(str(key), _TOP)}'}"
            )
    try:
        if top.get("base_model") is not None:
            form.base = read_reference(top["base_model"])
        form.pieces = list(_pieces(form))
    except ValueError as error:
        form.faults.append(str(error))
    if not isinstance(top.get("parameters") or {}, dict):
        form.faults.append("parameters: expected a mapping")
        form.top = {**top, "parameters": {}}
    return form


def _pieces(form: Form) -> Iterator[Slice]:
    """The slices; `models` are one of them.

    Raises:
        ValueError: The form is not mergekit's.
    """
    top = form.top
    if (top.get("models") is None) == (top.get("slices") is None):
        raise ValueError("exactly one of models and slices has to be there")
    if top.get("models") is not None:
        yield Slice([_input(given, False, form) for given in _listed(top["models"], "models")], {})
        return
    for index, given in enumerate(_listed(top["slices"], "slices")):
        where = f"slices[{index}]"
        for key in given:
            if key == "residual_weight":
                form.notes.append(f"{where}.residual_weight: mergekit reads it and does nothing with it")
            elif key not in ("sources", "parameters", "base_model"):
                form.faults.append(
                    f"{where}.{key}: is no key that is known; {closest(str(key), ['sources', 'parameters'])}"
                )
        if given.get("base_model") is not None and read_reference(given["base_model"]) != form.base:
            form.faults.append(f"{where}.base_model: a base of its own for a slice has no counterpart")
        piece = Slice(
            [_input(one, True, form) for one in _listed(given.get("sources"), f"{where}.sources")],
            given.get("parameters") or {},
        )
        if len({span[1] - span[0] for one in piece.inputs if (span := one.span)}) > 1:
            form.faults.append(f"{where}: its sources have different numbers of layers")
        yield piece


def _listed(given: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given or not all(isinstance(entry, dict) for entry in given):
        raise ValueError(f"{where}: expected a list of mappings, got {given!r}")
    return given


def _input(given: Mapping[str, Any], sliced: bool, form: Form) -> Input:
    """A model of `models` or of a slice's `sources`."""
    known = ["model", "parameters", *(["layer_range"] if sliced else [])]
    for key in given:
        if key not in known:
            form.faults.append(f"{key} of {given.get('model')}: is no key that is known; {closest(str(key), known)}")
    reference = read_reference(given.get("model"))
    span = given.get("layer_range")
    if sliced and (not isinstance(span, list) or len(span) != 2 or not all(type(end) is int for end in span)):
        raise ValueError(f"layer_range of {reference.model}: expected [first, last], got {span!r}")
    return Input(reference, (span[0], span[1]) if sliced and span else None, given.get("parameters") or {})


def read_reference(given: Any) -> Reference:
    """A model's reference from its text or mapping.

    Raises:
        ValueError: It is none, or asks for another architecture.

    >>> read_reference("org/name@v1+org/adapter")
    Reference(model='org/name@v1', adapter='org/adapter')
    """
    if isinstance(given, Mapping):
        if given.get("override_architecture") is not None:
            raise ValueError(f"override_architecture of {given.get('model')}: has no counterpart")
        model, adapter = (_place(given.get(key)) for key in ("model", "lora"))
        if model is None:
            raise ValueError(f"{dict(given)!r} refers to no model")
        return Reference(model, adapter)
    if not isinstance(given, str) or not given or given.count("+") > 1:
        raise ValueError(f"{given!r} refers to no model; it is written PATH@REVISION+ADAPTER, the last two optional")
    model, _, adapter = given.partition("+")
    return Reference(model, adapter or None)


def _place(given: Any) -> str | None:
    """A path or hub id with its revision."""
    if isinstance(given, Mapping):
        revision = given.get("revision")
        return f"{given.get('path')}@{revision}" if revision else str(given.get("path"))
    return None if given is None else str(given)
