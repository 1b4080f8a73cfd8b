"""What tests of the engine share: checkpoints on the disk, merges that are ready, processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.inputs import Inputs
from harness.merge import Merge, ready
from methods.catalogue import find
from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.roles import NamedRoles
from pools.write import Layout, write_directory

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, torch.Tensor]


def on_disk(directory: Path, tensors: State, shard_bytes: int = 10**9) -> Checkpoint:
    """Written by our own writer and opened again."""
    write_directory(directory, Layout(specs_of(tensors)), tensors.items(), shard_bytes=shard_bytes)
    return Checkpoint(directory)


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Every tensor's bytes, by the order of names."""
    return {name: tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in sorted(tensors)}


def plain(method: str, base: Mapping | None, experts: Mapping, dtype=None, seed: int = 0, **params: Any) -> Merge:
    """A merge that is ready."""
    row = find(method)
    roles = NamedRoles(specs_of(base if base is not None else next(iter(experts.values()))))
    return ready(Merge(row, row.load_params()(**params), Inputs(base, experts, roles, seed=seed, dtype=dtype)))


def files_of(directory: Path) -> dict[str, bytes]:
    """A directory's files and what is in them."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def start(code: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    """Python code in a process of its own, in which SIGINT is a KeyboardInterrupt as at a terminal."""
    head = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(code: str, *arguments: Any) -> str:
    """What the code prints; it must end well."""
    process = start(code, *arguments)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return out
