"""Twin-Merging: a shared model by task arithmetic, and what each expert has beyond it in low rank, mixed by a router.

Source: Lu et al. 2024, arXiv:2406.15479, Algorithm 1.
Differs: the router has two linear layers without batch norm and dropout, so that each example is routed on its own; it
reads the pool's features of the shared model. What is no matrix is kept whole. Of a text a causal model's router
sees all that it is given: of a continuation the prompt, but of a text that is scored its answer too.
Formula: shared = base + scale * sum_i delta_i; theta(x) = shared + sum_i gate_i(x) SVD_r(expert_i - shared), the gates
a softmax of the router, which learns to tell the experts' tasks apart
Cost: an SVD for each of T changes of each matrix; 1 + T density (1/m + 1/n) m n numbers at most, and for each example
O(T r m n) time to merge, two forward passes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.lazy import torch
from methods.parameters import Params, at_least, positive, share, tunable

if TYPE_CHECKING:
    from methods.routed import Parts


@dataclass(frozen=True)
class TwinMergingParams(Params):
    """Parameters of `twin_merging`; also the schema of conf/method/twin_merging.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic, which makes the shared model
    density: float = share(0.1, low=0.01, high=1.0, log=True)  # share of singular directions that a matrix keeps
    lr: float = tunable(5e-4, low=1e-5, high=1e-2, log=True)  # Adam's learning rate for the router
    steps: int = 500  # updates

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        at_least("steps", self.steps, 1)


def twin_merging(
    base: torch.nn.Module, experts: Sequence[torch.nn.Module], params: TwinMergingParams, roles: Parts
) -> torch.nn.Module:
    """A module that holds the shared model and the exclusive changes; only the router is trainable."""
    from methods.lessons import Lesson
    from methods.mixtures import PerExample, changes_of
    from methods.routed import Router, network, task_arithmetic_in_place

    class Telling(Lesson):
        """Telling whose task an input is of."""

        def loss(self, module: Any, task: int, inputs: Mapping[str, Any]) -> torch.Tensor:
            """Cross-entropy, (B,)."""
            told = module.router.net(module.read(inputs))
            wanted = torch.full((len(told),), task, device=told.device)
            return torch.nn.functional.cross_entropy(told, wanted, reduction="none")

    task_arithmetic_in_place(base, experts, params.scale)
    net = network(roles.n_features, len(experts), 2, 0.0)
    router = Router(net, len(experts), soft=True)
    made = PerExample(base, changes_of(base, experts, roles, params.density), router, roles)
    made.lesson = Telling()  # type: ignore[assignment]
    return made
