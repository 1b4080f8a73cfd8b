"""The six kinds of method and what a catalogue row says of one.

A kind is a shape of function, so that the engine and the tests never ask for a method's name:

    rule      f(base, experts, params, **extras) -> tensor          one tensor at a time
    informed  the same, with `stats` among the extras               Fisher, RegMean
    search    f(stack, params) -> Search                              what is learnt, and the weights that come of it
    fold      f(base, params, roles) -> Fold                          one expert after the other
    build     f(base, experts, params, roles) -> module               a new module out of modules
    compression  f(base, experts, params, **extras) -> {part: tensor}, and `restore`, from these parts to one expert

Extras are handed over when the row asks for them: `numbers` (the row has `prepare`), `draw` (`random`),
`stats` (`stats`), `place` (`placed`).

A veneer is put around a rule: f(piece, params, numbers) -> (the piece that the rule is given, what becomes of what the
rule has made).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    Draw = Callable[[int], Tensor]  # expert's index -> uniform numbers in [0, 1), shaped like the piece
    Dressed = tuple["Piece", Callable[[Tensor], Tensor]]


class Kind(Enum):
    """By what a method needs."""

    rule = "rule"
    informed = "informed"
    search = "search"
    fold = "fold"
    build = "build"
    compression = "compression"


class Base(Enum):
    """What a method wants with the base model."""

    needed = "needed"
    optional = "optional"
    origin = "origin"  # optional; where there is one, the method works on the task vectors
    unused = "unused"


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its model, as the pool knows it."""

    layer: int = 0  # depth: 0 before the first block, 1 to n_layers for the blocks, n_layers + 1 after them
    n_layers: int = 0
    linear: bool = False  # the weight of a linear layer, (out, in)
    name: str = ""  # its own, to tell which tensors belong to one module
    transposed: bool = False  # the weight of a linear layer, stored as (in, out), which `linear` leaves out


@dataclass(frozen=True)
class Piece:
    """One tensor, or a chunk of it, as the engine hands it to a `prepare` pass."""

    name: str
    base: Tensor | None  # (*shape) float32
    experts: Tensor  # (T, *shape) float32
    draw: Draw | None = None
    stats: Tensor | None = None  # (T, ...) float32
    place: Place = field(default_factory=Place)

    @property
    def deltas(self) -> Tensor:
        """The task vectors, (T, *shape) float32."""
        assert self.base is not None, "the row says that its method needs no base"
        return self.experts - self.base


class Pieces(Protocol):
    """What a prepare pass is given to look at the weights; each call is a fresh walk over all pieces."""

    def __call__(self, function: Callable[[Piece], Any], limit: int | None = None) -> Iterable[Any]:
        """The function's result for each piece, in order; several may be worked on at once.

        Args:
            function: What to find out about a piece; the piece's tensors are valid until it returns.
            limit: Look at the first so many elements of each piece only, a multiple of 8.
        """
        ...


@dataclass(frozen=True)
class Stack:
    """Base and task vectors as a search is given them; all by the tensors' names, float32, on one device.

    What asks for `change`, `products` and `expert` alone may be given vectors that are in no memory.
    """

    base: dict[str, Tensor]  # (*shape), never changed
    deltas: dict[str, Tensor]  # (T, *shape); a search may change them in place, or drop what it does not need
    places: Mapping[str, Place]
    seed: int = 0

    @property
    def n_experts(self) -> int:
        """How many task vectors there are."""
        return len(next(iter(self.deltas.values())))

    @property
    def device(self) -> Any:
        """Where the tensors are."""
        return next(iter(self.base.values())).device

    def change(self, name: str, coefficients: Tensor) -> Tensor:
        """sum_i c_i v_i, (*shape), of coefficients (T,)."""
        return (coefficients @ self._rows(name)).reshape(self.base[name].shape)

    def products(self, name: str, slope: Tensor) -> Tensor:
        """Inner products of each task vector with a gradient (*shape), (T,)."""
        return self._rows(name) @ slope.flatten()

    def expert(self, name: str, index: int) -> Tensor:
        """A tensor of one expert, (*shape)."""
        return self.base[name] + self.deltas[name][index]

    def _rows(self, name: str) -> Tensor:
        """(T, n)."""
        return self.deltas[name].reshape(len(self.deltas[name]), -1)


class Search(Protocol):
    """What is learnt of a merge, and the weights that come of it; called without a graph, gradients are its own matter.

    Attributes:
        learnt: What is learnt, by name; `pull` adds to the gradients in `.grad`, steps change the tensors in place.
        steps: How many updates there are.
        rates: What a learnt tensor's name begins with -> its learning rate.
        groups: Names of what has coefficients of its own.
    """

    learnt: dict[str, Tensor]
    steps: int
    rates: dict[str, float]
    groups: list[str]

    @property
    def coefficients(self) -> Tensor | None:
        """Of the task vectors, (groups, T), where they are learnt or shown."""
        ...

    def begin(self, step: int, look: Callable[[], float]) -> None:
        """Before a step; `look` runs a batch of its own with the weights as they are and pulls its gradients."""
        ...

    def weight(self, name: str) -> Tensor:
        """A merged tensor, (*shape), in memory of its own."""
        ...

    def pull(self, name: str, slope: Tensor) -> None:
        """Add what a merged tensor's gradient, (*shape), means for what is learnt."""
        ...

    def settle(self) -> None:
        """After a step: bring what has moved back to where it may be."""
        ...

    def finish(self) -> None:
        """After the last step: from now on `weight` gives the merged model."""
        ...


