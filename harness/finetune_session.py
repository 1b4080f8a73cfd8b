"""A training that is opened: scored, trained, written, scored again, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from harness.bench import Bench
from harness.config import RunConfig, UserError
from harness.evaluate import TaskScore, score
from harness.examples import Examples, Texts, endless
from harness.execute import FabricTeam
from harness.finetune_loop import Curves, Training, fit, keeping, newest
from harness.finetune_losses import Lessons, loss_of
from harness.finetune_settings import FinetuneSettings
from harness.finetune_write import Learnt, write_expert
from harness.keep import known_tasks, members
from harness.learning_plots import learning_curve
from harness.rebuild import open_directory
from harness.track import DataInput, Run
from pools.partial import linked

UNTOLD = ("task", "checkpoints", "checkpoint_every", "resume", "validate_every")  # change nothing of what is learnt


@dataclass(frozen=True)
class Finished:
    """What a training came to."""

    run_id: str | None  # None: of a process that does not record
    model_uri: str | None
    before: TaskScore  # of the base
    after: TaskScore  # of the expert, as it was written

    def told(self) -> list[tuple[str, str]]:
        """In words."""
        if self.run_id is None:
            return []
        metric = self.after.metric
        found = [
            (metric, f"{self.before.value:.4f} before, {self.after.value:.4f} after"),
            ("loss", f"{self.before.loss:.4f} before, {self.after.loss:.4f} after"),
            ("run", self.run_id),
        ]
        return found + ([("expert", f"+pool.experts.NAME={self.model_uri}")] if self.model_uri else [])


class _Own:
    """For the scores of a classifier: it keeps the head that it has."""

    def with_head(self, module: Any, expert: str | None) -> Any:
        """The module as it is."""
        return module


@dataclass
class Session:
    """A training that is going on."""

    config: RunConfig
    settings: FinetuneSettings
    task: str
    fabric: Fabric
    tracked: Run
    bench: Bench
    base_name: str

    def examples(self) -> Examples | Texts:
        """What is scored before, on the way and after."""
        own = self.config.evaluation
        found = self.bench.examples(self.task, own.split, own.limit, self.config.seed)
        return replace(found, heads=_Own()) if isinstance(found, Texts) else found

    def score(self, module: nn.Module) -> TaskScore:
        """The module's score; its mode stays as it was."""
        training = module.training
        module.eval()
        found = score(
            self.fabric, module, self.task, self.examples(), self.config.evaluation.batch_size, lambda n: None
        )
        module.train(training)
        return found

    @property
    def checkpoints(self) -> Path | None:
        """Where they are kept."""
        named = self.settings.checkpoints
        return None if named is None else Path(named).expanduser().absolute()

    def signature(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        told = {key: value for key, value in asdict(self.settings).items() if key not in UNTOLD}
        rows = self.bench.tasks[self.task].fingerprint(self.settings.split)
        base: Any = self.bench.pool.base
        return {**told, "seed": self.config.seed, "base": base.fingerprint, "rows": rows}


def train_and_keep(session: Session) -> Finished:
    """Train, write, score and record."""
    config, settings, tracked, bench = session.config, session.settings, session.tracked, session.bench
    task = bench.tasks[session.task]
    splits = dict.fromkeys((settings.split, config.evaluation.split))
    tracked.inputs(
        DataInput(task.name, task.source, task.fingerprint(s), s, len(task.rows(s)), task.labels, task.columns)
        for s in splits
    )
    tracked.lineage(members(bench.pool))
    place = session.checkpoints
    resumed = None if place is None else newest(place, settings.resume, session.signature())
    module = bench.pool.module().to(session.fabric.device)
    with tracked.phase("base"):
        before = session.score(module)
    _tell(tracked.metric, before, 0)
    adapter = _prepared(session, module)
    with tracked.phase("train"):
        _train(session, module, resumed)
    learnt = Learnt(module, adapter, bench.pool, _dtype(config), _facts(session))
    after = _kept(session, learnt)
    for name, value in {after.metric: after.value, "loss": after.loss, **after.more}.items():
        tracked.metric(f"{session.task}/{name}", value)
    row = {"task": session.task, "split": config.evaluation.split, "metric": after.metric, "n": after.n}
    row |= {"base": before.value, "value": after.value, "base_loss": before.loss, "loss": after.loss}
    tracked.table([row], "results.json")
    uri = tracked.model.uri if tracked.model else None
    tracked.describe(_description(session, before, after, uri))
    return Finished(tracked.id, uri, before, after)


def _prepared(session: Session, module: nn.Module) -> Any:
    """Have just what is trained require a gradient; returns the adapter that was put on, if any.

    Raises:
        UserError: Nothing is left to train.
    """
    settings, pool = session.settings, session.bench.pool
    names = set(pool.reference) if pool.family == "clip" else {name for name, _ in module.named_parameters()}  # type: ignore[attr-defined]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    adapter = None
    if settings.mode != "full":
        from harness.finetune_lora import adapted

        heads = getattr(pool, "heads", {}).get(None, ())
        whole = sorted({name.rpartition(".")[0] for name in heads})
        linear = settings.mode == "linear_lora"
        adapter = adapted(module, settings.lora, pool.family, session.base_name, whole, linear, session.config.seed)
    for pattern in settings.freeze:
        fitting = [own for name, own in module.named_parameters() if fnmatch(name, pattern) and own.requires_grad]
        if not fitting:
            raise UserError(f"finetune.freeze: no trained parameter fits {pattern!r}")
        for own in fitting:
            own.requires_grad_(False)
    n = sum(own.numel() for own in module.parameters() if own.requires_grad)
    if not n:
        raise UserError("finetune.freeze leaves nothing to train; leave a pattern out")
    session.tracked.metric("train/parameters", n)
    return adapter


def _train(session: Session, module: nn.Module, resumed: Path | None) -> None:
    """Run the steps, from a checkpoint on where there is one; losses and scores on the way are recorded."""
    settings, tracked, seed = session.settings, session.tracked, session.config.seed
    rows = session.bench.examples(session.task, settings.split)
    lessons = Lessons(module, session.task, rows, session.fabric.device, settings.max_tokens)
    batches = list(islice(endless(len(rows), settings.batch_size, seed), settings.steps))
    with _bar(session) as bar:

        def told(step: int, loss: float) -> None:
            curves.add("train/loss", loss, step)
            if settings.validate_every is not None and step % settings.validate_every == 0 and step < settings.steps:
                _tell(curves.add, session.score(module), step)
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        curves = Curves(tracked.metric, told)
        optimiser = {"lr": settings.lr, "weight_decay": settings.weight_decay, "warmup": settings.warmup}
        training = Training(session.fabric, module, loss_of(lessons), batches, optimiser, seed, session.signature())
        place = session.checkpoints
        fit(
            training,
            training.steps(),
            clip=settings.clip,
            accelerator=session.config.fabric.accelerator,
            devices=session.fabric.world_size,
            precision=session.config.fabric.precision,
            steps=settings.steps,
            callbacks=[curves, *([keeping(place, settings.checkpoint_every)] if place else [])],
            resume=resumed,
            bar=False,
        )
    module.eval()
    _tell(tracked.metric, session.score(module.to(session.fabric.device)), settings.steps)
    losses = [value for key, value, _ in curves.points if key == "train/loss"]
    if losses and session.config.evaluation.plots:
        tracked.figure(learning_curve(losses, "training"), "plots/train_loss.png")


def _bar(session: Session) -> tqdm:
    """A progress bar, of rank zero at a terminal."""
    silent = None if session.fabric.is_global_zero else True
    return tqdm(total=session.settings.steps, desc=f"finetune {session.task}", unit="step", disable=silent)


def _kept(session: Session, learnt: Learnt) -> TaskScore:
    """Write the expert into the run and to `output`, as far as either is asked for, and score what was written."""
    config, tracked = session.config, session.tracked
    team, found = FabricTeam(session.fabric), list[TaskScore]()

    def write(directory: Path) -> None:
        if session.fabric.is_global_zero:
            write_expert(learnt, directory)
        place = Path(team.agree(str(directory)))
        module, _ = open_directory(place, config.pool.family, config.pool.trust_remote_code)
        found.append(session.score(module.to(session.fabric.device)))
        team.wait()

    output = None if config.output is None else Path(config.output).expanduser()
    facts: dict[str, Any] = {"tasks": known_tasks(session.bench), "kind": "expert", "family": config.pool.family}
    facts |= {"trust_remote_code": True} if config.pool.trust_remote_code else {}
    with tracked.phase("write"):
        if output is not None or (config.tracking.log_model and not session.fabric.is_global_zero):
            write(output or Path())
        if config.tracking.log_model and session.fabric.is_global_zero:
            tracked.log_model(write if output is None else lambda path: linked(output, path), facts)
    return found[0] if found else session.score(learnt.module)


def _dtype(config: RunConfig) -> Any:
    """What the expert's floating tensors are written in; None: the base's."""
    return getattr(torch, config.engine.dtype) if config.engine.dtype else None


def _facts(session: Session) -> dict[str, Any]:
    """What the expert's card tells."""
    own = {key: value for key, value in leaves(asdict(session.settings)) if key not in UNTOLD}
    adapted = session.settings.mode != "full"
    told = {key: value for key, value in own.items() if adapted or not key.startswith("lora.")}
    base = {"task": session.task, "base": session.config.pool.base, "seed": session.config.seed}
    return {**base, **told, **({"run": session.tracked.id} if session.tracked.id else {})}


def _tell(metric: Callable[[str, float, int], None], found: TaskScore, step: int) -> None:
    """A score on the way."""
    metric(f"validation/{found.metric}", found.value, step)
    metric("validation/loss", found.loss, step)


def _description(session: Session, before: TaskScore, after: TaskScore, uri: str | None) -> str:
    """The run's page in Markdown."""
    lines = [
        f"An expert for **{session.task}**, {session.settings.mode}, trained from `{session.config.pool.base}`.",
        "",
        f"| {session.config.evaluation.split} | before | after |",
        "|---|---|---|",
        f"| {after.metric} | {before.value:.4f} | {after.value:.4f} |",
        f"| loss | {before.loss:.4f} | {after.loss:.4f} |",
    ]
    if uri:
        lines += ["", f"Merge it with others: `crucible run ... +pool.experts.NAME={uri}`"]
    return "\n".join(lines)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
