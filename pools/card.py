"""The model card of a merged model: what it was made of, and how, for people and for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pools.checkpoint import Checkpoint
from pools.locate import is_hub_id


def model_card(base: Checkpoint | None, experts: Mapping[str, Checkpoint], lineage: Mapping[str, Any]) -> str:
    """README.md: the hub's metadata, the members with their fingerprints, and the lineage.

    Args:
        base: The base.
        experts: Name -> expert.
        lineage: `method`, `params` (a mapping), and whatever else is worth knowing (`seed`, `run_id`, ...).
    """
    from huggingface_hub import ModelCardData

    members = {"base": base} if base is not None else {}
    members |= dict(experts)
    on_hub = [member.source.partition("@")[0] for member in members.values() if is_hub_id(member.source)]
    data = ModelCardData(
        library_name="transformers",
        tags=["merge", "crucible"],
        base_model=list(dict.fromkeys(on_hub)) or None,
        base_model_relation="merge" if on_hub else None,
    )
    method = lineage.get("method", "a merge")
    params = lineage.get("params") or {}
    rest = {key: value for key, value in lineage.items() if key not in ("method", "params")}
    rows = [(name, member.source, member.fingerprint[:16]) for name, member in members.items()]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Merged by {method}",
        f"{len(experts)} experts were merged by `{method}` with Crucible.",
        "## Members",
        _table(("member", "source", "fingerprint (SHA-256, first 16)"), rows),
    ]
    if params:
        parts += ["## Parameters", _table(("parameter", "value"), _cells(params))]
    if rest:
        parts += ["## Lineage", _table(("", ""), _cells(rest))]
    return "\n\n".join(parts) + "\n"


def _cells(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values as they are written in a configuration."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))
        for key, value in facts.items()
    ]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")
