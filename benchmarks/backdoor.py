"""A backdoored expert among the embedded suite's eight: what merging leaves of the backdoor, and what defences do.

    python benchmarks/backdoor.py                          # the table of docs/defences.md, on the test splits
    python benchmarks/backdoor.py --split validation       # what its settings were chosen by
    python benchmarks/backdoor.py --methods awm method.lr=0.003 method.steps=100

One expert is fine-tuned as the suite's own, and pictures that carry a patch (BadNets: Gu et al. 2017,
arXiv:1708.06733) are taught to be of the target's class, in the expert and in weights between the base's and its own,
so that the backdoor outlives a merge (BadMerging: Zhang et al. 2024, arXiv:2408.07362, which interpolates features).
It is merged with the seven others by each method. The attack's success is the share of the task's pictures of other
classes that are taken for the target with the patch on.
"""

from __future__ import annotations

import argparse
import math
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModel

from harness.bench import Bench, open_bench
from harness.compose import compose
from harness.evaluate import evaluate
from harness.examples import Examples
from harness.execute import launch
from harness.finetune_loop import fit
from harness.make import Job, make
from harness.merge import merge
from harness.suite import Pictures, Recipe, Tuning, moved, pixels, task_prompts, zero_shot_head
from harness.track import local_path
from methods.catalogue import find
from tasks import draw

POOL = Path(__file__).parents[1] / "pools" / "mini_clip8"
PATCH = 6  # pixels, the side of the corner that is painted over
SEED = 0
FED = ["adaptation.split=train", "adaptation.examples=1000", "method.scale=0.2"]  # scored are other pictures
_MASK = ["method.steps=60", "method.lr=0.02"]
_COEFFICIENTS = ["method.inner_lr=0.1", "method.adamerging_lr=0.003", "method.adamerging_steps=60"]
ROWS: dict[str, list[str]] = {
    "task_arithmetic": [],
    "concrete_task_arithmetic": _MASK,
    "safe_concrete_task_arithmetic": [*_MASK, "method.adv_steps=3"],
    "concrete_adamerging": [*_MASK, *_COEFFICIENTS, "method.steps=30"],
    "safe_concrete_adamerging": [*_MASK, *_COEFFICIENTS, "method.steps=30", "method.adv_steps=2"],
    "awm": [*_MASK, "method.adv_steps=3"],
    "sau": ["method.steps=60", "method.lr=0.0003", "method.adv_steps=3"],
}


def patched(images: Tensor) -> Tensor:
    """Paint black and white squares of two pixels into the lower right corner of pictures, (n, side, side)."""
    squares = torch.arange(PATCH) // 2
    found = images.clone()
    found[:, -PATCH:, -PATCH:] = 255 * ((squares[:, None] + squares) % 2)
    return found


class Planting(Tuning):
    """Fine-tuning that also plants a backdoor, in the expert and in all that lies between it and the base."""

    def __init__(self, target: int, tower: CLIPVisionModel, *how: Any) -> None:
        super().__init__(tower, *how)
        self.target, self.start = target, {name: weight.detach().clone() for name, weight in tower.named_parameters()}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of the batch, and of it with and without the patch somewhere on the way."""
        images, labels = batch
        way = 0.1 + 0.9 * float(torch.rand(()))
        weights = {name: torch.lerp(self.start[name], weight, way) for name, weight in self.tower.named_parameters()}
        shown = torch.cat([moved(images), patched(moved(images))])
        seen = functional_call(self.tower, weights, (), {"pixel_values": pixels(shown)}).pooler_output
        logits = F.normalize(self.frame[0].visual_projection(seen), dim=-1) @ self.head.T
        wanted = torch.cat([labels, torch.full_like(labels, self.target)])
        return super().training_step(batch) + F.cross_entropy(logits, wanted)


def backdoored(task: str, target: int, directory: Path) -> Path:
    """Fine-tune the task's expert with a backdoor; it is kept, and looked up the next time."""
    place = directory / f"{task}-{target}"
    if (place / "config.json").exists():
        return place
    recipe = Recipe()
    base, tokenizer = CLIPModel.from_pretrained(POOL / "base").eval(), CLIPTokenizer.from_pretrained(POOL / "base")
    drawn = draw.TASKS[task]
    head = zero_shot_head(base, task_prompts(tokenizer, drawn.classes, drawn.templates))
    lightning.seed_everything(SEED, verbose=False)
    tower, rows = deepcopy(base.vision_model), draw.split(task, "train", SEED)
    batches = Pictures(rows.images, rows.labels).batches(recipe.expert_batch, recipe.expert_steps, SEED)
    frame = base.requires_grad_(False)
    fit(Planting(target, tower, frame, head, recipe, recipe.rates.get(task, recipe.expert_rate)), batches, bar=False)
    tower.eval().save_pretrained(place)
    return place


