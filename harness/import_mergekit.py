"""A merge that is written for mergekit as a configuration of ours: all of it, or the list of what has no counterpart.

Facts about mergekit are those of version 0.1.5 and its public source; docs/mergekit.md has them, with what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from harness.config import DTYPES, UserError, closest
from harness.mergekit_document import Document
from harness.mergekit_form import read_form
from harness.mergekit_methods import METHODS, NAMES

_TEMPLATES = ("alpaca", "chatml", "llama3", "mistral", "exaone")  # chat templates that mergekit brings along


@dataclass(frozen=True)
class Imported:
    """What an import came to."""

    yaml: str  # a file for `experiment=`
    notes: list[str]  # what is computed otherwise, or was left out because it changes nothing


def import_config(text: str) -> Imported:
    """Translate a mergekit configuration.

    Args:
        text: The YAML that `mergekit-yaml` takes.

    Returns:
        A file that `crucible merge experiment=FILE output=DIR` runs, and notes that stand at its head too.

    Raises:
        UserError: It is no such configuration, or something in it has no counterpart; the message lists all of that.
    """
    document = Document(**vars(read_form(text)))
    made = dict(_made(document))
    for name in document.unused():
        known = closest(name, document.asked)
        document.fault(
            f"parameters: {document.method} takes no {name!r}, mergekit passes over it; {known}, or remove it"
        )
    if document.faults:
        lines = "\n".join(f"  - {fault}" for fault in dict.fromkeys(document.faults))
        raise UserError(f"this configuration cannot be imported as it is:\n{lines}")
    notes = list(dict.fromkeys(document.notes))
    head = [
        "# crucible merge experiment=FILE output=DIR",
        "# Imported from a mergekit configuration.",
        *map(_comment, notes),
    ]
    return Imported(
        "\n".join(head) + "\n" + yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=110), notes
    )


def _comment(note: str) -> str:
    return f"# Note: {note}"


def _made(document: Document) -> Iterator[tuple[str, Any]]:
    """The sections of our configuration; faults and notes are gathered in the document."""
    if document.method not in METHODS:
        why = (
            "has no counterpart yet" if document.method in NAMES else f"is no method; {closest(document.method, NAMES)}"
        )
        document.fault(f"merge_method: {document.method} {why}; there are counterparts of {', '.join(METHODS)}")
        return
    if not document.pieces:  # what is wrong with them is among the faults
        return
    method, params = METHODS[document.method](document)
    yield "defaults", [{"override /method": method}, {"override /pool": None}]
    yield "pool_name", "imported"
    yield "pool", dict(_pool(document))
    if params:
        yield "method", params
    dtype = _dtype(document)
    if dtype is not None:
        yield "engine", {"dtype": dtype}


def _pool(document: Document) -> Iterator[tuple[str, Any]]:
    """Members, slices, tokenizer."""
    yield "family", "causal_lm"
    yield "base", document.base_member()
    yield "experts", document.experts()
    slices = document.slices()
    if slices is not None:
        yield "slices", slices
    yield from _tokenizer(document)
    template = document.top.get("chat_template")
    if template == "auto":
        document.note(
            "chat_template: auto takes the commonest; here members with different ones are an error to decide on"
        )
    elif template in _TEMPLATES:
        document.fault(
            f"chat_template: {template} is a template of mergekit's own; save it and set pool.chat_template=FILE"
        )
    elif template is not None:
        document.fault("chat_template: write the template into a file and set pool.chat_template=FILE instead")


def _tokenizer(document: Document) -> Iterator[tuple[str, Any]]:
    """`tokenizer_source`, or `tokenizer` with rules for tokens."""
    given, tokens = document.top.get("tokenizer"), dict[str, Any]()
    if given is None:
        source = document.top.get("tokenizer_source")
    elif not isinstance(given, Mapping):
        document.fault(f"tokenizer: expected a mapping with source and tokens, got {given!r}")
        return
    else:
        source, tokens = given.get("source", "union"), given.get("tokens") or {}
        for key in given:
            if key == "pad_to_multiple_of" and given[key] is None:
                continue
            if key not in ("source", "tokens"):
                document.fault(f"tokenizer.{key}: has no counterpart; padded sizes are kept as the members have them")
    if source is None:
        return
    if source not in ("base", "union"):
        if document.name_of(source) != "base":
            document.fault(
                f"tokenizer source {source}: the tokenizer of a member that is not the base has no counterpart"
            )
            return
        source = "base"
    yield "tokenizer", source
    rules = {str(token): _token_rule(str(token), rule, document) for token, rule in tokens.items()}
    if rules:
        yield "tokens", rules


def _token_rule(token: str, rule: Any, document: Document) -> str | None:
    """Whose row a token gets."""
    where = f"tokenizer.tokens.{token}"
    if not isinstance(rule, Mapping):
        document.fault(f"{where}: expected a mapping with source, got {rule!r}")
        return None
    source = rule.get("source")
    for key in rule:
        if key != "source" and not (key == "force" and rule[key] is False):
            document.fault(f"{where}.{key}: has no counterpart")
    if isinstance(source, Mapping) or source is None:
        document.fault(f"{where}.source: {source!r} has no counterpart; name a model")
        return None
    name = document.name_of(source)
    if name is None:
        document.fault(f"{where}.source: {source} is none of the models that are merged")
    return name


def _dtype(document: Document) -> str | None:
    """What the merged model is written as."""
    within, out = document.top.get("dtype"), document.top.get("out_dtype")
    for key, word in (("dtype", within), ("out_dtype", out)):
        if word is not None and word not in DTYPES:
            document.fault(f"{key}: {word} is none of {', '.join(DTYPES)}")
    if within in ("bfloat16", "float16"):
        document.note(
            f"dtype: mergekit computes in {within}, here arithmetic is in float32 and only the result is rounded"
        )
    if within is None and out is None:
        return None
    return str(out or within)
