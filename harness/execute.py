"""Devices, precision and processes: the gate to Lightning Fabric."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric, seed_everything

from harness.config import UserError

PATIENCE_S = 10  # what a process that failed leaves rank zero to tell why, and to end it


def launch(accelerator: str, devices: int | str, precision: Any, seed: int) -> Fabric:
    """Start Fabric: one process for each device, the same seed in all.

    Raises:
        UserError: The machine has no such device.
    """
    for name in ("lightning.fabric", "lightning.pytorch"):  # where several processes are greeted
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which devices could be used is said in the run's tags
            fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
            fabric.launch()
    except (RuntimeError, ValueError, TypeError) as error:
        kind = "GPU" if torch.cuda.is_available() else "CPU only"
        raise UserError(
            f"fabric.accelerator={accelerator} fabric.devices={devices} is not on this machine ({kind}): {error}"
        ) from error
    seed_everything(seed, verbose=False)
    return fabric


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """When the body fails end all processes: they would wait for a sum that never comes. Rank zero alone tells why."""
    try:
        yield
    except BaseException as error:
        if fabric.is_global_zero:
            _end_others(fabric)
        elif isinstance(error, KeyboardInterrupt):  # rank zero has it too, and may wait for this process in a sum
            raise SystemExit(0) from None  # 0, lest Lightning's observer kills rank zero before it has ended the run
        else:
            time.sleep(PATIENCE_S)
        raise


def _end_others(fabric: Fabric) -> None:
    """End the processes that this one has started."""
    started = getattr(fabric.strategy.launcher, "procs", [])
    for process in started:
        process.kill()
        process.wait()
    started.clear()  # else Lightning's observer would find them dead, and kill this process too


def sum_over_devices(fabric: Fabric, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, in every process."""
    if fabric.world_size == 1:
        return tensor
    total = fabric.all_reduce(tensor, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total


def own_share(fabric: Fabric, n: int) -> range:
    """The rows of n that this process works on: every row in just one process, no padding."""
    return range(fabric.global_rank, n, fabric.world_size)


class FabricTeam:
    """The processes of a run, as a merge asks of them; see `harness.output.Team`."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self.rank, self.size = fabric.global_rank, fabric.world_size

    def agree(self, word: str) -> str:
        """Rank zero's word, in every process."""
        return self._fabric.broadcast(word, src=0)

    def wait(self) -> None:
        """Until all processes are here."""
        self._fabric.barrier()

    def add(self, numbers: list[float]) -> list[float]:
        """Sums over the processes, in every process."""
        return sum_over_devices(self._fabric, torch.tensor(numbers, dtype=torch.float64)).tolist()

    def hear(self, word: str) -> list[str]:
        """What each process says, in every process."""
        return [self._fabric.broadcast(word, src=rank) for rank in range(self.size)]


def describe(fabric: Fabric) -> str:
    """Devices in words, for the run's tags."""
    if fabric.device.type == "cuda":
        return f"{fabric.world_size} x {torch.cuda.get_device_name(fabric.device)}"
    return f"{fabric.world_size} x {fabric.device.type}"