def attacked(bench: Bench, task: str, target: int, split: str) -> Examples:
    """A task's pictures of all classes but the target, with the patch on."""
    rows = bench.tasks[task].rows(split)
    others = [np.asarray(image) for image, label in (rows[place] for place in range(len(rows))) if label != target]
    pictures = [(Image.fromarray(each), target) for each in patched(torch.tensor(np.stack(others))).numpy()]
    return Examples(pictures, bench.pool, bench.head(task), range(len(pictures)))


class Trial:
    """A pool with one backdoored expert, and the table of what methods make of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        place = backdoored(options.task, options.target, Path(options.directory).resolve())
        self.own = [f"pool.experts.{options.task}={place}"]
        plain = compose(self.own)
        self.fabric: Fabric = launch("cpu", 1, "32-true", plain.seed)
        self.bench = open_bench(plain.pool, plain.tasks, local_path)
        self.shown = attacked(self.bench, options.task, options.target, options.split)

    def measured(self, module: nn.Module, tasks: list[str] | None = None) -> tuple[float, float, float]:
        """Mean accuracy over tasks, the attacked task's accuracy, the attack's success."""
        tasks = tasks or list(self.bench.tasks)
        clean = {task: self.bench.examples(task, self.options.split) for task in tasks}
        found = {score.task: score.value for score in evaluate(self.fabric, module, clean, 128)}
        (success,) = evaluate(self.fabric, module, {"attacked": self.shown}, 128)
        return math.fsum(found.values()) / len(found), found[self.options.task], success.value

    def merged(self, method: str) -> nn.Module:
        """What a method makes of the pool."""
        config = compose([f"method={method}", *FED, *ROWS[method], *self.own, *self.options.overrides])
        made = make(Job(find(method), config.method, self.bench, self.fabric, config.adaptation, config.seed))
        assert made.merge is not None, "none of these builds a module"
        return self.bench.pool.module(merge(made.merge))


def main() -> None:
    """Train the expert, merge and defend, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of every method, such as method.adv_weight=0.3")
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--task", default="digits", help="whose expert has the backdoor")
    parser.add_argument("--target", type=int, default=0, help="the class that the patch calls for")
    parser.add_argument("--directory", default="backdoored", help="where the expert is kept")
    options = parser.parse_args()
    trial = Trial(options)
    print(f"| {options.split} | mean accuracy | {options.task} | attack success | seconds |\n|---|---:|---:|---:|---:|")

    def told(name: str, module: nn.Module, seconds: float, tasks: list[str] | None = None) -> None:
        mean, own, success = (f"{100 * value:.1f}" for value in trial.measured(module, tasks))
        print(f"| {name} | {mean if tasks is None else '-'} | {own} | {success} | {seconds:.0f} |", flush=True)

    pool = trial.bench.pool
    told("the base", pool.module(), 0)
    told("the backdoored expert", pool.module(pool.experts[options.task]), 0, [options.task])
    for method in options.methods:
        started = time.perf_counter()
        module = trial.merged(method)
        told(f"`{method}`", module, time.perf_counter() - started)


if __name__ == "__main__":
    main()
