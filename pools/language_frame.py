"""What runs a language model: its class from transformers, its tokenizer, its inputs and its greedy continuations."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pools.headers import CheckpointError

AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}  # family -> class that knows the models of it
_SHOWN = 5


class LanguageFrame:
    """A model's files but for the weights: configuration, tokenizer, generation settings.

    Args:
        family: Of `AUTO`.
        source: What the user called the member that the files are of.
        copies: Files as they are.
        texts: File name -> content; `config.json` among them.
        trust_remote_code: Code among the files may run.
    """

    def __init__(
        self,
        family: str,
        source: str,
        copies: Sequence[Path],
        texts: Mapping[str, str],
        trust_remote_code: bool,
    ) -> None:
        self.family, self.source = family, source
        self.copies, self.texts, self.trust_remote_code = tuple(copies), dict(texts), trust_remote_code

    @cached_property
    def config(self) -> Any:
        """The configuration, as transformers has it.

        Raises:
            CheckpointError: transformers cannot make it.
        """
        from transformers import AutoConfig

        return self._loaded(AutoConfig, "configuration")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; where it has no padding token, the end of a text serves, and is masked out.

        Raises:
            CheckpointError: There is none, or transformers cannot make it.
        """
        from transformers import AutoTokenizer

        if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in self._names):
            raise CheckpointError(f"{self.source} has no tokenizer files; texts cannot be fed without")
        tokenizer = self._loaded(AutoTokenizer, "tokenizer")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise CheckpointError(
                f"the tokenizer of {self.source} has no token that could pad: pad, eos and unk are none"
            )
        return tokenizer

    def skeleton(self, n_labels: int | None = None) -> Any:
        """The model with parameters on the meta device and buffers in memory, in eval mode.

        Args:
            n_labels: Classes of a sequence classifier, where they are not the configuration's.
        """
        model = self._meta_model(n_labels)
        for name, buffer in list(model.named_buffers()):
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            owner._buffers[leaf] = _unfilled(buffer)
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()  # of what is on the meta device, nothing; buffers get their values
        lacking = [name for name, buffer in model.named_buffers() if _is_unfilled(buffer)]
        if lacking:
            some = ", ".join(lacking[:_SHOWN])
            raise CheckpointError(f"this transformers does not say what the buffers {some} of {self.source} hold")
        return model.eval()

    def filled(self, weights: dict[str, torch.Tensor]) -> Any:
        """The model with these weights, which it keeps without a copy, in float32 and eval mode.

        Args:
            weights: By their names on disk, all but what is tied; float32.

        Raises:
            CheckpointError: Tensors are missing, left over or of another shape.
        """
        kind = type(self._meta_model())
        try:
            with quiet():
                model, told = kind.from_pretrained(
                    None, config=self.config, state_dict=weights, dtype=torch.float32, output_loading_info=True
                )
        except RuntimeError as error:
            raise CheckpointError(
                f"these tensors do not make a {kind.__name__}: {self._mismatches(weights, error)}"
            ) from error
        wrong = {
            "missing": told["missing_keys"],
            "left over": told["unexpected_keys"],
            "of another shape": told["mismatched_keys"],
        }
        parts = [
            f"{len(names)} {how}: {', '.join(sorted(map(str, names))[:_SHOWN])}"
            for how, names in wrong.items()
            if names
        ]
        parts += list(told.get("error_msgs") or [])[:_SHOWN]
        if parts:
            raise CheckpointError(f"these tensors do not make a {kind.__name__}: {'; '.join(parts)}")
        if self.family == "sequence_classification" and model.config.pad_token_id is None and self._has_tokenizer:
            model.config.pad_token_id = self.tokenizer.pad_token_id  # decoders look for the last token by it
        return model.eval()

    def _meta_model(self, n_labels: int | None = None) -> Any:
        """The model with all of it on the meta device."""
        import transformers

        config = copy.deepcopy(self.config)
        if n_labels is not None:
            config.num_labels = n_labels
        auto = getattr(transformers, AUTO[self.family])
        try:
            with torch.device("meta"), quiet():
                return auto.from_config(config, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            told = str(error).splitlines()[0][:200]
            raise CheckpointError(f"{self.source} is no model of the family {self.family}: {told}") from error

    def _loaded(self, auto: Any, what: str) -> Any:
        """Have transformers read the files."""
        with quiet():
            try:
                return auto.from_pretrained(
                    self._directory, local_files_only=True, trust_remote_code=self.trust_remote_code
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                told = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise CheckpointError(f"transformers cannot make the {what} of {self.source}: {told}") from error

    @cached_property
    def _directory(self) -> Path:
        """The files, in a directory that goes away with this object: code of a model's own is loaded from it late."""
        place = Path(tempfile.mkdtemp(prefix="crucible-"))
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        for file in self.copies:
            shutil.copyfile(file, place / file.name)
        for name, text in self.texts.items():
            (place / name).write_text(text, encoding="utf-8")
        return place

    @property
    def _names(self) -> list[str]:
        return [*(file.name for file in self.copies), *self.texts]

    @property
    def _has_tokenizer(self) -> bool:
        return any(name.startswith(("tokenizer", "vocab", "spiece")) for name in self._names)

    def _mismatches(self, weights: Mapping[str, torch.Tensor], error: Exception) -> str:
        """Which weights are of another shape than the model's, by name where the names are the same."""
        expected = self._meta_model().state_dict()
        found = [
            f"{name} is {tuple(tensor.shape)}, wanted {tuple(expected[name].shape)}"
            for name, tensor in weights.items()
            if name in expected and expected[name].shape != tensor.shape
        ]
        return "; ".join(found[:_SHOWN]) or str(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars and reports; what they would tell is raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def replace_head(module: Any, fresh: nn.Module, weights: Mapping[str, torch.Tensor]) -> Any:
    """Give a classifier another head, in place.

    Args:
        module: The classifier.
        fresh: A classifier of the same kind on the meta device, with as many classes as the head.
        weights: The head's, by their names in the module, float32; the module keeps them.

    Raises:
        CheckpointError: They do not make the head.
    """
    for part in dict.fromkeys(map(_root, weights)):
        inside = {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items() if _root(name) == part}
        places = [path for path, _ in fresh.named_modules() if path == part or path.endswith(f".{part}")]
        try:
            if len(places) != 1:
                raise RuntimeError(f"a {type(module).__name__} has no {part}")
            head = fresh.get_submodule(places[0])
            head.load_state_dict(inside, strict=True, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"these tensors do not make the head of a {type(module).__name__}: {error}"
            ) from error
        outer, _, leaf = places[0].rpartition(".")
        setattr(module.get_submodule(outer), leaf, head.to(module.device).eval())
    module.num_labels = module.config.num_labels = fresh.config.num_labels  # type: ignore[union-attr]
    return module


def _root(name: str) -> str:
    """Path of the part of a head that a tensor is in.

    >>> _root("classifier.out_proj.weight"), _root("bert.pooler.dense.bias")
    ('classifier', 'bert.pooler')
    """
    before, pooler, _ = name.partition("pooler.")
    return f"{before}pooler" if pooler else name.partition(".")[0]


def _unfilled(buffer: torch.Tensor) -> torch.Tensor:
    """A buffer in memory that holds what no buffer should."""
    if buffer.is_floating_point():
        return torch.full(buffer.shape, float("nan"), dtype=buffer.dtype)
    if buffer.dtype == torch.bool:
        return torch.zeros(buffer.shape, dtype=buffer.dtype)
    return torch.full(buffer.shape, torch.iinfo(buffer.dtype).min, dtype=buffer.dtype)


def _is_unfilled(buffer: torch.Tensor) -> bool:
    """Whether a buffer still holds some of it."""
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return buffer.dtype != torch.bool and bool((buffer == torch.iinfo(buffer.dtype).min).any())
