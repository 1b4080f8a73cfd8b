"""Experts that are trained: what is learnt, how it is written, named by a pool and gone on with; what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import datasets
import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness import cli
from harness.bench import open_bench
from harness.compose import compose
from harness.finetune_settings import FinetuneSettings, LoraSettings
from harness.rebuild import open_directory
from harness.track import local_path
from pools.adapters import LoraExpert
from tests.pools.language_models import write_model

QUICK = "steps=12", "batch_size=6", "lr=0.01", "validate_every=6", "evaluation.plots=false"


@pytest.fixture(scope="module")
def place(tmp_path_factory, build_workplace):
    """A workplace of the tiny CLIP, for this file alone."""
    return build_workplace(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(place, *overrides: str) -> mlflow.entities.Run:
    """Train by the command; gives the run."""
    with place.entered():
        before = place.runs()
        assert cli.main(["finetune", *place.choices, *QUICK, *overrides]) == 0
        (new,) = [run for run_id, run in place.runs().items() if run_id not in before]
        assert new.info.status == "FINISHED"
    return new


def directory_of(place, run: mlflow.entities.Run) -> Path:
    with place.entered():
        return local_path(f"runs:/{run.info.run_id}/model")


def refused(place, capfd, *overrides: str) -> str:
    """What a training that cannot be done says; it leaves no model."""
    with place.entered():
        models = place.models()
        capfd.readouterr()
        assert cli.main(["finetune", *place.choices, *QUICK, *overrides]) == 2
        assert place.models() == models
        assert all(run.info.status != "RUNNING" for run in place.runs().values())
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    return said.err.rpartition("crucible: ")[2]


def series(place, run: mlflow.entities.Run, key: str) -> dict[int, float]:
    with place.entered():
        return {each.step: each.value for each in mlflow.MlflowClient().get_metric_history(run.info.run_id, key)}


@pytest.fixture(scope="module")
def full(place) -> mlflow.entities.Run:
    return trained(place, "task=red", "steps=30")


@pytest.mark.slow
def test_a_trained_tower_beats_its_base_and_is_recorded(place, full) -> None:
    losses, validated = series(place, full, "train/loss"), series(place, full, "validation/loss")
    assert list(losses) == list(range(1, 31))
    assert list(validated) == [0, 6, 12, 18, 24, 30]
    assert validated[30] < 0.7 * validated[0]
    assert full.data.metrics["red/loss"] == pytest.approx(validated[30])  # as it was written
    assert full.data.metrics["red/accuracy"] >= series(place, full, "validation/accuracy")[0]
    told = {key: full.data.params[key] for key in ("task", "finetune.mode", "finetune.steps", "finetune.lora.rank")}
    assert told == {"task": "red", "finetune.mode": "full", "finetune.steps": "30", "finetune.lora.rank": "8"}
    assert full.data.tags["kind"] == "expert"
    assert "fingerprint.base" in full.data.params
    assert {each.dataset.name for each in full.inputs.dataset_inputs} == {"red/train", "red/validation"}


@pytest.mark.slow
def test_only_the_tower_is_trained(place, full, tiny_pool) -> None:
    base, expert = (
        load_file(tiny_pool.root / "base" / "model.safetensors"),
        load_file(directory_of(place, full) / "model.safetensors"),
    )
    moved = {name for name, tensor in base.items() if not torch.equal(tensor, expert[name])}
    assert moved
    assert all(name.startswith("vision_model.") for name in moved)


@pytest.mark.slow
def test_a_pool_names_the_expert_by_its_run(place, full) -> None:
    uri = f"runs:/{full.info.run_id}/model"
    done = place.run(f"+pool.experts.mine={uri}", "experts=[green,mine]", "evaluation.plots=false")
    assert done.model_uri
    with place.entered():
        alone = cli.main(["evaluate", *place.choices, f"model={uri}", "evaluation.plots=false"])
    assert alone == 0


@pytest.fixture(scope="module")
def lora(place) -> dict[str, mlflow.entities.Run]:
    return {mode: trained(place, "task=red", f"mode={mode}", "lora.rank=2") for mode in ("lora", "linear_lora")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "linear_lora"])
def test_an_adapter_is_in_the_weights_and_beside_them(place, lora, tiny_pool, mode) -> None:
    validated = series(place, lora[mode], "validation/loss")
    assert validated[12] < validated[0]
    found = directory_of(place, lora[mode])
    pool = open_bench(compose(place.choices).pool, compose(["tasks=none"]).tasks, local_path).pool
    adapter = LoraExpert(found / "adapter", "adapter", pool.base)
    merged = load_file(found / "model.safetensors")
    for name in pool.base:
        torch.testing.assert_close(merged[name], adapter[name], rtol=1e-5, atol=1e-6)
    moved = [name for name in pool.base if not torch.equal(pool.base[name], adapter[name])]
    assert moved
    assert all(pool.roles.is_linear(name) and 1 <= pool.roles.layer_of(name) <= 2 for name in moved)


@pytest.mark.slow
def test_a_linearised_adapter_keeps_its_first_factor(place, lora) -> None:
    longer = trained(place, "task=green", "mode=linear_lora", "lora.rank=2", "steps=3")

    def factors(run, which: str) -> dict[str, torch.Tensor]:
        weights = load_file(directory_of(place, run) / "adapter" / "adapter_model.safetensors")
        return {name: tensor for name, tensor in weights.items() if f"lora_{which}" in name}

    linear, plain = lora["linear_lora"], lora["lora"]
    assert factors(linear, "A")
    for name, tensor in factors(linear, "A").items():
        assert torch.equal(tensor, factors(longer, "A")[name])  # of another task, another length
        assert not torch.equal(tensor, factors(plain, "A")[name])
    assert all(tensor.any() for tensor in factors(linear, "B").values())


@pytest.mark.slow
def test_equal_seeds_give_equal_experts_and_other_seeds_others(place, lora) -> None:
    def weights(run) -> dict[str, torch.Tensor]:
        return load_file(directory_of(place, run) / "model.safetensors")

    one = weights(lora["lora"])
    again = weights(trained(place, "task=red", "mode=lora", "lora.rank=2"))
    other = weights(trained(place, "task=red", "mode=lora", "lora.rank=2", "seed=1"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_an_interrupted_training_is_gone_on_with_to_the_same_end(place, tmp_path, monkeypatch) -> None:
    from harness import finetune_session

    overrides = "task=blue", "mode=lora", "lora.rank=2", "lora.dropout=0.2"
    whole = load_file(directory_of(place, trained(place, *overrides)) / "model.safetensors")
    kept = f"checkpoints={tmp_path / 'kept'}", "checkpoint_every=4"
    score, calls = finetune_session.Session.score, []

    def interrupted(self, module):
        calls.append(module)
        if len(calls) == 2:  # the one on the way, after step 6
            raise KeyboardInterrupt
        return score(self, module)

    monkeypatch.setattr(finetune_session.Session, "score", interrupted)
    with place.entered():
        assert cli.main(["finetune", *place.choices, *QUICK, *overrides, *kept]) == 130
        assert "KILLED" in {run.info.status for run in place.runs().values()}
    monkeypatch.undo()
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["step=4.ckpt"]
    resumed = trained(place, *overrides, *kept, "resume=true")
    assert list(series(place, resumed, "train/loss")) == list(range(1, 13))  # what was before is in the checkpoint
    found = load_file(directory_of(place, resumed) / "model.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_refused(place, tmp_path, capfd) -> None:
    kept = f"checkpoints={tmp_path / 'kept'}", "checkpoint_every=4"
    assert "no checkpoint in" in refused(place, capfd, "task=blue", *kept, "resume=true")
    trained(place, "task=blue", "steps=4", *kept)
    said = refused(place, capfd, "task=blue", "steps=4", "lr=0.02", *kept, "resume=true")
    assert "is of another training: lr was 0.01 and is 0.02" in said
    assert "there is step=4.ckpt; finetune.resume=true goes on" in refused(place, capfd, "task=blue", "steps=4", *kept)
    (tmp_path / "kept" / "step=4.ckpt").write_bytes(b"no")
    said = refused(place, capfd, "task=blue", "steps=4", *kept, "resume=true")
    assert "step=4.ckpt cannot be read as a checkpoint" in said


def killed_at(place, directory: Path, step: int, *overrides: str) -> None:
    """Train in a process of its own, and kill it with no chance to tidy up once it has a checkpoint of a step."""
    command = place.command("finetune", *QUICK, *overrides)
    process = subprocess.Popen(command, env=place.environment, cwd=place.directory)
    while process.poll() is None and not (directory / f"step={step}.ckpt").exists():
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_training_is_gone_on_with_to_the_same_bits(place, tmp_path) -> None:
    overrides = "task=green", "steps=400", "validate_every=null"
    kept = f"checkpoints={tmp_path}", "checkpoint_every=20"
    killed_at(place, tmp_path, 40, *overrides, *kept)
    (left,) = tmp_path.glob("*.ckpt")
    assert 40 <= int(left.stem.removeprefix("step=")) < 400
    resumed = trained(place, *overrides, *kept, "resume=true")
    assert list(series(place, resumed, "train/loss")) == list(range(1, 401))
    found = load_file(directory_of(place, resumed) / "model.safetensors")
    whole = load_file(directory_of(place, trained(place, *overrides)) / "model.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["red", "texts"])  # neither has dropout, which is each device's own
def test_two_devices_train_the_same_expert(place, language, tmp_path, name) -> None:
    place = place if name == "red" else language(name)
    overrides = "task=red" if name == "red" else "validate_every=3", "steps=6", "batch_size=5"
    one = load_file(directory_of(place, trained(place, *overrides)) / "model.safetensors")
    devices = "fabric.accelerator=cpu", "fabric.devices=2", f"output={tmp_path / 'two'}"
    done = place.cli("finetune", *QUICK, *overrides, *devices, timeout=600)
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "model.safetensors")
    unseen = "k_proj.bias"  # a softmax does not see it: its gradient is rounding, of which Adam makes whole steps
    for key in (key for key in one if not key.endswith(unseen)):
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


# -- language models ---------------------------------------------------------------------------------------------------

ASKED = {"prompt": [f"{k}+1=" for k in range(8)], "target": [str(k + 1) for k in range(8)]}
MOODS = {"text": ["good", "bad", "fine", "poor"] * 3, "label": [0, 1, 0, 1] * 3}
LIKED = {"chosen": ["good", "fine", "well"] * 3, "rejected": ["bad", "poor", "ill"] * 3}
TEXTS = {"text": ["some text", "other words", "a third"] * 3}
LANGUAGE = {
    "texts": ("causal_lm", "llama", "AutoModelForCausalLM", "perplexity", TEXTS, {}),
    "sums": ("causal_lm", "gpt2", "AutoModelForCausalLM", "exact_match", ASKED, {"max_new_tokens": 3}),
    "answers": ("seq2seq", "t5", "AutoModelForSeq2SeqLM", "exact_match", ASKED, {"max_new_tokens": 3}),
    "moods": (
        "sequence_classification", "bert", "AutoModelForSequenceClassification", "text_classification", MOODS,
        {"labels": ["good", "bad"]},
    ),
    "headless": (
        "sequence_classification", "bert", "AutoModel", "text_classification", MOODS, {"labels": ["good", "bad"]},
    ),
    "rewards": ("sequence_classification", "llama", "AutoModel", "preference", LIKED, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def language(tmp_path_factory, build_workplace):
    """Makes workplaces of a base and one task of a kind."""
    made = {}

    def build(name: str):
        if name not in made:
            family, kind, auto, task, columns, more = LANGUAGE[name]
            root = tmp_path_factory.mktemp(name)
            write_model(root / "base", kind, 0, auto)
            datasets.Dataset.from_dict(columns).to_parquet(root / "train.parquet")
            place = build_workplace(root / "work", {"family": family, "base": str(root / "base"), "experts": {}})
            splits = dict.fromkeys(("train", "validation", "test"), "train")
            settings = {"path": str(root), "kind": task, "splits": splits, **more}
            (place.directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {name: settings}}))
            made[name] = place
        return made[name]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_every_family_learns_and_its_expert_is_merged(language, name, mode) -> None:
    place = language(name)
    run = trained(place, f"mode={mode}", "steps=20", "validate_every=null")
    validated = series(place, run, "validation/loss")
    assert validated[20] < validated[0]
    assert run.data.metrics[f"{name}/loss"] == pytest.approx(validated[20], rel=1e-4)  # as it was written
    uri = f"runs:/{run.info.run_id}/model"
    quick = "evaluation.plots=false", "tracking.log_model=false"
    done = place.run(f"+pool.experts.{name}={uri}", "method.scale=1.0", *quick)
    assert done.scores[0].loss == pytest.approx(validated[20], rel=1e-4)  # the base plus all of one change is it
    found = directory_of(place, run)
    assert (found / "adapter_config.json").exists() == (mode == "lora")
    module, _ = open_directory(found, LANGUAGE[name][0])
    assert not module.training


@pytest.mark.slow
def test_targets_are_named_by_their_last_part(language, capfd) -> None:
    place = language("texts")
    run = trained(place, "mode=lora", "steps=2", "lora.targets=[q_proj,down_proj]")
    config = json.loads((directory_of(place, run) / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert "no linear layer is called 'qproj'" in refused(place, capfd, "mode=lora", "lora.targets=[qproj]")


@pytest.mark.slow
def test_what_is_frozen_stays(language) -> None:
    place = language("texts")
    run = trained(place, "steps=2", "freeze=['*embed*','lm_head*']")
    own = load_file(directory_of(place, run) / "model.safetensors")
    base = load_file(Path(yaml.safe_load((place.directory / "pool.yaml").read_text())["base"]) / "model.safetensors")
    still = {name for name in base if torch.equal(base[name], own[name])}
    assert still == {name for name in base if "embed" in name or "lm_head" in name}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("task=red", "batch_size=31"), "task red has 30 rows in train, fewer than finetune.batch_size=31"),
        (("task=rde",), "did you mean red?"),
        ((), "finetune.task=NAME says what is learnt; known are red, green, blue"),
        (("task=red", "~tasks.tasks.red.splits.train"), "finetune.split=train: task red has no such split"),
        (("task=red", "pool.base=null"), "the pool pool has none; pool.base=PATH"),
        (("task=red", "fabric.accelerator=cpu", "fabric.devices=7"), "finetune.batch_size=6 is fewer; raise it"),
        (("task=red", "max_tokens=8"), "images have no tokens"),
        (("task=red", "mode=ful"), "finetune.mode=ful: mode is one of full, lora, linear_lora; got 'ful'"),
        (("task=red", "resume=true"), "finetune.checkpoints=DIR"),
        (("task=red", "finetune.stesp=3"), "did you mean finetune.steps?"),
        (("task=red", "freeze=[nothing*]"), "no trained parameter fits 'nothing*'"),
        (("task=red", "freeze=['*']"), "leaves nothing to train"),
    ],
)
def test_bad_input_is_told_in_one_message(place, capfd, overrides, said) -> None:
    if "~tasks.tasks.red.splits.train" in overrides:
        tasks = yaml.safe_load((place.directory / "tasks.yaml").read_text())
        del tasks["tasks"]["red"]["splits"]["train"]
        other = place.directory / "untrained.yaml"
        other.write_text(yaml.safe_dump(tasks))
        overrides = ("task=red", f"tasks={other}")
    assert said in refused(place, capfd, *overrides)


def test_a_loss_that_is_no_number_stops_with_its_step(place, capfd, tmp_path) -> None:
    output = tmp_path / "expert"
    said = refused(place, capfd, "task=red", "lr=1e30", "clip=null", f"output={output}")
    assert "the loss is nan at step" in said
    assert "a smaller finetune.lr than 1e+30 may help; nothing was written" in said
    assert not output.exists()


def test_settings_are_held_to_their_ranges() -> None:
    with pytest.raises(ValueError, match=r"rank must be at least 1 .*\n.*dropout is a share in \[0, 1\), got 1"):
        LoraSettings(rank=0, dropout=1.0)
    with pytest.raises(ValueError, match="lr must be positive"):
        FinetuneSettings(lr=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "better"),
    [
        (("task=digits", "steps=100"), 0.3),
        (("task=digits", "finetune=lora", "steps=100"), 0.3),
        (("task=digits", "finetune=linear_lora", "steps=100"), 0.3),
        (("pool=mini_lm", "tasks=mini_lm", "task=roman", "steps=150"), 0.4),
    ],
)
def test_the_embedded_suites_have_experts_trained_in_a_minute(tmp_path, monkeypatch, choices, better) -> None:
    from harness.compose_section import section, split_section
    from harness.finetune import finetune

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    own, others = split_section(choices, "finetune", FinetuneSettings)
    config = compose(["method=base", "evaluation.split=validation", "evaluation.limit=200", *others])
    done = finetune(config, section(FinetuneSettings, "finetune", own))
    assert done.after.value > done.before.value + better
    assert done.after.loss < done.before.loss
