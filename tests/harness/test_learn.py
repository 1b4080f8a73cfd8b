"""Losses against plain loops, gradients against autograd, and learning that is broken off and gone on with."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from harness import searching
from harness.bench import open_bench
from harness.checkpoint import FILE, Saved
from harness.compose import compose
from harness.config import UserError
from harness.execute import launch
from harness.inputs import MergeError
from harness.learn import Course, Merging, Module, learn
from harness.losses import Losses, Shells, parameters_of
from harness.make import Job, make
from harness.merge import Merge, merge
from harness.track import local_path
from methods.adamerging import AdamergingParams, Coefficients
from methods.catalogue import CATALOGUE, find
from methods.concrete import ConcreteAdamergingParams, concrete_adamerging
from methods.kinds import Kind, Place, Stack
from methods.min_norm import min_norm
from pools.language import CausalLMPool
from tests.harness.conftest import Workplace
from tests.harness.learners import DATA, write_language
from tests.harness.test_adapt import encoder, examples, fabric  # noqa: F401
from tests.pools.language_models import write_model

TASKS = {"a": examples(6, 3, seed=1), "b": examples(6, 2, seed=2)}


class Own:
    """Of `Shells` what merging asks: one module for all tasks, merged but for what is in no forward pass."""

    def __init__(self) -> None:
        self.module = encoder(0).requires_grad_(False)
        self.paths = {name: name for name, _ in self.module.named_parameters() if "unused" not in name}

    def stack(self, n_experts: int = 2) -> Stack:
        base = {name: self.module.get_parameter(name) for name in self.paths}
        experts = [encoder(seed).state_dict() for seed in range(1, n_experts + 1)]
        deltas = {name: torch.stack([expert[name] - base[name] for expert in experts]) for name in base}
        return Stack(base, deltas, {name: Place(int("outer" in name), 1, name=name) for name in base})

    def forward(self, weights):
        return lambda task, inputs: torch.func.functional_call(self.module, weights, (), inputs)


def merging(fabric, conflicts="sum", **params) -> Merging:  # noqa: F811
    own = Own()
    return Merging(fabric, Coefficients(own.stack(), AdamergingParams(**params)), own, conflicts)


def test_entropy_is_that_of_the_next_batches_summed_over_tasks(fabric):  # noqa: F811
    module, tasks = encoder(0), {"a": examples(5, 3, seed=1), "b": examples(4, 2, seed=2)}
    value = Losses(fabric, tasks, 10, 0)(lambda inputs: module(**inputs))  # larger than the tasks: all rows each time
    wanted = 0.0
    for fed in tasks.values():
        for row, _ in fed.rows:
            chances = torch.softmax(module(row[None]) @ fed.head.T, 1)[0].tolist()
            wanted -= sum(chance * math.log(chance) for chance in chances) / len(fed)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert module.inner.weight.grad is not None


def test_with_labels_it_is_the_cross_entropy(fabric):  # noqa: F811
    module, fed = encoder(0), examples(5, 3)
    value = Losses(fabric, {"a": fed}, 10, 0, "labels")(lambda inputs: module(**inputs))
    wanted = -sum(torch.log_softmax(module(row[None]) @ fed.head.T, 1)[0, label].item() for row, label in fed.rows) / 5
    assert value == pytest.approx(wanted, rel=1e-5)


def test_every_example_comes_once_a_round_and_batches_can_be_left_out(fabric):  # noqa: F811
    fed = examples(5, 2)

    def shown(losses, n):
        seen = []

        def forward(inputs):
            seen.append(inputs["tokens"])
            return torch.zeros(len(inputs["tokens"]), 3, requires_grad=True)

        for _ in range(n):
            assert losses(forward) == pytest.approx(math.log(2))
        return seen

    losses = Losses(fabric, {"a": fed}, 2, 0)
    seen = shown(losses, 5)
    assert losses.drawn == 5
    for row, _ in fed.rows:
        assert sum(torch.equal(row, each) for each in torch.cat(seen)) == 2
    later = Losses(fabric, {"a": fed}, 2, 0)
    later.skip(3)
    assert all(torch.equal(*pair) for pair in zip(shown(later, 2), seen[3:], strict=True))


def test_a_coefficients_gradient_is_autograds_through_the_merge(fabric):  # noqa: F811
    subject = merging(fabric, granularity="layer")
    at = torch.tensor([[0.3, -0.2], [0.7, 0.4]])
    subject.learnt["coefficients"].copy_(at)
    value = subject.slope(0, Losses(fabric, TASKS, 10, 0))
    own, coefficients = Own(), at.clone().requires_grad_()
    stack = own.stack()
    merged = {
        name: base + torch.tensordot(coefficients[stack.places[name].layer], stack.deltas[name], dims=1)
        for name, base in stack.base.items()
    }
    loss = torch.zeros(())
    for fed in TASKS.values():
        outputs = own.forward(merged)("a", {"tokens": torch.stack([row for row, _ in fed.rows])})
        logits = outputs @ fed.head.T
        loss = loss - (torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum() / len(fed)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(subject.learnt["coefficients"].grad, coefficients.grad, rtol=1e-4, atol=1e-6)


def test_images_of_several_tasks_shown_at_once_give_the_same(fabric):  # noqa: F811
    """As on a GPU, where the tasks' batches are joined."""
    found = []
    for joins in (False, True):
        subject, losses = merging(fabric), Losses(fabric, TASKS, 10, 0)
        losses._joins = joins
        value = subject.slope(0, losses)
        found.append((value, subject.learnt["coefficients"].grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_mgda_takes_the_combination_of_the_least_norm(fabric):  # noqa: F811
    apart = []
    for task, fed in TASKS.items():
        subject = merging(fabric)
        subject.slope(0, Losses(fabric, {task: fed}, 10, 0))
        apart.append(subject.learnt["coefficients"].grad.flatten().double())
    stacked = torch.stack(apart)
    shares = min_norm(stacked @ stacked.T)
    subject = merging(fabric, "mgda")
    value = subject.slope(0, Losses(fabric, TASKS, 10, 0))
    found = subject.learnt["coefficients"].grad.flatten().double()
    torch.testing.assert_close(found, torch.tensor(shares, dtype=torch.float64) @ stacked, rtol=1e-4, atol=1e-7)
    assert value == pytest.approx(merging(fabric).slope(0, Losses(fabric, TASKS, 10, 0)), rel=1e-5)


def test_a_module_learns_only_what_is_trainable_and_lowers_the_loss(fabric):  # noqa: F811
    module, losses = encoder(0), []
    module.inner.requires_grad_(False)
    before = module.inner.weight.clone()
    course = Course("x", 30, 1e-2, lambda step, value, _: losses.append((step, value)))
    learn(fabric, Module(fabric, module), Losses(fabric, {"a": examples(8, 3)}, 8, 0), course)
    assert [step for step, _ in losses] == list(range(30))
    assert losses[-1][1] < 0.7 * losses[0][1]
    assert torch.equal(module.inner.weight, before)


def test_a_loss_that_is_no_number_ends_it_with_step_and_coefficients(fabric, tmp_path):  # noqa: F811
    subject = merging(fabric, granularity="task")
    seen = []

    def spoil(step, loss, coefficients):
        seen.append(step)
        if step == 1:
            TASKS["a"].head.mul_(math.nan)

    kept = TASKS["a"].head.clone()
    saved = Saved(tmp_path, 1, False)
    losses = Losses(fabric, TASKS, 10, 0)
    losses._heads["a"] = TASKS["a"].head
    try:
        with pytest.raises(FloatingPointError, match=r"at step 2, with the coefficients \[0\.[\d., ]+\].*than 0.01"):
            learn(fabric, subject, losses, Course("x", 9, {"": 0.01}, spoil, saved))
    finally:
        TASKS["a"].head.copy_(kept)
    assert seen == [0, 1]
    assert len(torch.load(tmp_path / FILE, weights_only=True)["history"]) == 2  # what was good is left


class KilledError(Exception):
    """In the place of a signal."""


def masks(fabric):  # noqa: F811
    own = Own()
    params = ConcreteAdamergingParams(steps=5, adamerging_steps=5, lr=0.05, adamerging_lr=0.02)
    return Merging(fabric, concrete_adamerging(own.stack(), params), own)


@pytest.mark.parametrize(("made", "at"), [(merging, 4), (masks, 5)])
def test_gone_on_with_it_ends_the_same_bit_for_bit(fabric, tmp_path, made, at):  # noqa: F811
    def learnt(saved=None, last=None):
        subject, curve = made(fabric), []

        def report(step, loss, coefficients):
            if step == last:
                raise KilledError
            curve.append((step, loss))

        learn(fabric, subject, Losses(fabric, TASKS, 4, 0), Course("x", 10, {"mask/": 0.05, "": 0.02}, report, saved))
        return subject.learnt, curve

    whole, curve = learnt()
    with pytest.raises(KilledError):
        learnt(Saved(tmp_path, 2, False, {"method": "x"}), last=at)
    again, curve_again = learnt(Saved(tmp_path, 2, True, {"method": "x"}))
    assert curve_again == curve
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    done, curve_done = learnt(Saved(tmp_path, 2, True, {"method": "x"}))  # nothing is left to do
    assert curve_done == curve
    assert all(torch.equal(tensor, done[name]) for name, tensor in whole.items())


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another(fabric, tmp_path):  # noqa: F811
    def start(resume, facts, made=merging):
        learn(
            fabric, made(fabric), Losses(fabric, TASKS, 4, 0),
            Course("x", 2, {"": 0.02}, saved=Saved(tmp_path, 1, resume, facts)),
        )  # fmt: skip

    start(False, {"method": "x", "seed": 0})
    with pytest.raises(UserError, match=r"a checkpoint is there; adaptation.resume=true goes on with it"):
        start(False, {"method": "x", "seed": 0})
    with pytest.raises(UserError, match=r"of another run: it has method 'x', here 'y'"):
        start(True, {"method": "y", "seed": 0})
    with pytest.raises(UserError, match="other tensors"):
        start(True, {"method": "x", "seed": 0}, masks)
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as a checkpoint of learning"):
        start(True, {"method": "x", "seed": 0})


OPENED = {}


def job_of(workplace, *given, report=lambda *_: None) -> Job:
    config = compose([*workplace.choices, *given, "adaptation.batch_size=12"])  # all rows in every batch
    bench = OPENED.setdefault(workplace.directory, None) or open_bench(config.pool, config.tasks, local_path)
    OPENED[workplace.directory] = bench
    return Job(
        find(config.method_name), config.method, bench, launch("cpu", 1, "32-true", 0), config.adaptation, 0, report
    )


LEARNT = [row.name for row in CATALOGUE.values() if row.kind is Kind.search and not (row.rule or row.adversary)]
FASTER = {"adamerging_lr": 0.05, "adamerging_steps": 20, "lr": 0.1}  # in which a run takes a moment
RULES = {"adamerging_plus": ("ties", {"scale": 0.3, "disjoint": "sum"}), "concrete_tsv_m": ("tsv_m", {"scale": 1.0})}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param(method, [], marks=[] if method in ("adamerging", "ada_rank") else pytest.mark.slow)
        for method in LEARNT
    ]
    + [("adamerging", [given]) for given in ("method.granularity=task", "method.granularity=layer")]
    + [("adamerging", ["method.conflicts=mgda"]), ("adamerging", ["method.loss=labels"])],
)
def test_what_a_search_learns_beats_where_it_starts(workplace, method, more):
    """Those that ask in their own way are in test_asked_searches.py."""
    known = find(method).load_params().__dataclass_fields__
    faster = [f"method.{name}={value}" for name, value in FASTER.items() if name in known]
    reported = []
    given = [f"method={method}", "method.steps=20", *faster, *more]
    job = job_of(workplace, *given, report=lambda step, loss, coefficients: reported.append((loss, coefficients)))
    fed = job.bench.adaptation(job.adaptation, 0, job.bench.tasks)
    losses = Losses(job.fabric, fed, 12, 0, getattr(job.params, "loss", "entropy"))
    made = make(job)
    module = job.bench.pool.module(merge(made.merge))
    assert len(reported) == (40 if method == "concrete_adamerging" else 20)
    start, params = RULES.get(method, ("task_arithmetic", {"scale": 0.3}))
    before = job.bench.pool.module(merge(Merge(find(start), find(start).load_params()(**params), job.inputs)))
    at_start, at_end = losses(lambda inputs: before(**inputs)), losses(lambda inputs: module(**inputs))
    assert at_end < at_start - 0.002
    if not method.startswith("concrete"):
        assert at_start == pytest.approx(reported[0][0], rel=1e-4)
        assert bool((reported[0][1] == 0.3).all())
    if made.coefficients is not None:
        assert {len(values) for values in made.coefficients.values()} == {len(job.bench.pool.experts)}


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Makes workplaces of language models, each expert with a task of its name."""

    @functools.cache
    def build(kind):
        root = tmp_path_factory.mktemp(kind)
        write_language(root, kind)
        return Workplace(root / "work")

    return build


def test_tensors_are_found_in_the_module_under_other_names(tmp_path):
    """A checkpoint of GPT-2 without its head names its tensors without `transformer.`."""
    write_model(tmp_path, "gpt2", 0, "AutoModel")
    pool = CausalLMPool((tmp_path, "gpt2"), {})
    module, names = pool.module(), list(pool.base)
    found = parameters_of(pool, module, names)
    assert found["h.0.mlp.c_fc.weight"] == "transformer.h.0.mlp.c_fc.weight"
    for name, path in found.items():
        assert torch.equal(module.get_parameter(path), pool.base[name])
    with pytest.raises(MergeError, match=r"h\.0\.nothing, 1 tensors in all, are not found in the model"):
        parameters_of(pool, module, [*names, "h.0.nothing"])


@pytest.mark.parametrize("kind", ["entropy", "labels"])
def test_losses_of_texts_are_a_plain_loop(language, kind):
    """Each row on its own, without padding: of texts every token after the first, of answers the first, or all."""
    with language("qwen2").entered():
        job = job_of(language("qwen2"), "method=adamerging")
        fed = job.bench.adaptation(job.adaptation, 0, job.bench.tasks, texts=True)
    pool, module = job.bench.pool, job.bench.pool.module()
    value = Losses(job.fabric, fed, 12, 0, kind).backward(lambda task, inputs: module(**inputs))
    wanted = 0.0
    for task, rows in (("words", DATA["words"][1]["text"]), ("sums", [*zip(*DATA["sums"][1].values(), strict=True)])):
        for row in filter(None, rows):
            inputs = pool.feed([row])
            labels = inputs.pop("labels")[0, 1:]
            logs = torch.log_softmax(module(**inputs).logits[0, :-1], -1).detach()
            places = (labels != -100).nonzero()[:, 0]
            if kind == "labels":
                own = -logs[places, labels[places]].mean()
            else:
                places = places[:1] if task == "sums" else places
                own = -(logs[places].exp() * logs[places]).sum(1).mean()
            wanted += own.item() / len(rows)
    assert value == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["entropy", "labels"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("qwen2", "adamerging"), ("gpt2", "ada_rank"), ("t5", "adamerging"), ("bert", "concrete_adamerging")],
)
def test_language_models_learn_too(language, kind, method, loss):
    curve = []
    more = ["method.adamerging_steps=10", "method.adamerging_lr=0.05"] if method == "concrete_adamerging" else []
    given = [f"method={method}", "method.steps=10", "method.lr=0.05", f"method.loss={loss}", *more]
    with language(kind).entered():
        job = job_of(language(kind), *given, report=lambda step, value, _: curve.append(value))
        made = make(job)
        merged = merge(made.merge)
    assert set(merged) == set(job.bench.pool.base)
    assert curve[-1] < curve[-10] < 20


# -- several processes, and none ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(workplace, tmp_path):
    """By the command line; every row is run by two processes in test_every_learner.py."""
    given = "method=adamerging", "method.conflicts=mgda"
    found = []
    for devices in (1, 2):
        place = tmp_path / str(devices)
        done = workplace.cli(
            "run", *given, "method.steps=4", "tracking.log_model=false", "evaluation.plots=false", f"output={place}",
            "evaluation.references=false", "fabric.accelerator=cpu", f"fabric.devices={devices}",
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        found.append({name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [("method=concrete_adamerging", "method.adamerging_steps=60"), ("method=we_moe",)],
    ids=["search", "build"],
)
def test_after_a_kill_the_command_goes_on_to_the_same_end(workplace, tmp_path, given):
    given = ["run", *given, "method.steps=60", "tracking.log_model=false", "adaptation.checkpoint_every=5"]
    given += ["evaluation.plots=false", "evaluation.references=false"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = workplace.cli(*given, f"adaptation.checkpoint={one}", f"output={tmp_path / 'a'}", timeout=400)
    assert done.returncode == 0, done.stderr
    given += [f"adaptation.checkpoint={two}"]
    process = subprocess.Popen(
        workplace.command(*given, f"output={tmp_path / 'b'}"), cwd=workplace.directory, env=workplace.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 200
    while not (two / FILE).exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    n_done = len(torch.load(two / FILE, weights_only=True)["history"])
    assert 0 < n_done < 60
    assert not (tmp_path / "b").exists()
    done = workplace.cli(*given, "adaptation.resume=true", f"output={tmp_path / 'b'}", timeout=400)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(place / FILE, weights_only=True) for place in (one, two))
    assert json.loads(first["facts"]) == json.loads(second["facts"])
    assert [loss for loss, _ in first["history"]] == [loss for loss, _ in second["history"]]
    assert all(torch.equal(tensor, second["learnt"][name]) for name, tensor in first["learnt"].items())
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("a", "b")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]] != []
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(*files, strict=True))


# -- task vectors that are in no memory --------------------------------------------------------------------------------


def test_task_vectors_read_from_files_are_those_in_memory(workplace, monkeypatch):
    monkeypatch.setattr(searching, "CHUNK", 100)  # several chunks a tensor
    job = job_of(workplace, "method=adamerging")
    fed = job.bench.adaptation(job.adaptation, 0, job.bench.tasks)
    shells = Shells(job.bench.pool, searching.weights_of(job.inputs), fed, job.fabric.device)
    held, read = (searching.stacked(job.inputs, shells, job.fabric.device, where) for where in ("memory", "files"))
    assert read.n_experts == held.n_experts == len(job.bench.pool.experts)
    coefficients = torch.linspace(-1, 1, held.n_experts)
    for name, base in held.base.items():
        slope = torch.cos(torch.arange(base.numel())).reshape(base.shape)
        torch.testing.assert_close(
            read.change(name, coefficients), held.change(name, coefficients), rtol=1e-5, atol=1e-8
        )
        torch.testing.assert_close(read.products(name, slope), held.products(name, slope), rtol=1e-4, atol=1e-6)
        assert torch.equal(read.expert(name, 1), job.bench.pool.experts[list(job.bench.pool.experts)[1]][name])
    assert "deltas" not in read.__dict__
    read.deltas[name].zero_()  # a search that changes them has them all in memory from then on
    assert not read.change(name, coefficients).any()


@pytest.mark.parametrize("method", ["adamerging", "adamerging_plus"])  # which has them all in memory
def test_learning_from_files_comes_to_the_same(workplace, method):
    found = []
    for where in ("memory", "files"):
        job = job_of(workplace, f"method={method}", "method.steps=2", f"adaptation.task_vectors={where}")
        found.append(make(job))
    assert found[0].coefficients is not None
    for group, values in found[0].coefficients.items():
        torch.testing.assert_close(found[1].coefficients[group], values, rtol=1e-4, atol=1e-5)
    tensors = [made.merge.inputs.experts["merged"] for made in found]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-4, atol=1e-6)
