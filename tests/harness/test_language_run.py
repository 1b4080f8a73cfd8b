"""Runs on language models: perplexity and exact answers side by side, heads of classifiers, lm-eval, no tasks."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import datasets
import mlflow
import pytest
import yaml

from harness import cli
from harness.bench import open_bench
from harness.compose import compose
from harness.config import UserError
from harness.track import local_path
from tests.pools.language_models import write_model

TEXTS = {"text": ["some text", "other words", "a third", ""]}
ASKED = {"prompt": ["1+1=", "2+2=", "3+3="], "target": ["2", "4", "6"]}
MOODS = {"text": ["good", "bad", "fine", "poor"], "label": [0, 1, 0, 1]}
QUICK = "tracking.log_model=false", "evaluation.plots=false"
SPLITS = {"train": "test", "validation": "test", "test": "test"}


def settings(place: Path, kind: str, columns: dict, **more) -> dict:
    place.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(place / "test.parquet")
    return {"path": str(place), "kind": kind, "splits": SPLITS, **more}


@pytest.fixture(scope="module")
def built(tmp_path_factory, build_workplace):
    """Makes workplaces of a family with a base and experts."""

    def build(family: str, kind: str, auto: str, tasks: dict[str, dict], lm_eval: dict | None = None):
        root = tmp_path_factory.mktemp(family)
        names = ("base", "words", "sums")
        for seed, name in enumerate(names):
            write_model(root / name, kind, seed, auto)
        pool = {"family": family, "base": "base", "experts": {name: name for name in names[1:]}, "root": str(root)}
        place = build_workplace(root / "work", pool)
        made = {name: settings(root / f"data_{name}", **how) for name, how in tasks.items()}
        (place.directory / "tasks.yaml").write_text(
            yaml.safe_dump({"tasks": made, "lm_eval": lm_eval or {}}, sort_keys=False)
        )
        return place

    return build


@pytest.fixture(scope="module")
def causal(built):
    tasks = {
        "words": {"kind": "perplexity", "columns": TEXTS, "block": 8},
        "sums": {"kind": "exact_match", "columns": ASKED, "max_new_tokens": 3},
        "held_out": {"kind": "perplexity", "columns": ASKED, "text": None},
    }
    return built("causal_lm", "llama", "AutoModelForCausalLM", tasks)


def test_perplexity_and_exact_match_stand_side_by_side(causal, capsys):
    with causal.entered():
        assert cli.main(["run", *causal.choices, "method=task_arithmetic"]) == 0
        shown = capsys.readouterr().out
        (found,) = causal.runs().values()
    metrics = found.data.metrics
    assert {
        "words/perplexity",
        "words/loss",
        "words/bits_per_byte",
        "words/tokens",
        "sums/exact_match",
        "sums/loss",
    } <= set(metrics)
    assert metrics["average/perplexity"] ** 2 == pytest.approx(
        metrics["words/perplexity"] * metrics["held_out/perplexity"]
    )
    assert metrics["average/exact_match"] == metrics["sums/exact_match"]
    assert metrics["words/tokens"] == len("".join(TEXTS["text"]))
    assert "average/normalized" not in metrics  # held_out has no expert of its own
    assert "perplexity ↓" in shown
    assert "exact match ↑" in shown
    assert "| words | perplexity ↓ |" in found.data.tags["mlflow.note.content"]
    with causal.entered():
        table = mlflow.MlflowClient().load_table(found.info.experiment_id, "results.json", [found.info.run_id])
        names = {item.path for item in mlflow.MlflowClient().list_artifacts(found.info.run_id, "plots")}
    assert list(table["metric"]) == ["perplexity", "exact_match", "perplexity"]
    assert list(table["base"].isna()) == [False, False, False]
    assert list(table["expert"].isna()) == [False, False, True]
    assert "plots/normalized.png" in names
    schema = {each.dataset.name: json.loads(each.dataset.schema) for each in found.inputs.dataset_inputs}
    assert [column["name"] for column in schema["sums/test"]["mlflow_colspec"]] == ["prompt", "target"]


def test_the_reference_of_an_expert_is_what_evaluating_it_gives(causal):
    merged = causal.run("method=simple_average", *QUICK)
    alone = causal.run("method=expert", "method.expert=words", *QUICK)
    assert {score.task: score.value for score in alone.scores}["words"] == merged.references.experts["words"]
    assert set(merged.references.base) == {"words", "sums", "held_out"}
    assert set(merged.references.experts) == {"words", "sums"}
    other = causal.run("method=expert", "method.expert=words", "tasks.tasks.words.block=4", *QUICK)
    assert other.references.experts["words"] != merged.references.experts["words"]  # computed anew


def test_without_tasks_a_run_merges_and_records(causal, tmp_path, capsys):
    with causal.entered():
        output = f"output={tmp_path / 'merged'}"
        assert cli.main(["run", causal.choices[0], "tasks=none", "method=simple_average", output]) == 0
        run_id = next(iter(causal.runs()))
        found = mlflow.get_run(run_id)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "merged, and scored on no task" in found.data.tags["mlflow.note.content"]
    assert not [key for key in found.data.metrics if key.startswith(("average/", "worst/"))]
    assert not found.inputs.dataset_inputs
    assert "task" not in capsys.readouterr().out.partition("run ")[0]


def test_a_classifiers_tasks_have_their_experts_heads(built):
    moods = {"kind": "text_classification", "columns": MOODS, "labels": ["good", "bad"]}
    place = built(
        "sequence_classification", "bert", "AutoModelForSequenceClassification", {"words": moods, "held_out": moods}
    )
    merged = place.run("method=simple_average", *QUICK)
    assert [score.metric for score in merged.scores] == ["accuracy", "accuracy"]
    assert merged.scores[0].loss != merged.scores[1].loss  # the same rows, the expert's head and the base's
    alone = place.run("method=expert", "method.expert=words", *QUICK)
    assert alone.scores[0].value == merged.references.experts["words"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.tasks.sums.kind=text_classification"], "task sums is of kind text_classification, which a pool of"),
        (["tasks.tasks.sums.kind=image_classification"], "it is scored on perplexity and exact_match"),
        (["tasks.tasks.sums.target=answer"], "has no column answer"),
        (["tasks.lm_eval.tasks=[words]"], "task words is also a task of tasks.lm_eval"),
        (["tasks.lm_eval.tasks=[/nowhere/x.yaml]"], "there is no file /nowhere/x.yaml"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_work(causal, overrides, message):
    config = compose([*causal.choices, *overrides])
    if "x.yaml" in message and find_spec("lm_eval") is None:
        message = "pip install"
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        open_bench(config.pool, config.tasks, local_path)


def test_a_method_that_is_fed_images_refuses_texts(causal):
    with pytest.raises(UserError, match=r"fed tasks of kind image_classification only, not words \(perplexity\), sums"):
        causal.run("method=fisher", *QUICK)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval, an optional extra, is not installed")
def test_lm_evals_numbers_are_metrics_of_the_run(causal, tmp_path):
    data = tmp_path / "asked.jsonl"
    rows = zip(ASKED["prompt"], ASKED["target"], strict=True)
    data.write_text("".join(json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in rows))
    task = {
        "task": "plus", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_target": "{{target}}", "metric_list": [{"metric": "perplexity"}], "metadata": {"version": 3},
    }  # fmt: skip
    (tmp_path / "plus.yaml").write_text(yaml.safe_dump(task))
    outcome = causal.run("method=ties", f"tasks.lm_eval.tasks=[{tmp_path / 'plus.yaml'}]", *QUICK)
    with causal.entered():
        found = mlflow.get_run(outcome.run_id)
        text = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/lm_eval/plus.jsonl")
    assert found.data.metrics["plus/n"] == 3
    assert found.data.params["lm_eval.version.plus"] == "3"
    assert len(text.splitlines()) == 3
    assert "| plus | perplexity |" in found.data.tags["mlflow.note.content"]
    # of one token each, so that a document's likelihood is a token's: lm-eval's number is ours
    assert found.data.metrics["plus/perplexity"] == pytest.approx(found.data.metrics["held_out/perplexity"], rel=1e-4)


def blocks(title: str) -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    return [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if block.startswith(f"# {title}")]


@pytest.mark.parametrize("block", blocks("my/tasks.yaml"))
def test_files_of_tasks_in_the_documentation_are_taken(causal, tmp_path, block):
    (tmp_path / "tasks.yaml").write_text(block)
    settings = compose([causal.choices[0], f"tasks={tmp_path / 'tasks.yaml'}", "method=simple_average"]).tasks
    assert settings.tasks or settings.lm_eval.tasks == ["arc_easy", "my/plus.yaml"]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval, an optional extra, is not installed")
def test_the_lm_eval_task_in_the_documentation_is_taken(causal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "plus.yaml").write_text(blocks("my/plus.yaml")[0])
    (tmp_path / "my" / "plus.jsonl").write_text('{"prompt": "1+1=", "target": "2"}\n')
    config = compose([causal.choices[0], "tasks=none", "tasks.lm_eval.tasks=[my/plus.yaml]"])
    bench = open_bench(config.pool, config.tasks, local_path)
    found = bench.asked.run(bench.pool.module(), bench.pool.tokenizer, "causal_lm", "32-true", 0)
    assert [(row["task"], row["metric"], row["n"]) for row in found.rows] == [("plus", "exact_match", 1)]


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(causal):
    one = causal.run("method=simple_average", *QUICK)
    before = set(causal.runs())
    two = "fabric.accelerator=cpu", "fabric.devices=2"
    done = causal.cli("run", "method=simple_average", *QUICK, *two, "evaluation.batch_size=2")
    assert done.returncode == 0, done.stderr
    (run_id,) = set(causal.runs()) - before
    metrics = causal.runs()[run_id].data.metrics
    for score in one.scores:
        assert metrics[f"{score.task}/{score.metric}"] == pytest.approx(score.value, rel=1e-5)
        assert metrics[f"{score.task}/tokens"] == score.more["tokens"]
