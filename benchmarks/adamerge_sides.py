"""The sides that `adamerge_clip.py` runs in turn, each in a process of its own: ours, one plain pass, FusionBench's."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

N_EXPERTS = 8
KINDS = {"layer": "tensor", "task": "task"}  # FusionBench's word -> our granularity
Found = dict[str, Any]


class Feeds:
    """Images are tensors already."""

    def feed(self, rows: Any) -> dict[str, Any]:
        """Rows of (3, H, W) as the module takes them."""
        import torch

        return {"pixel_values": torch.stack(list(rows))}


def run_ours(directory: Path, kind: str, steps: int, precision: str = "32-true") -> Found:
    """As `crucible run method=adamerging` makes it, from the files to the merged tensors."""
    import torch

    from harness.bench import Bench
    from harness.config import AdaptationSettings
    from harness.examples import Examples
    from harness.execute import launch
    from harness.make import Job, make
    from methods.catalogue import find
    from pools.clip import ClipPool

    fed = torch.load(directory / "fed.pt")
    names = [f"expert_{index}" for index in range(N_EXPERTS)]
    own = {
        name: Examples([(image, 0) for image in images], Feeds(), head * fed["temperature"], range(len(images)))
        for name, images, head in zip(names, fed["images"], fed["heads"], strict=True)
    }

    class Given(Bench):
        """A bench whose data and heads are there."""

        def feeds(self, tasks: Any, texts: bool = False) -> list[str]:
            return list(tasks)

        def adaptation(self, *_: Any, **__: Any) -> dict[str, Any]:
            return own

    began = time.perf_counter()
    pool = ClipPool((directory / "whole", "base"), {name: (directory / name, name) for name in names})
    row = find("adamerging")
    params = row.load_params()(granularity=KINDS[kind], steps=steps)
    clock: list[tuple[float, float]] = []
    losses: list[float] = []

    def report(step: int, loss: float, coefficients: Any) -> None:
        clock.append((time.perf_counter(), time.process_time()))
        losses.append(loss)

    size = len(fed["images"][0])
    adaptation = AdaptationSettings(split="train", examples=size, batch_size=size)
    fabric = launch("cpu", 1, precision, 0)
    made = make(Job(row, params, Given(pool, dict.fromkeys(names)), fabric, adaptation, 0, report))  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    assert made.coefficients is not None
    values = {name.removeprefix("vision_model."): own.tolist() for name, own in made.coefficients.items()}
    return _found(clock, seconds, losses, values)


def run_plain(directory: Path, kind: str, steps: int) -> Found:
    """Forward and backward alone, of one module whose weights are all trained."""
    import torch

    from harness.losses import entropy
    from pools.clip import ClipPool

    fed = torch.load(directory / "fed.pt")
    began = time.perf_counter()
    module = ClipPool((directory / "whole", "base"), {}).module()
    module.visual_projection.requires_grad_(False)
    clock: list[tuple[float, float]] = []
    losses: list[float] = []
    for _ in range(steps):
        total = 0.0
        for images, head in zip(fed["images"], fed["heads"], strict=True):
            loss = entropy(module(images) @ (head * fed["temperature"]).T).mean()
            loss.backward()
            total += loss.item()
        clock.append((time.perf_counter(), time.process_time()))
        losses.append(total)
        module.zero_grad()
    return _found(clock, time.perf_counter() - began, losses, {})


# -- FusionBench -------------------------------------------------------------------------------------------------------


def run_theirs(directory: Path, kind: str, steps: int) -> Found:
    """By FusionBench's own algorithm; see above for what it is fed."""
    import importlib

    import lightning
    import torch
    from fusion_bench import CLIPVisionModelPool
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from lightning.fabric.loggers import TensorBoardLogger
    from omegaconf import OmegaConf

    name = {"layer": "CLIPLayerWiseAdaMergingAlgorithm", "task": "CLIPTaskWiseAdaMergingAlgorithm"}[kind]
    algorithm: Any = getattr(
        importlib.import_module(f"fusion_bench.method.adamerging.clip_{kind}_wise_adamerging"), name
    )
    fed = torch.load(directory / "fed.pt")
    names = [f"expert_{index}" for index in range(N_EXPERTS)]
    batches = dict(zip(names, fed["images"], strict=True))
    clock: list[tuple[float, float]] = []
    losses, coefficients = [0.0], []
    parameters: list[str] = []

    class Fed(algorithm):
        """What comes from data sets and tokenizers is given; the rest is theirs."""

        def get_shuffled_test_loader_iter(self, task: str) -> Any:
            return iter([(batches[task], torch.zeros(len(batches[task]), dtype=torch.int64))])

        def on_test_time_adaptation_start(self) -> None:
            rows, columns = fed["projection"].shape
            self.visual_projection = torch.nn.Linear(columns, rows, bias=False).requires_grad_(False)
            self.visual_projection.weight.copy_(fed["projection"])
            self.logit_scale_exp = torch.tensor(fed["temperature"])
            self.zeroshot_weights = dict(zip(names, fed["heads"], strict=True))

        def compute_logits(self, module: Any, images: Any, task: str) -> Any:
            logits = super().compute_logits(module, images, task)
            losses[-1] += entropy_loss(logits.detach()).item()
            return logits

        def test_time_adaptation(self, module: Any) -> Any:
            merge = module.merge_weights

            def merged(*args: Any, **kwargs: Any) -> Any:  # the end of a step, and before the first
                state = merge(*args, **kwargs)
                clock.append((time.perf_counter(), time.process_time()))
                losses.append(0.0)
                return state

            module.merge_weights = merged
            module = super().test_time_adaptation(module)
            coefficients.append(module.merge_weight.detach())
            parameters.extend(name for name, _ in module.pretrained_model.named_parameters())
            return module

    config = {
        "name": f"clip_{kind}_wise_adamerging", "weights": None, "optimizer": "adam", "lr": 1e-3, "init_values": 0.3,
        "clamp_weights": False, "tie_weights": True, "strict": False, "batch_size": len(fed["images"][0]),
        "num_workers": 0, "max_steps": steps, "fast_dev_run": False, "save_merging_weights": False, "cache_dir": None,
    }  # fmt: skip
    began = time.perf_counter()
    places = {name: str(directory / name) for name in names}
    pool = CLIPVisionModelPool({"_pretrained_": str(directory / "base"), **places})
    made = Fed(OmegaConf.create(config))
    logger = TensorBoardLogger(directory / "logs")  # their own default
    made._fabric_instance = made._fabric = lightning.Fabric(accelerator="cpu", devices=1, loggers=[logger])
    made.run(pool)
    seconds = time.perf_counter() - began
    (found,) = coefficients
    rows = found.T if kind == "layer" else found[None]  # (groups, T)
    groups = [name.removeprefix("vision_model.") for name in parameters] if kind == "layer" else ["model"]
    values = {group: row.tolist() for group, row in zip(groups, rows, strict=True)}
    return _found(clock[: steps + 1], seconds, losses[1 : steps + 1], values)


SIDES: dict[str, Callable[[Path, str, int], Found]] = {
    "ours": run_ours,
    "bf16": functools.partial(run_ours, precision="bf16-mixed"),
    "plain": run_plain,
    "theirs": run_theirs,
}


def _found(
    clock: list[tuple[float, float]], seconds: float, losses: list[float], coefficients: dict[str, list[float]]
) -> Found:
    """What a process tells: the median step after the first, all of the time, its memory, and what came out."""
    import resource

    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(clock)]
    walls, busy = zip(*steps[1:] or steps, strict=True)
    return {
        "step_s": statistics.median(walls),
        "cpu_s": statistics.median(busy),
        "seconds": seconds,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "losses": losses,
        "coefficients": coefficients,
    }
