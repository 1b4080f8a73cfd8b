"""The description of a run in Markdown: the result in one line, the table, and how to use and repeat it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.evaluate import TaskScore


SHARES = ("accuracy", "exact_match")  # metrics that are shares, shown as percentages; higher is better
AUTO = {  # family -> the class of transformers that loads a model of it
    "clip": "CLIPModel",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}


def results(
    scores: Iterable[TaskScore], experts: Mapping[str, float], base: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each task, with the references where there are any.

    Args:
        scores: The merged model's.
        experts: Each task's score by its own expert.
        base: Each task's score by the base.
    """
    return [
        {
            "task": score.task,
            "metric": score.metric,
            "value": score.value,
            "expert": experts.get(score.task),
            "base": base.get(score.task),
            "normalized": share(score.metric, score.value, experts.get(score.task)),
            "loss": score.loss,
            **score.more,
            "n": score.n,
        }
        for score in scores
    ]


def share(metric: str, value: float | None, expert: float | None) -> float | None:
    """A score over its expert's, the other way round where lower is better; None where there is nothing to divide by.

    >>> share("accuracy", 0.6, 0.8), share("perplexity", 8.0, 4.0), share("accuracy", 0.6, 0.0)
    (0.7499999999999999, 0.5, None)
    """
    if value is None or not expert:
        return None
    return value / expert if metric in SHARES else expert / value


