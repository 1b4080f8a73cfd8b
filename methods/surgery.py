"""Surgery: task arithmetic, whose representations a small network of each task moves to where its expert has them.

Source: Yang et al. 2024, arXiv:2402.02705, equations 3 to 5; at every block: arXiv:2410.14389, equations 6 and 7.
Differs: the merge is task arithmetic, where the papers also start from AdaMerging; networks start without effect. The
task must be told when the model is used, as in the papers; padding counts.
Formula: h' = h - up_t relu(down_t h), at the last representation (surgery) or after every block (surgery_v2); minimised
is the mean of |h' - h of expert t| over the inputs of task t, summed over places
Cost: the experts while it is taught; 2 T rank width numbers at each place besides the merged model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class SurgeryParams(Params):
    """Parameters of `surgery`; also the schema of conf/method/surgery.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic
    rank: int = tunable(16, low=1, high=128, log=True)  # width of each network's middle
    lr: float = tunable(1e-3, low=1e-5, high=1e-1, log=True)  # Adam's learning rate
    steps: int = 1000  # updates

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)


@dataclass(frozen=True)
class SurgeryV2Params(SurgeryParams):
    """Parameters of `surgery_v2`; also the schema of conf/method/surgery_v2.yaml."""


def surgery(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: SurgeryParams, roles: Parts
) -> torch.nn.Module:
    """The merged module, corrected at its last representation.

    Raises:
        ValueError: The architecture has no representations that the pool can name.
    """
    return _operated(base, experts, params, roles, "surgery", slice(-1, None))


def surgery_v2(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: SurgeryV2Params, roles: Parts
) -> torch.nn.Module:
    """The merged module, corrected after every block; raises as `surgery`."""
    return _operated(base, experts, params, roles, "surgery_v2", slice(None))


def _operated(
    base: torch.nn.Module,
    experts: Sequence[torch.nn.Module],
    params: SurgeryParams,
    roles: Parts,
    method: str,
    which: slice,
) -> torch.nn.Module:
    from methods.corrections import Operated
    from methods.routed import task_arithmetic_in_place

    places = roles.points()[which]
    if not places:
        raise ValueError(f"{method} corrects blocks' outputs, and this architecture has none that the pool can name")
    task_arithmetic_in_place(base, experts, params.scale)
    return Operated(base, experts, places, roles.width_at, params.rank, roles.experts, roles.is_causal)
