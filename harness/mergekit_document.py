"""What a mergekit configuration says, as our configuration has it: members, slices, parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.mergekit_form import Form, Input, Reference, Slice, read_reference
from harness.mergekit_settings import Entry, SettingError, entries, schedule

REQUIRED = object()  # the default of what has to be given


@dataclass
class Document(Form):
    """A configuration with what a method asks of it: members, slices, parameters."""

    asked: set[str] = field(default_factory=set)  # parameters that the method takes
    names: dict[Reference, list[str]] = field(
        default_factory=dict
    )  # what the pool calls a model, once for each use in a slice
    base_merges: bool = False  # the base is one of the models that are averaged

    def fault(self, text: str) -> None:
        """Something has no counterpart."""
        self.faults.append(text)

    def note(self, text: str) -> None:
        """Something is computed otherwise."""
        self.notes.append(text)

    @property
    def sliced(self) -> bool:
        """Whether layers are stacked by ranges."""
        return any(given.span for piece in self.pieces for given in piece.inputs)

    def inputs_of(self, piece: Slice) -> list[Input]:
        """What is merged in a slice: all inputs, or all but the base."""
        return piece.inputs if self.base_merges else piece.without(self.base)

    # -- members -------------------------------------------------------------------------------------------------------

    def base_member(self) -> str | None:
        """The pool's base: the base model, or what adapters are adapters of."""
        under = {given.reference.model for piece in self.pieces for given in piece.inputs if given.reference.adapter}
        if self.base is not None:
            if self.base.adapter:
                self.fault(
                    f"base_model: {self.base.model}+{self.base.adapter} is a model with an adapter; merge that first"
                )
            under.add(self.base.model)
        if len(under) > 1:
            self.fault(
                f"adapters are experts of the pool's one base, and here they are of {', '.join(sorted(under))}; "
                "merge those of other models into their models first"
            )
        return next(iter(under), None)

    def experts(self) -> dict[str, str]:
        """The pool's experts by name, in the order in which they are first named."""
        self._name_members()
        return {name: ref.adapter or ref.model for ref, names in self.names.items() for name in names}

    def slices(self) -> list[dict[str, Any]] | None:
        """The pool's slices, or None where whole models are merged."""
        if not self.sliced:
            return None
        self._name_members()
        found = []
        for piece in self.pieces:
            used: dict[Reference, int] = {}
            made: dict[str, Any] = {"experts": {}}
            for given in self.inputs_of(piece):
                count = used[given.reference] = used.get(given.reference, 0) + 1
                made["experts"][self.names[given.reference][count - 1]] = list(given.span or ())
            spans = [given.span for given in piece.inputs if given.reference == self.base and not self.base_merges]
            if spans:
                made["base"] = list(spans[0] or ())
            found.append(made)
        return found

    def name_of(self, model: Any) -> str | None:
        """What the pool calls a model: an expert's name, `base`, or None."""
        try:
            reference = read_reference(model)
        except ValueError:
            return None
        self._name_members()
        if reference == self.base:
            return "base"
        return next(iter(self.names.get(reference, [])), None)

    def _name_members(self) -> None:
        """Give every model a name, and one more for each further use within a slice."""
        if self.names:
            return
        taken: set[str] = set()
        for piece in self.pieces:
            inputs = [given.reference for given in self.inputs_of(piece)]
            for reference in dict.fromkeys(inputs):
                known = self.names.setdefault(reference, [])
                while len(known) < inputs.count(reference):
                    plain = safe_name(reference.adapter or reference.model)
                    name = next(one for one in _numbered(plain) if one not in taken)
                    taken.add(name)
                    known.append(name)

    # -- parameters ----------------------------------------------------------------------------------------------------

    def unused(self) -> list[str]:
        """Parameters that the method does not take."""
        given = [self.top.get("parameters") or {}, *(piece.parameters for piece in self.pieces)]
        given += [one.parameters for piece in self.pieces for one in piece.inputs]
        return [name for name in dict.fromkeys(str(key) for own in given for key in own) if name not in self.asked]

    def scalar(self, name: str, default: Any) -> Any:
        """A number or schedule for the whole model."""
        self.asked.add(name)
        return self._schedule(name, [[piece.parameters] for piece in self.pieces], name, default)

    def per_expert(self, name: str, default: Any) -> list[Any]:
        """A number or schedule for each expert."""
        self.asked.add(name)
        inputs = [self.inputs_of(piece) for piece in self.pieces]
        if len(set(map(len, inputs))) > 1:
            self.fault(
                f"slices: all of them must merge as many models, got {', '.join(str(len(one)) for one in inputs)}"
            )
            return []
        columns = list(zip(*inputs, strict=True))
        for index, piece in enumerate(self.pieces):
            self._refuse_shifted(name, piece, sum(before.length for before in self.pieces[:index]))
        return [
            self._schedule(
                name,
                [[given.parameters, piece.parameters] for given, piece in zip(column, self.pieces, strict=True)],
                f"{name} of {column[0].reference.adapter or column[0].reference.model}",
                default,
            )
            for column in columns
        ]

    def flag(self, name: str, default: bool) -> bool:
        """True or false for the whole model."""
        self.asked.add(name)
        levels = [own[name] for own in (self._global(), *(piece.parameters for piece in self.pieces)) if name in own]
        if any(not isinstance(value, bool) for value in levels) or len(set(levels)) > 1:
            self.fault(
                f"{name}: one of true and false for all tensors has a counterpart, nothing else; got {levels[0]!r}"
            )
            return default
        return levels[0] if levels else default

    def ignored(self, name: str, why: str) -> None:
        """A parameter that may be given and changes nothing."""
        self.asked.add(name)
        given = [self._global(), *(piece.parameters for piece in self.pieces)]
        given += [one.parameters for piece in self.pieces for one in piece.inputs]
        if any(name in own for own in given):
            self.note(f"{name}: {why}")

    def _global(self) -> Mapping[str, Any]:
        return self.top.get("parameters") or {}

    def _schedule(self, name: str, levels: list[list[Mapping[str, Any]]], where: str, default: Any) -> Any:
        """The value of one parameter; `levels` are, for each slice, the mappings that come before the global one."""
        columns: list[list[Entry]] = []
        for own in levels:
            chain = [level[name] for level in (*own, self._global()) if name in level]
            try:
                found = entries(chain)
            except SettingError as error:
                self.fault(f"{where}: {error}")
                return default
            if not found or "match" in found[-1]:
                if default is REQUIRED:
                    self.fault(
                        f"{where}: has no value{' for what fits no filter' if found else ''}; mergekit asks for one"
                    )
                    return 0.0
                found = [*found, {"value": default}]
            columns.append(found)
        return schedule(columns, [piece.length for piece in self.pieces] if self.sliced else None)

    def _refuse_shifted(self, name: str, piece: Slice, offset: int) -> None:
        """A model's own filters see the names in that model; ours see those of the result."""
        for given in piece.inputs:
            conditions = given.parameters.get(name)
            for condition in conditions if isinstance(conditions, list) else [conditions]:
                said = str(condition.get("filter") or "") if isinstance(condition, Mapping) else ""
                if re.search(r"\d", said) and given.span is not None and given.span[0] != offset:
                    self.fault(
                        f"{name} of {given.reference.model}: the filter {said!r} counts layers before they were stacked"
                    )


def _numbered(plain: str) -> Iterator[str]:
    yield plain
    number = 2
    while True:
        yield f"{plain}_{number}"
        number += 1


def safe_name(text: str) -> str:
    """A member's name as a key of a configuration: the last part of its path, in letters, digits and underscores.

    >>> safe_name("mistralai/Mistral-7B-Instruct-v0.2@main")
    'Mistral_7B_Instruct_v0_2'
    """
    last = text.partition("@")[0].rstrip("/").rpartition("/")[2]
    name = re.sub(r"\W+", "_", last, flags=re.ASCII).strip("_")
    return name if name and not name[0].isdigit() and name not in ("base", "experts") else f"m_{name}"
