"""Merge time and peak memory on CLIP ViT-B/32's vision tower (88 M parameters, float32), base and eight random experts.

    python benchmarks/merge_clip.py                                    # ours alone
    python benchmarks/merge_clip.py --fusion-bench VENV/bin/python     # and FusionBench's, in turn, in one run
    python benchmarks/merge_clip.py --methods ties iso_c --repeats 3

VENV is a virtual environment with `pip install fusion_bench==0.2.33`. Each merge runs in a process of its own. Counted
is from the files to the merged tensors in memory, so that opening and reading the models is within it on both sides:
ours reads lazily from safetensors, FusionBench loads by its pool, as its own configurations do. Starting the process
and imports are counted on neither side. Memory is the process's largest resident memory, imports included. The two take
turns, so that a busy machine slows both alike; medians are printed. `change` is the mean magnitude of merged minus
base: that of a method agrees where the two do the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

N_EXPERTS = 8
STEPS = 5  # of WUDI; the difference to none is what its steps take

# Name -> our parameters, FusionBench's class and its parameters, experts. The same settings on both sides. What follows
# an @ tells settings of one method apart.
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, Any], int]] = {
    "simple_average": ({}, "simple_average:SimpleAverageAlgorithm", {}, N_EXPERTS),
    "task_arithmetic": ({"scale": 0.3}, "task_arithmetic:TaskArithmeticAlgorithm", {"scaling_factor": 0.3}, N_EXPERTS),
    "dare": (
        {"scale": 0.3, "density": 0.5},
        "dare:DareTaskArithmetic",
        {"scaling_factor": 0.3, "sparsity_ratio": 0.5, "only_on_linear_weights": False},
        N_EXPERTS,
    ),
    "ties": (
        {"scale": 0.3, "density": 0.2, "disjoint": "sum"},
        "ties_merging:TiesMergingAlgorithm",
        {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"},
        N_EXPERTS,
    ),
    "magmax": ({"scale": 0.5}, "magmax:MagMaxAlgorithm", {"scaling_factor": 0.5}, N_EXPERTS),
    "model_stock": ({}, "model_stock:ModelStock", {}, N_EXPERTS),
    "slerp": ({"t": 0.5}, "slerp:SlerpMergeAlgorithm", {"t": 0.5}, 2),
    "iso_c": ({"scale": 1.0}, "isotropic_merging:IsotropicMergingInCommonSubspace", {"scaling_factor": 1.0}, N_EXPERTS),
    "tsv_m": ({"scale": 1.0}, "task_singular_vector:TaskSingularVectorMerging", {"alpha": 1.0}, N_EXPERTS),
    "wudi@0": ({"steps": 0}, "wudi:WUDIMerging", {"iter_num": 0}, N_EXPERTS),
    f"wudi@{STEPS}": ({"steps": STEPS}, "wudi:WUDIMerging", {"iter_num": STEPS}, N_EXPERTS),
}


def make_inputs(directory: Path, layers: int) -> None:
    """Random towers of ViT-B/32's shapes as transformers writes them."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers))
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(directory / "base")
    with torch.no_grad():
        for index in range(N_EXPERTS):
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] + 0.01 * torch.randn_like(parameter))
            model.save_pretrained(directory / f"expert_{index}")


def merge_ours(directory: Path, method: str) -> dict[str, float]:
    """One merge in this process by our engine, with a worker for each core, as a run has it."""
    from harness.crew import count_workers, crew
    from harness.inputs import Inputs
    from harness.merge import Merge, merge
    from methods.catalogue import find
    from pools.checkpoint import Checkpoint
    from pools.faults import specs_of
    from pools.roles import NamedRoles

    params, _, _, n_experts = METHODS.get(method, ({}, "", {}, N_EXPERTS))
    row = find(method.partition("@")[0])
    made = row.load_params()(**params)
    began = time.perf_counter()
    base = Checkpoint(directory / "base/model.safetensors")
    experts = {f"expert_{i}": Checkpoint(directory / f"expert_{i}/model.safetensors") for i in range(n_experts)}
    inputs = Inputs(base, experts, NamedRoles(specs_of(base)))
    with crew(count_workers("auto")) as hands:
        merged = merge(Merge(row, made, inputs), hands)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **_memory(), "change": _change(merged, {name: base[name] for name in base})}


