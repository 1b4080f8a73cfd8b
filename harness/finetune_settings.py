"""What `crucible finetune` is told; the values stand in conf/finetune."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.config import SPLITS, hold
from methods.parameters import at_least, in_unit_interval, one_of, positive

MODES = ("full", "lora", "linear_lora")
SECTION = "finetune"


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 8
    alpha: float | None = None  # the change is alpha / rank * B A; None: twice the rank
    dropout: float = 0.0  # of what enters A, in [0, 1)
    targets: list[str] = field(default_factory=list)  # last parts of linear layers' names; none: all of the blocks

    def __post_init__(self) -> None:
        hold(
            (at_least, "rank", self.rank, 1),
            (positive, "alpha", 1.0 if self.alpha is None else self.alpha),
            (_share_below_one, "dropout", self.dropout),
        )

    @property
    def numerator(self) -> float:
        """Alpha, as it counts."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class FinetuneSettings:
    """How an expert is trained."""

    task: str | None = None
    mode: str = "full"
    steps: int = 300
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float | None = 1.0
    freeze: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    split: str = "train"
    validate_every: int | None = 100
    checkpoints: str | None = None
    checkpoint_every: int = 100
    resume: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        hold(
            (one_of, "mode", self.mode, MODES),
            (one_of, "split", self.split, SPLITS),
            (at_least, "steps", self.steps, 1),
            (at_least, "batch_size", self.batch_size, 1),
            (positive, "lr", self.lr),
            (at_least, "weight_decay", self.weight_decay, 0),
            (in_unit_interval, "warmup", self.warmup),
            (positive, "clip", 1.0 if self.clip is None else self.clip),
            (at_least, "max_tokens", 2 if self.max_tokens is None else self.max_tokens, 2),
            (at_least, "validate_every", 1 if self.validate_every is None else self.validate_every, 1),
            (at_least, "checkpoint_every", self.checkpoint_every, 1),
            (_somewhere, "resume", self.resume, self.checkpoints),
        )


def _share_below_one(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is a share in [0, 1), got {value}")


def _somewhere(name: str, resume: bool, checkpoints: str | None) -> None:
    if resume and checkpoints is None:
        raise ValueError(f"{name} goes on from a checkpoint: name their directory, finetune.checkpoints=DIR")
