"""What a study asks of the harness: a pool and its tasks opened once, and many configurations merged and scored there.

A trial writes nothing: it merges into memory, from weights that are held, and scores piece by piece of the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from harness.assess import summarise
from harness.bench import Bench, open_bench
from harness.bootstrap import Rows
from harness.compress import Restored, by_task, is_packed, pack
from harness.config import RunConfig, UserError
from harness.crew import count_workers, crew
from harness.direct import open_checked, params_by_name, refusals
from harness.evaluate import TaskScore, score
from harness.examples import Examples, Texts
from harness.execute import launch
from harness.held import Held, hold
from harness.inputs import Inputs
from harness.job import Memory, Merge
from harness.make import Job, make
from harness.merge import merge_into, ready
from harness.references import References, references
from harness.stacking import stacked
from harness.track import local_path
from harness.veneers import asked
from methods.catalogue import find

SHUFFLE = 0  # seed of the order of pieces: the same in all trials, which are compared piece by piece


@dataclass(frozen=True)
class Step:
    """One piece of the data scored."""

    index: int  # of the piece, the same in every trial
    done: int  # pieces so far
    total: int
    piece: TaskScore
    metrics: Mapping[str, float]  # over all that was scored so far; after the last step those of the trial


@dataclass(frozen=True)
class _Piece:
    index: int
    task: str
    examples: Examples | Texts


class Resident:
    """A pool with its tasks in memory, for one process and one device."""

    def __init__(
        self,
        config: RunConfig,
        *,
        step_rows: int | None = None,
        search_on_test: bool = False,
        device: int | None = None,
        processes: int = 1,
        normalized: bool = False,
    ) -> None:
        """Open everything.

        Args:
            config: Pool, tasks, split and devices; the method is each trial's own.
            step_rows: Rows of a piece; None scores a task at a time.
            search_on_test: Whether `evaluation.split=test` is meant.
            device: Which of several GPUs.
            processes: How many residents share this machine.
            normalized: Also score each task's own expert, to compare with.

        Raises:
            UserError: The input is bad, or the split is the test split without leave.
        """
        refuse_test(config.evaluation.split, search_on_test)
        chosen: Any = [device] if device is not None else 1
        self.fabric = launch(config.fabric.accelerator, chosen, config.fabric.precision, config.seed)
        self._processes = processes
        self._workers = count_workers(config.engine.workers, processes)
        if self.fabric.device.type == "cpu":
            torch.set_num_threads(count_workers("auto", processes))
        with refusals():
            self.bench = open_bench(stacked(config), config.tasks, local_path)
        self._benches = {_place(config): (self.bench, self._held(self.bench))}
        self._step_rows = step_rows
        self._pieces: dict[Any, list[_Piece]] = {}
        self._stats: dict[Any, Any] = {}
        self._modules: dict[int, nn.Module] = {}
        self.known = References()
        if normalized:
            self.known = references(self.fabric, self.bench, config.evaluation, config.seed)

    def score(self, config: RunConfig, seed: int) -> Iterator[Step]:
        """Merge as a configuration asks, in memory, and score piece by piece.

        Args:
            config: A trial's.
            seed: Of random methods and of what learns from data.

        Raises:
            ValueError: The weights cannot be merged so, or the method refuses its parameters.
        """
        bench, held = self._bench(config)
        started = time.perf_counter()
        module, nbytes = self._merged(replace(config, seed=seed), bench, held)
        self._wait()
        merged = time.perf_counter()
        sums: dict[str, _Sums] = {}
        pieces = self._pieces_of(config, bench)
        chosen = by_task(module.eval(), bench.tasks)
        evaluated_s = 0.0  # without what is done with a step before the next one is asked for
        for done, piece in enumerate(pieces, start=1):
            began = time.perf_counter()
            own = chosen(piece.task).to(self.fabric.device)
            found = score(self.fabric, own, piece.task, piece.examples, config.evaluation.batch_size, lambda n: None)
            sums.setdefault(piece.task, _Sums(found)).add(found)
            metrics = _metrics([sums[task].score() for task in bench.tasks if task in sums], self.known)
            evaluated_s += time.perf_counter() - began
            costs = {"time/merge_s": merged - started, "time/evaluate_s": evaluated_s}
            yield Step(piece.index, done, len(pieces), found, metrics | {**costs, "model/bytes": float(nbytes)})

    def rows(self, config: RunConfig, seed: int) -> Rows:
        """Each example's own score, for intervals: task -> (N,) of its metric, where that is a mean over examples."""
        bench, held = self._bench(config)
        module, _ = self._merged(replace(config, seed=seed), bench, held)
        chosen = by_task(module.eval(), bench.tasks)
        found = {}
        for task, examples in bench.evaluation(config.evaluation, config.seed).items():
            if isinstance(examples, Examples):
                own = chosen(task).to(self.fabric.device)
                found[task] = _right(self.fabric, own, examples, config.evaluation.batch_size)
        return found

    def n_steps(self, config: RunConfig) -> int:
        """How many pieces a trial scores."""
        return len(self._pieces_of(config, self._bench(config)[0]))

    # -- merging -------------------------------------------------------------------------------------------------------

    def _bench(self, config: RunConfig) -> tuple[Bench, Held | None]:
        """The bench of a configuration; another one than at first where pool or tasks are searched."""
        place = _place(config)
        if place not in self._benches:
            with refusals():
                bench = open_bench(stacked(config), config.tasks, local_path)
            self._benches[place] = (bench, self._held(bench))
        return self._benches[place]

    def _held(self, bench: Bench) -> Held | None:
        pool = bench.pool
        return hold(Inputs(pool.base, pool.experts, pool.roles, device=self.fabric.device), self._processes)

    def _merged(self, config: RunConfig, bench: Bench, held: Held | None) -> tuple[nn.Module, int]:
        """The module that a configuration comes to, and the bytes of its weights."""
        row = find(config.method_name)
        dtype = getattr(torch, config.engine.dtype) if config.engine.dtype else None
        job = Job(
            row,
            config.method,
            bench,
            self.fabric,
            config.adaptation,
            config.seed,
            dtype=dtype,
            params_of=params_by_name(config, bench.pool),
            veneers=asked(config),
        )
        key = (row.stats, repr(config.adaptation), config.seed, _place(config))
        reusable = bool(row.stats) and not row.layerwise  # those depend on what is merged before
        if reusable and key in self._stats:
            merge: Merge | None = Merge(
                row, job.params, replace(job.inputs, stats=self._stats[key]), job.params_of, job.veneers
            )
        else:
            made = make(job)
            if made.module is not None:
                return made.module, _nbytes(made.module)
            if made.packed is not None:
                return Restored(made.packed, bench.pool), made.packed.with_base_bytes
            merge = made.merge
        assert merge is not None
        if reusable:
            self._stats[key] = merge.inputs.stats
        if is_packed(row, job.params):
            with crew(self._workers if self.fabric.device.type == "cpu" else 1) as hands:
                packed = pack(replace(merge, inputs=replace(merge.inputs, held=held)), hands)
            return Restored(packed, bench.pool), packed.with_base_bytes
        merge = ready(replace(merge, inputs=replace(merge.inputs, held=held)))
        sink = Memory(merge.specs)
        with crew(self._workers if self.fabric.device.type == "cpu" else 1) as hands:
            merge_into(sink, merge, hands)
        nbytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in merge.specs.values())
        return self._filled(bench, sink.tensors), nbytes

    def _filled(self, bench: Bench, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """A module with these weights: the one of the last trial, filled anew, where it has them by the same names."""
        module = self._modules.get(id(bench))
        if module is None:
            module = bench.pool.module(tensors)
            own = module.state_dict()
            if all(name in own and own[name].shape == tensor.shape for name, tensor in tensors.items()):
                self._modules[id(bench)] = module
            return module
        own = module.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        return module

    def _wait(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)

    # -- pieces of the data --------------------------------------------------------------------------------------------

    def _pieces_of(self, config: RunConfig, bench: Bench) -> list[_Piece]:
        """The data in pieces, in an order that is shuffled once for all trials."""
        settings = config.evaluation
        key = (_place(config), settings.split, settings.limit, config.seed if settings.limit else None)
        if key not in self._pieces:
            tasks = bench.evaluation(settings, config.seed)
            cut = [(task, part) for task, examples in tasks.items() for part in self._cut(examples)]
            order: Sequence[int] = range(len(cut))
            if self._step_rows is not None:
                order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(SHUFFLE)).tolist()
            self._pieces[key] = [_Piece(index, *cut[index]) for index in order]
        return self._pieces[key]

    def _cut(self, examples: Examples | Texts) -> list[Examples | Texts]:
        """Pieces of one task, their inputs on the device; texts that are read in a row stay together."""
        if isinstance(examples, Texts) and (examples.block is not None or self._step_rows is None):
            return [examples]
        rows, size = list(examples.indices), self._step_rows or len(examples)
        cuts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if isinstance(examples, Texts):
            return [replace(examples, indices=own) for own in cuts]
        head = examples.head.to(self.fabric.device)
        parts = [Examples(examples.rows, examples.pool, head, own) for own in cuts]
        for part in parts:
            part.keep_on(self.fabric.device)
        return list(parts)


