"""Build the embedded suite: train a small CLIP on captioned drawings, then one expert of its vision tower per task.

The base sees only the tasks' galleries (plainer pictures in another style); each expert starts from the base and trains
its whole vision tower on its task's train split against the frozen zero-shot head. Seeded, on the CPU.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModel

from harness.finetune_loop import fit, one_cycle
from tasks import draw
from tasks.canvas import SIZE
from tasks.export import write_tasks

PROMPT_TOKENS = 16  # longest prompt, with its start and end
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Sizes and training of the suite's networks; chosen so that the published order of methods shows."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    patch: int = 7
    text_layers: int = 2
    gallery_rows: int = 3000  # pictures per task that the base sees
    base_steps: int = 3500
    base_batch: int = 128
    base_rate: float = 1e-3
    hottest: float = 20.0  # the contrastive scale exp(logit_scale) is kept at or below this
    expert_steps: int = 600
    expert_batch: int = 64
    expert_rate: float = 1e-3  # of the multilayer perceptrons
    calm: float = 0.1  # the rest of the tower learns this much slower
    rates: dict[str, float] = field(default_factory=dict)  # a task's own expert_rate


class Pictures(Dataset):
    """Images (n, SIZE, SIZE) uint8 and labels (n,), read a whole batch at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return the rows' images (B, SIZE, SIZE) and labels (B,)."""
        return self.images[rows], self.labels[rows]

    def batches(self, size: int, steps: int, seed: int) -> DataLoader:
        """Return `steps` batches that go through the rows again and again, shuffled anew in every pass by the seed."""
        order = RandomSampler(self, num_samples=size * steps, generator=torch.Generator().manual_seed(seed))
        return DataLoader(self, sampler=BatchSampler(order, size, drop_last=True), batch_size=None)


