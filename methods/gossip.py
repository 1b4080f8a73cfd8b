"""Gossip merging: every expert is a node that merges itself with its neighbours by AdaMerging, round after round.

Source: FusionBench 0.2.33 (no paper), on AdaMerging, Yang et al. 2024, arXiv:2310.02575.
Differs: with tied weights each node's new weights lie on the simplex, as FusionBench's documentation has it; its code
leaves them free (weights=free). They start at one over the number of members, where FusionBench starts at 0.3.
A node twice among its own neighbours (few experts) counts once.
Formula: node_i <- base + sum_j w_gj (node_j - base) over itself and its neighbours j, w of each group g by Adam on the
    entropy of the tasks that have reached it, all nodes at once; merged = mean_i node_i
Cost: rounds * T * steps evaluations, each a forward and backward pass and O(T n); (T + 2) n numbers, whatever the nodes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.adam import Adam
from methods.lazy import torch
from methods.ledger import Ledger
from methods.parameters import Params, at_least, finite, positive, tunable, word
from methods.simplex import onto_simplex


@dataclass(frozen=True)
class GossipParams(Params):
    """Parameters of `gossip`; also the schema of conf/method/gossip.yaml."""

    topology: str = word("ring", "rotate")  # neighbours: the one before and the one behind, or the next `neighbours`
    neighbours: int = 2  # of rotate: how many follow a node
    rounds: int = 20  # in each of which every node merges once
    granularity: str = word("tensor", "task", "layer")  # what has weights of its own: a tensor, the model or a block
    weights: str = word("tied", "free")  # tied: not negative and sum to one, at every step
    scale: float | None = None  # where every weight starts in each round; None: one over the number of members
    lr: float = tunable(1e-3, low=1e-4, high=1e-1, log=True)  # Adam's learning rate
    steps: int = 400  # updates of a node in a round; 0 only mixes with the weights that it starts from
    own_tasks: bool = True  # a node is fed only the tasks of the experts that have reached it, not all
    node: int | None = None  # this node's model instead of the average of all; counted from 0, as the experts are

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            finite("scale", self.scale)
        positive("lr", self.lr)
        for name, least in (("neighbours", 1), ("rounds", 1), ("steps", 0)):
            at_least(name, getattr(self, name), least)
        if self.node is not None:
            at_least("node", self.node, 0)

    def evaluations(self, n_experts: int) -> int:
        """How often the loss is asked for."""
        return self.rounds * n_experts * self.steps


def gossip(
    shape: tuple[int, int],
    objective: Callable[..., tuple[float, torch.Tensor]],
    params: GossipParams,
    report: Callable[[int, float, torch.Tensor], None],
) -> torch.Tensor:
    """Find the coefficients, (groups, T), of the average of the nodes, or of one.

    A node is itself a set of coefficients of the experts' changes, so that nodes cost no weights.

    Args:
        shape: Number of groups and of experts.
        objective: Coefficients, and with `tasks` only those experts' tasks -> loss and gradient, (groups, T).
        params: See GossipParams.
        report: Called after each evaluation with its number, the loss and the coefficients that had it.

    Raises:
        ValueError: There is no such node.
        FloatingPointError: The loss is no number; the message names the step.
    """
    n = shape[1]
    if params.node is not None and params.node >= n:
        raise ValueError(f"node is one of 0 to {n - 1}, one for each expert; got {params.node}")
    ledger = Ledger(objective, report, f"a smaller lr than {params.lr} may help")
    nodes = torch.eye(n).unsqueeze(1).repeat(1, shape[0], 1)  # (node, groups, T): its coefficients of the experts
    reached = [{index} for index in range(n)]
    for _ in range(params.rounds):
        members = [neighbourhood(index, n, params) for index in range(n)]
        reached = [set().union(*(reached[member] for member in each)) for each in members]
        nodes = torch.stack(
            [
                _merged(ledger, nodes[each], sorted(tasks) if params.own_tasks else list(range(n)), params)
                for each, tasks in zip(members, reached, strict=True)
            ]
        )
    return nodes.mean(0) if params.node is None else nodes[params.node]


def neighbourhood(index: int, n: int, params: GossipParams) -> list[int]:
    """A node and its neighbours, each once, in order of the experts."""
    steps = (-1, 0, 1) if params.topology == "ring" else range(params.neighbours + 1)
    return sorted({(index + step) % n for step in steps})


def _merged(ledger: Ledger, members: torch.Tensor, tasks: list[int], params: GossipParams) -> torch.Tensor:
    """A node's new coefficients, (groups, T), from its members' (M, groups, T)."""
    start = 1 / len(members) if params.scale is None else params.scale
    weights = torch.full((members.shape[1], len(members)), start)  # (groups, M)
    if params.weights == "tied":
        weights = onto_simplex(weights)
    adam = Adam(weights, params.lr)
    for _ in range(params.steps):
        slopes = ledger(_mixed(weights, members), tasks=tasks)[1]
        adam.step((slopes * members).sum(2).T)
        if params.weights == "tied":
            weights.copy_(onto_simplex(weights))
    return _mixed(weights, members)


def _mixed(weights: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Weights (groups, M) of members (M, groups, T) -> coefficients (groups, T)."""
    return (weights.T.unsqueeze(2) * members).sum(0)
