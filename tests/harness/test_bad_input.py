"""Bad input, as a user meets it: one clear message, exit status 2, no traceback, and no run left open."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from harness import cli
from harness.checkpoint import FILE
from tests.harness.learners import write_language

TENSOR = "encoder.layers.1.mlp.fc1.weight"  # of an expert's file
NAME = f"vision_model.{TENSOR}"  # as the pool calls it
QUICK = "evaluation.plots=false", "evaluation.references=false"


@pytest.fixture
def refused(workplace, capfd):
    """Runs a command that must be refused; gives what it said."""

    def refuse(*overrides: str, opens: bool = True, command: str = "run") -> str:
        before, models = workplace.runs(), workplace.models()
        capfd.readouterr()
        assert cli.main([command, *workplace.choices, *QUICK, *overrides]) == 2
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        assert said.out == ""
        _, named, message = said.err.rpartition("crucible: ")  # after what `datasets` may show on first use
        assert named
        left = {run_id: run for run_id, run in workplace.runs().items() if run_id not in before}
        assert [run.info.status for run in left.values()] == (["FAILED"] if opens else [])
        assert workplace.models() == models
        return message

    return refuse


@pytest.fixture
def blue(tiny_pool, tmp_path):
    """A copy of an expert with other tensors: gives the override that puts it into the pool."""

    def changed(change) -> str:
        copy = tmp_path / "blue"
        shutil.copytree(tiny_pool.root / "blue", copy)
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return f"pool.experts.blue={copy}"

    return changed


def test_an_expert_that_misses_a_tensor(refused, blue):
    said = refused(blue(lambda weights: weights.pop(TENSOR)))
    assert f"expert blue misses {NAME} (32, 16), which the base has" in said


def test_an_expert_of_another_shape(refused, blue):
    said = refused(blue(lambda weights: weights.update({TENSOR: torch.zeros(31, 16)})))
    assert f"expert blue has {NAME} of shape (31, 16), where the base has (32, 16)" in said


def test_an_expert_of_other_names_and_a_faulty_task_are_told_together(refused, blue):
    def rename(weights):
        weights["encoder.layers.1.mlp.fc9.weight"] = weights.pop(TENSOR)

    said = refused(blue(rename), "tasks.tasks.red.path=/nowhere")
    assert f"misses {NAME}" in said
    assert "has vision_model.encoder.layers.1.mlp.fc9.weight (32, 16), which the base lacks" in said
    assert "task red: there is no data set at /nowhere" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["ties", "slerp experts=[red,blue]", "opcm", "simple_ensemble", "adamerging"])
def test_weights_that_are_no_numbers_are_named(refused, blue, method, value):
    def spoil(weights):
        weights[TENSOR][0, 0] = value

    method, *more = method.split()
    said = refused(blue(spoil), f"method={method}", *more)
    assert f"{NAME} has NaN or infinite weights in expert blue" in said
    assert "red" not in said


def test_a_pickled_checkpoint(refused, tiny_pool, tmp_path):
    (tmp_path / "config.json").write_text((tiny_pool.root / "blue" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    said = refused(f"pool.experts.blue={tmp_path}")
    assert "expert blue" in said
    assert "only as pytorch_model.bin: pickles run code when they are read, and only safetensors is taken" in said


@pytest.mark.parametrize("kept", [4, 1000, -10])
def test_a_truncated_file(refused, tiny_pool, tmp_path, kept):
    shutil.copytree(tiny_pool.root / "blue", tmp_path / "blue")
    file = tmp_path / "blue" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    said = refused(f"pool.experts.blue={tmp_path / 'blue'}")
    assert f"{file} is truncated" in said


def test_a_pool_that_is_not_there(refused):
    assert "expert blue: there is no checkpoint" in refused("pool.experts.blue=/nowhere/blue")


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging", "we_moe"])
def test_an_expert_without_a_task(refused, method):
    said = refused("~tasks.tasks.green", f"method={method}")
    assert f"{method} is fed the inputs of each expert's own task, and none is called green" in said


def test_a_task_that_the_pool_has_no_head_for(refused):
    said = refused("tasks.tasks.red.templates=['a very long text about one single {} which never seems to end']")
    assert "task red: the prompt" in said
    assert "the text tower reads at most 32" in said


def test_a_split_that_a_task_lacks(refused):
    said = refused("tasks.tasks.red.splits.test=tset")
    assert "task red: its test split 'tset' cannot be read" in said
    assert "train, validation, test" in said


def test_nuslerp_with_three(refused):
    assert "nuslerp merges at most 2 experts, the pool pool has 3; choose with experts=[red,green]" in refused(
        "method=nuslerp", opens=False
    )


def test_zero_experts(refused, workplace, tmp_path, tiny_pool):
    pool = yaml.safe_load((workplace.directory / "pool.yaml").read_text())
    (tmp_path / "none.yaml").write_text(yaml.safe_dump({**pool, "experts": {}}))
    said = refused(f"pool={tmp_path / 'none.yaml'}", opens=False)
    assert "expert" in said


def test_unknown_words_are_told_at_once(refused):
    said = refused("method=tise", "evaluation.bach_size=3", "seed=x", opens=False)
    assert said.startswith("3 faults in the configuration, nothing was started:")


def test_a_device_that_is_not_there(refused):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    said = refused("fabric.accelerator=cuda", opens=False)
    assert "fabric.accelerator=cuda fabric.devices=1 is not on this machine (CPU only)" in said


def test_a_tracking_server_that_does_not_answer(workplace, monkeypatch, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
    start = time.monotonic()
    assert cli.main(["run", *workplace.choices]) == 2
    assert time.monotonic() - start < 20
    said = capfd.readouterr().err
    assert "cannot be used, nothing was started" in said
    assert "Traceback" not in said


def test_an_output_that_is_taken_is_said_before_the_merge(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.run.make", lambda job: pytest.fail("merged"))
    (tmp_path / "file").touch()
    assert f"output={tmp_path}: it exists already and is not overwritten" in refused(f"output={tmp_path}")


def test_a_model_that_is_not_there(refused):
    said = refused("model=/nowhere/model", command="evaluate")
    assert "model=/nowhere/model: there is no such directory" in said


def test_a_loss_that_is_no_number_is_a_matter_of_the_learning_rate(refused):
    said = refused("method=adamerging", "method.lr=1e30", "method.steps=5")
    assert "not a number" in said
    assert "a smaller lr than 1e+30 may help" in said


# -- methods that are fed data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lorahub", "expert_merging"])
def test_too_few_examples(refused, method):
    said = refused(f"method={method}", "adaptation.examples=4", "experts=[red,blue]")
    assert said == (
        f"{method} learns from 5 examples of each task at least; red has 4, blue has 4: raise adaptation.examples, "
        "choose another adaptation.split, or leave these experts out with experts=[...]\n"
    )


def test_a_task_without_unlabelled_data(refused):
    for method in ("adamerging", "we_moe", "regmean"):
        said = refused(f"method={method}", "~tasks.tasks.red.splits.validation", opens=False)
        assert "adaptation.split=validation: task red has no such split; it has train, test" in said
    said = refused("method=adamerging", "tasks.tasks.red.splits.validation='validation[:0]'")
    assert "task red: its validation split 'validation[:0]' cannot be read" in said
    assert "corresponds to no data" in said


@pytest.mark.slow
def test_a_loss_that_is_no_number_writes_nothing(refused, tmp_path):
    """What was saved before is left."""
    kept = f"adaptation.checkpoint={tmp_path / 'kept'}", "adaptation.checkpoint_every=1"
    for method, told in (("adamerging", ", with the coefficients ["), ("surgery", ";")):
        output = tmp_path / method
        said = refused(f"method={method}", "method.lr=1e30", "method.steps=9", f"output={output}", *kept)
        assert f"the loss is not a number at step 1{told}" in said
        assert "a smaller lr than 1e+30 may help" in said
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
        assert len(torch.load(tmp_path / "kept" / FILE, weights_only=True)["history"]) == 1
        shutil.rmtree(tmp_path / "kept")


@pytest.mark.slow
def test_an_architecture_without_the_modules_that_a_method_needs(refused, tmp_path):
    write_language(tmp_path, "gpt2")
    own = f"pool={tmp_path / 'work' / 'pool.yaml'}", f"tasks={tmp_path / 'work' / 'tasks.yaml'}"
    said = refused("method=smile", *own)
    assert said == "smile gives experts to linear layers (nn.Linear) of blocks, and this GPT2LMHeadModel has none\n"
    said = refused("method=expert_prune", "experts=[words]", *own)
    assert "gpt2" in said
    assert "has no mixtures of experts (experts.N in a feed-forward block)" in said


@pytest.mark.slow
def test_a_checkpoint_of_another_method(refused, workplace, tmp_path):
    kept, least = f"adaptation.checkpoint={tmp_path}", ("method.granularity=task", "method.steps=1")
    workplace.run("method=adamerging", *least, *QUICK, "tracking.log_model=false", kept)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    for method in ("we_moe", "lorahub", "ada_rank"):
        said = refused(f"method={method}", "method.steps=1", kept, "adaptation.resume=true")
        assert f"{file} is a checkpoint of another run: it has method 'adamerging', here '{method}'; params." in said
    assert "a checkpoint is there; adaptation.resume=true goes on with it" in refused("method=we_moe", kept)
    said = refused("method=adamerging", *least, kept, "adaptation.resume=true", "experts=[red,blue]")
    assert "it has experts ['red', 'green', 'blue'], here ['red', 'blue']" in said
    file.write_bytes(before[:-9])
    assert "cannot be read as a checkpoint" in refused("method=adamerging", *least, kept, "adaptation.resume=true")
    assert file.read_bytes() == before[:-9]


def test_a_router_for_more_experts_than_there_are(refused, monkeypatch):
    for given in ("pwe_moe method.preference", "weighted_ensemble method.weights"):
        said = refused(*f"method={given}=[1,1,1,1]".split(), opens=False)
        assert f"{given.split()[1]} lists 4 numbers for 3 experts" in said
    monkeypatch.setattr("harness.make._refuse_non_finite", lambda inputs: pytest.fail("weights were read"))
    said = refused("method=smile", "method.top_k=4")
    assert said == "top_k=4 sends a token to more experts than there are, 3\n"


@pytest.mark.slow
def test_a_built_model_whose_recipe_names_more_experts_than_it_was_made_for(refused, workplace, tmp_path):
    output = tmp_path / "built"
    workplace.run("method=we_moe", "method.steps=1", *QUICK, "tracking.log_model=false", f"output={output}")
    facts = json.loads((output / "recipe.json").read_text())
    facts["recipe"]["experts"].append("fourth")
    (output / "recipe.json").write_text(json.dumps(facts))
    said = refused(f"model={output}", command="evaluate")
    assert f"the tensors of {output} do not fit what its recipe builds" in said
    assert "4 experts" in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk(refused, monkeypatch, tmp_path):
    """What is written goes to the device that is always full: the kernel's ENOSPC, as of a real disk."""
    from pools import write

    def full(descriptor, block, offset):
        with open("/dev/full", "wb", buffering=0) as device:
            return device.write(block)

    monkeypatch.setattr(write.os, "pwrite", full)
    said = refused(f"output={tmp_path / 'merged'}", "tracking.log_model=false")
    assert f"{tmp_path / 'merged'} could not be written: No space left on device" in said
    assert list(tmp_path.iterdir()) == []
    assert "could not be written: No space left on device" in refused("method=we_moe", "method.steps=1")


def test_a_disk_that_is_full_for_anything_else(refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "/store/MLmodel")

    monkeypatch.setattr("harness.run.keep", full)
    assert "/store/MLmodel could not be written: No space left on device; make room" in refused()


def test_a_disk_that_is_too_small_is_known_before_writing(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("pools.partial.shutil.disk_usage", lambda path: usage)
    said = refused(f"output={tmp_path / 'merged'}")
    assert "GiB are needed" in said
    assert not Path(tmp_path / "merged").exists()
