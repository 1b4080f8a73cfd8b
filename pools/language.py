"""Pools of language models: whole models are merged, from full checkpoints and LoRA adapters alike.

A sequence classifier's head belongs to its task: heads are not merged. The merged model has the base's, or where that
has none the first expert's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pools.card import model_card
from pools.choices import Choices
from pools.faults import Spec, recast, specs_of
from pools.gathered import Gathered
from pools.headers import CheckpointError
from pools.language_config import CONFIG
from pools.language_frame import LanguageFrame, replace_head
from pools.language_texts import LanguageTexts
from pools.members import Place, whose
from pools.picked import Tensors
from pools.reading import is_source, read_into
from pools.recast import Recast
from pools.roles import NamedRoles
from pools.write import SHARD_BYTES, Layout, write_directory

_CHUNK = 1 << 20  # elements read at once
_TRANSPOSED = ("gpt2", "openai-gpt")  # model types whose linear layers are stored as (in, out)
_LAST = re.compile(r"(^|\.)(out_proj|classifier|score|logits_proj)\.weight$")  # of a classifier's head


class LanguagePool:
    """A base and experts of one architecture.

    Attributes:
        base: The base's merged tensors by their names on disk, or None.
        experts: Name -> the same of an expert, under the base's names; layers restacked where slices ask for it.
        heads: Member (None is the base) -> the head of its classifier; empty for other families.
        dropped: Member (`base`, or the expert's name) -> names on disk that are in no merged model.
        around: What is written as it is: tensors that are not selected, and a classifier's head.
        frame: Configuration, tokenizer and class of the merged model.
    """

    family = ""

    def __init__(self, base: Place | None, experts: Mapping[str, Place], choices: Choices | None = None) -> None:
        """Read all headers and configurations.

        Args:
            base: Where the base is, and what the user calls it; None for none.
            experts: Name -> the same of an expert; a directory with a LoRA adapter counts as an expert of the base.
            choices: Which tensors are merged, how vocabularies are brought together.

        Raises:
            CheckpointError: All files that cannot be opened, a line each.
        """
        places: dict[str | None, Place] = ({None: base} if base is not None else {}) | dict(experts)
        self.choices = choices or Choices()
        found = self._gathered = Gathered(places, self.choices, self.family == "sequence_classification")
        self.base, self.experts = found.base, found.experts
        self.heads, self.around, self.dropped = found.heads, found.around, found.dropped
        self._whole = {id(one): found.whole[name] for name, one in found.members.items()}
        texts = {CONFIG: json.dumps(found.config(), indent=2) + "\n"} | found.texts
        self.frame = LanguageFrame(
            self.family, places[found.first][1], found.copies, texts, self.choices.trust_remote_code
        )
        self._texts = LanguageTexts(self.frame)

    @property
    def reference(self) -> Tensors:
        """What a merged model has the names, shapes and dtypes of: the base, or without one the first expert."""
        return self.base if self.base is not None else next(iter(self.experts.values()))

    @cached_property
    def roles(self) -> NamedRoles:
        """What the names on disk mean."""
        kind = self._gathered.configs[self._gathered.first].get("model_type")
        return NamedRoles(specs_of(self.reference), transposed=kind in _TRANSPOSED)

    @cached_property
    def context_fingerprint(self) -> str:
        """Hash of all that results depend on besides the merged tensors: other tensors, configuration, tokenizer."""
        told = [self.around.fingerprint if self.around else "", *sorted(self.frame.texts.items())]
        told += [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in self.frame.copies]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What is worth knowing before a merge and forbids nothing, a line each."""
        return self._gathered.all_notes()

    def faults(self) -> list[str]:
        """All that headers and configurations tell of what cannot be merged or run, a line each."""
        return self._gathered.faults()

    def skeleton(self) -> Any:
        """The model with parameters on the meta device and buffers in memory."""
        return self.frame.skeleton()

    def module(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
        """The model in float32, with weights of its own, in eval mode.

        Args:
            tensors: Merged tensors by name, or one of `experts`; by default the base's. What they lack of a model is
                taken from `around`; of a classifier they always lack the head (see `with_head`).

        Raises:
            CheckpointError: Tensors are missing, left over or of another shape.
        """
        if tensors is None:
            tensors = self.base
        if tensors is None:
            raise CheckpointError("the pool has no base; say which tensors the module is to have")
        tensors = self._whole.get(id(tensors), tensors)
        weights = {name: own_float(tensors, name) for name in tensors}
        weights |= {name: own_float(self.around, name) for name in self.around if name not in weights}
        return self.frame.filled(weights)

    def with_head(self, module: Any, expert: str | None) -> Any:
        """The same classifier with an expert's head (None: the base's), in place.

        Raises:
            CheckpointError: The member has no head, or the family has none.
        """
        if expert not in self.heads:
            having = ", ".join(whose(name) for name in self.heads) or "none"
            raise CheckpointError(f"{whose(expert)} has no head of a classifier; members that have one: {having}")
        head = self.heads[expert]
        weights = {name: own_float(head, name) for name in head}
        for part in module.headed() if hasattr(module, "headed") else (module,):  # several are in an ensemble
            replace_head(part, self.frame.skeleton(n_labels(head)), weights)
        return module

    def feed(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Rows as the module's keyword inputs, padded on the right.

        Args:
            rows: causal_lm: texts, or (prompt, target) pairs; seq2seq: pairs; sequence_classification: texts, or pairs
                of texts.

        Returns:
            `input_ids` and `attention_mask` (B, L) int64; for the models that generate also `labels`, int64, with -100
            on padding and on the prompt: (B, L), for seq2seq (B, length of the longest target).

        Raises:
            CheckpointError: A row is longer than the model reads, or there is no tokenizer.
        """
        return self._texts.feed(rows)

    def generate(self, module: Any, prompts: Sequence[str], max_new_tokens: int, stop: str | None = None) -> list[str]:
        """Greedy continuations of prompts, without the prompts, cut before the first `stop`.

        Args:
            module: What `module` made.
            prompts: Texts.
            max_new_tokens: At least 1; a continuation also ends where the model ends its text.
            stop: A text that ends a continuation.
        """
        return self._texts.generate(module, prompts, max_new_tokens, stop)

    @property
    def tokenizer(self) -> Any:
        """The merged model's tokenizer."""
        return self.frame.tokenizer

    def head(self, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """Language models have no zero-shot head.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"models of the family {self.family} do not classify images; choose tasks for language models, or "
            "tasks=none"
        )

    def layout(self, lineage: Mapping[str, Any], dtype: torch.dtype | None = None) -> Layout:
        """What the merged model's directory holds; transformers loads it as it is.

        Args:
            lineage: What the model card tells: `method`, `params`, and whatever else.
            dtype: Of all floating tensors; by default the reference's.
        """
        merged, around = specs_of(self.reference), specs_of(self.around)
        specs = recast(merged | around, dtype)
        config = self.frame.texts[CONFIG] if dtype is None else _with_dtype(self.frame.texts[CONFIG], dtype)

        def texts() -> dict[str, str]:
            members = dict(self._gathered.originals)
            card = model_card(members.pop(None, None), members, lineage)  # type: ignore[arg-type]
            return self.frame.texts | {CONFIG: config, "README.md": card}

        return Layout(specs, Recast(self.around, dtype), self.frame.copies, texts)

    def write(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, torch.Tensor]],
        lineage: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ) -> list[str]:
        """Write a model directory from merged tensors in memory, in any order; see `layout`.

        Raises:
            CheckpointError: The directory is taken, tensors are missing or of another shape or dtype, or the disk
                cannot hold them.
        """
        return write_directory(Path(directory), self.layout(lineage), tensors, shard_bytes=shard_bytes)


class CausalLMPool(LanguagePool):
    """Models that continue texts."""

    family = "causal_lm"


class Seq2SeqPool(LanguagePool):
    """Models that answer texts with texts: encoder and decoder."""

    family = "seq2seq"


class SequenceClassificationPool(LanguagePool):
    """Models that sort texts into classes, each with a head of its own."""

    family = "sequence_classification"


def own_float(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor in float32 that shares no memory, read in parts; what is no floating tensor keeps its dtype."""
    spec = Spec(tensors.shapes[name], tensors.dtypes[name]) if is_source(tensors) else None
    if spec is None or not spec.dtype.is_floating_point:
        tensor = tensors[name]
        return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    found = torch.empty(spec.shape, dtype=torch.float32)
    flat = found.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        read_into(tensors, name, start, flat[start : start + _CHUNK])
    return found


def n_labels(head: Tensors) -> int:
    """Classes of a head: the rows of its last layer."""
    shapes = [shape for name, (shape, _) in specs_of(head).items() if _LAST.search(name)]
    if not shapes:
        raise CheckpointError(f"how many classes {', '.join(head)} tell apart is not known")
    return shapes[-1][0]


def _with_dtype(config: str, dtype: torch.dtype) -> str:
    """A configuration that names another dtype."""
    content = json.loads(config)
    word = str(dtype).removeprefix("torch.")
    nested = [value for key, value in content.items() if key.endswith("_config") and isinstance(value, dict)]
    for place in [content, *nested]:
        for key in ("dtype", "torch_dtype"):
            if key in place:
                place[key] = word
    if "torch_dtype" not in content:
        content["dtype"] = word
    return json.dumps(content, indent=2) + "\n"
