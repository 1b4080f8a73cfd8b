"""Concrete subspaces: learn one mask for all experts' changes, over task arithmetic, AdaMerging or TSV-M.

Source: Tang et al. 2023, arXiv:2312.06173 (the Concrete mask, over task arithmetic and AdaMerging); the mask over TSV-M
(Gargiulo et al. 2025, arXiv:2412.00081) is FusionBench's.
Differs: the inner step of `concrete_adamerging` is one of gradient descent, as in the paper's bi-level problem, where
FusionBench takes Adam's with a learning rate of 1, which moves every coefficient by about 1. The final mask is not
drawn: it is the noise-free one (`mask=soft`), or all that is likelier kept than not (`hard`). Over TSV-M Adam has no
weight decay.
Formula: merged = base + m / mean(m) * D, m = sigmoid((logits + log(u / (1 - u))) / temperature), u uniform, the mean
over each tensor; D is the change of the merge below: scale * sum_i v_i, sum_i c_gi v_i, or TSV-M's
Cost: each step as AdaMerging's, for `concrete_adamerging` two of them, and O(n) for the mask; 7 n numbers, and T n
where coefficients are learnt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods.adamerging import AdamergingParams, Coefficients, add_slope
from methods.kinds import Stack
from methods.lazy import torch
from methods.parameters import Params, at_least, positive, tunable, word
from methods.primitives import add_up
from methods.tsv_m import TsvMParams, tsv_m

_SPREAD = 1_000_003  # between the seeds of runs, as steps count up from them


@dataclass(frozen=True)
class ConcreteTaskArithmeticParams(Params):
    """Parameters of `concrete_task_arithmetic`; also the schema of conf/method/concrete_task_arithmetic.yaml."""

    scale: float = tunable(0.3, low=0.0, high=1.0)  # of task arithmetic
    lr: float = tunable(1e-3, low=1e-4, high=1e-1, log=True)  # Adam's learning rate for the mask's logits
    steps: int = 2000  # updates of the mask
    logits: float = tunable(0.0, low=-2.0, high=5.0)  # where every logit starts
    temperature: float = tunable(0.5, low=0.1, high=2.0)  # of the relaxed mask; the lower, the nearer to 0 and 1
    mask: str = word("soft", "hard")  # the final one: soft shares, or 1 where the logit is not negative, else 0
    loss: str = word("entropy", "labels")  # entropy of predictions, or cross-entropy of labels or next tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        positive("temperature", self.temperature)
        at_least("steps", self.steps, 1)


@dataclass(frozen=True)
class ConcreteTsvMParams(ConcreteTaskArithmeticParams):
    """Parameters of `concrete_tsv_m`; also the schema of conf/method/concrete_tsv_m.yaml."""

    scale: float = tunable(1.0, low=0.1, high=2.0)  # of TSV-M


@dataclass(frozen=True)
class ConcreteAdamergingParams(ConcreteTaskArithmeticParams):
    """Parameters of `concrete_adamerging`; also the schema of conf/method/concrete_adamerging.yaml."""

    steps: int = 1000  # updates of the mask
    granularity: str = word("tensor", "layer", "task")  # what has coefficients of its own: task is the whole model
    clamp: bool = False  # hold the coefficients in [0, 1]
    inner_lr: float = tunable(1.0, low=0.0, high=10.0)  # of the one inner step of the coefficients, before the mask's
    adamerging_lr: float = tunable(1e-3, low=1e-4, high=1e-1, log=True)  # Adam's, for the coefficients at the end
    adamerging_steps: int = 1000  # updates of the coefficients, behind the mask that was found

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_lr", self.inner_lr, 0)
        positive("adamerging_lr", self.adamerging_lr)
        at_least("adamerging_steps", self.adamerging_steps, 0)


class Concrete:
    """A mask over the merged change; see `methods.kinds.Search`."""

    def __init__(self, stack: Stack, params: ConcreteTaskArithmeticParams, changes: dict[str, torch.Tensor]) -> None:
        self.groups: list[str] = []
        self.base, self.params, self.changes, self.seed = stack.base, params, changes, stack.seed
        self.logits = {name: torch.full_like(base, float(params.logits)) for name, base in stack.base.items()}
        self.learnt = {f"mask/{name}": logits for name, logits in self.logits.items()}
        self.steps, self.rates = params.steps, {"mask/": params.lr}
        self.raw: dict[str, torch.Tensor] = {}  # the mask before it is rescaled
        self.means: dict[str, torch.Tensor] = {}

    @property
    def coefficients(self) -> torch.Tensor | None:
        """None are learnt."""
        return None

    def begin(self, step: int, look: Callable[[], float]) -> None:
        """Draw the step's mask; it depends on the seed and the step alone."""
        generator = torch.Generator(next(iter(self.base.values())).device)
        generator.manual_seed((self.seed * _SPREAD + step) % 2**63)
        for name, logits in self.logits.items():
            uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_(1e-6, 1 - 1e-6)
            self._take(name, torch.logit(uniform).add_(logits).div_(self.params.temperature).sigmoid_())

    def weight(self, name: str) -> torch.Tensor:
        """The base and the masked change."""
        return torch.addcmul(self.base[name], self.raw[name], self.changes[name] / self.means[name])

    def pull(self, name: str, slope: torch.Tensor) -> None:
        """Through the mask's mean and the sigmoid, by hand."""
        raw, mean = self.raw[name], self.means[name]
        felt = slope * self.changes[name]
        through = felt / mean - (felt * raw).mean() / mean.square()
        add_slope(self.logits[name], through.mul_(raw).mul_(1 - raw).div_(self.params.temperature))

    def settle(self) -> None:
        """Nothing is bounded."""

    def finish(self) -> None:
        """The mask without noise."""
        for name, logits in self.logits.items():
            soft = self.params.mask == "soft"
            self._take(name, (logits / self.params.temperature).sigmoid_() if soft else (logits >= 0).float())

    def _take(self, name: str, raw: torch.Tensor) -> None:
        mean = raw.mean()
        self.raw[name], self.means[name] = raw, mean + (mean == 0)  # an empty mask stays empty


