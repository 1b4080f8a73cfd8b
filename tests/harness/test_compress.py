"""Compressed experts through every door: run, directory, served model, a fresh process, a study's trial."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
import transformers
from safetensors import safe_open

from harness.bench import open_bench
from harness.compose import compose
from harness.compress import Restored, by_task
from harness.config import UserError
from harness.direct import look, merge_only
from harness.packed import FACTS, is_compressed
from harness.rebuild import open_directory
from harness.run import score_model
from harness.serve_language import open_served
from harness.track import local_path
from harness.trials import Resident
from methods.catalogue import CATALOGUE
from methods.kinds import Kind
from pools.headers import CheckpointError
from tests.pools.language_models import write_model

TASKS = ("red", "green", "blue")
EMR = ("method=emr", "evaluation.plots=false")


@pytest.fixture(scope="module")
def outcome(shared_workplace):
    """One run of EMR, its model logged."""
    with shared_workplace.entered():
        return shared_workplace.once(*EMR)


@pytest.fixture(scope="module")
def directory(outcome, shared_workplace) -> Path:
    with shared_workplace.entered():
        return local_path(str(outcome.model_uri))


def stored_bytes(directory: Path) -> int:
    total = 0
    for file in (directory / "packed").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118
    return total


def test_the_run_scores_each_task_with_its_own_expert(workplace, outcome, directory):
    module, _ = open_directory(directory)
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    config = compose([*workplace.choices])
    bench = open_bench(config.pool, config.tasks, local_path)
    for score in outcome.scores:
        rows = bench.tasks[score.task].rows("test")
        head = bench.head(score.task)
        own = module.of(score.task)
        with torch.inference_mode():
            logits = own(**bench.pool.feed([image for image, _ in rows])) @ head.T
        right = (logits.argmax(1) == torch.tensor([label for _, label in rows])).float().mean()
        assert float(right) == pytest.approx(score.value, abs=1e-6)
    with torch.inference_mode():
        seen = [module.of(task)(pixel_values=pixels) for task in TASKS]
    assert not torch.equal(seen[0], seen[1])


def test_what_is_recorded_is_what_lies_on_the_disk(workplace, outcome, directory):
    metrics = mlflow.get_run(outcome.run_id).data.metrics
    assert metrics["compression/bytes"] == stored_bytes(directory)
    facts = json.loads((directory / FACTS).read_text())
    n = 3 * facts["n_parameters"]
    assert metrics["compression/bits_per_parameter"] == pytest.approx(8 * stored_bytes(directory) / n)
    assert 32 / 3 + 1 < metrics["compression/bits_per_parameter"] < 13  # one vector of 32 bits, a bit each, rescalers
    assert metrics["compression/ratio"] == pytest.approx(3 * facts["expert_bytes"] / stored_bytes(directory))
    assert {"average/normalized", "worst/accuracy", "time/merge_s"} <= set(metrics)


def test_the_served_model_answers_as_the_expert_that_is_named(workplace, outcome, directory):
    model = mlflow.pyfunc.load_model(outcome.model_uri)
    restored, pool = open_directory(directory)
    config = compose([*workplace.choices])
    task = open_bench(config.pool, config.tasks, local_path).tasks["red"]
    images = [image for image, _ in task.rows("test")]
    classes = {"classes": list(task.labels), "templates": list(task.templates)}
    head = pool.head(task.labels, task.templates)
    for params, expert in (({"task": "red"}, "red"), ({"expert": "blue", **classes}, "blue")):
        answer = model.predict(pandas.DataFrame({"image": images}), params=params)
        with torch.inference_mode():
            wanted = (restored.of(expert)(**pool.feed(images)) @ head.T).softmax(-1)
        torch.testing.assert_close(torch.tensor(answer["probabilities"].tolist()), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="got 'pink'; there are red, green, blue"):
        model.predict(pandas.DataFrame({"image": images}), params={"expert": "pink", **classes})


@pytest.mark.slow
def test_scoring_the_logged_model_gives_the_scores_of_the_run(workplace, outcome):
    config = compose([*workplace.choices, f"model={outcome.model_uri}", "evaluation.plots=false"])
    again = score_model(config)
    assert [(one.task, one.value, one.loss) for one in again.scores] == [
        (one.task, one.value, one.loss) for one in outcome.scores
    ]


FRESH = """
import json, sys
from pathlib import Path
import torch
from harness.rebuild import open_directory
torch.set_num_threads(1)
pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
modules = [open_directory(Path(each))[0] for each in sys.argv[1:]]
with torch.inference_mode():
    seen = [[each.of(name)(pixel_values=pixels).tolist() for name in each.packed.experts] for each in modules]
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_a_fresh_process_restores_the_same(workplace):
    methods = [row.name for row in CATALOGUE.values() if row.kind is Kind.compression and not row.data]
    places = [workplace.directory / f"packed_{method}" for method in methods]
    for method, place in zip(methods, places, strict=True):
        merge_only(compose([*workplace.choices, f"method={method}", f"output={place}", "seed=5"]))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, places)],
        env={**workplace.environment, "PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    for place, seen in zip(places, json.loads(done.stdout), strict=True):
        module, _ = open_directory(place)
        with torch.inference_mode():
            for name, answer in zip(TASKS, seen, strict=True):
                torch.testing.assert_close(torch.tensor(answer), module.of(name)(pixel_values=pixels))


@pytest.mark.parametrize("method", ["emr", "randes"])
def test_one_expert_is_written_as_an_ordinary_checkpoint(workplace, method):
    """And has the bits that the directory of all experts restores."""
    base = [*workplace.choices, f"method={method}", "seed=5"]
    one, every = workplace.directory / f"one_{method}", workplace.directory / f"every_{method}"
    merge_only(compose([*base, "method.expert=green", f"output={one}"]))
    told = dict(merge_only(compose([*base, f"output={every}"])))
    assert told["experts"] == "red, green, blue"
    assert not is_compressed(one)
    assert (one / "model.safetensors").is_file()
    written, restored = open_directory(one)[0].state_dict(), open_directory(every)[0].of("green").state_dict()
    for name, tensor in written.items():
        assert torch.equal(tensor, restored[name]), name


def test_a_trial_of_a_study_scores_as_a_run_does(workplace, outcome):
    config = compose([*workplace.choices, "method=emr"])
    resident = Resident(config, search_on_test=True, step_rows=8)
    *_, last = resident.score(config, 0)
    for score in outcome.scores:
        assert last.metrics[f"{score.task}/accuracy"] == pytest.approx(score.value)
    packed = mlflow.get_run(outcome.run_id).data.metrics["compression/bytes"]
    assert last.metrics["model/bytes"] == packed + resident.bench.pool.base.nbytes
    assert set(resident.rows(config, 0)) == set(TASKS)


def test_look_says_what_is_written(workplace):
    found = look(compose([*workplace.choices, "method=emr"]))
    assert "what emr keeps of 3 experts" in found.notes[-1]


@pytest.mark.slow
def test_distilled_scales_answer_more_like_the_expert(workplace):
    """BitDelta's scales learnt on inputs: the loss falls, only the scales change, one expert alone may be written."""
    learning = ("method=bitdelta", "method.steps=20", "method.lr=1e-3", "tracking.log_model=false")
    quick = ("evaluation.plots=false", "evaluation.references=false", "adaptation.examples=32")
    place, one = workplace.directory / "distilled", workplace.directory / "distilled_red"
    outcome = workplace.run(*learning, *quick, f"output={place}")
    history = mlflow.MlflowClient().get_metric_history(outcome.run_id, "adaptation/loss")
    losses = [each.value for each in sorted(history, key=lambda each: each.step)]
    assert len(losses) == 60
    for own in (losses[:20], losses[20:40], losses[40:]):
        assert sum(own[-5:]) < sum(own[:5])
    merge_only(compose([*workplace.choices, "method=bitdelta", f"output={place}_0"]))
    learnt, plain = (open_directory(each)[0].packed.tensors for each in (place, Path(f"{place}_0")))
    assert list(learnt) == list(plain)
    changed = {name.rpartition("/")[2] for name in plain if not torch.equal(learnt[name], plain[name])}
    assert changed == {"scales"}
    workplace.run(*learning, *quick, "method.expert=red", f"output={one}")
    for name, tensor in open_directory(one)[0].state_dict().items():
        torch.testing.assert_close(tensor, open_directory(place)[0].of("red").state_dict()[name])


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    """Base and two experts of two families; the second classifier has another number of classes."""
    root = tmp_path_factory.mktemp("language")
    for seed, name in enumerate(("base", "one", "two")):
        write_model(root / "causal_lm" / name, "llama", seed)
        write_model(
            root / "sequence_classification" / name, "bert", seed, "AutoModelForSequenceClassification",
            num_labels=3 if name == "two" else 2,
        )  # fmt: skip
    return root


def served(language: Path, workplace, family: str):
    """All ranks kept, so that what is restored is the expert but for rounding."""
    own = {"family": family, "base": "base", "experts": {"one": "one", "two": "two"}, "root": str(language / family)}
    pool, place = workplace.directory / f"{family}.yaml", workplace.directory / f"packed_{family}"
    pool.write_text(json.dumps(own))
    merge_only(compose([f"pool={pool}", "tasks=none", "method=tsv_compress", "method.share=1.0", f"output={place}"]))
    return open_served(place, family)


def test_a_served_classifier_has_the_head_of_the_expert_that_is_named(language, workplace):
    family = "sequence_classification"
    model, texts = served(language, workplace, family), ["the cat sat", "a dog"]
    for name in ("one", "two", "one"):
        answer = model.predict(pandas.DataFrame({"text": texts}), {"expert": name})
        own = transformers.AutoModelForSequenceClassification.from_pretrained(language / family / name).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(language / family / name)
        with torch.inference_mode():
            logits = torch.cat([own(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        found = torch.tensor(answer["probabilities"].tolist())
        torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"expert=NAME says which .* there are one, two"):
        model.predict(pandas.DataFrame({"text": texts}))


def test_prompts_are_answered_by_the_expert_that_is_named(language, workplace):
    model, prompt = served(language, workplace, "causal_lm"), "the cat"
    for name in ("one", "two"):
        answer = model.predict(pandas.DataFrame({"prompt": [prompt]}), {"expert": name, "max_new_tokens": 4})
        own = transformers.AutoModelForCausalLM.from_pretrained(language / "causal_lm" / name).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(language / "causal_lm" / name)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = own.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
        assert answer["text"][0] == tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_task_without_an_expert_is_refused_before_work(workplace):
    before = set(workplace.runs())
    with pytest.raises(UserError, match=r"there is none for blue; experts are red, green: leave these tasks out"):
        workplace.run(*EMR, "~pool.experts.blue", "evaluation.references=false")
    (run,) = [run for name, run in workplace.runs().items() if name not in before]
    assert "time/merge_s" not in run.data.metrics


@pytest.mark.slow
def test_one_restored_expert_is_scored_on_every_task(workplace):
    outcome = workplace.run(
        *EMR, "~pool.experts.blue", "method.expert=red", "tracking.log_model=false", "evaluation.references=false"
    )
    assert [score.task for score in outcome.scores] == list(TASKS)


def test_no_adapter_is_made_of_it(workplace):
    with pytest.raises(UserError, match="emr keeps experts compressed, which is no adapter"):
        merge_only(compose([*workplace.choices, "method=emr", "output=adapter_of_emr", "output_kind=adapter"]))


def test_scales_are_learnt_by_runs_only(workplace):
    with pytest.raises(UserError, match=r"bitdelta with method.steps is fed data: use `crucible run method=bitdelta`"):
        merge_only(compose([*workplace.choices, "method=bitdelta", "method.steps=3", "output=learnt"]))


def test_a_single_model_knows_no_experts():
    module = torch.nn.Linear(1, 1)
    assert by_task(module, ["anything"])("anything") is module


def test_a_broken_directory_is_named(workplace, directory, tmp_path):
    (tmp_path / FACTS).write_text("{}")
    with pytest.raises(CheckpointError, match="does not tell of compressed experts: KeyError"):
        open_directory(tmp_path)
    facts = json.loads((directory / FACTS).read_text())
    (tmp_path / FACTS).write_text(json.dumps({**facts, "format": 9}))
    with pytest.raises(CheckpointError, match="has the format 9, known is 1"):
        open_directory(tmp_path)
    module, _ = open_directory(directory)
    assert isinstance(module, Restored)
    with pytest.raises(ValueError, match=r"got 'gren'; did you mean green\?"):
        module.of("gren")
