"""What base and experts reach on the tasks, computed once and kept by content: later runs compare for free."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from harness.bench import Bench
from harness.config import EvaluationSettings
from harness.evaluate import score
from harness.execute import sum_over_devices
from pools.reading import Source


@dataclass(frozen=True)
class References:
    """Scores to compare a merge with, each in its task's metric."""

    experts: dict[str, float] = field(default_factory=dict)  # task -> its own expert's score
    base: dict[str, float] = field(default_factory=dict)  # task -> the base's score


def references(
    fabric: Fabric, bench: Bench, settings: EvaluationSettings, seed: int, tick: Callable[[int], None] = lambda n: None
) -> References:
    """Score the base on every task and each expert on its own; what is in the cache is not computed again."""
    found = References()
    tasks = bench.evaluation(settings, seed)
    wanted: list[tuple[dict[str, float], Any, list[str]]] = []
    if bench.pool.base is not None:
        wanted.append((found.base, bench.pool.base, list(tasks)))
    wanted += [(found.experts, expert, [name]) for name, expert in bench.pool.experts.items() if name in tasks]
    for place, weights, own in wanted:
        keys = {task: _key(bench, weights, task, settings, seed, fabric) for task in own}
        place |= {task: value for task, key in keys.items() if (value := _read(key)) is not None}
        missing = [task for task in own if task not in place]
        if _anywhere(fabric, missing):
            module = bench.pool.module(weights).to(fabric.device)
            for task in own:
                place[task] = score(fabric, module, task, tasks[task], settings.batch_size, tick).value
                if fabric.is_global_zero:
                    _write(keys[task], {"source": weights.source, "task": task, "value": place[task]})
    return found


def _anywhere(fabric: Fabric, missing: list[str]) -> bool:
    """Whether any process lacks a result: all of them score then, or none."""
    return float(sum_over_devices(fabric, torch.tensor(float(len(missing)), device=fabric.device))) > 0


def _key(bench: Bench, weights: Source, task: str, settings: EvaluationSettings, seed: int, fabric: Fabric) -> str:
    """All that a score depends on."""
    chosen = [settings.limit, seed] if settings.limit is not None else []
    own = bench.tasks[task]
    facts = {
        "kind": own.kind,
        **{name: getattr(own, name, None) for name in ("max_new_tokens", "stop", "block")},
        "head": bench.head_fingerprint(task),
        "weights": weights.fingerprint,
        "around": bench.pool.context_fingerprint,
        "task": own.fingerprint(settings.split),
        "labels": own.labels,
        "templates": own.templates,
        "split": [settings.split, *chosen],
        "device": [fabric.device.type, type(fabric._precision).__name__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()[:32]


def _place(key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "crucible" / "references" / f"{key}.json"


def _read(key: str) -> float | None:
    try:
        return float(json.loads(_place(key).read_text())["value"])
    except (OSError, ValueError, KeyError):
        return None


def _write(key: str, found: Mapping[str, object]) -> None:
    """Keep a result; a cache that cannot be written costs time only."""
    place = _place(key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(place)
    except OSError:
        return
