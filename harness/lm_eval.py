"""Tasks of lm-evaluation-harness on a model in memory: the only file that imports `lm_eval`, an optional extra."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config import LmEvalSettings, UserError, closest

BACKENDS = {"causal_lm": "causal", "seq2seq": "seq2seq"}  # family -> lm-eval's word
MIXED = {"16-mixed": "float16", "bf16-mixed": "bfloat16"}  # Fabric's word -> dtype
RESAMPLES = 1000  # of the bootstrap, for metrics that have no other standard error


@dataclass(frozen=True)
class Found:
    """What lm-evaluation-harness says of a model."""

    rows: list[dict[str, Any]]  # task, metric, value, stderr, n
    versions: dict[str, str]  # task -> version
    n: dict[str, int]  # task -> documents
    samples: dict[str, str] = field(default_factory=dict)  # task -> every document with its answers, a JSON line each


class Asked:
    """Tasks of lm-evaluation-harness, opened before work starts."""

    def __init__(self, settings: LmEvalSettings) -> None:
        """Find the tasks and load their data.

        Raises:
            UserError: lm-eval is not installed; tasks are unknown, or cannot be loaded.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("tasks.lm_eval needs lm-evaluation-harness: pip install 'crucible[lm-eval]'")
        self.settings = settings
        with _quiet():
            from lm_eval.tasks import TaskManager

            files = [name for name in settings.tasks if _is_file(name)]
            lacking = [name for name in files if not Path(name).is_file()]
            if lacking:
                raise UserError(f"tasks.lm_eval.tasks: there is no file {', '.join(lacking)}")
            if settings.include_path is not None and not Path(settings.include_path).is_dir():
                raise UserError(f"tasks.lm_eval.include_path={settings.include_path}: there is no such directory")
            named = len(files) < len(settings.tasks)  # else its own thousands of tasks need not be looked through
            self._manager = TaskManager(include_path=settings.include_path, include_defaults=named)
            self._tasks = self._loaded()

    def run(self, module: Any, tokenizer: Any, family: str, precision: str, seed: int) -> Found:
        """Score a model.

        Args:
            module: Of transformers, on its device.
            tokenizer: Its tokenizer.
            family: causal_lm or seq2seq.
            precision: Of the run, in Fabric's words.
            seed: Of the choice of few-shot examples.
        """
        own = self.settings
        with _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            model = HFLM(
                pretrained=module,
                tokenizer=tokenizer,
                backend=BACKENDS[family],
                batch_size=own.batch_size,
                mixed_precision_dtype=MIXED.get(precision),
            )
            told = simple_evaluate(
                model,
                tasks=self._tasks,
                task_manager=self._manager,
                num_fewshot=own.num_fewshot,
                limit=own.limit,
                batch_size=own.batch_size,
                apply_chat_template=own.apply_chat_template,
                bootstrap_iters=RESAMPLES,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        assert told is not None, "rank zero is given the results"
        return found_in(told)

    def _loaded(self) -> list[Any]:
        """Tasks and groups with their data.

        Raises:
            UserError: A name is unknown, or the data cannot be had.
        """
        known = self._manager.all_tasks
        unknown = [name for name in self.settings.tasks if not _is_file(name) and name not in known]
        if unknown:
            raise UserError(
                "\n".join(
                    f"tasks.lm_eval.tasks: lm-eval has no task {name!r}; {_hint(name, known)}; "
                    "a file of your own is named by a path that ends in .yaml"
                    for name in unknown
                )
            )
        paths = [str(Path(name).absolute()) if _is_file(name) else name for name in self.settings.tasks]
        try:
            found = self._manager.load(paths)
        except Exception as error:  # a task may run code of its own, and `datasets` raises what it will
            first = str(error).strip().partition("\n")[0][:300]
            raise UserError(
                f"tasks.lm_eval.tasks: {', '.join(self.settings.tasks)} cannot be loaded: "
                f"{type(error).__name__}: {first}"
            ) from error
        children = {child for names in found["group_map"].values() for child in names}
        everything = {**found["groups"], **found["tasks"]}
        return [task for name, task in everything.items() if name not in children]


def found_in(told: Mapping[str, Any]) -> Found:
    """What a run of lm-eval tells, in our words.

    >>> scores = {"alias": "sums", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}
    >>> found_in({"results": {"sums": scores}, "versions": {"sums": 1}, "n-samples": {"sums": {"effective": 4}}}).rows
    [{'task': 'sums', 'metric': 'exact_match', 'value': 0.5, 'stderr': 0.1, 'n': 4}]
    """
    n = {task: int(counts["effective"]) for task, counts in told.get("n-samples", {}).items()}
    rows = [
        {"task": task, **row, "n": n.get(task)} for task, scores in told["results"].items() for row in _metrics(scores)
    ]
    versions = {task: str(version) for task, version in told.get("versions", {}).items() if version is not None}
    samples = {
        task: "".join(json.dumps(line, default=str, ensure_ascii=False) + "\n" for line in lines)
        for task, lines in told.get("samples", {}).items()
    }
    return Found(rows, versions, n, samples)


def _metrics(scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A task's metrics; a filter is named only where a metric comes from several."""
    numbers = {
        tuple(key.split(",", 1)): float(value)
        for key, value in scores.items()
        if "," in key and isinstance(value, int | float)
    }
    metrics = [metric for metric, _ in numbers]
    for (metric, how), value in numbers.items():
        if metric.endswith("_stderr"):
            continue
        name = metric if metrics.count(metric) == 1 else f"{metric}.{how}"
        stderr = numbers.get((f"{metric}_stderr", how))
        yield {"metric": re.sub(r"[^\w\-./ :]", "_", name), "value": value, "stderr": stderr}


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _hint(name: str, known: list[str]) -> str:
    """The closest task; not all of thousands."""
    hint = closest(name, known)
    return hint if hint.startswith("did you mean") else "`lm-eval ls tasks` lists them"


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its remarks; what is wrong with a task is raised."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
