"""The description of a run in Markdown: the result in one line, the table, and how to use and repeat it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.evaluate import TaskScore


def results(
    scores: Iterable[TaskScore], experts: Mapping[str, float], base: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each task, with the references where there are any.

    Args:
        scores: The merged model's.
        experts: Each task's accuracy by its own expert.
        base: Each task's accuracy by the base.
    """
    return [
        {
            "task": score.task,
            "accuracy": score.accuracy,
            "expert": experts.get(score.task),
            "base": base.get(score.task),
            "normalized": score.accuracy / experts[score.task] if experts.get(score.task) else None,
            "loss": score.loss,
            "n": score.n,
        }
        for score in scores
    ]


def description(
    *,
    method: str,
    pool: str,
    results: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
    run_id: str,
    model_uri: str | None,
) -> str:
    """The Markdown at the head of a run's page.

    Args:
        method: Name of the method, or of the model that was scored.
        pool: Name of the pool.
        results: Rows of `results`.
        metrics: `average/accuracy`, `worst/accuracy` and, with references, `average/normalized`.
        run_id: The run, for the command that repeats it.
        model_uri: `models:/...` if the model was logged.
    """
    parts = [_headline(method, pool, results, metrics), _table(results, metrics), _repeat(run_id)]
    if model_uri is not None:
        parts.append(_load(model_uri, results))
    return "\n\n".join(parts) + "\n"


def summary(
    scores: Iterable[TaskScore], experts: Mapping[str, float], base: Mapping[str, float]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The results for a terminal: column titles, and a line for each task and for their mean."""
    rows = results(scores, experts, base)
    columns = ("accuracy", "expert", "base", "normalized")
    lines = [(str(row["task"]), *(_percent(row[key]) for key in columns)) for row in rows]
    lines.append(("average", *(_percent(_mean([row[key] for row in rows])) for key in columns)))
    return ("task", "merged", "expert", "base", "merged / expert"), lines


def _headline(method: str, pool: str, results: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    worst = min(results, key=lambda row: row["accuracy"])
    share = metrics.get("average/normalized")
    normalized = f", **{_percent(share)}** of the experts'" if share is not None else ""
    return (
        f"**{method}** on **{pool}**: **{_percent(metrics['average/accuracy'])}** average accuracy over "
        f"{_count(len(results), 'task')}{normalized}; worst {worst['task']} at {_percent(worst['accuracy'])}."
    )


def _table(results: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    columns = [("merged", "accuracy"), ("expert", "expert"), ("base", "base"), ("merged / expert", "normalized")]
    shown = [(title, key) for title, key in columns if any(row[key] is not None for row in results)]
    lines = [
        _line(["task", *(title for title, _ in shown), "examples"]),
        _line(["---", *("---:" for _ in shown), "---:"]),
        *(_line([_plain(row["task"]), *(_percent(row[key]) for _, key in shown), str(row["n"])]) for row in results),
    ]
    means = {key: _mean([row[key] for row in results]) for _, key in shown}
    means["accuracy"] = metrics["average/accuracy"]
    cells = [f"**{_percent(means[key])}**" for _, key in shown]
    return "\n".join([*lines, _line(["**average**", *cells, str(sum(row["n"] for row in results))])])


def _repeat(run_id: str) -> str:
    return f"Repeat this run:\n\n```bash\ncrucible run --from-run {run_id}\n```"


def _load(model_uri: str, results: Sequence[Mapping[str, Any]]) -> str:
    task = str(results[0]["task"])
    return (
        "Use the model:\n\n```python\n"
        "import mlflow, pandas\n\n"
        f'model = mlflow.pyfunc.load_model("{model_uri}")\n'
        'images = pandas.DataFrame({"image": [open("picture.png", "rb").read()]})\n'
        f'model.predict(images, params={{"task": "{task}"}})  # or {{"classes": ["cat", "dog"]}}\n'
        "```"
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return str(text).replace("|", "\\|")


def _percent(share: float | None) -> str:
    """A share as a percentage; a dash where there is none.

    >>> _percent(0.9137), _percent(None)
    ('91.4 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def _count(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n} {what}s"


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over all tasks; None unless every task has a value, as means over different tasks do not compare."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
