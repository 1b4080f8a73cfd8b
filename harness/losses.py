"""What learning methods minimise: one batch of every task a call, any kind of task, spread over the devices.

`entropy` is that of the predictions and asks for inputs alone; of generated answers that of the first token, of plain
texts that of every next token. `labels` is the cross-entropy of the right class or of the tokens to be predicted;
`own` is what `forward` gives, (B,): a build's own matter, where tasks are taken apart. Each example counts alike,
whatever its length, and each task: so the number of devices changes nothing but the time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy

from harness.bench import HEADED
from harness.evaluate import IGNORED, preference_inputs
from harness.examples import Examples, Inputs, Texts, endless
from harness.execute import own_share, sum_over_devices
from harness.inputs import MergeError
from pools.faults import specs_of

Forward = Callable[[str, Inputs], Any]  # (task, inputs) -> what the module gives
Part = Callable[[Forward], torch.Tensor]  # -> the loss of some tasks, of this process's rows
Chosen = tuple[str, list[int], int]  # task, positions of this process, rows on all devices

KINDS = ("entropy", "labels", "own")


class Losses:
    """The tasks' data in endless order, and their losses.

    Attributes:
        drawn: How many batches of each task have come.
    """

    def __init__(
        self,
        fabric: Fabric,
        tasks: Mapping[str, Examples | Texts],
        batch_size: int,
        seed: int,
        kind: str = "entropy",
    ) -> None:
        """Nothing is fed yet.

        Args:
            fabric: Devices.
            tasks: What is learnt from, by task.
            batch_size: Rows of each task at a time, over all devices.
            seed: Of the rows' order.
            kind: Of `KINDS`.
        """
        self.fabric, self.tasks, self.kind, self.drawn = fabric, tasks, kind, 0
        self._heads = {name: own.head.to(fabric.device) for name, own in tasks.items() if isinstance(own, Examples)}
        self._orders = {name: endless(len(own), min(batch_size, len(own)), seed) for name, own in tasks.items()}
        self._joins = fabric.device.type == "cuda" and len(self._heads) == len(tasks)  # a CPU gains nothing by it

    def skip(self, n: int) -> None:
        """Leave batches out: those that were drawn before an interruption."""
        for _ in range(n):
            self._next()

    def parts(self, apart: bool = False, only: Container[str] | None = None) -> Iterator[Part]:
        """The next batches, in parts that are to be run one after the other; their sum is the loss.

        Args:
            apart: Each task on its own, in the order of the tasks, on every device alike.
            only: The tasks that count; None: all. Batches are drawn of every task.
        """
        for part in self._parts(apart, only):
            yield functools.partial(self._in_precision, part)

    def _parts(self, apart: bool, only: Container[str] | None) -> Iterator[Part]:
        chosen = [one for one in self._next() if only is None or one[0] in only]
        if self._joins and not apart:
            yield functools.partial(self._joined, chosen=[one for one in chosen if one[1]])
            return
        for one in chosen:
            yield functools.partial(self._joined, chosen=[one] if one[1] else [])

    def __call__(self, forward: Callable[[Inputs], Any]) -> float:
        """The loss of the next batches under one module; gradients are left in `.grad`, of this process's rows."""
        return self.backward(lambda task, inputs: forward(inputs))

    def backward(self, forward: Forward) -> float:
        """The same where the module is each task's own."""
        total = torch.zeros((), device=self.fabric.device)
        for part in self.parts():
            value = part(forward)
            if value.requires_grad:
                value.backward()
            total += value.detach()
        return self.total(total)

    def total(self, value: torch.Tensor) -> float:
        """A loss over all devices."""
        return float(sum_over_devices(self.fabric, value))

    def _in_precision(self, part: Part, forward: Forward) -> torch.Tensor:
        with self.fabric.autocast():
            return part(forward)

    def _next(self) -> list[Chosen]:
        self.drawn += 1
        found = []
        for task, order in self._orders.items():
            positions = next(order)
            own = [positions[index] for index in own_share(self.fabric, len(positions))]
            found.append((task, own, len(positions)))
        return found

    def _joined(self, forward: Forward, chosen: list[Chosen]) -> torch.Tensor:
        """The loss of some tasks; images of several are shown to the module at once."""
        if not chosen:
            return torch.zeros((), device=self.fabric.device)
        task, own, rows = chosen[0]
        examples = self.tasks[task]
        if isinstance(examples, Texts):
            return self._of_texts(forward, task, examples, own).sum() / rows
        fed = [self.tasks[name].batch(positions) for name, positions, _ in chosen]  # type: ignore[union-attr]
        joined = {key: torch.cat([inputs[key] for inputs, _ in fed]) for key in fed[0][0]}
        if self.kind == "own":
            return forward(task, self._on(joined)).sum() / rows
        outputs = forward(task, self._on(joined)).split([len(positions) for _, positions, _ in chosen])
        losses = [
            self._of_classes(output @ self._heads[name].T, labels).sum() / rows
            for (name, _, rows), output, (_, labels) in zip(chosen, outputs, fed, strict=True)
        ]
        return torch.stack(losses).sum()

    def _of_classes(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits (B, K), labels (B,) -> (B,)."""
        if self.kind == "entropy":
            return entropy(logits)
        return cross_entropy(logits.float(), labels.to(logits.device), reduction="none")

    def _of_texts(self, forward: Forward, task: str, examples: Texts, positions: list[int]) -> torch.Tensor:
        """Each row's loss, (B,); a row without a token to predict has none."""
        rows = [row for row in examples.chosen(positions) if row]
        if not rows:
            return torch.zeros(0, device=self.fabric.device)
        if self.kind == "own":
            classed = examples.kind in HEADED
            fed = self._on(examples.pool.feed([text for text, _ in rows] if classed else rows))
            if examples.pool.family == "causal_lm":
                del fed["labels"]
            return forward(task, fed)
        if examples.kind == "text_classification":
            texts, classes = zip(*rows, strict=True)
            logits = forward(task, self._on(examples.pool.feed(texts))).logits
            return self._of_classes(logits, torch.tensor(classes))
        if examples.kind == "preference":  # which of two texts has the higher reward, as two classes
            rewards = forward(task, self._on(preference_inputs(examples.pool, rows))).logits[:, 0]
            margins = rewards.chunk(2)[0] - rewards.chunk(2)[1]
            logits = torch.stack([margins, torch.zeros_like(margins)], 1)
            return self._of_classes(logits, torch.zeros(len(rows), dtype=torch.int64))
        return self._of_tokens(forward, task, examples, rows)

    def _of_tokens(self, forward: Forward, task: str, examples: Texts, rows: list[Any]) -> torch.Tensor:
        """Each row's mean over the tokens that are to be predicted, (B,)."""
        inputs = self._on(examples.pool.feed(rows))
        labels = inputs["labels"]
        if examples.pool.family == "seq2seq":  # the decoder's inputs are the labels, moved by one inside
            logits = forward(task, inputs).logits
        else:
            del inputs["labels"]
            logits, labels = forward(task, inputs).logits[:, :-1], labels[:, 1:]
        counted = labels.ne(IGNORED)
        if self.kind == "labels":
            losses = cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
        else:
            if not isinstance(rows[0], str):  # what follows the first token of an answer would be shown to the model
                counted &= counted.cumsum(1) == 1
            losses = entropy(logits)
        return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)

    def _on(self, inputs: Inputs) -> Inputs:
        return {key: tensor.to(self.fabric.device) for key, tensor in inputs.items()}


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of the softmax of the last dimension, (..., K) -> (...), in nats."""
    logs = torch.log_softmax(logits.float(), -1)
    return -(logs.exp() * logs).sum(-1)


class Shells:
    """The pool's module with each task's own head, all of them sharing their parameters.

    Attributes:
        paths: The merged tensors' names -> the parameters' names in the modules.
        modules: By task.
    """

    def __init__(
        self, pool: Any, names: list[str], tasks: Mapping[str, Examples | Texts], device: torch.device
    ) -> None:
        """Make the module once.

        Raises:
            MergeError: Some merged tensor is no parameter of the module.
        """
        module = pool.module().to(device).requires_grad_(False)
        self.paths = parameters_of(pool, module, names)
        shared = {id(tensor): tensor for tensor in module.parameters()}
        self.modules: dict[str, nn.Module] = {}
        for task, own in tasks.items():
            self.modules[task] = module
            if isinstance(own, Texts) and own.kind in HEADED:
                apart = copy.deepcopy(module, dict(shared))
                self.modules[task] = (own.heads or own.pool).with_head(apart, own.expert).to(device)
            self.modules[task].requires_grad_(False)

    def base(self) -> dict[str, torch.Tensor]:
        """The merged tensors as the module has them, by their names; they share its memory."""
        module = next(iter(self.modules.values()))
        return {name: module.get_parameter(path).detach() for name, path in self.paths.items()}

    def forward(self, weights: Mapping[str, torch.Tensor]) -> Forward:
        """The modules with other weights, given by the merged tensors' names."""
        placed = {self.paths[name]: tensor for name, tensor in weights.items()}

        def run(task: str, inputs: Inputs) -> Any:
            return torch.func.functional_call(self.modules[task], placed, (), inputs)

        return run


def parameters_of(pool: Any, module: nn.Module, names: list[str]) -> dict[str, str]:
    """Where a pool puts its tensors: name -> the name of the parameter.

    Names on disk may be others than in the module. Then a module is filled with numbers that tell.

    Raises:
        MergeError: A tensor is not found whole in one parameter.
    """
    own = dict(module.named_parameters())
    if all(name in own for name in names):
        return {name: name for name in names}
    marked = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs_of(pool.reference).items()}
    for index, name in enumerate(names, start=1):
        if name in marked:
            marked[name] = torch.full(marked[name].shape, float(index))
    found: dict[str, str] = {}
    for path, tensor in pool.module(marked).named_parameters():
        low, high = tensor.aminmax()
        if low == high and 0 < int(low) <= len(names):
            found.setdefault(names[int(low) - 1], path)
    lacking = [name for name in names if name not in found]
    if lacking:
        raise MergeError(
            f"{', '.join(lacking[:3])}, {len(lacking)} tensors in all, are not found in the model as parameters of "
            "their own, so that nothing can be learnt of them; leave them out by pool.merge"
        )
    return found
