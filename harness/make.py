"""From a method and the bench to a merge that is ready to be done, or a built module: one function for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from harness.adapt import AT_BASE, FROM_TEXTS, STATISTICS
from harness.bench import Bench
from harness.built import Built, build, rehearse
from harness.checkpoint import Saved
from harness.compress import Expert, Packed, is_packed, pack, refuse_strangers
from harness.config import AdaptationSettings, UserError
from harness.distill import distilled
from harness.inputs import Inputs, MergeError, check
from harness.job import Merge
from harness.layerwise import merged_by_layers
from harness.learn import Course, Merging, Report, learn
from harness.losses import Losses, Shells
from harness.merge import selected
from harness.objective import Objective, losses_of
from harness.sampler import cma_es
from harness.searching import done, saved, stacked, weights_of
from harness.sparsity import prunes, refuse_unprunable
from harness.veneers import Worn
from methods.catalogue import find
from methods.kinds import Kind, Row


@dataclass(frozen=True)
class Job:
    """A merge to be done."""

    row: Row
    params: Any
    bench: Bench
    fabric: Fabric
    adaptation: AdaptationSettings
    seed: int
    report: Report = lambda step, loss, coefficients: None
    dtype: torch.dtype | None = None  # of the merged tensors; None: the base's
    params_of: Callable[[str], Any] | None = None  # for each tensor's name, where parameters differ
    veneers: tuple[Worn, ...] = ()  # around the rule, the first innermost

    @property
    def inputs(self) -> Inputs:
        """Base and experts for the engine."""
        pool = self.bench.pool
        return Inputs(pool.base, pool.experts, pool.roles, seed=self.seed, device=self.fabric.device, dtype=self.dtype)


@dataclass(frozen=True)
class Made:
    """What came out: a merge whose parameters and statistics are known, or a module."""

    merge: Merge | None = None
    module: nn.Module | None = None
    coefficients: dict[str, torch.Tensor] | None = None  # what a search found: group's name -> (T,)
    packed: Packed | None = None  # what a compression has packed already, because it had to learn of it


def make(job: Job) -> Made:
    """Do what the method's kind asks for."""
    return _MAKERS[job.row.kind](job)


def _rule(job: Job) -> Made:
    return Made(Merge(job.row, job.params, job.inputs, job.params_of, job.veneers))


def _compression(job: Job) -> Made:
    """Where one expert is restored, as a rule; else every task has its own. Some learn part of what they store."""
    if is_packed(job.row, job.params):
        refuse_strangers(job.row, job.bench.pool.experts, job.bench.tasks)
        if job.bench.asked is not None:
            raise UserError(
                f"tasks.lm_eval asks one model, and {job.row.name} keeps each expert apart; name one as method.expert"
            )
    merge = _told(job) if job.row.stats else Merge(job.row, job.params, job.inputs, veneers=job.veneers)
    return _distilled(job, merge) if job.row.learns and job.params.steps else Made(merge)


def _distilled(job: Job, merge: Merge) -> Made:
    """Compress, and learn from unlabelled inputs what the row says."""
    pool, one = job.bench.pool, job.params.expert
    fed, kept = _fed(job, texts=True), _kept(job)
    rough = pack(merge)
    course = Course(job.row.name, job.params.steps, job.params.lr, job.report, kept)
    packed = distilled(job.fabric, rough, pool, fed, job.adaptation.batch_size, course)
    if one is None:
        return Made(merge, packed=packed)
    assert pool.base is not None, "a compression needs a base"
    row, restored = find("expert"), Expert(packed, pool.base, pool.roles, one)
    return Made(Merge(row, row.load_params()(), replace(job.inputs, base=None, experts={one: restored})))


def _informed(job: Job) -> Made:
    """Collect each expert's statistics on its own task, then merge; or, layer by layer, one in turn with the other."""
    if not job.row.layerwise:
        return Made(_told(job))
    pool, tasks, collect = job.bench.pool, *_collecting(job)
    plain = Merge(job.row, job.params, job.inputs, job.params_of, job.veneers)
    module = pool.module(pool.experts[tasks[0]]).to(job.fabric.device)
    return Made(merged_by_layers(plain, module, lambda expert, names: collect(expert, module, names)))


