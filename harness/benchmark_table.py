"""The table of a benchmark: from the studies' runs to rows, to JSON and to Markdown."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.nested import Child
from harness.provenance import version_tags
from harness.report import SHARES
from methods.catalogue import FAMILIES, find

FALLING = ("perplexity", "loss")  # metrics of which less is better
_BEST, _PARAM = "best/", "best_param.method."  # of a study's metrics and tags: what its winner has
Table = Mapping[str, Any]


class Entry(NamedTuple):
    """A method whose study is finished."""

    method: str
    study: Child
    experts: Sequence[str] | None  # where it takes no more than these


def is_finished(study: Child) -> bool:
    """Whether a study has come to its end, the winner scored."""
    return study.status == "FINISHED" and "best_run" in study.tags


def table_of(entries: Sequence[Entry], split: str, tasks: Sequence[str], failed: Mapping[str, str]) -> dict[str, Any]:
    """Metric, machine, versions and rows, the best first; neither dates nor ids, so that files tell of numbers alone.

    Args:
        entries: The methods that are through.
        split: That winners were scored on.
        tasks: Names of the tasks, in order.
        failed: Method -> why it has no row.
    """
    named = [key.removeprefix(_BEST) for entry in entries for key in entry.study.metrics if key.startswith(_BEST)]
    metric = named[0] if named else ""
    rows = [_row(entry, metric, split, tasks) for entry in entries]
    rows.sort(key=lambda row: row["mean"], reverse=metric.rpartition("/")[2] not in FALLING)
    return {
        "metric": metric,
        "split": split,
        "machine": machine(),
        "versions": {name.partition(".")[2]: value for name, value in version_tags().items()},
        "rows": [*rows, *({"method": name, "failed": reason} for name, reason in failed.items())],
    }


def _row(entry: Entry, metric: str, split: str, tasks: Sequence[str]) -> dict[str, Any]:
    """One method: mean, ends of its interval, what was chosen, each task; null where there is none."""
    found = {key: round(value, 6) for key, value in entry.study.metrics.items()}
    params = {key.removeprefix(_PARAM): value for key, value in entry.study.tags.items() if key.startswith(_PARAM)}
    what = metric.rpartition("/")[2]
    return {
        "method": entry.method,
        "family": next(family for family, rows in FAMILIES.items() if find(entry.method) in rows),
        "mean": found[f"{split}/{metric}"],
        "low": found.get(f"{split}/{metric}_low"),
        "high": found.get(f"{split}/{metric}_high"),
        "normalized": found.get(f"{split}/average/normalized"),
        "searched": found[f"{_BEST}{metric}"],
        "settings": ", ".join(f"{key}={_short(value)}" for key, value in params.items()),
        "experts": None if entry.experts is None else list(entry.experts),
        "tasks": {task: found.get(f"{split}/{task}/{what}") for task in tasks},
    }


def _short(value: str) -> str:
    """A tag's value with four digits, where it is a number.

    >>> _short("0.123456"), _short("model")
    ('0.1235', 'model')
    """
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def machine() -> dict[str, Any]:
    """How large the machine is; nothing that tells which."""
    import psutil
    import torch

    n = torch.cuda.device_count()
    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "gpus": n,
        "gpu": torch.cuda.get_device_name() if n else None,
    }


def in_words(row: Table, metric: str) -> str:
    """A row in a few words, for the terminal."""
    interval = f" ({_cell(row['low'], metric)} to {_cell(row['high'], metric)})" if row["low"] is not None else ""
    return f"{_cell(row['mean'], metric)}{interval} with {row['settings'] or 'defaults'}"


def markdown(table: Table) -> str:
    """The table to read."""
    rows = [row for row in table["rows"] if "failed" not in row]
    failed = [row for row in table["rows"] if "failed" in row]
    parts = [f"# Every method on {table['tasks']}", _preamble(table), f"```bash\n{table['command']}\n```"]
    if rows:
        tasks = list(rows[0]["tasks"])
        head = f"| method | family | mean | 95 % | of the experts' | {' | '.join(tasks)} | chosen |"
        rule = "|---|---|---:|---:|---:|" + "---:|" * len(tasks) + "---|"
        parts.append("\n".join([head, rule, *(_line(row, table["metric"]) for row in rows)]))
    parts += [f"`{row['method']}` has no row: {row['failed']}" for row in failed]
    return "\n\n".join(parts) + "\n"


def _preamble(table: Table) -> str:
    """What was done, and on what."""
    size = table["machine"]
    gpus = f"{size['gpus']} x {size['gpu']}" if size["gpus"] else "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    unit = " in %" if _is_share(table["metric"]) else ""
    tried, final = table["searched_on"], table["split"]
    said = (
        f"`{table['metric']}`{unit} on {final}, of what each method makes of the experts in {table['pool']}. Each had "
        f"{table['trials']} trials on {tried} over the ranges that its parameters have by default, one where it has no "
        f"ranges; the best was scored once on {final}. The 95 % interval is by resampling each task's examples: it "
        "tells of them, not of the search. A method that takes fewer experts than there are was given the first. Every "
        "row is a run in MLflow with its trials below it."
    )
    machine = f"{size['cores']} cores, {size['memory_gib']} GiB, {gpus}"
    return f"{textwrap.fill(said, 140)}\n\nSeed {table['seed']}; {machine}; {versions}."


def _line(row: Table, metric: str) -> str:
    name = f"`{row['method']}`" + (f" of {' and '.join(row['experts'])}" if row["experts"] else "")
    interval = "-" if row["low"] is None else f"{_cell(row['low'], metric)} to {_cell(row['high'], metric)}"
    normalized = _cell(row["normalized"], "average/normalized")
    cells = [name, row["family"], _cell(row["mean"], metric), interval, normalized]
    cells += [_cell(value, metric) for value in row["tasks"].values()]
    return "| " + " | ".join([*cells, row["settings"] or "defaults"]) + " |"


def _is_share(metric: str) -> bool:
    return metric.rpartition("/")[2] in (*SHARES, "normalized")


def _cell(value: float | None, metric: str) -> str:
    """A number as a table has it: shares in percent."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if _is_share(metric) else f"{value:.3f}"
