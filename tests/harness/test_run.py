"""The whole life of a run, for one method of each kind: what MLflow holds of it, and what the model does."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
import transformers
from PIL import Image

from harness import cli
from harness.assess import summarise
from harness.bench import open_bench
from harness.compose import compose, flat, from_yaml
from harness.config import UserError
from harness.evaluate import TaskScore
from harness.rebuild import open_directory
from harness.references import References
from harness.run import run, score_model
from harness.track import config_of, local_path
from methods.catalogue import find
from methods.kinds import Kind

TASKS = ("red", "green", "blue")
PLAIN = ("task_arithmetic", "regmean", "fisher", "adamerging", "opcm")
WRAPPED = ("simple_ensemble", "we_moe")
ITERATE = ("adamerging", "we_moe")
QUICK = ("task_arithmetic", "adamerging", "we_moe")  # one that streams, one that searches, one that builds
EVERY = [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in (*PLAIN, *WRAPPED)]
KNOWN = {"", ".json", ".md", ".safetensors", ".txt"}  # of a model's files; no suffix: MLmodel


def overrides(method: str) -> tuple[str, ...]:
    return f"method={method}", *(("method.steps=3",) if method in ITERATE else ())


def model_directory(outcome) -> Path:
    return local_path(str(outcome.model_uri))


def artifacts(run_id: str) -> dict[str, Path]:
    root = Path(mlflow.artifacts.download_artifacts(run_id=run_id, dst_path=None, artifact_path=""))
    return {str(file.relative_to(root)): file for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("method", EVERY)
def test_what_mlflow_holds(workplace, method):
    outcome = workplace.once(*overrides(method))
    config = compose([*workplace.choices, *overrides(method)])
    found = mlflow.get_run(outcome.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == f"{method}{' steps=3' if method in ITERATE else ''} on pool"
    tags, params, metrics = found.data.tags, found.data.params, found.data.metrics
    row = find(method)
    wanted = {"method": method, "pool": "pool", "tasks": "tasks", "kind": row.kind.value, "seed": "0"}
    assert wanted.items() <= tags.items()
    assert tags["device"].startswith("1 x ")
    assert tags["version.torch"] == torch.__version__
    assert f"**{method}** on **pool**" in tags["mlflow.note.content"]
    assert set(flat(config)) <= set(params)
    assert params["evaluation.batch_size"] == "128"
    assert all(len(params[f"fingerprint.{member}"]) == 64 for member in ("base", *TASKS))
    assert from_yaml(config_of(outcome.run_id)) == config
    own = {"write"} if row.kind is Kind.build else {"merge", "load"}
    check_metrics(outcome, metrics, {"open", "prepare", *own, "evaluate", "references", "plots"})
    check_artifacts(outcome, row)
    inputs = {each.dataset.name: each for each in found.inputs.dataset_inputs}
    assert set(inputs) == {f"{task}/test" for task in TASKS}
    assert json.loads(inputs["green/test"].dataset.profile)["num_rows"] == 20


def check_metrics(outcome, metrics: dict[str, float], phases: set[str]) -> None:
    for score in outcome.scores:
        assert metrics[f"{score.task}/accuracy"] == score.value
        assert metrics[f"{score.task}/loss"] == score.loss
        assert score.value * score.n == pytest.approx(round(score.value * score.n), abs=1e-4)
    assert [(score.task, score.n) for score in outcome.scores] == [("red", 21), ("green", 20), ("blue", 17)]
    accuracies = [score.value for score in outcome.scores]
    assert metrics["average/accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert metrics["worst/accuracy"] == min(accuracies)
    shares = [score.value / outcome.references.experts[score.task] for score in outcome.scores]
    assert metrics["average/normalized"] == pytest.approx(sum(shares) / 3)
    for phase in phases:
        assert metrics[f"time/{phase}_s"] >= 0
        assert metrics[f"memory/{phase}_peak_bytes"] > 1 << 20


def check_artifacts(outcome, row) -> None:
    files = artifacts(outcome.run_id)
    pictures = {"plots/accuracy.png", "plots/radar.png", "plots/task_vector_cosines.png"}
    if row.name in ITERATE:
        pictures.add("plots/adaptation_loss.png")
        history = mlflow.MlflowClient().get_metric_history(outcome.run_id, "adaptation/loss")
        assert [each.step for each in history] == [0, 1, 2]
    if row.name == "adamerging":
        pictures.add("plots/coefficients.png")
        assert "coefficients.json" in files
        for task in TASKS:
            assert len(mlflow.MlflowClient().get_metric_history(outcome.run_id, f"coefficient/{task}")) == 3
    if row.name == "we_moe":
        pictures.add("plots/routing.png")
        routes = json.loads(files["routing.json"].read_text("utf-8"))
        assert routes["columns"] == ["task", "expert", "mean", "first", "examples", "router"]
    assert {name for name in files if name.endswith(".png")} == pictures
    for name in pictures:
        with Image.open(files[name]) as picture:
            picture.verify()
        assert picture.format == "PNG"
    experiment = mlflow.get_run(outcome.run_id).info.experiment_id
    table = mlflow.MlflowClient().load_table(experiment, "results.json", [outcome.run_id])
    assert list(table["task"]) == list(TASKS)
    assert list(table["value"]) == pytest.approx([score.value for score in outcome.scores])
    assert list(table["expert"]) == pytest.approx([outcome.references.experts[task] for task in TASKS])
    lineage = json.loads(files["lineage.json"].read_text())
    assert list(lineage) == ["base", *TASKS]
    assert lineage["red"]["source"] == "red"
    assert lineage["red"]["bytes"] > 0


@pytest.mark.parametrize("method", EVERY)
def test_the_logged_model_gives_the_metrics_of_the_run(workplace, method):
    outcome = workplace.once(*overrides(method))
    directory = model_directory(outcome)
    assert {file.suffix for file in directory.rglob("*") if file.is_file()} <= KNOWN
    config = compose([*workplace.choices])
    bench = open_bench(config.pool, config.tasks, local_path)
    model = mlflow.pyfunc.load_model(outcome.model_uri)
    for score in outcome.scores:
        rows = bench.tasks[score.task].rows("test")
        answer = model.predict(pandas.DataFrame({"image": [image for image, _ in rows]}), params={"task": score.task})
        chances = torch.tensor(answer["probabilities"].tolist())
        labels = torch.tensor([label for _, label in rows])
        assert float((chances.argmax(1) == labels).float().mean()) == pytest.approx(score.value, abs=1e-6)
        loss = torch.nn.functional.nll_loss(chances.log(), labels)
        assert float(loss) == pytest.approx(score.loss, abs=1e-5)


@pytest.mark.parametrize("method", EVERY[: len(PLAIN)])
def test_transformers_loads_the_model_and_sees_the_same(workplace, method):
    directory = model_directory(workplace.once(*overrides(method)))
    module, pool = open_directory(directory)
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "teal", "white")]
    pixels = pool.feed(images)["pixel_values"]
    theirs, notes = transformers.CLIPModel.from_pretrained(directory, output_loading_info=True)
    assert not any(notes.values())
    with torch.inference_mode():
        seen = theirs.eval().visual_projection(theirs.vision_model(pixels).pooler_output)
        torch.testing.assert_close(torch.nn.functional.normalize(seen, dim=-1), module(pixels))


def test_the_tensors_of_a_rule_are_those_of_the_arithmetic(workplace):
    directory = model_directory(workplace.once(*overrides("task_arithmetic")))
    pool = open_bench(*_settings(workplace)).pool
    merged = open_directory(directory)[1].base
    for name, base in pool.base.items():
        wanted = base + 0.3 * sum(expert[name] - base for expert in pool.experts.values())
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-7)


def _settings(workplace):
    config = compose([*workplace.choices])
    return config.pool, config.tasks, local_path


FRESH = """
import json, sys
from pathlib import Path
import torch
from harness.rebuild import open_directory
torch.set_num_threads(1)
pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
with torch.inference_mode():
    print(json.dumps([open_directory(Path(each))[0](pixel_values=pixels).tolist() for each in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_wrapped_models_answer_the_same_in_a_fresh_process(workplace):
    directories = [model_directory(workplace.once(*overrides(method))) for method in WRAPPED]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, directories)],
        env=workplace.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    for directory, fresh in zip(directories, json.loads(done.stdout), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(fresh), open_directory(directory)[0](pixel_values=pixels))


def test_without_a_logged_model_nothing_is_written(workplace):
    before = workplace.models()
    outcome = workplace.run("method=ties", "tracking.log_model=false", "evaluation.plots=false")
    assert outcome.model_uri is None
    assert workplace.models() == before
    assert not mlflow.get_run(outcome.run_id).outputs.model_outputs
    assert not [name for name in artifacts(outcome.run_id) if name.endswith(".png")]


@pytest.mark.parametrize("method", ["ties", pytest.param("simple_ensemble", marks=pytest.mark.slow)])
def test_output_is_a_complete_model_that_scores_the_same(workplace, tmp_path, method):
    few = "evaluation.plots=false", "evaluation.references=false"
    outcome = workplace.run(f"method={method}", f"output={tmp_path / 'merged'}", "tracking.log_model=false", *few)
    assert not list(tmp_path.glob(".*"))
    evaluated = ["method=base", f"model={tmp_path / 'merged'}", "tracking.log_model=false", *few]
    again = score_model(compose([*workplace.choices, *evaluated]))
    assert again.scores == outcome.scores
    found = mlflow.get_run(again.run_id)
    assert found.data.tags["kind"] == "model"
    assert str(tmp_path / "merged") in found.info.run_name


def test_an_earlier_run_is_repeated(workplace):
    outcome = workplace.once(*overrides("we_moe"))
    again = run(from_yaml(config_of(outcome.run_id), ["evaluation.plots=false"]))
    assert again.metrics == outcome.metrics
    assert again.scores == outcome.scores
    files = [(model_directory(each) / "model.safetensors").read_bytes() for each in (outcome, again)]
    assert files[0] == files[1]


def test_a_models_preference_is_asked_for_when_it_is_used(workplace, tmp_path):
    few = "evaluation.plots=false", "evaluation.references=false"
    outcome = workplace.run("method=pwe_moe", "method.steps=8", "method.lr=0.1", f"output={tmp_path / 'traded'}", *few)
    model = ["method=base", f"model={tmp_path / 'traded'}", "tracking.log_model=false", *few]

    def losses(*given: str) -> list[float]:
        return [score.loss for score in score_model(compose([*workplace.choices, *model, *given])).scores]

    assert losses() == [score.loss for score in outcome.scores]
    assert losses("evaluation.preference=[8,1,1]") != losses("evaluation.preference=[1,1,8]") != losses()
    with pytest.raises(UserError, match=r"evaluation\.preference=\[1\.0\]: a preference is 3 numbers"):
        losses("evaluation.preference=[1]")
    served = mlflow.pyfunc.load_model(outcome.model_uri)
    frame = pandas.DataFrame({"image": [Image.new("RGB", (28, 28), color) for color in ("red", "teal")]})
    own = served.predict(frame, params={"task": "red"})
    other = served.predict(frame, params={"task": "red", "preference": [8.0, 1.0, 1.0]})
    assert not own.probabilities.equals(other.probabilities)
    assert served.predict(frame, params={"task": "red"}).probabilities.equals(own.probabilities)


def test_a_preference_is_refused_where_nothing_trades(workplace):
    with pytest.raises(UserError, match=r"evaluation\.preference is of a model that was made before"):
        workplace.run("method=ties", "evaluation.preference=[1,1,1]")


def told(capsys, *arguments: str) -> str:
    """The run that a command line says it made."""
    assert cli.main([*arguments, "evaluation.plots=false"]) == 0
    return re.findall(r"^run (\w{32})", capsys.readouterr().out, re.MULTILINE)[0]


def scores_of(run_id: str) -> dict[str, float]:
    metrics = mlflow.get_run(run_id).data.metrics
    return {key: value for key, value in metrics.items() if key.endswith(("/accuracy", "/loss", "/normalized"))}


def test_the_command_line_repeats_and_evaluates(workplace, capsys):
    outcome = workplace.once(*overrides("we_moe"))
    assert scores_of(told(capsys, "run", "--from-run", outcome.run_id)) == scores_of(outcome.run_id)
    uri = f"model=runs:/{outcome.run_id}/model"
    again = told(capsys, "evaluate", *workplace.choices, uri, "pool.experts={}")
    assert all(scores_of(outcome.run_id)[key] == value for key, value in scores_of(again).items())
    alone = told(capsys, "evaluate", *workplace.choices, "expert=blue")
    assert mlflow.get_run(alone).data.tags["method"] == "expert"
    quick = "tracking.log_model=false", "evaluation.plots=false"
    assert scores_of(alone) == scores_of(workplace.run("method=expert", "method.expert=blue", *quick).run_id)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "dare", "adamerging"])