class ConcreteCoefficients(Concrete):
    """The mask with coefficients below it: they take one inner step for each of the mask's, and are learnt at last."""

    def __init__(self, stack: Stack, params: ConcreteAdamergingParams) -> None:
        super().__init__(stack, params, {})
        kept = AdamergingParams(params.granularity, params.scale, params.adamerging_lr, 1, params.clamp)
        self.inner = Coefficients(stack, kept)
        self.learnt = {**self.learnt, **self.inner.learnt}
        self.groups = self.inner.groups
        self.steps = params.steps + params.adamerging_steps
        self.rates = {"mask/": params.lr, "": params.adamerging_lr}
        self.of_mask = True  # whether it is the mask that gradients are of

    @property
    def coefficients(self) -> torch.Tensor:
        """(groups, T)."""
        return self.inner.values

    def begin(self, step: int, look: Callable[[], float]) -> None:
        """The mask's step, at coefficients one step from where they start; or a step of the coefficients."""
        params, values = self.params, self.inner.values
        assert isinstance(params, ConcreteAdamergingParams)
        if step >= params.steps:
            if step == params.steps:
                values.fill_(params.scale)
            if self.of_mask:
                self.finish()
            self.of_mask = False
            return
        super().begin(step, look)
        values.fill_(params.scale)
        if params.inner_lr:
            self.of_mask = False
            look()
            self.of_mask = True
            assert values.grad is not None, "the look has pulled"
            values.sub_(values.grad, alpha=params.inner_lr)
            self.settle()

    def weight(self, name: str) -> torch.Tensor:
        """The same, of the coefficients' change."""
        self.changes[name] = self.inner.change(name)
        return super().weight(name)

    def pull(self, name: str, slope: torch.Tensor) -> None:
        """Of the mask, or of the coefficients behind it."""
        if self.of_mask:
            super().pull(name, slope)
        else:
            self.inner.pull(name, slope * (self.raw[name] / self.means[name]))

    def settle(self) -> None:
        """Hold the coefficients in [0, 1], where that is asked for."""
        self.inner.settle()


def concrete_task_arithmetic(stack: Stack, params: ConcreteTaskArithmeticParams) -> Concrete:
    """A mask over the scaled sum of task vectors."""
    return Concrete(stack, params, {name: add_up(deltas) * params.scale for name, deltas in stack.deltas.items()})


def concrete_tsv_m(stack: Stack, params: ConcreteTsvMParams) -> Concrete:
    """A mask over the change that TSV-M makes."""
    kept = TsvMParams(scale=params.scale)
    return Concrete(
        stack,
        params,
        {
            name: tsv_m(base, base + stack.deltas[name], kept, place=stack.places[name]) - base
            for name, base in stack.base.items()
        },
    )


def concrete_adamerging(stack: Stack, params: ConcreteAdamergingParams) -> ConcreteCoefficients:
    """A mask over AdaMerging, task-wise or layer-wise."""
    return ConcreteCoefficients(stack, params)