def pixels(images: Tensor) -> Tensor:
    """Do what the suite's image processor does: (B, SIZE, SIZE) uint8 -> (B, 3, SIZE, SIZE) float32 in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def moved(images: Tensor, most: int = 2) -> Tensor:
    """Shift a batch (B, SIZE, SIZE) by up to `most` pixels either way, repeating the border."""
    down, right = torch.randint(0, 2 * most + 1, (2,)).tolist()
    wide = F.pad(images[:, None].float(), (most,) * 4, mode="replicate")[:, 0]
    return wide[:, down : down + SIZE, right : right + SIZE]


class Alignment(lightning.LightningModule):
    """Contrastive training of pictures against captions, where captions of one class are not each other's negatives."""

    def __init__(self, model: CLIPModel, prompts: Tensor, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.prompts = prompts  # (C, templates, tokens)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the symmetric cross-entropy of one batch, each picture with one of its class's captions."""
        images, labels = batch
        chosen = torch.randint(0, self.prompts.shape[1], labels.shape)
        text = F.normalize(embedded_text(self.model, self.prompts[labels, chosen]), dim=-1)
        seen = F.normalize(embedded_images(self.model.vision_model, self.model, pixels(moved(images, 1))), dim=-1)
        scale = self.model.logit_scale.exp().clamp(max=self.recipe.hottest)
        logits = scale * seen @ text.T  # (B, B)
        same = (labels[:, None] == labels[None]).float()
        targets = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle rate."""
        return one_cycle([list(self.model.parameters())], [self.recipe.base_rate], self.recipe.base_steps)


class Tuning(lightning.LightningModule):
    """Fine-tuning of one vision tower on one task against its frozen zero-shot head."""

    def __init__(self, tower: CLIPVisionModel, frame: CLIPModel, head: Tensor, recipe: Recipe, rate: float) -> None:
        super().__init__()
        self.tower, self.recipe, self.rate = tower, recipe, rate
        self.frame = [frame]  # in a list, so that its frozen weights are not this module's
        self.head = head  # (C, D), already scaled

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of one batch."""
        images, labels = batch
        seen = embedded_images(self.tower, self.frame[0], pixels(moved(images)))
        loss = F.cross_entropy(F.normalize(seen, dim=-1) @ self.head.T, labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle rate, which is lower outside the multilayer perceptrons."""
        inner = [weight for name, weight in self.tower.named_parameters() if ".mlp." in name]
        outer = [weight for name, weight in self.tower.named_parameters() if ".mlp." not in name]
        return one_cycle([inner, outer], [self.rate, self.rate * self.recipe.calm], self.recipe.expert_steps)


def embedded_text(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Embed prompts (B, PROMPT_TOKENS) -> (B, D), not normalised."""
    return model.text_projection(model.text_model(input_ids=tokens).pooler_output)


def embedded_images(tower: nn.Module, frame: CLIPModel, values: Tensor) -> Tensor:
    """Embed pixel values (B, 3, SIZE, SIZE) by a tower and the frame's projection -> (B, D), not normalised."""
    return frame.visual_projection(tower(pixel_values=values).pooler_output)


def caption_tokenizer() -> CLIPTokenizer:
    """Learn byte-pair merges on the suite's prompts: a `CLIPTokenizer` that reads any text."""
    start = CLIPTokenizer().backend_tokenizer  # for CLIP's own normaliser and word pattern
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = start.normalizer, start.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    prompts = [text.format(name) for task in draw.TASKS.values() for text in task.templates for name in task.classes]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[], end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator(prompts, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def task_prompts(tokenizer: CLIPTokenizer, classes: Iterable[str], templates: Iterable[str]) -> Tensor:
    """Tokenise every class in every template: (classes, templates, PROMPT_TOKENS)."""
    texts = [[template.format(name) for template in templates] for name in classes]
    padded = {"padding": "max_length", "max_length": PROMPT_TOKENS, "return_tensors": "pt"}
    return torch.stack([tokenizer(row, **padded)["input_ids"] for row in texts])


@torch.no_grad()
def zero_shot_head(model: CLIPModel, prompts: Tensor) -> Tensor:
    """Average the normalised prompts of each class, times exp(logit_scale): (C, templates, tokens) -> (C, D)."""
    text = F.normalize(embedded_text(model, prompts.flatten(0, 1)), dim=-1).unflatten(0, prompts.shape[:2])
    return model.logit_scale.exp() * F.normalize(text.mean(1), dim=-1)


def new_model(tokenizer: CLIPTokenizer, recipe: Recipe) -> CLIPModel:
    """Set up the untrained CLIP."""
    same = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_attention_heads": recipe.heads,
        "projection_dim": recipe.width,
    }
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": PROMPT_TOKENS,
        "num_hidden_layers": recipe.text_layers,
    }
    vision = {"image_size": SIZE, "patch_size": recipe.patch, "num_hidden_layers": recipe.layers}
    config = CLIPConfig(
        text_config={**same, **text, **ids}, vision_config={**same, **vision}, projection_dim=recipe.width
    )
    model = CLIPModel(config)
    model.logit_scale.data.fill_(float(np.log(10.0)))
    return model


def train_base(tokenizer: CLIPTokenizer, recipe: Recipe, seed: int) -> CLIPModel:
    """Train the CLIP on the galleries of all tasks and their captions."""
    lightning.seed_everything(seed, verbose=False)
    model = new_model(tokenizer, recipe)
    shown = [draw.gallery(name, recipe.gallery_rows, seed) for name in draw.TASKS]
    prompts = [task_prompts(tokenizer, task.classes, task.templates) for task in draw.TASKS.values()]
    starts = np.cumsum([0, *(len(p) for p in prompts)])
    labels = np.concatenate([rows.labels + start for rows, start in zip(shown, starts, strict=False)])
    pictures = Pictures(np.concatenate([rows.images for rows in shown]), labels)
    batches = pictures.batches(recipe.base_batch, recipe.base_steps, seed)
    ends = (torch.cat(prompts) == tokenizer.eos_token_id).int().argmax(-1)  # what follows the first end is padding
    fit(Alignment(model, torch.cat(prompts)[..., : int(ends.max()) + 1], recipe), batches)
    model.logit_scale.data.clamp_(max=float(np.log(recipe.hottest)))
    return model.eval()


def train_expert(base: CLIPModel, name: str, head: Tensor, recipe: Recipe, seed: int) -> CLIPVisionModel:
    """Fine-tune a copy of the base's vision tower on one task's train split."""
    lightning.seed_everything(seed, verbose=False)
    tower = deepcopy(base.vision_model)
    rows = draw.split(name, "train", seed)
    batches = Pictures(rows.images, rows.labels).batches(recipe.expert_batch, recipe.expert_steps, seed)
    frame = deepcopy(base).requires_grad_(False)
    fit(Tuning(tower, frame, head, recipe, recipe.rates.get(name, recipe.expert_rate)), batches)
    return tower.eval()


@torch.no_grad()
def accuracy(tower: nn.Module, frame: CLIPModel, head: Tensor, images: Tensor, labels: Tensor) -> float:
    """Share of rows whose highest logit is their label; images are pixel values (n, 3, SIZE, SIZE)."""
    logits = F.normalize(embedded_images(tower, frame, images), dim=-1) @ head.T
    return (logits.argmax(1) == labels).float().mean().item()


def build_suite(out_pool: Path, out_tasks: Path, seed: int = 0, recipe: Recipe | None = None) -> dict:
    """Train the whole suite and write it: a pool in the hub's layout and its tasks as parquet.

    Args:
        out_pool: Directory for `base/`, `experts/<task>/` and `accuracies.json`; files there are overwritten.
        out_tasks: Directory for `<task>/<split>.parquet` and `templates.json`.
        seed: Seeds drawings, initial weights and the order of batches.
        recipe: Sizes and training; the default is the suite as committed.

    Returns:
        The recorded test accuracies, as `accuracies.json` holds them.
    """
    recipe = recipe or Recipe()
    write_tasks(out_tasks, seed)
    tokenizer = caption_tokenizer()
    base = train_base(tokenizer, recipe, seed)
    base.save_pretrained(out_pool / "base")
    tokenizer.save_pretrained(out_pool / "base")
    side = {"height": SIZE, "width": SIZE}
    half = [0.5] * 3
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=half, image_std=half
    ).save_pretrained(out_pool / "base")
    for name, task in draw.TASKS.items():
        head = zero_shot_head(base, task_prompts(tokenizer, task.classes, task.templates))
        train_expert(base, name, head, recipe, seed).save_pretrained(out_pool / "experts" / name)
    return record_accuracies(out_pool, out_tasks)


def record_accuracies(pool: Path, tasks: Path) -> dict:
    """Score the base and each task's own expert on the test splits, all read from their files, and write the result."""
    base = CLIPModel.from_pretrained(pool / "base").eval()
    tokenizer = CLIPTokenizer.from_pretrained(pool / "base")
    processor = CLIPImageProcessorPil.from_pretrained(pool / "base")
    templates = json.loads((tasks / "templates.json").read_text())
    scores: dict = {"experts": {}, "base": {}}
    for name, wording in templates.items():
        rows = datasets.Dataset.from_parquet(str(tasks / name / "test.parquet"))
        head = zero_shot_head(base, task_prompts(tokenizer, rows.features["label"].names, wording))
        values = processor(rows["image"][:], return_tensors="pt")["pixel_values"]
        labels = torch.tensor(rows["label"][:])
        expert = CLIPVisionModel.from_pretrained(pool / "experts" / name).eval()
        scores["experts"][name] = accuracy(expert, base, head, values, labels)
        scores["base"][name] = accuracy(base.vision_model, base, head, values, labels)
    (pool / "accuracies.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores
