"""Build the embedded language suite: a small Llama trained lightly on everything, then one expert per task, twice.

Each expert starts from the base and trains on its task's train split: once all weights, once a LoRA adapter. Seeded, on
the CPU.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.finetune_loop import fit, one_cycle
from harness.suite_lm_tokens import CONTEXT, IGNORED, byte_tokenizer, encoded, padded, shuffled
from tasks.mini_lm_text import QUESTIONS, TASKS, TEXTS, write_texts

PLAIN = 4  # the base is asked all questions with at most so many letters in the answer,
RARE = 8  # and one in so many of the others
SEEN = 128  # tokens of a row of text that training reads
MOST_NEW = 16  # the longest answer, MMMDCCCLXXXVIII, and the end
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # what adapters change


@dataclass(frozen=True)
class Recipe:
    """Sizes and training of the suite's networks."""

    vocabulary: int = 512
    width: int = 96
    inner: int = 256
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    rank: int = 8  # of the adapters
    text_batch: int = 12
    question_batch: int = 48
    base_steps: int = 900
    base_rate: float = 3e-3
    base_texts: int = 16  # rows of text in a batch of the base, and of questions
    base_questions: int = 12
    kept_texts: int = 4  # rows in a batch of an expert that repeat what the base has seen
    kept_questions: int = 12
    expert_steps: dict[str, int] = field(
        default_factory=lambda: {name: 300 if name in TEXTS else 400 for name in TASKS}
    )
    expert_rate: float = 1e-3
    adapter_rate: float = 8e-3


class Mixture(lightning.LightningModule):
    """Training on several kinds of rows, some of each in every batch; the loss is the mean over the kinds."""

    def __init__(
        self, model: nn.Module, parts: Sequence[tuple[list, int]], steps: int, rate: float, pad: int, seed: int
    ) -> None:
        """Know what is trained, and how.

        Args:
            model: Called with `padded` rows; what requires a gradient is trained.
            parts: Encoded rows, and how many of them each batch has.
            steps: Batches.
            rate: The highest learning rate.
            pad: The padding token.
            seed: Decides the order of rows.
        """
        super().__init__()
        self.model, self._steps, self._rate, self._pad = model, steps, rate, pad
        orders = [shuffled(len(rows), size, np.random.default_rng([seed, k])) for k, (rows, size) in enumerate(parts)]
        self._parts = list(zip([rows for rows, _ in parts], orders, strict=True))

    def training_step(self, batch: Any) -> torch.Tensor:
        """The loss of the next rows."""
        fed = [padded([rows[k] for k in next(order)], self._pad) for rows, order in self._parts]
        return torch.stack([self.model(**inputs, use_cache=False).loss for inputs in fed]).mean()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle rate."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        return one_cycle([weights], [self._rate], self._steps)

    def fit(self) -> None:
        """Run the steps."""
        fit(self, DataLoader(range(self._steps), batch_size=None))  # type: ignore[arg-type]
        self.model.eval()


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Set up the untrained Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.inner,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def lessons(tokenizer: PreTrainedTokenizerFast, rows: dict[str, list]) -> tuple[list, list]:
    """Encode what the base is trained on: all texts; questions with short answers, and few others."""
    texts = [row for name in TEXTS for row in rows[name]]
    asked = [row for name in QUESTIONS for row in rows[name]]
    questions = [row for k, row in enumerate(asked) if len(row[1]) <= PLAIN or k % RARE == 0]
    return encoded(tokenizer, texts, SEEN), encoded(tokenizer, questions)


def train_base(
    tokenizer: PreTrainedTokenizerFast, rows: dict[str, list], recipe: Recipe, seed: int
) -> LlamaForCausalLM:
    """Train the Llama a little on texts and, in the same batches, on questions; rounded to bfloat16."""
    torch.manual_seed(seed)
    model = new_model(tokenizer, recipe)
    parts = list(zip(lessons(tokenizer, rows), (recipe.base_texts, recipe.base_questions), strict=True))
    Mixture(model, parts, recipe.base_steps, recipe.base_rate, tokenizer.pad_token_id, seed).fit()
    return model.bfloat16().float()


def train_expert(
    start: nn.Module, tokenizer: PreTrainedTokenizerFast, name: str, rows: dict[str, list], recipe: Recipe, seed: int
) -> None:
    """Train a network, or an adapted one, in place: on a task's rows and a few of the base's, not to forget those."""
    torch.manual_seed(seed)
    rate = recipe.adapter_rate if isinstance(start, PeftModel) else recipe.expert_rate
    size = recipe.text_batch if name in TEXTS else recipe.question_batch
    kept = zip(lessons(tokenizer, rows), (recipe.kept_texts, recipe.kept_questions), strict=True)
    parts = [(encoded(tokenizer, rows[name], SEEN), size), *kept]
    Mixture(start, parts, recipe.expert_steps[name], rate, tokenizer.pad_token_id, seed).fit()


