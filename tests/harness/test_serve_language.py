"""Logged language models: the same answers through MLflow as from transformers, and scores with their own tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import mlflow
import pandas
import pytest
import torch
import transformers
import yaml

from harness.compose import compose
from harness.run import score_model
from harness.serve_language import Classifier, Continuation
from pools.headers import CheckpointError
from tests.pools.language_models import change_config, write_model

KINDS = {
    "causal_lm": ("llama", "AutoModelForCausalLM"),
    "seq2seq": ("t5", "AutoModelForSeq2SeqLM"),
    "sequence_classification": ("bert", "AutoModelForSequenceClassification"),
}
PROMPTS = ["1+1=", "a longer prompt", "ab"]
QUICK = "tracking.log_model=false", "evaluation.plots=false", "evaluation.references=false"
SPLITS = {"train": "test", "validation": "test", "test": "test"}


class Logged:
    """A model that a run has logged, and the workplace of the run."""

    def __init__(self, place, outcome) -> None:
        self.place, self.uri = place, outcome.model_uri
        with place.entered():
            self.directory = Path(mlflow.get_logged_model(self.uri.rpartition("/")[2]).artifact_location)
            self.info = mlflow.models.get_model_info(self.uri)

    def ask(self, column: str, values: list, **params) -> pandas.DataFrame:
        with self.place.entered():
            return mlflow.pyfunc.load_model(self.uri).predict(pandas.DataFrame({column: values}), params=params)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A directory for each family, with base and two experts."""
    root = tmp_path_factory.mktemp("members")
    for family, (kind, auto) in KINDS.items():
        for seed, name in enumerate(("base", "one", "two")):
            write_model(root / family / name, kind, seed, auto)
            if family == "sequence_classification":
                change_config(root / family / name, id2label={"0": "good", "1": "bad"})
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory, build_workplace):
    """A store for all tests of this file; which pool and tasks are used is written anew."""
    return build_workplace(tmp_path_factory.mktemp("serve_language") / "work")


def write_pool(place, root: Path, family: str, experts: tuple[str, ...], **more) -> None:
    pool = {"family": family, "base": "base", "experts": {name: name for name in experts}, "root": str(root)}
    (place.directory / "pool.yaml").write_text(yaml.safe_dump(pool | more, sort_keys=False))


@pytest.fixture(scope="module")
def logged(members, place):
    """Merges base and experts of a family once, without tasks, as `crucible run` does."""
    done: dict[str, Logged] = {}

    def run(family: str) -> Logged:
        if family not in done:
            write_pool(place, members / ("causal_lm" if family == "state_dict" else family), family, ("one", "two"))
            done[family] = Logged(place, place.run("tasks=none", "method=simple_average", "evaluation.plots=false"))
        return done[family]

    return run


def own_model(directory: Path, family: str):
    """Model and tokenizer as transformers reads them."""
    model = getattr(transformers, KINDS[family][1]).from_pretrained(directory, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def continued(directory: Path, family: str, n: int) -> list[str]:
    """Greedy continuations with transformers alone, one prompt at a time."""
    model, tokenizer = own_model(directory, family)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=n, do_sample=False)[0]
        start = inputs["input_ids"].shape[1] if family == "causal_lm" else 0
        found.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("family", ["causal_lm", "seq2seq"])
def test_prompts_are_continued_as_transformers_does(logged, family):
    model = logged(family)
    wanted = continued(model.directory, family, 6)
    assert any(wanted)
    answer = model.ask("prompt", PROMPTS, max_new_tokens=6)
    assert list(answer["text"]) == wanted
    stop = max(wanted, key=len)[2]
    assert list(model.ask("prompt", PROMPTS, max_new_tokens=6, stop=stop)["text"]) == [
        text.partition(stop)[0] for text in wanted
    ]
    assert list(model.ask("prompt", PROMPTS)["text"]) == continued(model.directory, family, 32)


def test_texts_are_classified_as_transformers_does(logged):
    found = logged("sequence_classification")
    model, tokenizer = own_model(found.directory, "sequence_classification")
    with torch.inference_mode():
        logits = torch.cat([model(**tokenizer(prompt, return_tensors="pt")).logits for prompt in PROMPTS])
    answer = found.ask("text", PROMPTS)
    torch.testing.assert_close(torch.tensor(answer["probabilities"].tolist()), logits.softmax(-1), rtol=1e-5, atol=1e-6)
    assert list(answer["label"]) == [["good", "bad"][index] for index in logits.argmax(-1)]