def _told(job: Job) -> Merge:
    """A merge that knows each expert's statistics."""
    refuse_unprunable(job.row, job.inputs, lambda name: job.params)
    pool, tasks, collect = job.bench.pool, *_collecting(job)
    stats, roles, turned = {}, pool.roles, job.row.kind is Kind.compression  # which takes layers stored either way

    def wanted(name: str) -> bool:
        if job.row.prunes:
            return name in job.inputs.specs and prunes(job.row, job.inputs, name, job.params)
        return roles.is_linear(name) or (turned and roles.is_transposed(name))

    for expert in tqdm(tasks, desc=f"{job.row.stats} statistics", unit="expert", disable=_silent(job.fabric)):
        weights = pool.base if job.row.stats in AT_BASE else pool.experts[expert]
        stats[expert] = collect(expert, pool.module(weights).to(job.fabric.device), wanted)
    return Merge(job.row, job.params, replace(job.inputs, stats=stats), job.params_of, job.veneers)


def _collecting(job: Job) -> tuple[list[str], Callable[..., dict[str, torch.Tensor]]]:
    """Whose statistics are collected, and what does it: (expert, module, which layers) -> by the weights' names."""
    bench, texts = job.bench, job.row.stats in FROM_TEXTS
    tasks = _own_tasks(job, texts)
    _refuse_non_finite(job.inputs)

    def collect(expert: str, module: nn.Module, is_linear: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        examples = bench.adaptation(job.adaptation, job.seed, [expert], texts)[expert]
        return STATISTICS[job.row.stats](job.fabric, module, examples, job.adaptation.batch_size, is_linear)

    return tasks, collect


def _search(job: Job) -> Made:
    """Learn what the method asks for on the inputs of every expert's own task, then merge with it."""
    pool, params = job.bench.pool, job.params
    check(replace(job.row, kind=Kind.rule), job.inputs)
    fed, kept = _fed(job, texts=not job.row.adversary), _kept(job)
    _refuse_non_finite(job.inputs)
    shells = Shells(pool, weights_of(job.inputs), fed, job.fabric.device)
    stack = stacked(job.inputs, shells, job.fabric.device, job.adaptation.task_vectors)
    size = job.adaptation.batch_size
    losses = losses_of(job.row, params, job.fabric, fed, size, job.seed, shells, stack)
    if job.row.rule:
        return _coefficients(job, Objective(job.fabric, stack, params.granularity, shells, losses, kept))
    try:
        search = job.row.load()(stack, params)
    except ValueError as error:  # nothing there that the method needs
        raise MergeError(str(error)) from error
    subject = Merging(job.fabric, search, shells, getattr(params, "conflicts", "sum"))
    learn(job.fabric, subject, losses, Course(job.row.name, search.steps, search.rates, job.report, kept))
    with torch.no_grad():
        search.finish()
    found = search.coefficients
    named = None if found is None else dict(zip(search.groups, found.cpu(), strict=True))
    return Made(done(job.row, params, job.inputs, search.weight), coefficients=named)


def _coefficients(job: Job, objective: Objective) -> Made:
    """Have a method find the coefficients of a rule in its own way."""
    extras = {"sampler": cma_es(job.seed)} if job.row.random else {}
    total = job.params.evaluations(objective.shape[1])
    with tqdm(total=total, desc=job.row.name, unit="step", disable=_silent(job.fabric)) as bar:

        def report(step: int, value: float, coefficients: torch.Tensor | None) -> None:
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
            job.report(step, value, coefficients)

        try:
            found = job.row.load()(objective.shape, objective, job.params, report, **extras)
        except ValueError as error:  # parameters that do not fit the experts
            raise MergeError(str(error)) from error
    rule = find(job.row.rule)
    plain = rule.load_params()(scale=1.0)
    own = {name: replace(plain, weights=found[group].tolist()) for name, group in objective.group_of.items()}
    finished = Merge(rule, plain, job.inputs, own.__getitem__)
    return Made(finished, coefficients=dict(zip(objective.groups, found, strict=True)))


def _build(job: Job) -> Made:
    """Build a module out of modules and train what it left trainable."""
    check(replace(job.row, kind=Kind.rule), job.inputs)
    pool = job.bench.pool
    if job.row.loss:
        fed, kept = _fed(job, texts=True), _kept(job)
    names = weights_of(job.inputs)
    rehearse(job.row, job.params, pool, names)
    _refuse_non_finite(job.inputs)
    torch.manual_seed(job.seed)
    module = build(job.row, job.params, pool, names).to(job.fabric.device)
    if hasattr(module, "of"):  # it is another for each task
        refuse_strangers(job.row, pool.experts, job.bench.tasks)
    if job.row.loss:
        losses = Losses(job.fabric, fed, job.adaptation.batch_size, job.seed, job.row.loss)
        course = Course(job.row.name, job.params.steps, job.params.lr, job.report, kept)
        subject = Built(module, losses, pool, job.seed)
        learn(job.fabric, subject, losses, course)
        subject.finish()
    return Made(module=module.eval())


_MAKERS: dict[Kind, Callable[[Job], Made]] = {
    Kind.rule: _rule,
    Kind.informed: _informed,
    Kind.search: _search,
    Kind.fold: _rule,
    Kind.build: _build,
    Kind.compression: _compression,
}


def _fed(job: Job, texts: bool = False) -> dict[str, Any]:
    """Inputs of every expert's own task.

    Raises:
        UserError: Some task has too few examples, or as `_own_tasks`.
    """
    row, fed = job.row, job.bench.adaptation(job.adaptation, job.seed, _own_tasks(job, texts), texts)
    few = [f"{task} has {len(examples)}" for task, examples in fed.items() if len(examples) < row.fewest]
    if few:
        raise UserError(
            f"{row.name} learns from {row.fewest} examples of each task at least; {', '.join(few)}: raise "
            "adaptation.examples, choose another adaptation.split, or leave these experts out with experts=[...]"
        )
    return fed


def _kept(job: Job) -> Saved | None:
    """Where learning is saved, of a job."""
    return saved(job.adaptation, job.row, job.params, job.bench, job.fabric, job.seed)


def _own_tasks(job: Job, texts: bool = False) -> list[str]:
    """Every expert that the method reads has a task of its name; or all tasks, where the row says so.

    Raises:
        UserError: Some have none, so that there are no inputs and no head for them.
    """
    if job.row.all_tasks:
        if not job.bench.tasks:
            raise UserError(f"{job.row.name} is fed the inputs of every task, and there is none; choose tasks=NAME")
        return job.bench.feeds(job.bench.tasks, texts)
    read = selected(job.row, job.params, job.inputs).experts
    lacking = [expert for expert in read if expert not in job.bench.tasks]
    if lacking:
        raise UserError(
            f"{job.row.name} is fed the inputs of each expert's own task, and none is called {', '.join(lacking)}; "
            f"tasks are {', '.join(job.bench.tasks)}: add them, or leave these experts out with experts=[...]"
        )
    return job.bench.feeds(read, texts)


def _refuse_non_finite(inputs: Inputs) -> None:
    """Read every weight once before models of them are run: NaN would show only as a loss or a score that is NaN.

    Raises:
        MergeError: Some are NaN or infinite; the message names tensors and experts.
    """
    members = ({"the base": inputs.base} if inputs.base is not None else {}) | {
        f"expert {name}": tensors for name, tensors in inputs.experts.items()
    }
    faults = [
        f"{name} has NaN or infinite weights in {whose}; a merge would spread them"
        for name in filter(inputs.is_weight, inputs.specs)
        for whose, tensors in members.items()
        if not torch.isfinite(tensors[name]).all()
    ]
    if faults:
        raise MergeError("\n".join(faults))


def _silent(fabric: Fabric) -> bool | None:
    """Bars are for rank zero at a terminal."""
    return True if fabric.global_rank else None
