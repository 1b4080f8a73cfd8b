"""The contract of a method that is fed data, run against every such row: devices, interruptions, seeds, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from harness import checkpoint
from harness.compose import compose
from harness.config import UserError
from harness.execute import launch
from harness.losses import Losses
from harness.make import make
from harness.method_pages import entry
from methods.catalogue import CATALOGUE
from methods.kinds import Row
from tests.harness.conftest import ROOT
from tests.harness.learners import FED, STEPPED, fit, job_of, tensors_of, write_language

IDLE = ("k_proj.bias", "key.bias")  # they move no softmax: their gradient is rounding, which Adam makes steps of
every = pytest.mark.parametrize("row", STEPPED, ids=lambda row: row.name)


class KilledError(Exception):
    """In the place of a signal."""


def made(workplace, row: Row, *overrides: str, last: int | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What a row makes, and the losses on the way; broken off when it tells of step `last`."""
    losses: list[float] = []

    def report(step, loss, coefficients):
        if step == last:
            raise KilledError
        losses.append(loss)

    return tensors_of(make(job_of(workplace.choices, row, *overrides, report=report))), losses


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_the_rows_say_what_they_are_fed_and_never_the_test_split():
    """In the catalogue and in what `crucible list methods NAME` shows."""
    assert compose([]).adaptation.split == "validation"
    for row in CATALOGUE.values():
        assert row.is_fed(row.load_params()()) <= bool(row.data)
        shown = "`adaptation.split`, which is never test unless you say so" in entry(row)
        assert shown == bool(row.data or row.learns)
    for row in FED:
        assert row.is_fed(row.load_params()())
        assert "inputs" in row.data or "images" in row.data
        assert ("labelled" in row.data.replace("unlabelled", "")) == (row.loss == "labels" or row.stats == "gradient")


@pytest.mark.parametrize(
    ("method", "split", "tagged"),
    [("regmean", "test", "true"), ("regmean", "train", None), ("task_arithmetic", "test", None)],
)
def test_a_run_that_looks_at_test_inputs_is_tagged(workplace, method, split, tagged):
    quick = "evaluation.plots=false", "evaluation.references=false", "tracking.log_model=false"
    outcome = workplace.run(f"method={method}", f"adaptation.split={split}", *quick)
    assert workplace.runs()[outcome.run_id].data.tags.get("transductive") == tagged


@pytest.mark.slow
@every
def test_broken_off_it_goes_on_to_the_same_end(workplace, tmp_path, row):
    """And so do equal seeds give equal results."""
    whole, losses = made(workplace, row)
    kept = f"adaptation.checkpoint={tmp_path / 'kept'}", "adaptation.checkpoint_every=2"
    with pytest.raises(KilledError):
        made(workplace, row, *kept, last=3)
    assert list((tmp_path / "kept").iterdir())
    with pytest.raises(UserError, match=r"a checkpoint is there; adaptation\.resume=true goes on with it"):
        made(workplace, row, *kept)
    again, losses_again = made(workplace, row, *kept, "adaptation.resume=true")
    assert_same(again, whole)
    assert losses_again == losses


@pytest.mark.slow
@every
def test_in_bfloat16_it_learns_nearly_the_same(workplace, row):
    """With `fabric.precision=bf16-mixed` products are rounded, and nothing else is."""
    losses = {precision: list[float]() for precision in ("32-true", "bf16-mixed")}
    for precision, own in losses.items():
        fabric = launch("cpu", 1, precision, 0)
        job = job_of(workplace.choices, row, fabric=fabric, report=lambda step, loss, shown, own=own: own.append(loss))
        tensors_of(make(job))
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.03, abs=0.003)
    assert losses["bf16-mixed"] != losses["32-true"]


@pytest.mark.slow
@every
def test_a_loss_that_is_no_number_stops_it_and_leaves_what_was_saved(workplace, tmp_path, row, monkeypatch):
    kept, spoilt, before, shown = tmp_path / "kept", [], {}, []
    total = Losses.total

    def spoil(self, value):
        before.update({file.name: file.read_bytes() for file in kept.iterdir()})
        return math.nan if spoilt else total(self, value)

    monkeypatch.setattr(Losses, "total", spoil)

    def report(step, loss, coefficients):
        shown.append(coefficients)
        if step == 1:
            spoilt.append(step)

    kept_there = f"adaptation.checkpoint={kept}", "adaptation.checkpoint_every=1"
    with pytest.raises(FloatingPointError, match="at step 2") as told:
        make(job_of(workplace.choices, row, *kept_there, report=report))
    assert ("the coefficients" in str(told.value)) == (shown[0] is not None)
    assert "may help" in str(told.value)
    assert before
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before


@pytest.mark.slow
def test_two_processes_make_what_one_makes(shared_workplace, tmp_path_factory):
    """Every row on every family, one after the other in one pair of processes."""
    places = [shared_workplace.directory]
    for kind in ("qwen2", "t5", "bert"):
        root = tmp_path_factory.mktemp(kind)
        write_language(root, kind)
        places.append(root / "work")
    found = []
    for devices in (1, 2):
        out = places[1].parent / f"{devices}.pt"
        command = [sys.executable, "-m", "tests.harness.learners", str(devices), str(out), *map(str, places)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert one.keys() == two.keys()
    assert {name.partition("/")[2] for name in one} == {row.name for row in FED if fit(row, "clip")}
    far = {
        f"{name}: {key}": gap
        for name, tensors in one.items()
        for key, tensor in tensors.items()
        if not key.endswith(IDLE)
        and not (gap := float((tensor.double() - two[name][key].double()).abs().max()) if tensor.numel() else 0) <= 1e-5
    }
    assert far == {}


# -- checkpoints that are none of one's own ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("method.lr=0.5",), r"params\.lr 0\.001, here 0\.5"),
        (("seed=1",), "seed 0, here 1"),
        (("adaptation.split=train",), r"adaptation\.split 'validation', here 'train'; tasks\.blue"),
        (("adaptation.examples=7",), r"adaptation\.examples 256, here 7"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left(workplace, tmp_path, overrides, told):
    row, other = (next(row for row in STEPPED if row.name == name) for name in ("adamerging", "lorahub"))
    kept = f"adaptation.checkpoint={tmp_path}", "method.steps=1", "method.granularity=task"
    made(workplace, row, *kept)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    resumed = (*kept, "adaptation.resume=true")
    with pytest.raises(UserError, match=rf"is a checkpoint of another run: it has {told}.*; name another adaptation"):
        made(workplace, row, *resumed, *overrides)
    with pytest.raises(UserError, match="it has method 'adamerging', here 'lorahub'"):
        made(workplace, other, *resumed)
    (tmp_path / checkpoint.FILE).write_bytes(before[checkpoint.FILE][:-100])
    with pytest.raises(UserError, match="cannot be read as a checkpoint of learning"):
        made(workplace, row, *resumed)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        checkpoint.FILE: before[checkpoint.FILE][:-100]
    }


def test_a_place_that_is_no_directory_is_refused(workplace, tmp_path):
    (tmp_path / "file").touch()
    row = next(row for row in STEPPED if row.name == "we_moe")
    with pytest.raises(UserError, match="is no directory to write in"):
        made(workplace, row, f"adaptation.checkpoint={tmp_path / 'file'}")