class Fold(Protocol):
    """A merge that takes the experts one after the other."""

    def update(self, expert: Mapping[str, Tensor]) -> None:
        """Merge one more expert's tensors (float32) into the state."""
        ...

    def result(self) -> dict[str, Tensor]:
        """The merged tensors (float32) so far."""
        ...


class Roles(Protocol):
    """What a tensor's name means, as the pool knows it."""

    @property
    def n_layers(self) -> int:
        """How many blocks there are."""
        ...

    def is_buffer(self, name: str) -> bool:
        """Whether the name is a buffer (running statistics, position ids) and no parameter."""
        ...

    def is_linear(self, name: str) -> bool:
        """Whether the name is the weight of a linear layer, (out, in)."""
        ...

    def is_transposed(self, name: str) -> bool:
        """Whether the name is the weight of a linear layer, stored as (in, out)."""
        ...

    def layer_of(self, name: str) -> int:
        """Depth: 0 for what comes before the first block, 1 to n for the blocks, n + 1 for what follows."""
        ...

    def mlps(self) -> tuple[str, ...]:
        """Module paths of the feed-forward blocks."""
        ...


@dataclass(frozen=True)
class Row:
    """A method as the engine, the tests and the listings know it; the dotted names load on first use."""

    name: str
    kind: Kind
    function: str  # "methods.ties:ties"
    params: str  # "methods.ties:TiesParams"
    paper: str  # arXiv id, or the source in a few words
    base: Base = Base.needed
    n_experts: tuple[int, int | None] = (1, None)  # fewest and most experts
    ordered: bool = False  # the order of experts matters
    random: bool = False  # draws random numbers; a search with a `rule` is handed a `sampler` for them
    elementwise: bool = True  # a tensor may be cut into chunks of any size
    placed: bool = False  # is told where the tensor stands
    prepare: str = ""  # "methods.ties:thresholds": (pieces, params) -> numbers, (T, ...)
    per_tensor: bool = False  # that pass is over each tensor on its own; otherwise the model, or as params.scope says
    prepared: str = ""  # "methods.ties:prepared": params -> names of those that it reads once for the whole model
    unread: tuple[str, ...] = ()  # parameters that the prepare pass does not look at: what it found holds for any
    kept: str = ""  # "methods.ties:magnitudes": pieces -> what that pass is given as `kept` instead of walking anew
    stats: str = (
        ""  # "fisher", "gram", "gradient", "inputs", "features" or "routed": a name of harness.adapt.STATISTICS
    )
    layerwise: bool = False  # these are collected behind the layers that are merged already, one block after the other
    may_rest: bool = False  # may leave a whole tensor at the base, by its own rule
    ranges: str = ""  # "methods.depth_upscaling:ranges": params -> ranges of its one model's layers that are stacked
    mixture: str = ""  # "methods.moe_upscaling:mixture": (params, names, seed) -> the mixture the pool makes of models
    members: str = ""  # "methods.expert:members": (params, names) -> names of the experts that are read
    rule: str = ""  # of a search that is f(shape, objective, params, report) -> coefficients: the row that has them
    learns: str = ""  # a compression's part that `steps` > 0 refine on unlabelled inputs
    prunes: str = ""  # "methods.prune:is_pruned": (shape, place, params) -> whether a tensor gets zeros, to be counted
    restore: str = ""  # a compression's: (base, parts, expert's index, params, **extras) -> its tensor
    entries: str = ""  # a compression's that is sparse: parts -> how many entries are not zero, and of how many
    loss: str = ""  # what is minimised on the inputs, by a search or by training what a build left trainable
    whole: bool = False  # of a search with a `rule`: each loss is that of all examples, not of the next batch
    adversary: str = ""  # "universal" or "shared": the perturbation of images that a search's loss is also taken under
    all_tasks: bool = False  # is fed the inputs of every task, whatever the experts are called
    fewest: int = 1  # examples of each task that it is fed; fewer are refused
    data: str = ""  # what must be fed besides weights, for listings

    def load(self) -> Callable[..., Any]:
        """The method itself."""
        return resolve(self.function)

    def load_params(self) -> type:
        """The params dataclass."""
        return resolve(self.params)

    def is_fed(self, params: Any) -> bool:
        """Whether it looks at inputs of tasks: always, or as its parameters say."""
        return bool(getattr(params, "from_tasks", self.data) or (self.learns and params.steps))

    def needs(self) -> str:
        """What a user must bring, in a few words."""
        low, high = self.n_experts
        count = f"{low}" if high == low else f"{low}+" if high is None else f"{low} to {high}"
        count = f"{count} expert" if high == 1 else f"{count} experts"
        if high is None and low < 2:
            count = "experts" if low else ""
        parts = ["base" if self.base is Base.needed else "", count]
        return ", ".join(part for part in [*parts, self.data] if part)


@dataclass(frozen=True)
class Veneer:
    """What may be put around a rule, as the engine and the listings know it."""

    name: str
    function: str  # "methods.lines:lines": (piece, params, numbers) -> (Piece, tensor -> tensor)
    params: str  # "methods.lines:LinesParams"
    paper: str
    elementwise: bool = True  # a tensor may be cut into chunks of any size
    aligns: bool = False  # gives the rule other numbers than the experts' own
    prepare: str = ""  # "methods.larv:factors": (pieces, params) -> numbers over the whole model

    def load(self) -> Callable[[Piece, Any, Any], Dressed]:
        """The veneer itself."""
        return resolve(self.function)

    def load_params(self) -> type:
        """The params dataclass."""
        return resolve(self.params)


def resolve(dotted: str) -> Any:
    """Load `module:attribute`."""
    module, _, attribute = dotted.partition(":")
    return getattr(importlib.import_module(module), attribute)