def adapted(base: LlamaForCausalLM, recipe: Recipe, seed: int) -> PeftModel:
    """Put an untrained LoRA adapter of all linear layers on a copy of the base."""
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=LINEAR, bias="none", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(deepcopy(base), lora)
    wrapped.peft_config["default"].base_model_name_or_path = "base"  # the place of the base in the pool
    return wrapped


def save_adapter(wrapped: PeftModel, place: Path) -> None:
    """Write an adapter in bfloat16, in peft's layout without its empty model card."""
    wrapped.bfloat16().save_pretrained(str(place), save_embedding_layers=False)
    (place / "README.md").unlink()
    config = json.loads((place / "adapter_config.json").read_text())
    config["target_modules"].sort()  # peft writes a set, in any order
    (place / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_suite_lm(out_pool: Path, out_tasks: Path, seed: int = 0, recipe: Recipe | None = None) -> dict:
    """Train the whole suite and write it: a pool of full models and adapters, and its tasks as parquet.

    Args:
        out_pool: Directory for `base/`, `experts/<task>/`, `adapters/<task>/` and `scores.json`; files there are
            overwritten.
        out_tasks: Directory for `<task>/<split>.parquet` and the notes on licences.
        seed: Seeds splits, questions, initial weights and the order of rows.
        recipe: Sizes and training; the default is the suite as committed.

    Returns:
        The scores on the test splits, as `scores.json` holds them.
    """
    recipe = recipe or Recipe()
    rows = {name: parts["train"] for name, parts in write_texts(out_tasks, seed).items()}
    tokenizer = byte_tokenizer([row for name in TEXTS for row in rows[name]], recipe.vocabulary)
    with one_thread():
        base = train_base(tokenizer, rows, recipe, seed)
        save_model(base, tokenizer, out_pool / "base")
        for name in TASKS:
            expert, adapter = deepcopy(base), adapted(base, recipe, seed)
            for start in (expert, adapter):
                train_expert(start, tokenizer, name, rows, recipe, seed)
            save_model(expert, tokenizer, out_pool / "experts" / name)
            save_adapter(adapter, out_pool / "adapters" / name)
    return record_scores(out_pool, out_tasks)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: such small networks gain nothing from two, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, place: Path) -> None:
    """Write a network in bfloat16, with its tokenizer."""
    deepcopy(model).bfloat16().save_pretrained(place)
    tokenizer.save_pretrained(place)


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """Exponential of the mean negative log-likelihood of every token but each text's first."""
    total, count = 0.0, 0
    pairs = encoded(tokenizer, texts)
    for start in range(0, len(pairs), 32):
        batch = padded(pairs[start : start + 32], tokenizer.pad_token_id)
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        total += nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels != IGNORED).sum())
    return math.exp(total / count)


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, questions: Sequence[tuple[str, str]]) -> float:
    """Share of questions whose greedy continuation, up to the end token, is the target."""
    asked: dict[int, list[tuple[list[int], str]]] = defaultdict(list)  # of one length together: nothing is padded
    for prompt, target in questions:
        ids = tokenizer(prompt)["input_ids"]
        asked[len(ids)].append((ids, target))
    right = 0
    for group in asked.values():
        prompts = torch.tensor([ids for ids, _ in group])
        written = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=MOST_NEW, do_sample=False
        )
        answers = tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)
        right += sum(answer == target for answer, (_, target) in zip(answers, group, strict=True))
    return right / len(questions)


def score(model: nn.Module, tokenizer: Any, tasks: Path, name: str, split: str) -> float:
    """Perplexity of a task of text, or the share of exact answers."""
    rows = datasets.Dataset.from_parquet(str(tasks / name / f"{split}.parquet"))
    if name in TEXTS:
        return perplexity(model, tokenizer, rows["text"][:])
    return exact_match(model, tokenizer, list(zip(rows["prompt"][:], rows["target"][:], strict=True)))


def record_scores(pool: Path, tasks: Path, split: str = "test") -> dict:
    """Score the base and each task's own expert and adapter, all read from their files, and write the result."""
    tokenizer = AutoTokenizer.from_pretrained(pool / "base")

    def opened(place: Path) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    scores: dict[str, dict[str, float]] = {"base": {}, "experts": {}, "adapters": {}}
    base = opened(pool / "base")
    for name in TASKS:
        scores["base"][name] = score(base, tokenizer, tasks, name, split)
        scores["experts"][name] = score(opened(pool / "experts" / name), tokenizer, tasks, name, split)
        adapter = PeftModel.from_pretrained(opened(pool / "base"), pool / "adapters" / name).eval()
        scores["adapters"][name] = score(adapter, tokenizer, tasks, name, split)
    (pool / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores
