"""Texts as a language model's inputs, and its greedy continuations of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from pools.headers import CheckpointError
from pools.language_frame import LanguageFrame, quiet

IGNORED = -100  # a label that no loss counts
_PROMPTS = 32  # continued at a time


class LanguageTexts:
    """What stands between texts and a model.

    Args:
        frame: Whose tokenizer, configuration and generation settings are used.
    """

    def __init__(self, frame: LanguageFrame) -> None:
        self._frame, self._family = frame, frame.family

    @cached_property
    def _tokenizer(self) -> Any:
        return self._frame.tokenizer

    def feed(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Rows as the model's inputs: see `pools.language.LanguagePool.feed`."""
        if self._family == "sequence_classification":
            return self._texts(rows)
        if self._family == "seq2seq":
            return self._pairs(rows)
        return self._continuations(rows)

    def generate(self, module: Any, prompts: Sequence[str], max_new_tokens: int, stop: str | None = None) -> list[str]:
        """Greedy continuations: see `pools.language.LanguagePool.generate`."""
        if self._family == "sequence_classification":
            raise CheckpointError("a sequence classifier continues no text; use family causal_lm or seq2seq")
        found: list[str] = []
        for start in range(0, len(prompts), _PROMPTS):
            found += self._continued(module, list(prompts[start : start + _PROMPTS]), max_new_tokens, stop)
        return found

    def _continued(self, module: Any, prompts: list[str], max_new_tokens: int, stop: str | None) -> list[str]:
        """Continue a batch of prompts."""
        inputs = self._tokenizer(
            prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
        )
        length = 0 if self._family == "seq2seq" else inputs["input_ids"].shape[1]
        self._fits(length + max_new_tokens, f"a prompt with {max_new_tokens} new tokens")
        done = [_Stop(self._tokenizer, stop, length)] if stop else None
        with torch.no_grad(), quiet():
            how = self._greedy(module, max_new_tokens)
            ids = module.generate(**inputs.to(module.device), generation_config=how, stopping_criteria=done)
        texts = self._tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        return [text.partition(stop)[0] if stop else text for text in texts]

    def _greedy(self, module: Any, max_new_tokens: int) -> Any:
        """Settings of a greedy continuation: of the model's own, only which tokens begin and end a text."""
        from transformers import GenerationConfig

        file = next((file for file in self._frame.copies if file.name == "generation_config.json"), None)
        told = json.loads(file.read_text(encoding="utf-8")) if file else {}
        keys = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
        own = {key: told.get(key, getattr(self._frame.config, key, None)) for key in keys}
        if own["eos_token_id"] is None:
            own["eos_token_id"] = self._tokenizer.eos_token_id
        own |= {"pad_token_id": self._tokenizer.pad_token_id, "max_new_tokens": max_new_tokens}
        own["use_cache"] = not getattr(module, "uncached", False)  # a mixture may look back at the tokens
        return GenerationConfig(do_sample=False, **{key: value for key, value in own.items() if value is not None})

    def _texts(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Texts, or pairs of texts, for a classifier."""
        single = all(isinstance(row, str) for row in rows)
        columns = [list(rows)] if single else [list(column) for column in zip(*rows, strict=True)]
        inputs = self._tokenizer(*columns, padding=True, padding_side="right", return_tensors="pt")
        self._fits(inputs["input_ids"].shape[1], "a text")
        return dict(inputs)

    def _continuations(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Texts, or prompts with what follows them, and the labels of what is to be predicted."""
        ids, hidden = [], []  # tokens of each row, and how many of them are the prompt's
        for row in rows:
            prompt, target = ("", row) if isinstance(row, str) else row
            whole = self._tokenizer(prompt + target)["input_ids"]
            before = self._tokenizer(prompt)["input_ids"] if prompt else []
            ids.append(whole)
            hidden.append(_common(before, whole))
        input_ids, mask = self._padded(ids)
        labels = input_ids.masked_fill(mask == 0, IGNORED)
        for row_labels, n in zip(labels, hidden, strict=True):
            row_labels[:n] = IGNORED
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _pairs(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Prompts for the encoder and targets as labels."""
        if any(isinstance(row, str) for row in rows):
            raise CheckpointError("seq2seq models are fed (prompt, target) pairs, got a text alone")
        input_ids, mask = self._padded([self._tokenizer(prompt)["input_ids"] for prompt, _ in rows])
        targets, target_mask = self._padded([self._tokenizer(text_target=target)["input_ids"] for _, target in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": targets.masked_fill(target_mask == 0, IGNORED),
        }

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, padded on the right (B, L), and where they are tokens (B, L)."""
        longest = max(map(len, rows))
        self._fits(longest, "a text")
        ids = torch.full((len(rows), longest), self._tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = 1
        return ids, mask

    def _fits(self, length: int, what: str) -> None:
        """Refuse what is longer than the model reads."""
        text = self._frame.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and "roberta" in text.model_type:
            limit -= 2  # its positions are counted from 2 on
        if isinstance(limit, int) and length > limit > 0:
            raise CheckpointError(
                f"{what} has {length} tokens, and {self._frame.source} reads at most {limit}; shorten it"
            )


def _Stop(tokenizer: Any, stop: str, length: int) -> Any:  # noqa: N802
    """A criterion that ends a row when its continuation has the text `stop`."""
    from transformers import StoppingCriteria

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            texts = tokenizer.batch_decode(input_ids[:, length:], skip_special_tokens=True)
            return torch.tensor([stop in text for text in texts], device=input_ids.device)

    return Stop()


def _common(start: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for index, (one, other) in enumerate(zip(start, whole, strict=False)):
        if one != other:
            return index
    return min(len(start), len(whole))
