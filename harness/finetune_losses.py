"""What an expert is trained on: a loss for each kind of task, of rows that the pool feeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from harness.evaluate import IGNORED, preference_inputs, reward_margins
from harness.examples import Examples, Inputs, Texts
from harness.finetune_loop import Loss


@dataclass(frozen=True)
class Lessons:
    """A task's training rows and the module that learns them."""

    module: Any
    task: str
    examples: Any  # Examples or Texts
    device: torch.device
    max_tokens: int | None = None

    def on(self, inputs: Inputs) -> Inputs:
        """The inputs on the device, texts cut to the most tokens."""
        return {key: tensor[:, : self.max_tokens].to(self.device) for key, tensor in inputs.items()}


def loss_of(lessons: Lessons) -> Loss:
    """The mean loss of positions, by the kind of the task, and over how many it is."""
    examples = lessons.examples
    if isinstance(examples, Examples):
        return _images(lessons, examples)
    return _LOSSES[examples.kind](lessons, examples)


def _images(lessons: Lessons, examples: Examples) -> Loss:
    """Cross-entropy against the frozen zero-shot head."""
    head = examples.head.to(lessons.device)

    def loss(positions: list[int]) -> tuple[Tensor, int]:
        inputs, labels = examples.batch(positions)
        own = {key: tensor.to(lessons.device) for key, tensor in inputs.items()}
        return cross_entropy(lessons.module(**own) @ head.T, labels.to(lessons.device)), len(labels)

    return loss


def _classes(lessons: Lessons, examples: Texts) -> Loss:
    """Cross-entropy of a classifier's own head."""

    def loss(positions: list[int]) -> tuple[Tensor, int]:
        texts, labels = zip(*examples.chosen(positions), strict=True)
        logits = lessons.module(**lessons.on(examples.pool.feed(texts))).logits
        return cross_entropy(logits, torch.tensor(labels, device=lessons.device)), len(labels)

    return loss


def _preferences(lessons: Lessons, examples: Texts) -> Loss:
    """Bradley and Terry's: the mean of -log sigmoid(reward of the better text - reward of the other)."""

    def loss(positions: list[int]) -> tuple[Tensor, int]:
        inputs = lessons.on(preference_inputs(examples.pool, examples.chosen(positions)))
        return -logsigmoid(reward_margins(lessons.module, lessons.task, inputs)).mean(), len(positions)

    return loss


def _tokens(lessons: Lessons, examples: Texts) -> Loss:
    """Mean cross-entropy of the tokens that are to be predicted: of a text all, of a pair the target's and the end."""

    def loss(positions: list[int]) -> tuple[Tensor, int]:
        rows = ended(examples, examples.chosen(positions))
        inputs = lessons.on(examples.pool.feed(rows))
        told = inputs["labels"] if examples.pool.family == "seq2seq" else inputs["labels"][:, 1:]
        return lessons.module(**inputs, use_cache=False).loss, int(told.ne(IGNORED).sum())

    return loss


_LOSSES: dict[str, Callable[[Lessons, Texts], Loss]] = {
    "text_classification": _classes,
    "preference": _preferences,
    "perplexity": _tokens,
    "exact_match": _tokens,
}


def ended(examples: Texts, rows: Sequence[Any]) -> list[Any]:
    """The rows, answers of a model that continues texts with what ends them: the task's `stop`, or the end of text.

    Models of encoder and decoder have tokenizers that end targets themselves.
    """
    if examples.kind != "exact_match" or examples.pool.family != "causal_lm":
        return list(rows)
    end = examples.stop if examples.stop is not None else examples.pool.tokenizer.eos_token or ""
    return [(prompt, target + end) for prompt, target in rows]
