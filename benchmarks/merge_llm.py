"""Merging from disk to disk against mergekit: wall time and peak resident memory of whole processes, alternating.

    python benchmarks/merge_llm.py --mergekit MERGEKIT_YAML  # 1.1 B parameters, all methods
    python benchmarks/merge_llm.py --mergekit ... --methods linear ties --repeats 5
    python benchmarks/merge_llm.py --make-only --inputs DIR   # the inputs, and one with tokens of its own
    python benchmarks/merge_llm.py --growth                  # crucible alone: 0.1 to 4 B, 2 to 16 experts

mergekit 0.1.5 wants an environment of its own: `python -m venv mk; mk/bin/pip install mergekit==0.1.5 "torch<2.14"`.
Inputs have TinyLlama's shapes and random weights in bfloat16, the experts small random changes of the base; they are
made once under --inputs (2.2 GB each at 1.1 B). The file cache is warm: inputs are read right before each run. That
reading, by `cat`, and a plain write of as much as the output, synced, are the floor that the machine sets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _size(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "heads": heads, "kv": kv,
    }  # fmt: skip


SIZES: dict[str, dict[str, int]] = {  # hidden, feed-forward, layers, heads, key-value heads
    "0.1": _size(768, 2048, 9, 12, 4),
    "0.25": _size(1024, 2816, 15, 16, 4),
    "0.5": _size(1536, 4096, 16, 12, 4),
    "1.1": _size(2048, 5632, 22, 32, 4),
    "2": _size(2560, 6912, 26, 20, 4),
    "4": _size(3072, 8192, 38, 24, 4),
}
VOCABULARY = 32000
TOKENIZER = tuple(ROOT / "pools" / "mini_lm" / "base" / name for name in ("tokenizer.json", "tokenizer_config.json"))
# method -> our overrides, mergekit's YAML for the same computation, number of experts
METHODS: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "linear": (["method=weighted_average"], {"merge_method": "linear"}, 3),
    "task_arithmetic": (["method=task_arithmetic", "method.scale=0.5"], {"merge_method": "task_arithmetic"}, 3),
    "slerp": (["method=slerp", "method.t=0.3"], {"merge_method": "slerp"}, 1),
    "dare_ties": (
        ["method=dare", "method.base_rule=ties", "method.density=0.5", "method.trim=1.0", "method.scale=1.0"],
        {"merge_method": "dare_ties"},
        3,
    ),
    "ties": (["method=ties", "method.scope=tensor", "method.density=0.5"], {"merge_method": "ties"}, 3),
    "ties_model": (["method=ties", "method.scope=model", "method.density=0.5"], {"merge_method": "ties"}, 3),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    facts = SIZES[size]
    hidden, inner, head = facts["hidden_size"], facts["intermediate_size"], facts["hidden_size"] // facts["heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(facts["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        found |= {
            f"{stem}self_attn.q_proj.weight": (hidden, hidden),
            f"{stem}self_attn.k_proj.weight": (head * facts["kv"], hidden),
            f"{stem}self_attn.v_proj.weight": (head * facts["kv"], hidden),
            f"{stem}self_attn.o_proj.weight": (hidden, hidden),
            f"{stem}mlp.gate_proj.weight": (inner, hidden),
            f"{stem}mlp.up_proj.weight": (inner, hidden),
            f"{stem}mlp.down_proj.weight": (hidden, inner),
            f"{stem}input_layernorm.weight": (hidden,),
            f"{stem}post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def make_inputs(directory: Path, size: str, n_experts: int) -> None:
    """Base and experts as the hub lays them out, shards of at most 1 GB; what is there already stays."""
    import torch

    from pools.faults import Spec
    from pools.write import Layout, write_directory

    specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes(size).items()}
    block = torch.randn(4_194_301, generator=torch.Generator().manual_seed(0))  # repeated: drawing all takes minutes

    def numbers(n: int, seed: int) -> torch.Tensor:
        start = seed * 1_000_003 % len(block)
        return block.repeat(n // len(block) + 2)[start : start + n]

    layout = Layout(specs, {}, TOKENIZER, lambda: {"config.json": json.dumps(config(size), indent=2)})

    def tensors(member: int) -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, spec) in enumerate(specs.items()):
            tensor = numbers(torch.Size(spec.shape).numel(), index) * 0.02
            if member:
                tensor += numbers(len(tensor), 1000 * member + index) * 0.002
            yield name, tensor.reshape(spec.shape).bfloat16()

    for member in range(n_experts + 1):
        place = directory / ("base" if member == 0 else f"expert_{member}")
        if not place.exists():
            print(f"making {place.name} of {size} B parameters", file=sys.stderr)
            write_directory(place, layout, tensors(member), shard_bytes=1_000_000_000)


def make_apart(directory: Path, size: str, n_experts: int) -> Path:
    """Make inputs in a process of its own: what is measured inherits the resident memory of the one that starts it."""
    own = ["--make-only", "--inputs", str(directory), "--size", size, "--experts", str(n_experts)]
    subprocess.run([sys.executable, __file__, *own], check=True)
    return directory / size


def make_other_tokens(directory: Path, size: str) -> None:
    """An expert whose tokenizer has two tokens more than the base's, and rows for them."""
    import torch

    from pools.checkpoint import Checkpoint
    from pools.faults import specs_of
    from pools.write import Layout, write_directory

    place, expert = directory / "other_tokens", Checkpoint(directory / "expert_1")
    if place.exists():
        return
    tokenizer = json.loads(TOKENIZER[0].read_text())
    known = max(entry["id"] for entry in tokenizer["added_tokens"]) if tokenizer["added_tokens"] else 0
    first = max(known, *tokenizer["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": first + i, "content": f"<|new_{i}|>", **plain} for i in range(2)]
    grown = [name for name, spec in specs_of(expert).items() if spec.shape[0] == VOCABULARY]
    more = {name: torch.full((64, expert.shapes[name][1]), 0.01).bfloat16() for name in grown}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in expert:
            yield name, torch.cat([expert[name], more[name]]) if name in grown else expert[name]

    specs = {
        name: spec._replace(shape=(VOCABULARY + 64, *spec.shape[1:])) if name in grown else spec
        for name, spec in specs_of(expert).items()
    }
    facts = {**config(size), "vocab_size": VOCABULARY + 64}
    texts = {"config.json": json.dumps(facts, indent=2), "tokenizer.json": json.dumps(tokenizer)}
    write_directory(place, Layout(specs, {}, TOKENIZER[1:], lambda: texts), tensors(), shard_bytes=1_000_000_000)


