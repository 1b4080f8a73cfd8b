"""Tokens of the embedded language suite: the tokenizer, and rows as a network is trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tasks.mini_lm_text import Row

CONTEXT = 512  # positions of the network; a row of text takes fewer
IGNORED = -100  # a label that no loss counts
END, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Learn byte-pair merges on texts; digits and capitals stand alone, so that questions are read letter by letter."""
    learner = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex("[0-9A-Z]"), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )


def encoded(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], most: int = CONTEXT
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row; of a question, only the answer and the end are labels."""
    pairs = []
    for row in rows:
        if isinstance(row, str):
            ids = tokenizer(row)["input_ids"][:most]
            pairs.append((ids, ids))
        else:
            asked, answer = (tokenizer(part)["input_ids"] for part in row)
            answer = [*answer, tokenizer.eos_token_id]
            pairs.append((asked + answer, [IGNORED] * len(asked) + answer))
    return pairs


def padded(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Stack rows: input_ids and labels, each (B, L) int64; padded on the right, where nothing that counts looks."""
    longest = max(len(ids) for ids, _ in pairs)

    def stacked(rows: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": stacked([ids for ids, _ in pairs], pad),
        "labels": stacked([labels for _, labels in pairs], IGNORED),
    }


def shuffled(count: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Batches of `size` row numbers below `count`, passing through all of them again and again in a new order."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(count).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
