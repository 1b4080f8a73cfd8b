"""Merge time and peak memory on CLIP ViT-B/32's vision tower (88 M parameters), base and eight random experts.

    python benchmarks/merge_clip.py                      # ties, task_arithmetic, dare
    python benchmarks/merge_clip.py --methods ties opcm --repeats 5

Each merge runs in a process of its own, reads lazily from safetensors files and keeps the merged tensors in memory;
methods take turns, so that a busy machine slows all of them alike. Peak memory is resident memory above what the
process holds before the merge, in models of 0.35 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

N_EXPERTS = 8


def make_inputs(directory: Path) -> None:
    """Random towers of ViT-B/32's shapes, float32."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    base = {name: tensor.clone() for name, tensor in CLIPVisionModel(CLIPVisionConfig()).state_dict().items()}
    base = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    save_file(base, directory / "base.safetensors")
    for index in range(N_EXPERTS):
        expert = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
        save_file(expert, directory / f"expert_{index}.safetensors")


def merge_once(directory: Path, method: str) -> dict[str, float]:
    """One merge in this process: seconds and peak bytes."""
    from harness.measure import measure
    from harness.merge import merge_state_dicts
    from pools.checkpoint import Checkpoint

    base = Checkpoint(directory / "base.safetensors")
    experts = {f"expert_{index}": Checkpoint(directory / f"expert_{index}.safetensors") for index in range(N_EXPERTS)}
    size = sum(4 * base[name].numel() for name in base)
    import psutil

    before = psutil.Process().memory_info().rss
    with measure() as found:
        merged = merge_state_dicts(base, experts, method)
    assert len(merged) == len(base)
    return {"seconds": found.seconds, "models": (found.peak_bytes - before) / size, "peak_bytes": found.peak_bytes}


def main() -> None:
    """Run the methods in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "dare"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--once", nargs=2, metavar=("DIRECTORY", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(merge_once(Path(options.once[0]), options.once[1])))
        return
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(Path(directory))
        found: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
        for _ in range(options.repeats):
            for method in options.methods:
                command = [sys.executable, __file__, "--once", directory, method]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[method].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'method':20} {'seconds':>8} {'peak, in models':>16} {'resident GB':>12}   (medians of {options.repeats})")
    for method, runs in found.items():
        seconds, models, peak = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "models", "peak_bytes")
        )
        print(f"{method:20} {seconds:8.2f} {models:16.2f} {peak / 1e9:12.2f}")


if __name__ == "__main__":
    main()