def config(size: str) -> dict[str, Any]:
    """config.json of a Llama."""
    facts = dict(SIZES[size])
    heads, kv = facts.pop("heads"), facts.pop("kv")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **facts,
    }


def ours(method: str, inputs: Path, output: Path, n_experts: int | None = None) -> list[str]:
    """Our command."""
    overrides, _, count = METHODS[method]
    experts = [f"+pool.experts.e{index}={inputs}/expert_{index}" for index in range(1, (n_experts or count) + 1)]
    base = [f"pool.base={inputs}/base"]
    return [sys.executable, "-m", "harness", "merge", "pool=causal_lm", *base, *experts, *overrides, f"output={output}"]


def theirs(method: str, inputs: Path, output: Path, tool: str) -> list[str]:
    """mergekit's command, its YAML written beside the output."""
    _, facts, count = METHODS[method]
    experts = [str(inputs / f"expert_{index}") for index in range(1, count + 1)]
    recipe: dict[str, Any] = {**facts, "base_model": str(inputs / "base"), "dtype": "bfloat16"}
    if method == "linear":
        del recipe["base_model"]
    if method == "slerp":
        recipe |= {"models": [{"model": str(inputs / "base")}, {"model": experts[0]}], "parameters": {"t": 0.3}}
    else:
        own = {"weight": 1.0} | ({"density": 0.5} if "ties" in method else {})
        recipe["models"] = [{"model": expert, "parameters": own} for expert in experts]
        recipe["parameters"] = {"lambda": 0.5} if method == "task_arithmetic" else {}
    yaml = output.with_suffix(".json")  # JSON is YAML
    yaml.write_text(json.dumps(recipe))
    return [tool, str(yaml), str(output), "--no-copy-tokenizer", "--quiet"]


def measured(
    command: list[str], output: Path | None = None, environment: dict[str, str] | None = None
) -> dict[str, float]:
    """Wall seconds of a process, the same until its output is on the disk, and its peak resident bytes.

    The output is removed afterwards.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, cwd=ROOT
    )
    said = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    os.sync()  # crucible has waited for the disk, mergekit has not
    synced = time.perf_counter() - started
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode(errors='replace')[-3000:]}")
    return {"seconds": seconds, "synced": synced, "bytes": usage.ru_maxrss * 1024}


def floor(inputs: Path, members: list[str], scratch: Path) -> float:
    """Seconds to read the inputs and to write as much as one of them, synced."""
    files = [str(file) for member in members for file in sorted((inputs / member).glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in (inputs / members[0]).glob("*.safetensors"))
    started = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    count = size // (1 << 20)
    target = scratch / "plain"
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={count}", "conv=fsync"], check=True, capture_output=True
    )
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def compare(inputs: Path, scratch: Path, tool: str | None, methods: list[str], repeats: int) -> list[dict[str, Any]]:
    """Both tools in turn, for each method."""
    rows = []
    for method in methods:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        floors = []
        members = [*(["base"] if method != "linear" else []), *(f"expert_{i + 1}" for i in range(METHODS[method][2]))]
        for _ in range(repeats):
            floors.append(floor(inputs, members, scratch))
            output = scratch / "ours"
            found["ours"].append(measured(ours(method, inputs, output), output))
            if tool:
                output = scratch / "theirs"
                found["theirs"].append(measured(theirs(method, inputs, output, tool), output, {"HF_HUB_OFFLINE": "1"}))
            print(method, {name: runs[-1] for name, runs in found.items() if runs}, file=sys.stderr)
        rows.append({"method": method, "floor_s": statistics.median(floors), **summary(found)})
    return rows


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians, and the ratio of the two tools."""
    facts: dict[str, float] = {}
    for name, runs in found.items():
        if runs:
            facts[f"{name}_s"] = statistics.median(run["seconds"] for run in runs)
            facts[f"{name}_synced_s"] = statistics.median(run["synced"] for run in runs)
            facts[f"{name}_mb"] = max(run["bytes"] for run in runs) / 1e6
    if found["theirs"]:
        facts["ratio"] = facts["theirs_s"] / facts["ours_s"]
        facts["ratio_synced"] = facts["theirs_synced_s"] / facts["ours_synced_s"]
    return facts


