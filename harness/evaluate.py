"""Scores a module on every task, each task's result as soon as it is there: one scorer for each kind of task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid

from harness.examples import Examples, Inputs, Texts
from harness.execute import own_share, sum_over_devices
from tasks.splits import TaskError

LOGITS_BYTES = 1 << 28  # of one forward pass over tokens, about: batches with more are cut
IGNORED = -100  # a label that is not predicted: padding, prompts

Tick = Callable[[int], None]


@dataclass(frozen=True)
class TaskScore:
    """What a module reaches on one task."""

    task: str
    metric: str  # what `value` is: accuracy, exact_match (shares in [0, 1]), perplexity
    value: float
    higher_is_better: bool
    loss: float  # mean cross-entropy in nats: of an example where there are classes, else of a token
    n: int  # examples
    more: Mapping[str, float] = field(default_factory=dict)  # further numbers, by metric


def evaluate(
    fabric: Fabric,
    module: nn.Module,
    tasks: Mapping[str, Examples | Texts],
    batch_size: int,
    tick: Tick = lambda n: None,
) -> Iterator[TaskScore]:
    """Score a module task by task; the rows are spread over the devices and every row counts once.

    Args:
        fabric: Devices.
        module: What the tasks' pool made.
        tasks: Examples by task name.
        batch_size: Rows on each device at a time.
        tick: Called with the number of rows done.
    """
    module = module.to(fabric.device).eval()
    for task, examples in tasks.items():
        yield score(fabric, module, task, examples, batch_size, tick)


@torch.inference_mode()
def score(
    fabric: Fabric, module: nn.Module, task: str, examples: Examples | Texts, batch_size: int, tick: Tick
) -> TaskScore:
    """Score a module on one task, by the task's kind."""
    return _SCORERS[examples.kind](fabric, module, task, examples, batch_size, tick)


def _images(fabric: Fabric, module: nn.Module, task: str, examples: Examples, batch_size: int, tick: Tick) -> TaskScore:
    """Accuracy: the module's outputs (B, D) by the task's head (K, D)."""
    head = examples.head.to(fabric.device)
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # right, nats
    for inputs, labels in examples.batches(own_share(fabric, len(examples)), batch_size):
        with fabric.autocast():
            logits = module(**_on(fabric, inputs)) @ head.T
        sums += _right_and_nats(logits, labels.to(fabric.device))
        tick(len(labels))
    return _accuracy(fabric, task, sums, len(examples))


