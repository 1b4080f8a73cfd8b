"""Scores a module on every task, each task's result as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics.aggregation import MeanMetric

from harness.examples import Examples
from harness.execute import own_share


@dataclass(frozen=True)
class TaskScore:
    """What a module reaches on one task."""

    task: str
    accuracy: float  # share of examples, in [0, 1]
    loss: float  # mean cross-entropy, nats
    n: int  # examples


def evaluate(
    fabric: Fabric,
    module: nn.Module,
    tasks: Mapping[str, Examples],
    batch_size: int,
    tick: Callable[[int], None] = lambda n: None,
) -> Iterator[TaskScore]:
    """Score a module task by task; the rows are spread over the devices and every row counts once.

    Args:
        fabric: Devices.
        module: Inputs -> outputs (B, D), which a task's head (K, D) turns into logits.
        tasks: Examples by task name.
        batch_size: Rows on each device at a time.
        tick: Called with the number of rows done.
    """
    module = module.to(fabric.device).eval()
    for task, examples in tasks.items():
        yield score(fabric, module, task, examples, batch_size, tick)


@torch.inference_mode()
def score(
    fabric: Fabric, module: nn.Module, task: str, examples: Examples, batch_size: int, tick: Callable[[int], None]
) -> TaskScore:
    """Score a module on one task."""
    head = examples.head.to(fabric.device)
    accuracy, loss = (MeanMetric().set_dtype(torch.float64).to(fabric.device) for _ in range(2))
    for inputs, labels in examples.batches(own_share(fabric, len(examples)), batch_size):
        labels = labels.to(fabric.device)
        with fabric.autocast():
            logits = module(**{key: tensor.to(fabric.device) for key, tensor in inputs.items()}) @ head.T
        accuracy.update(logits.argmax(1) == labels)
        loss.update(cross_entropy(logits.float(), labels, reduction="none"))
        tick(len(labels))
    return TaskScore(task, float(accuracy.compute()), float(loss.compute()), len(examples))