def growth(directory: Path, scratch: Path, sizes: list[str], counts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Our time and memory over model sizes (3 experts) and numbers of experts (0.25 B)."""
    rows = []
    for size, count in [*((size, 3) for size in sizes), *(("0.25", count) for count in counts)]:
        inputs = make_apart(directory, size, count)
        for method in ("task_arithmetic", "ties_model"):
            runs = []
            for _ in range(repeats):
                output = scratch / "ours"
                runs.append(measured(ours(method, inputs, output, count), output))
            rows.append(
                {
                    "method": method,
                    "parameters": sum(torch_numel(shape) for shape in shapes(size).values()),
                    "experts": count,
                    "seconds": statistics.median(run["seconds"] for run in runs),
                    "mb": max(run["bytes"] for run in runs) / 1e6,
                }
            )
            print(rows[-1], file=sys.stderr)
        if size not in ("0.25", "1.1"):
            shutil.rmtree(inputs)
    return rows


def torch_numel(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    count = 1
    for size in shape:
        count *= size
    return count


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Time and memory over size, and over the number of experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    sized = [row for row in rows if row["experts"] == 3]
    counted = [row for row in rows if row["parameters"] < 0.4e9 and row["parameters"] > 0.15e9]
    for column, (chosen, key, scale, label) in enumerate(
        (
            (sized, "parameters", 1e9, "parameters, billions (3 experts)"),
            (counted, "experts", 1, "experts (0.25 B each)"),
        )
    ):
        for method in dict.fromkeys(row["method"] for row in chosen):
            own = sorted((row for row in chosen if row["method"] == method), key=lambda row: row[key])
            x = [row[key] / scale for row in own]
            axes[0][column].plot(x, [row["seconds"] for row in own], "o-", label=method)
            axes[1][column].plot(x, [row["mb"] for row in own], "o-", label=method)
        axes[0][column].set_ylabel("wall time, s")
        axes[1][column].set_ylabel("peak resident memory, MB")
        for row in axes:
            row[column].set_xlabel(label)
            row[column].set_ylim(bottom=0)
            row[column].grid(alpha=0.3)
        axes[0][column].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Make the inputs, run, print a table as Markdown and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="path of mergekit-yaml; without it only crucible is measured")
    parser.add_argument("--inputs", type=Path, default=Path(tempfile.gettempdir()) / "crucible-merge-llm")
    parser.add_argument("--size", choices=SIZES, default="1.1", help="billions of parameters")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make-only", action="store_true", help="make the inputs under --inputs, measure nothing")
    parser.add_argument("--experts", type=int, help="with --make-only: so many experts, and none with other tokens")
    parser.add_argument("--growth", action="store_true", help="time and memory over sizes and numbers of experts")
    parser.add_argument("--sizes", nargs="*", default=["0.1", "0.5", "1.1", "2", "4"])
    parser.add_argument("--counts", nargs="*", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--plot", type=Path, help="with --growth: write the plot here")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.make_only:
        make_inputs(given.inputs / given.size, given.size, given.experts or 3)
        if given.experts is None:
            make_other_tokens(given.inputs / given.size, given.size)
        return
    with tempfile.TemporaryDirectory(dir=given.inputs.parent) as scratch:
        if given.growth:
            rows = growth(given.inputs, Path(scratch), given.sizes, given.counts, given.repeats)
            if given.plot:
                plot(rows, given.plot)
        else:
            inputs = make_apart(given.inputs, given.size, 3)
            rows = compare(inputs, Path(scratch), given.mergekit, given.methods, given.repeats)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in rows:
        cells = (row.get(key, "") for key in keys)
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