class _Sums:
    """A task's score over its pieces."""

    def __init__(self, first: TaskScore) -> None:
        self._first = first
        self._n = 0
        self._tokens = self._nats = self._values = 0.0

    def add(self, found: TaskScore) -> None:
        tokens = found.more.get("tokens", float(found.n))
        self._n += found.n
        self._tokens += tokens
        self._nats += found.loss * tokens
        self._values += found.value * found.n

    def score(self) -> TaskScore:
        loss = self._nats / self._tokens if self._tokens else math.nan
        perplexity = self._first.metric == "perplexity"
        value = float(torch.tensor(loss, dtype=torch.float64).exp()) if perplexity else self._values / self._n
        return replace(self._first, value=value, loss=loss, n=self._n, more={})


def refuse_test(split: str, meant: bool) -> None:
    """Refuse a search on the test split, unless it is asked for in so many words.

    Raises:
        UserError: It is not.
    """
    if split == "test" and not meant:
        raise UserError(
            "study.split=test: a search would fit its winner to the very rows that judge it; search on validation, "
            "or say study.search_on_test=true"
        )


def depth_of(config: RunConfig) -> tuple[bool, int, bool]:
    """Whether merged tensors lie before the blocks, how many blocks there are, and whether any lie after them.

    Raises:
        UserError: The pool cannot be opened.
    """
    with refusals():
        pool = open_checked(stacked(config), local_path)
    inputs, roles = Inputs(pool.base, pool.experts, pool.roles), pool.roles
    depths = {roles.layer_of(name) for name in inputs.specs if inputs.is_weight(name)}
    return 0 in depths, roles.n_layers, roles.n_layers + 1 in depths


def devices_of(config: RunConfig) -> int | None:
    """How many GPUs there are for workers; None where they run on the CPU."""
    if config.fabric.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return None


def _metrics(scores: Sequence[TaskScore], known: References) -> dict[str, float]:
    """Every task's own metrics, and those over tasks."""
    own = {f"{found.task}/{name}": value for found in scores for name, value in _named(found)}
    return own | summarise(scores, known)


def _named(found: TaskScore) -> list[tuple[str, float]]:
    return [(found.metric, found.value), ("loss", found.loss)]


def _place(config: RunConfig) -> str:
    """What a bench is opened for."""
    return repr((stacked(config), config.tasks))


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


@torch.inference_mode()
def _right(fabric: Any, module: nn.Module, examples: Examples, batch_size: int) -> list[float]:
    """Whether each example is classified right, 1 or 0."""
    head = examples.head.to(fabric.device)
    found: list[float] = []
    for inputs, labels in examples.batches(range(len(examples)), batch_size):
        with fabric.autocast():
            logits = module(**{name: tensor.to(fabric.device) for name, tensor in inputs.items()}) @ head.T
        found += (logits.argmax(1) == labels.to(fabric.device)).double().tolist()
    return found
