"""What base and experts reach on the tasks, computed once and kept by content: later runs compare for free."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.fabric import Fabric

from harness.bench import Bench
from harness.config import EvaluationSettings
from harness.evaluate import score
from harness.execute import sum_over_devices
from pools.checkpoint import Checkpoint


@dataclass(frozen=True)
class References:
    """Accuracies to compare a merge with."""

    experts: dict[str, float] = field(default_factory=dict)  # task -> its own expert's accuracy
    base: dict[str, float] = field(default_factory=dict)  # task -> the base's accuracy


def references(
    fabric: Fabric, bench: Bench, settings: EvaluationSettings, seed: int, tick: Callable[[int], None] = lambda n: None
) -> References:
    """Score the base on every task and each expert on its own; what is in the cache is not computed again."""
    found = References()
    tasks = bench.evaluation(settings, seed)
    wanted = [(found.base, bench.pool.base, list(tasks))] if bench.pool.base is not None else []
    wanted += [(found.experts, expert, [name]) for name, expert in bench.pool.experts.items() if name in tasks]
    for place, weights, own in wanted:
        keys = {task: _key(bench, weights, task, settings, seed, fabric) for task in own}
        place |= {task: accuracy for task, key in keys.items() if (accuracy := _read(key)) is not None}
        missing = [task for task in own if task not in place]
        if _anywhere(fabric, missing):
            module = bench.pool.module(weights).to(fabric.device)
            for task in own:
                place[task] = score(fabric, module, task, tasks[task], settings.batch_size, tick).accuracy
                if fabric.is_global_zero:
                    _write(keys[task], {"source": weights.source, "task": task, "accuracy": place[task]})
    return found


def _anywhere(fabric: Fabric, missing: list[str]) -> bool:
    """Whether any process lacks a result: all of them score then, or none."""
    return float(sum_over_devices(fabric, torch.tensor(float(len(missing)), device=fabric.device))) > 0


def _key(bench: Bench, weights: Checkpoint, task: str, settings: EvaluationSettings, seed: int, fabric: Fabric) -> str:
    """All that an accuracy depends on."""
    chosen = [settings.limit, seed] if settings.limit is not None else []
    facts = {
        "weights": weights.fingerprint,
        "around": bench.pool.context_fingerprint,
        "task": bench.tasks[task].fingerprint(settings.split),
        "labels": bench.tasks[task].labels,
        "templates": bench.tasks[task].templates,
        "split": [settings.split, *chosen],
        "device": [fabric.device.type, type(fabric._precision).__name__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()[:32]


def _place(key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "crucible" / "references" / f"{key}.json"


def _read(key: str) -> float | None:
    try:
        return float(json.loads(_place(key).read_text())["accuracy"])
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