def test_the_same_run_twice_gives_the_same_bits(workplace, method):
    quick = "evaluation.plots=false", "evaluation.references=false"
    one, two = (workplace.run(*overrides(method), *quick) for _ in range(2))
    assert one.metrics == two.metrics
    files = [sorted(model_directory(each).glob("*.safetensors")) for each in (one, two)]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.mark.slow
def test_another_seed_draws_otherwise(workplace):
    quick = "method=dare", "evaluation.plots=false", "evaluation.references=false", "tracking.log_model=false"
    assert workplace.run(*quick).scores != workplace.run(*quick, "seed=1").scores


def test_an_average_of_scores_is_over_tasks():
    scores = [TaskScore("a", "accuracy", 0.5, True, 1.0, 1000), TaskScore("b", "accuracy", 0.75, True, 2.0, 10)]
    found = summarise(scores, References(experts={"a": 1.0, "b": 0.75}))
    assert found == {
        "average/accuracy": 0.625, "average/loss": 1.5, "worst/accuracy": 0.5,
        "average/normalized": 0.75, "worst/normalized": 0.5,
    }  # fmt: skip
    assert "average/normalized" not in summarise(scores, References(experts={"a": 1.0}))
    assert "average/normalized" not in summarise(scores, References(experts={"a": 1.0, "b": 0.0}))


def test_metrics_are_averaged_each_in_its_own_way():
    scores = [
        TaskScore("a", "perplexity", 2.0, False, math.log(2), 5),
        TaskScore("b", "perplexity", 8.0, False, math.log(8), 5),
        TaskScore("c", "exact_match", 0.5, True, 1.0, 5),
    ]
    found = summarise(scores, References(experts={"a": 2.0, "b": 2.0, "c": 1.0}))
    assert found == pytest.approx({
        "average/loss": (math.log(16) + 1) / 3, "average/perplexity": 4.0, "worst/perplexity": 8.0,
        "average/exact_match": 0.5, "worst/exact_match": 0.5,
        "average/normalized": (1 + 0.25 + 0.5) / 3, "worst/normalized": 0.25,
    })  # fmt: skip
    assert summarise([], References()) == {}