def test_a_merged_state_dict_says_that_it_answers_nothing(logged):
    with pytest.raises(ValueError, match="has no module that could answer"):
        logged("state_dict").ask("prompt", PROMPTS)


@pytest.mark.parametrize("family", [*KINDS, "state_dict"])
def test_what_the_model_says_of_itself(logged, family):
    model = logged(family)
    assert model.info.metadata["family"] == family
    pipelines = {"causal_lm": "text-generation", "sequence_classification": "text-classification"}
    assert model.info.flavors.get("transformers", {}).get("task") == pipelines.get(family)
    lines = (model.directory / "requirements.txt").read_text().splitlines()[1:]
    words = ["mlflow", "torch", "safetensors"] + ([] if family == "state_dict" else ["transformers", "pandas"])
    assert {line.partition("==")[0] for line in lines} == set(words)
    if family == "state_dict":
        assert model.info.signature is None
    else:
        column = "text" if family == "sequence_classification" else "prompt"
        assert model.info.signature.inputs.input_names() == [column]


def test_a_pipeline_of_transformers_generates_the_same(logged):
    model = logged("causal_lm")
    with model.place.entered():
        pipeline = mlflow.transformers.load_model(model.uri)
    answers = [
        pipeline(prompt, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
        for prompt in PROMPTS
    ]
    assert answers == list(model.ask("prompt", PROMPTS, max_new_tokens=6)["text"])


def test_a_pipeline_of_transformers_classifies_the_same(logged):
    model = logged("sequence_classification")
    with model.place.entered():
        pipeline = mlflow.transformers.load_model(model.uri)
    answer = model.ask("text", PROMPTS)
    for told, label, shares in zip(pipeline(PROMPTS), answer["label"], answer["probabilities"], strict=True):
        assert told["label"] == label
        assert told["score"] == pytest.approx(max(shares), rel=1e-5)


def test_weights_lie_in_the_store_once(logged):
    model = logged("causal_lm")
    assert len(list(model.directory.parent.rglob("*.safetensors"))) == 1


def test_what_is_built_of_language_models_is_asked_as_they_are(members, place):
    write_pool(place, members / "causal_lm", "causal_lm", ("one", "two"))
    outcome = place.run("tasks=none", "method=simple_ensemble", "evaluation.plots=false")
    answers = Logged(place, outcome).ask("prompt", PROMPTS, max_new_tokens=3)
    assert any(answers["text"])


def test_without_a_tokenizer_there_is_no_pipeline_and_the_error_says_what_is_missing(members, tmp_path, place):
    for name in ("base", "one"):
        shutil.copytree(members / "causal_lm" / name, tmp_path / name, ignore=shutil.ignore_patterns("tokenizer*"))
    write_pool(place, tmp_path, "causal_lm", ("one",))
    model = Logged(place, place.run("tasks=none", "method=simple_average", "evaluation.plots=false"))
    assert "transformers" not in model.info.flavors
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        model.ask("prompt", PROMPTS)


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class ServedConfig(LlamaConfig):
    model_type = "served_own"

class ServedForCausalLM(LlamaForCausalLM):
    config_class = ServedConfig
"""


def test_code_that_was_trusted_is_served_and_left_to_no_pipeline(members, tmp_path, place):
    classes = {"AutoConfig": "own.ServedConfig", "AutoModelForCausalLM": "own.ServedForCausalLM"}
    for name in ("base", "one"):
        shutil.copytree(members / "causal_lm" / name, tmp_path / name)
        (tmp_path / name / "own.py").write_text(OWN)
        change_config(tmp_path / name, auto_map=classes, model_type="served_own")
    write_pool(place, tmp_path, "causal_lm", ("one",), trust_remote_code=True)
    model = Logged(place, place.run("tasks=none", "method=expert", "method.expert=one", "evaluation.plots=false"))
    assert "transformers" not in model.info.flavors
    answer = model.ask("prompt", PROMPTS, max_new_tokens=6)
    assert list(answer["text"]) == continued(members / "causal_lm" / "one", "causal_lm", 6)


class Module:
    """A configuration alone: what is refused is refused before the model is run."""

    def __init__(self, **config) -> None:
        self.config = transformers.BertConfig(**config)


@pytest.mark.parametrize(
    ("served", "table", "params", "message"),
    [
        (Continuation(None, None), {"text": ["a"]}, {}, "column 'prompt', got text"),
        (Continuation(None, None), {"prompt": ["a", 3]}, {}, "got 3 in row 1"),
        (Continuation(None, None), {"prompt": ["a"]}, {"max_new_tokens": 0}, "at least 1, got 0"),
        (Continuation(None, None), {"prompt": ["a"]}, {"stop": 1}, "stop is a text"),
        (Classifier(Module(num_labels=2), None), {"prompt": ["a"]}, {}, "column 'text', got prompt"),
        (Classifier(Module(num_labels=1), None), {"text": ["a"]}, {}, "num_labels=1"),
        (Classifier(Module(problem_type="multi_label_classification"), None), {"text": ["a"]}, {}, "multi_label"),
    ],
)
def test_bad_input_is_named(served, table, params, message):
    with pytest.raises(ValueError, match=message):
        served.predict(pandas.DataFrame(table), params)


EXTRA = "<tool>"
TEXTS = [f"some {EXTRA} text", f"{EXTRA}{EXTRA}", "other words"]


def write_wider(directory: Path, family: str, seed: int) -> Path:
    """A model whose tokenizer has one more token, with a row of its own in the embedding."""
    kind, auto = KINDS[family]
    write_model(directory, kind, seed, auto, vocab_size=261)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.add_tokens([EXTRA]) == 1
    tokenizer.save_pretrained(directory)
    return directory


def write_tasks(place, root: Path, name: str, columns: dict, **settings) -> None:
    (root / "data").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(root / "data" / "test.parquet")
    task = {"path": str(root / "data"), "splits": SPLITS, **settings}
    (place.directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {name: task}}, sort_keys=False))


def scored(place, model: str):
    """What `crucible evaluate model=...` does."""
    with place.entered():
        (score,) = score_model(compose([*place.choices, "method=base", f"model={model}", *QUICK])).scores
    return score


def test_a_model_is_scored_with_its_own_tokenizer(members, tmp_path, place):
    write_pool(place, members / "causal_lm", "causal_lm", ())
    write_tasks(place, tmp_path, "texts", {"text": TEXTS}, kind="perplexity")
    directory = write_wider(tmp_path / "wider", "causal_lm", 5)
    model, tokenizer = own_model(directory, "causal_lm")
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    found = scored(place, str(directory))
    assert found.more["tokens"] == tokens  # the pool's own tokenizer makes six tokens of each <tool>
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)


def test_a_model_of_a_union_vocabulary_scores_as_in_its_run(members, tmp_path, place):
    write_wider(members / "causal_lm" / "wider", "causal_lm", 5)
    write_pool(place, members / "causal_lm", "causal_lm", ("wider",), tokenizer="union")
    write_tasks(place, tmp_path, "texts", {"text": TEXTS}, kind="perplexity")
    outcome = place.run("method=simple_average", "evaluation.plots=false", "evaluation.references=false")
    write_pool(place, members / "causal_lm", "causal_lm", ())
    assert scored(place, outcome.model_uri) == outcome.scores[0]
    model = Logged(place, outcome)
    added = json.loads((model.directory / "tokenizer.json").read_text())["added_tokens"]
    assert EXTRA in [token["content"] for token in added]
    assert len(model.ask("prompt", [EXTRA], max_new_tokens=2)) == 1


def test_a_classifier_is_scored_with_its_own_tokenizer_and_the_experts_head(members, tmp_path, place):
    family = "sequence_classification"
    write_pool(place, members / family, family, ("one",))
    columns = {"text": TEXTS, "label": [0, 1, 0]}
    write_tasks(place, tmp_path, "one", columns, kind="text_classification", labels=["good", "bad"])
    directory = write_wider(tmp_path / "wider", family, 5)
    model, tokenizer = own_model(directory, family)
    model.classifier = own_model(members / family / "one", family)[0].classifier
    with torch.inference_mode():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(columns["label"]))
    assert scored(place, str(directory)).loss == pytest.approx(float(wanted), rel=1e-5)