def mean(metric: str, values: Sequence[float]) -> float:
    """The mean of several tasks' scores: of perplexities the geometric one, which is the perplexity of the mean loss.

    >>> mean("perplexity", [2.0, 8.0]), mean("accuracy", [0.25, 0.75])
    (4.0, 0.5)
    """
    if metric in SHARES:
        return math.fsum(values) / len(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def description(
    *,
    method: str,
    pool: str,
    results: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
    run_id: str,
    model_uri: str | None,
    family: str = "clip",
    asked: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The Markdown at the head of a run's page.

    Args:
        method: Name of the method, or of the model that was scored.
        pool: Name of the pool.
        results: Rows of `results`; none where nothing was scored.
        metrics: `average/<metric>`, `worst/<metric>` and, with references, `average/normalized`.
        run_id: The run, for the command that repeats it.
        model_uri: `models:/...` if the model was logged.
        family: Of the pool.
        asked: Rows of what lm-evaluation-harness found: task, metric, value, stderr, n.
    """
    parts = [_headline(method, pool, results, metrics)]
    if results:
        parts.append(_table(results))
    if asked:
        parts.append(_harness_table(asked))
    parts.append(_repeat(run_id))
    if model_uri is not None:
        parts.append(_load(model_uri, family, [row["task"] for row in results]))
    return "\n\n".join(parts) + "\n"


def summary(
    scores: Iterable[TaskScore], experts: Mapping[str, float], base: Mapping[str, float]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The results for a terminal: column titles, and a line for each task and for each metric's mean."""
    rows = results(scores, experts, base)
    titles = ("merged", "expert", "base", _ratio(rows))
    named = _names_metrics(rows)
    lines = [_cells(str(row["task"]), row, named) for row in [*rows, *_means(rows)]]
    return ("task", *(("metric",) if named else ()), *titles), lines


def _headline(method: str, pool: str, results: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    start = f"**{method}** on **{pool}**: "
    if not results:
        return start + "merged, and scored on no task."
    parts = []
    for metric in dict.fromkeys(row["metric"] for row in results):
        own = [row for row in results if row["metric"] == metric]
        worst = (min if metric in SHARES else max)(own, key=lambda row: row["value"])
        parts.append(
            f"**{_shown(metric, metrics[f'average/{metric}'])}** average {_words(metric)} over "
            f"{_count(len(own), 'task')}; worst {worst['task']} at {_shown(metric, worst['value'])}"
        )
    normalized = metrics.get("average/normalized")
    if normalized is not None:
        parts.append(f"**{_percent(normalized)}** of the experts'")
    return start + "; ".join(parts) + "."


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    columns = [("merged", "value"), ("expert", "expert"), ("base", "base"), (_ratio(results), "normalized")]
    shown = [(title, key) for title, key in columns if any(row[key] is not None for row in results)]
    named = _names_metrics(results)
    head = ["task", *(["metric"] if named else []), *(title for title, _ in shown), "examples"]
    lines = [_line(head), _line(["---"] * (1 + named) + ["---:"] * (len(shown) + 1))]
    for row in [*results, *_means(results)]:
        bold = "**" if row.get("mean") else ""
        metric = [_arrowed(row["metric"])] if named else []
        cells = [f"{bold}{_cell(row, key)}{bold}" for _, key in shown]
        lines.append(_line([f"{bold}{_plain(row['task'])}{bold}", *metric, *cells, str(row["n"])]))
    return "\n".join(lines)


def _harness_table(asked: Sequence[Mapping[str, Any]]) -> str:
    lines = [_line(["lm-eval", "metric", "value", "± (1 s.e.)", "examples"]), _line(["---", "---", *["---:"] * 3])]
    for row in asked:
        spread = "-" if row.get("stderr") is None else f"{row['stderr']:.4f}"
        n = "-" if row.get("n") is None else str(row["n"])
        lines.append(_line([_plain(row["task"]), _plain(row["metric"]), f"{row['value']:.4f}", spread, n]))
    return "\n".join(lines)


def _cells(title: str, row: Mapping[str, Any], named: bool) -> tuple[str, ...]:
    metric = (_arrowed(row["metric"]),) if named else ()
    return title, *metric, *(_cell(row, key) for key in ("value", "expert", "base", "normalized"))


def _cell(row: Mapping[str, Any], key: str) -> str:
    return _percent(row[key]) if key == "normalized" else _shown(row["metric"], row[key])


def _means(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of means for each metric; a mean over other tasks than the merged model's is left out."""
    rows = []
    for metric in dict.fromkeys(row["metric"] for row in results):
        own = [row for row in results if row["metric"] == metric]
        found = {key: [row[key] for row in own] for key in ("value", "expert", "base", "normalized")}
        means = {key: None if None in values else mean(metric, values) for key, values in found.items()}
        if None not in found["normalized"]:
            means["normalized"] = math.fsum(found["normalized"]) / len(own)
        rows.append({"task": "average", "metric": metric, "mean": True, "n": sum(row["n"] for row in own), **means})
    return rows


def _names_metrics(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a table needs a column that says what is measured."""
    return any(row["metric"] != "accuracy" for row in results)


def _ratio(results: Sequence[Mapping[str, Any]]) -> str:
    return "merged / expert" if all(row["metric"] in SHARES for row in results) else "of expert"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _arrowed(metric: str) -> str:
    """A metric and which way is better.

    >>> _arrowed("exact_match"), _arrowed("perplexity")
    ('exact match ↑', 'perplexity ↓')
    """
    return f"{_words(metric)} {'↑' if metric in SHARES else '↓'}"


def _shown(metric: str, value: float | None) -> str:
    """A score as it is read: shares as percentages, perplexities in four digits."""
    if value is None or metric in SHARES:
        return _percent(value)
    return f"{value:.4g}"


def _repeat(run_id: str) -> str:
    return f"Repeat this run:\n\n```bash\ncrucible run --from-run {run_id}\n```"


def _load(model_uri: str, family: str, tasks: Sequence[str]) -> str:
    if family == "clip" and tasks:
        return (
            "Use the model:\n\n```python\n"
            "import mlflow, pandas\n\n"
            f'model = mlflow.pyfunc.load_model("{model_uri}")\n'
            'images = pandas.DataFrame({"image": [open("picture.png", "rb").read()]})\n'
            f'model.predict(images, params={{"task": "{tasks[0]}"}})  # or {{"classes": ["cat", "dog"]}}\n'
            "```"
        )
    place = f'path = mlflow.artifacts.download_artifacts("{model_uri}")'
    if family not in AUTO:
        return f"Where the model is:\n\n```python\nimport mlflow\n\n{place}\n```"
    return (
        "Use the model:\n\n```python\n"
        f"import mlflow\nfrom transformers import {AUTO[family]}\n\n{place}\n"
        f"model = {AUTO[family]}.from_pretrained(path)\n```"
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
