"""From a method and the bench to a merge that is ready to be done, or a built module: one function for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from harness.adapt import AT_BASE, LOSSES, STATISTICS, CoefficientObjective, Report, train
from harness.bench import Bench
from harness.compress import Expert, Packed, is_packed, pack, refuse_strangers
from harness.config import AdaptationSettings, UserError
from harness.distill import distilled
from harness.inputs import Inputs, MergeError, check
from harness.job import Merge
from harness.layerwise import merged_by_layers
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
    merge = Merge(job.row, job.params, job.inputs, veneers=job.veneers)
    return _distilled(job, merge) if job.row.learns and job.params.steps else Made(merge)


def _distilled(job: Job, merge: Merge) -> Made:
    """Compress, and learn from unlabelled inputs what the row says."""
    pool, one = job.bench.pool, job.params.expert
    fed = _fed(job)
    rough = pack(merge)
    total = len(rough.experts) * job.params.steps
    with tqdm(total=total, desc=job.row.name, unit="step", disable=_silent(job.fabric)) as bar:

        def report(step: int, loss: float) -> None:
            bar.update()
            job.report(step, loss, None)

        size = job.adaptation.batch_size
        packed = distilled(rough, pool, fed, size, job.seed, job.fabric.device, report)
    if one is None:
        return Made(merge, packed=packed)
    assert pool.base is not None, "a compression needs a base"
    row, restored = find("expert"), Expert(packed, pool.base, pool.roles, one)
    return Made(Merge(row, row.load_params()(), replace(job.inputs, base=None, experts={one: restored})))


def _informed(job: Job) -> Made:
    """Collect each expert's statistics on its own task, then merge; or, layer by layer, one in turn with the other."""
    bench, statistic = job.bench, STATISTICS[job.row.stats]
    pool, tasks = bench.pool, _own_tasks(job)
    _refuse_non_finite(job.inputs)

    def collect(expert: str, module: nn.Module, is_linear: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        examples = bench.adaptation(job.adaptation, job.seed, [expert])[expert]
        return statistic(job.fabric, module, examples, job.adaptation.batch_size, is_linear)

    plain = Merge(job.row, job.params, job.inputs, job.params_of, job.veneers)
    if job.row.layerwise:
        module = pool.module(pool.experts[tasks[0]]).to(job.fabric.device)
        return Made(merged_by_layers(plain, module, lambda expert, names: collect(expert, module, names)))
    stats = {}
    for expert in tqdm(tasks, desc=f"{job.row.stats} statistics", unit="expert", disable=_silent(job.fabric)):
        weights = pool.base if job.row.stats in AT_BASE else pool.experts[expert]
        stats[expert] = collect(expert, pool.module(weights).to(job.fabric.device), pool.roles.is_linear)
    return Made(replace(plain, inputs=replace(plain.inputs, stats=stats)))


def _search(job: Job) -> Made:
    """Find the coefficients of a rule, then merge with them."""
    pool, params = job.bench.pool, job.params
    check(replace(job.row, kind=Kind.rule), job.inputs)
    fed = _fed(job)
    _refuse_non_finite(job.inputs)
    assert pool.base is not None, "the row says that its method needs a base"
    names = [name for name in job.inputs.specs if job.inputs.is_weight(name)]
    groups, group_of = _groups(params.granularity, names, pool.roles.layer_of)
    loss = LOSSES[job.row.loss](job.fabric, fed, job.adaptation.batch_size, job.seed)
    weights = {expert: {name: tensors[name] for name in names} for expert, tensors in pool.experts.items()}
    base = {name: pool.base[name] for name in names}
    objective = CoefficientObjective(
        job.fabric, pool.module().to(job.fabric.device), base, weights, group_of.__getitem__, loss
    )
    with tqdm(total=params.steps, desc=job.row.name, unit="step", disable=_silent(job.fabric)) as bar:

        def report(step: int, value: float, coefficients: torch.Tensor) -> None:
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}")
            job.report(step, value, coefficients)

        found = job.row.load()((len(groups), len(pool.experts)), objective, params, report)
    rule = find(job.row.rule)
    plain = rule.load_params()(scale=1.0)
    own = {name: replace(plain, weights=found[group_of[name]].tolist()) for name in names}
    done = Merge(rule, plain, job.inputs, own.__getitem__)
    return Made(done, coefficients=dict(zip(groups, found, strict=True)))


def _build(job: Job) -> Made:
    """Build a module out of modules and train what it left trainable.

    Raises:
        UserError: The pool's modules do not embed images, which is all that builds are made of for now.
    """
    if job.bench.pool.family != "clip":
        raise UserError(
            f"{job.row.name} builds a module out of models that embed images, not of the family "
            f"{job.bench.pool.family}; choose a method that merges weights (`crucible list methods`)"
        )
    check(replace(job.row, kind=Kind.rule), job.inputs)
    fed = _fed(job) if job.row.loss else {}
    _refuse_non_finite(job.inputs)
    pool = job.bench.pool
    torch.manual_seed(job.seed)
    module = job.row.load()(
        pool.module(), [pool.module(tensors) for tensors in pool.experts.values()], job.params, pool.roles
    ).to(job.fabric.device)
    if job.row.loss:
        loss = LOSSES[job.row.loss](job.fabric, fed, job.adaptation.batch_size, job.seed)
        with tqdm(total=job.params.steps, desc=job.row.name, unit="step", disable=_silent(job.fabric)) as bar:

            def report(step: int, value: float, coefficients: torch.Tensor | None) -> None:
                bar.update()
                bar.set_postfix(loss=f"{value:.4f}")
                job.report(step, value, coefficients)

            train(job.fabric, module, loss, job.params.lr, job.params.steps, report)
    return Made(module=module.eval())


_MAKERS: dict[Kind, Callable[[Job], Made]] = {
    Kind.rule: _rule,
    Kind.informed: _informed,
    Kind.search: _search,
    Kind.fold: _rule,
    Kind.build: _build,
    Kind.compression: _compression,
}


def _fed(job: Job) -> dict[str, Any]:
    """Inputs of every expert's own task."""
    return job.bench.adaptation(job.adaptation, job.seed, _own_tasks(job))


def _own_tasks(job: Job) -> list[str]:
    """Every expert has a task of its name.

    Raises:
        UserError: Some have none, so that there are no inputs and no head for them.
    """
    lacking = [expert for expert in job.bench.pool.experts if expert not in job.bench.tasks]
    if lacking:
        raise UserError(
            f"{job.row.name} is fed the inputs of each expert's own task, and none is called {', '.join(lacking)}; "
            f"tasks are {', '.join(job.bench.tasks)}: add them, or leave these experts out with experts=[...]"
        )
    return job.bench.feeds(job.bench.pool.experts)


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


def _groups(granularity: str, names: list[str], layer_of: Callable[[str], int]) -> tuple[list[str], dict[str, int]]:
    """What has coefficients of its own: the groups' names, and each tensor's group."""
    if granularity == "task":
        return ["model"], dict.fromkeys(names, 0)
    if granularity == "tensor":
        return names, {name: index for index, name in enumerate(names)}
    layers = sorted({layer_of(name) for name in names})
    return [f"layer {layer}" for layer in layers], {name: layers.index(layer_of(name)) for name in names}


def _silent(fabric: Fabric) -> bool | None:
    """Bars are for rank zero at a terminal."""
    return True if fabric.global_rank else None
