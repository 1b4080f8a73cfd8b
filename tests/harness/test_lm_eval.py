"""lm-evaluation-harness on a model in memory, offline, with local tasks: its numbers are ours."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import yaml

from harness import lm_eval
from harness.config import LmEvalSettings, UserError
from harness.lm_eval import Asked, found_in
from pools.open import open_pool
from tests.pools.language_models import write_model

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval, an optional extra, is not installed")

CHOICES = [("the sky is", [" blue", " one"], 0), ("one and one", [" two", " six"], 1), ("?", [" a", " b"], 0)]
PROMPTS = ["say a:", "count:", "and then?"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return open_pool("causal_lm", str(write_model(tmp_path_factory.mktemp("models") / "llama", "llama")), {})


@pytest.fixture(scope="module")
def module(pool):
    return pool.module()


@pytest.fixture(scope="module")
def answers(pool, module):
    return pool.generate(module, PROMPTS, 4)


@pytest.fixture
def files(tmp_path, answers):
    """Two tasks as files: which of two endings is likelier, and greedy answers of which one is right."""
    endings = [{"context": context, "choices": texts, "gold": gold} for context, texts, gold in CHOICES]
    targets = [answers[0], answers[1] + "!", answers[2] + "!"]
    asked = [{"prompt": prompt, "target": target} for prompt, target in zip(PROMPTS, targets, strict=True)]
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 2.0}}
    own = {
        "endings": {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
            "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        },
        "answers": {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["~~"], "do_sample": False, "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
            "filter_list": [{"name": "as-is", "filter": [{"function": "take_first"}]}],
        },
    }  # fmt: skip
    for name, rows in (("endings", endings), ("answers", asked)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": f"local_{name}", "dataset_kwargs": {"data_files": {"test": str(data)}}, **common, **own[name]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def likeliest(pool, module, context: str, texts: list[str]) -> int:
    def chance(text: str) -> float:
        inputs = pool.feed([(context, text)])
        told = module(input_ids=inputs["input_ids"]).logits[0, :-1].log_softmax(-1)
        labels = inputs["labels"][0, 1:]
        return float(sum(told[place, label].detach() for place, label in enumerate(labels) if label != -100))

    return max(range(len(texts)), key=lambda index: chance(texts[index]))


@needs_lm_eval
def test_local_tasks_give_the_numbers_of_the_model(files, pool, module):
    settings = LmEvalSettings(tasks=[str(files / "endings.yaml"), str(files / "answers.yaml")], batch_size=2)
    found = Asked(settings).run(module, pool.tokenizer, "causal_lm", "32-true", 0)
    right = [likeliest(pool, module, context, texts) == gold for context, texts, gold in CHOICES]
    assert {(row["task"], row["metric"]): row["value"] for row in found.rows} == {
        ("local_endings", "acc"): pytest.approx(sum(right) / 3),
        ("local_answers", "exact_match"): pytest.approx(1 / 3),
    }
    assert found.versions == {"local_endings": "2.0", "local_answers": "2.0"}
    assert found.n == {"local_endings": 3, "local_answers": 3}
    lines = [json.loads(line) for line in found.samples["local_answers"].splitlines()]
    assert sorted(line["doc"]["prompt"] for line in lines) == sorted(PROMPTS)
    assert [line["exact_match"] for line in sorted(lines, key=lambda line: line["doc_id"])] == [1.0, 0.0, 0.0]


@needs_lm_eval
def test_a_limit_and_a_relative_path(files, pool, module, monkeypatch):
    monkeypatch.chdir(files)
    found = Asked(LmEvalSettings(tasks=["answers.yaml"], limit=1)).run(
        module, pool.tokenizer, "causal_lm", "32-true", 0
    )
    assert (found.n, found.rows[0]["value"]) == ({"local_answers": 1}, 1.0)


@needs_lm_eval
def test_what_cannot_be_asked_is_told_before_work(files):
    with pytest.raises(UserError, match=r"there is no file /nowhere/x\.yaml"):
        Asked(LmEvalSettings(tasks=["/nowhere/x.yaml"]))
    with pytest.raises(UserError, match="include_path=/nowhere: there is no such directory"):
        Asked(LmEvalSettings(tasks=["a"], include_path="/nowhere"))
    (files / "answers.jsonl").unlink()
    with pytest.raises(UserError, match=r"answers.yaml cannot be loaded: FileNotFoundError"):
        Asked(LmEvalSettings(tasks=[str(files / "answers.yaml")]))


@needs_lm_eval
@pytest.mark.slow
def test_tasks_by_name(files):
    asked = Asked(LmEvalSettings(tasks=["local_endings"], include_path=str(files)))
    assert [task.task_name for task in asked._tasks] == ["local_endings"]
    with pytest.raises(UserError, match="no task 'hellaswagg'; did you mean hellaswag"):
        Asked(LmEvalSettings(tasks=["hellaswagg"]))


def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'crucible\[lm-eval\]'"):
        Asked(LmEvalSettings(tasks=["x"]))


def test_a_filter_is_named_only_where_there_are_several():
    scores = {
        "alias": "m", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A",
        "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible extract": 0.5, "exact_match_stderr,flexible extract": 0.2, "f1@5,none": 1,
    }  # fmt: skip
    found = found_in({"results": {"m": scores}, "versions": {"m": None}, "n-samples": {}})
    assert [(row["metric"], row["value"], row["stderr"]) for row in found.rows] == [
        ("acc", 0.5, None),
        ("exact_match.strict-match", 0.25, 0.1),
        ("exact_match.flexible extract", 0.5, 0.2),
        ("f1_5", 1.0, None),
    ]
    assert (found.versions, found.n, found.samples) == ({}, {}, {})