def _right_and_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of logits (B, K) and labels (B,): how many are right, and summed cross-entropy, (2,) float64."""
    nats = cross_entropy(logits.float(), labels, reduction="none").double().sum()
    return torch.stack([(logits.argmax(1) == labels).sum().double(), nats])


def _accuracy(fabric: Fabric, task: str, sums: torch.Tensor, n: int) -> TaskScore:
    right, nats = (sum_over_devices(fabric, sums) / n).tolist()
    return TaskScore(task, "accuracy", right, True, nats, n)


def _classes(fabric: Fabric, module: Any, task: str, examples: Texts, batch_size: int, tick: Tick) -> TaskScore:
    """Accuracy of a sequence classifier with the head of the task's own expert.

    Raises:
        TaskError: The head has another number of classes than the task.
    """
    module = (examples.heads or examples.pool).with_head(module, examples.expert).to(fabric.device)
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # right, nats
    for rows in examples.batches(own_share(fabric, len(examples)), batch_size):
        texts, labels = zip(*rows, strict=True)
        wanted = torch.tensor(labels, device=fabric.device)
        with fabric.autocast():
            logits = module(**_on(fabric, examples.pool.feed(texts))).logits  # (B, K)
        if logits.shape[1] != len(examples.labels):
            raise TaskError(f"task {task} has {len(examples.labels)} classes, the model's head {logits.shape[1]}")
        sums += _right_and_nats(logits, wanted)
        tick(len(rows))
    return _accuracy(fabric, task, sums, len(examples))


def _preferences(
    fabric: Fabric, module: nn.Module, task: str, examples: Texts, batch_size: int, tick: Tick
) -> TaskScore:
    """Share of pairs whose better text has the higher reward; the loss is Bradley and Terry's.

    Raises:
        TaskError: The head gives more than one number.
    """
    module = (examples.heads or examples.pool).with_head(module, examples.expert).to(fabric.device)
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # right, nats
    for rows in examples.batches(own_share(fabric, len(examples)), batch_size):
        with fabric.autocast():
            margins = reward_margins(module, task, _on(fabric, preference_inputs(examples.pool, rows)))
        sums += torch.stack([(margins > 0).sum().double(), -logsigmoid(margins.float()).double().sum()])
        tick(len(rows))
    return _accuracy(fabric, task, sums, len(examples))


def preference_inputs(pool: Any, rows: Sequence[tuple[str, str]]) -> Inputs:
    """Pairs of texts as inputs: the better ones, then the others, (2 B, L)."""
    return pool.feed([*(chosen for chosen, _ in rows), *(rejected for _, rejected in rows)])


def reward_margins(module: Any, task: str, inputs: Inputs) -> torch.Tensor:
    """By how much the better texts' rewards are higher, (B,).

    Raises:
        TaskError: The head gives more than one number.
    """
    rewards = module(**inputs).logits  # (2 B, 1)
    if rewards.shape[1] != 1:
        raise TaskError(
            f"task {task} wants one number of a text, its reward; the model's head gives {rewards.shape[1]}"
        )
    chosen, rejected = rewards[:, 0].chunk(2)
    return chosen - rejected


def _perplexity(fabric: Fabric, module: Any, task: str, examples: Texts, batch_size: int, tick: Tick) -> TaskScore:
    """Perplexity over all tokens of the split that have a token before them, and bits per byte.

    Raises:
        TaskError: There is no such token.
    """
    share = own_share(fabric, len(examples))
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)  # nats, tokens, bytes
    for row in examples.chosen(share):
        sums[2] += len((row if isinstance(row, str) else row[1]).encode())
    for inputs, done in _blocks(fabric, examples, batch_size) if examples.block else _rows(examples, share, batch_size):
        if inputs is not None:
            sums[:2] += _nats(fabric, module, examples.pool.family, inputs)
        tick(done)
    nats, tokens, size = sum_over_devices(fabric, sums).tolist()
    loss = _mean(task, nats, tokens)
    more = {"tokens": tokens, "bits_per_byte": nats / math.log(2) / size}
    return TaskScore(
        task, "perplexity", float(torch.tensor(loss, dtype=torch.float64).exp()), False, loss, len(examples), more
    )


def _exact_match(fabric: Fabric, module: Any, task: str, examples: Texts, batch_size: int, tick: Tick) -> TaskScore:
    """Share of greedy answers that are the target, but for spaces around them; the loss is of the targets' tokens.

    Raises:
        TaskError: No target has a token.
    """
    pool = examples.pool
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)  # nats, tokens, right
    for rows in examples.batches(own_share(fabric, len(examples)), batch_size):
        prompts, targets = zip(*rows, strict=True)
        with fabric.autocast():
            answers = pool.generate(module, prompts, examples.max_new_tokens, examples.stop)
        sums[2] += sum(answer.strip() == target.strip() for answer, target in zip(answers, targets, strict=True))
        sums[:2] += _nats(fabric, module, pool.family, pool.feed(rows))
        tick(len(rows))
    nats, tokens, right = sum_over_devices(fabric, sums).tolist()
    loss = _mean(task, nats, tokens)
    return TaskScore(task, "exact_match", right / len(examples), True, loss, len(examples), {"tokens": tokens})


_SCORERS: dict[str, Callable[..., TaskScore]] = {
    "image_classification": _images,
    "text_classification": _classes,
    "preference": _preferences,
    "perplexity": _perplexity,
    "exact_match": _exact_match,
}


def _mean(task: str, nats: float, tokens: float) -> float:
    if not tokens:
        raise TaskError(f"task {task}: no row has a token to predict; a text needs at least two, a target one")
    return nats / tokens


def _rows(examples: Texts, share: range, batch_size: int) -> Iterator[tuple[Inputs | None, int]]:
    """Batches of rows, each on its own, and how many; empty texts have nothing to predict."""
    for rows in examples.batches(share, batch_size):
        filled = [row for row in rows if row]
        yield examples.pool.feed(filled) if filled else None, len(rows)


def _blocks(fabric: Fabric, examples: Texts, batch_size: int) -> Iterator[tuple[Inputs, int]]:
    """Batches of blocks of all texts in a row, and how many rows they are worth.

    A block begins with the last token of the one before, so that the tokens that are predicted are those of the rows
    on their own: each once, but for the first of each text.
    """
    assert examples.block is not None
    rows = [row for row in examples.chosen(range(len(examples))) if row]
    tokens = (
        [torch.tensor(ids, dtype=torch.int64) for ids in examples.pool.tokenizer(rows)["input_ids"]] if rows else []
    )
    ids = torch.cat([torch.zeros(0, dtype=torch.int64), *tokens])  # (N,)
    labels = torch.cat([ids[:0], *(torch.cat([ids.new_full((1,), IGNORED), own[1:]]) for own in tokens if len(own))])
    starts = range(0, max(len(ids) - 1, 0), examples.block - 1)
    own = [starts[index] for index in own_share(fabric, len(starts))]
    whole = [start for start in own if start + examples.block <= len(ids)]
    batches = [whole[index : index + batch_size] for index in range(0, len(whole), batch_size)]
    batches += [[start] for start in own[len(whole) :]]
    done = 0  # blocks
    for batch in batches:
        inputs = torch.stack([ids[start : start + examples.block] for start in batch])  # (B, block), the last shorter
        wanted = torch.stack([labels[start : start + examples.block] for start in batch])
        before, done = done, done + len(batch)
        worth = len(examples) * done // len(starts) - len(examples) * before // len(starts)
        yield {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": wanted}, worth


def _nats(fabric: Fabric, module: Any, family: str, inputs: Inputs) -> torch.Tensor:
    """Summed cross-entropy of the labels that count, and how many do: (2,) float64."""
    found = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    width = max(inputs["input_ids"].shape[1], inputs["labels"].shape[1])
    words = module.config.get_text_config().vocab_size
    at_once = max(1, LOGITS_BYTES // (4 * width * words))
    for part in zip(*(tensor.split(at_once) for tensor in inputs.values()), strict=True):
        own = _on(fabric, dict(zip(inputs, part, strict=True)))
        labels = own["labels"]
        with fabric.autocast():
            if family == "seq2seq":  # the decoder's inputs are the labels, moved by one inside
                logits = module(**own, use_cache=False).logits
            else:
                del own["labels"]
                logits, labels = module(**own, use_cache=False).logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        found += torch.stack([losses.double().sum(), (labels != IGNORED).sum().double()])
    return found


def _on(fabric: Fabric, inputs: Inputs) -> Inputs:
    """The inputs on the device."""
    return {key: tensor.to(fabric.device) for key, tensor in inputs.items()}
