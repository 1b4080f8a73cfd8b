"""What a compression learns from inputs: numbers that bring a restored expert's answers nearer to the expert's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.nn.functional import mse_loss

from harness.compress import Expert, Packed
from harness.examples import Examples, endless

if TYPE_CHECKING:
    from pools.open import Pool


def distilled(
    packed: Packed,
    pool: Pool,
    fed: Mapping[str, Examples],
    batch_size: int,
    seed: int,
    device: torch.device,
    report: Callable[[int, float], None],
) -> Packed:
    """The same compressed experts, with the part that the row names learnt, each expert for itself.

    Args:
        packed: What was packed; its parameters say how many `steps` of Adam and which `lr`.
        pool: The experts as they are.
        fed: Unlabelled inputs of each expert's own task, with its head.
        batch_size: Inputs of a step.
        seed: Of their order.
        device: Where the models run.
        report: Told of each step and its loss.

    Raises:
        FloatingPointError: The loss is no number; the message names the step.
    """
    part, params = packed.row.learns, packed.params
    tensors = {name: packed.tensors[name] for name in packed.tensors}
    for index, name in enumerate(packed.experts):
        assert pool.base is not None, "a compression needs a base"
        expert = Expert(packed, pool.base, pool.roles, name)
        teacher = pool.module(pool.experts[name]).to(device)
        student = pool.module(expert).to(device)
        head = fed[name].head.to(device)
        order = endless(len(fed[name]), min(batch_size, len(fed[name])), seed)
        learnt = {key: tensors[key][index].clone() for key in tensors if key.endswith(f"/{part}")}
        optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in learnt.values()], lr=params.lr)
        for step in range(params.steps):
            inputs = {key: tensor.to(device) for key, tensor in fed[name].batch(next(order))[0].items()}
            with torch.no_grad():
                wanted = teacher(**inputs) @ head.T
            weights = {
                key.rpartition("/")[0]: expert.with_part(key.rpartition("/")[0], part, value).to(device)
                for key, value in learnt.items()
            }
            loss = mse_loss(functional_call(student, weights, args=(), kwargs=inputs) @ head.T, wanted)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is not a number at step {step}; a smaller lr than {params.lr} may help"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(index * params.steps + step, float(loss.detach()))
        for key, value in learnt.items():
            tensors[key] = torch.stack([*tensors[key][:index], value.detach(), *tensors[key][index + 1 :]])
    return replace(packed, tensors=tensors)
