"""Time of a step and peak memory of AdaMerging on CLIP ViT-B/32's vision tower, base and eight random experts.

    python benchmarks/adamerge_clip.py                                    # ours, and one plain forward and backward
    python benchmarks/adamerge_clip.py --fusion-bench VENV/bin/python     # and FusionBench's, in turn, in one run
    python benchmarks/adamerge_clip.py --kinds layer --steps 4 --repeats 3

VENV is a virtual environment with `pip install fusion_bench==0.2.33`. `layer` is layer-wise AdaMerging (coefficients of
every tensor), `task` task-wise. Every side runs in a process of its own with as many threads, and they take turns, so
that a busy machine slows all alike; medians are printed. A step is all of it: eight tasks' batches, forward, backward,
Adam, the merge; the first of a process is left out. `GB` is the process's largest resident memory from start to merged
model, imports and reading included. `plain` is a training step's forward and backward of the same images on the same
module, its 88 M weights' gradients kept, nothing merged: what a step costs whoever does it. `bf16` is ours with
fabric.precision=bf16-mixed; the other sides are float32.

FusionBench runs its own CLIPLayerWiseAdaMergingAlgorithm and CLIPTaskWiseAdaMergingAlgorithm with its own defaults
(Adam, lr 1e-3, 0.3, batches of 16) and its own pool. Two of their methods are replaced, since there are no data sets:
the loaders give the same images at each step, and the heads and the projection are read from the inputs here. Ours is
the run's own `make` with a bench that has the same images and heads. Losses and coefficients of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from adamerge_sides import KINDS, N_EXPERTS, SIDES, Found

CLASSES = (10, 20, 30, 43, 45, 47, 80, 100)  # of each task's head
UNITS = {"step_s": 1, "cpu_s": 1, "seconds": 1, "peak_bytes": 1e9}  # by what each is divided for the table


def make_inputs(directory: Path, layers: int, batch: int) -> None:
    """Random towers of ViT-B/32's shapes as transformers writes them, a projection, heads and images."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = CLIPConfig(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": layers})
    whole = CLIPModel(config)
    whole.save_pretrained(directory / "whole")
    tower = CLIPVisionModel(config.vision_config)  # type: ignore[arg-type]
    state = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("vision_model.")}
    prefix = "" if next(iter(tower.state_dict())).startswith("vision_model.") else "vision_model."
    tower.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    tower.save_pretrained(directory / "base")
    base = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    with torch.no_grad():
        for index in range(N_EXPERTS):
            for name, parameter in tower.named_parameters():
                parameter.copy_(base[name] + 0.005 * torch.randn_like(parameter))
            tower.save_pretrained(directory / f"expert_{index}")
    fed = {
        "projection": whole.visual_projection.weight.detach(),
        "heads": [torch.nn.functional.normalize(torch.randn(n, 512), dim=1) for n in CLASSES],
        "images": [torch.randn(batch, 3, 224, 224) for _ in CLASSES],
        "temperature": 100.0,
    }
    torch.save(fed, directory / "fed.pt")


def timed(python: str, side: str, directory: Path, kind: str, steps: int, threads: int) -> Found:
    """A process of its own; its last line is what it found."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "" if side == "theirs" else str(root),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait burn no core that others work on
    }
    command = [python, str(Path(__file__).resolve()), "--once", side, str(directory), kind, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=directory)
    if done.returncode:
        raise SystemExit(f"{kind} failed on {side}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(ours: Found, theirs: Found) -> str:
    """How far two runs are from each other."""
    groups = ours["coefficients"]
    away = max(abs(a - b) for name in groups for a, b in zip(groups[name], theirs["coefficients"][name], strict=True))
    moved = max(abs(value - 0.3) for own in groups.values() for value in own)
    losses = " ".join(f"{a:.5f}/{b:.5f}" for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    return f"losses, ours/theirs: {losses}; coefficients apart by {away:.1e} at most, having moved by {moved:.1e}"


def line(kind: str, found: dict[str, list[Found]]) -> str:
    """One row of the table."""
    middle = {
        side: {key: statistics.median(run[key] for run in runs) for key in UNITS}
        for side, runs in found.items()
        if runs
    }
    cells = [f"{own[key] / scale:.2f}" for own in middle.values() for key, scale in UNITS.items()]
    if "theirs" in middle:
        cells += [f"{middle['theirs'][key] / middle['ours'][key]:.2f}" for key in UNITS]
    return f"| {kind} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run all sides in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fusion-bench", metavar="PYTHON", help="the interpreter of an environment that has it")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick try (default: 12)")
    parser.add_argument("--batch", type=int, default=16, help="images of each task a step (default: 16)")
    parser.add_argument("--inputs", type=Path, help="where inputs are made once and kept (default: made anew)")
    parser.add_argument("--once", nargs=4, metavar=("SIDE", "DIRECTORY", "KIND", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        side, directory, kind, steps = options.once
        print("\n" + json.dumps(SIDES[side](Path(directory), kind, int(steps))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = (options.inputs or Path(scratch)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "fed.pt").exists():
            make_inputs(directory, options.layers, options.batch)
        sides = [side for side in options.sides if side != "theirs" or options.fusion_bench]
        head = [f"{unit}, {side}" for side in sides for unit in ("s a step", "s of the cores", "s in all", "GB")]
        if {"ours", "theirs"} <= set(sides):
            head += ["steps as fast", "of the cores", "all as fast", "times less memory"]
        print(f"| AdaMerging | {' | '.join(head)} |\n|---|" + "---:|" * len(head), flush=True)
        notes = []
        for kind in options.kinds:
            runs: dict[str, list[Found]] = {side: [] for side in sides}
            for _ in range(options.repeats):
                for side in sides:
                    python = options.fusion_bench if side == "theirs" else sys.executable
                    runs[side].append(timed(python, side, directory, kind, options.steps, options.threads))
            print(line(kind, runs), flush=True)
            if {"ours", "theirs"} <= set(sides):
                notes.append(f"{kind}: {agreement(runs['ours'][0], runs['theirs'][0])}")
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