def merge_theirs(directory: Path, method: str) -> dict[str, float]:
    """One merge in this process by FusionBench."""
    import importlib

    from fusion_bench import BaseModelPool

    _, place, settings, n_experts = METHODS[method]
    module, _, name = place.partition(":")
    algorithm = getattr(importlib.import_module(f"fusion_bench.method.{module}"), name)(**settings)
    names = {f"expert_{index}": directory / f"expert_{index}" for index in range(n_experts)}
    if method != "slerp":  # which counts the base among the two
        names["_pretrained_"] = directory / "base"
    load = "transformers.CLIPVisionModel.from_pretrained"
    from transformers import CLIPVisionModel  # imported before the clock runs

    pool = BaseModelPool(
        {name: {"_target_": load, "pretrained_model_name_or_path": str(path)} for name, path in names.items()}
    )
    began = time.perf_counter()
    merged = algorithm.run(pool)
    seconds = time.perf_counter() - began
    base = CLIPVisionModel.from_pretrained(directory / "base")
    tensors = {name: parameter.detach() for name, parameter in merged.named_parameters()}
    return {"seconds": seconds, **_memory(), "change": _change(tensors, dict(base.named_parameters()))}


def _memory() -> dict[str, float]:
    """Largest resident memory of this process so far."""
    import resource

    return {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _change(merged: dict[str, Any], base: dict[str, Any]) -> float:
    """Mean magnitude of the change, over all weights."""
    total = sum(float((merged[name] - base[name]).abs().double().sum()) for name in base)
    return total / sum(tensor.numel() for tensor in base.values())


def timed(python: str, side: str, directory: Path, method: str) -> dict[str, float]:
    """A merge in a process of its own; its last line is what it found."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root) if side == "ours" else ""}
    command = [python, __file__, "--once", side, str(directory), method]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed on {side}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(method: str, found: dict[str, dict[str, float]]) -> str:
    """One row of the table: medians, and how many times less ours needs."""
    cells = []
    for own in found.values():
        cells += [f"{own['seconds']:.2f}", f"{own['peak_bytes'] / 1e9:.2f}", f"{own['change']:.5f}"]
    if "theirs" in found:
        cells += [f"{found['theirs'][key] / found['ours'][key]:.1f}" for key in ("seconds", "peak_bytes")]
    return f"| `{method}` | " + " | ".join(cells) + " |"


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each side that has run."""
    return {
        side: {key: statistics.median(run[key] for run in own) for key in own[0]} for side, own in runs.items() if own
    }


def per_step(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """What one step of WUDI takes on each side."""
    many, none = found[f"wudi@{STEPS}"], found["wudi@0"]
    seconds = {side: (many[side]["seconds"] - none[side]["seconds"]) / STEPS for side in many}
    return "\nA step of wudi: " + ", ".join(f"{side} {value:.2f} s" for side, value in seconds.items())


def main() -> None:
    """Run both sides in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fusion-bench", metavar="PYTHON", help="the interpreter of an environment that has it")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick try (default: 12)")
    parser.add_argument("--once", nargs=3, metavar=("SIDE", "DIRECTORY", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        side, directory, method = options.once
        print("\n" + json.dumps((merge_ours if side == "ours" else merge_theirs)(Path(directory), method)))
        return
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(Path(directory), options.layers)
        head = ["method", "s", "GB", "change"]
        if options.fusion_bench:
            head += ["s, FusionBench", "GB, FusionBench", "change, FusionBench", "times as fast", "times less memory"]
        print(f"| {' | '.join(head)} |\n|---|" + "---:|" * (len(head) - 1), flush=True)
        found = {}
        for method in options.methods:
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                runs["ours"].append(timed(sys.executable, "ours", Path(directory), method))
                if options.fusion_bench and method in METHODS:
                    runs["theirs"].append(timed(options.fusion_bench, "theirs", Path(directory), method))
            found[method] = medians(runs)
            print(line(method, found[method]), flush=True)
    if {"wudi@0", f"wudi@{STEPS}"} <= set(found):
        print(per_step(found))


if __name__ == "__main__":
    main()
