"""Training by Lightning's Trainer: the one loop of experts and of the embedded suite of images."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.config import UserError
from harness.execute import own_share, sum_over_devices
from harness.learn import sum_gradients

Told = Callable[[int, float], None]  # step, loss
Loss = Callable[[list[int]], tuple[Tensor, int]]  # positions of rows -> a mean, and over how many
_STRIDE = 1_000_003  # between the seeds of two runs: each step draws from a seed of its own
_FAR = 53  # bits, beyond all of these: so does each device


def one_cycle(
    groups: Sequence[Iterable[nn.Parameter]],
    rates: Sequence[float],
    steps: int,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> OptimizerLRSchedulerConfig:
    """AdamW whose rates rise to their highest and fall by a cosine (Smith and Topin 2017, arXiv:1708.07120).

    Args:
        groups: Parameters.
        rates: Of each group, the highest.
        steps: Of the whole training.
        weight_decay: Decoupled.
        warmup: Share of the steps in which the rates rise, in (0, 1].
    """
    optimizer = torch.optim.AdamW([{"params": list(group)} for group in groups], weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates), total_steps=steps, pct_start=warmup)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    module: lightning.LightningModule,
    batches: DataLoader,
    *,
    clip: float | None = 1.0,
    accelerator: str = "cpu",
    devices: int = 1,
    precision: Any = "32-true",
    steps: int | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    resume: Path | None = None,
    bar: bool = True,
) -> None:
    """Train.

    Args:
        module: Its weights are changed in place.
        batches: Gone through once, or with `steps` as often as they take.
        clip: Longest gradient; None: any.
        accelerator: As Lightning has it.
        devices: Of them; where several, Fabric has started their processes already, and each goes through all batches.
        precision: As Lightning has it.
        steps: Of the optimiser, counted from the very start of a resumed training.
        callbacks: Told of every step; `keeping` keeps the state.
        resume: The checkpoint to go on from.
        bar: Show progress.
    """
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="auto" if devices == 1 else SideBySide(),
        use_distributed_sampler=False,
        precision=precision,
        max_epochs=1 if steps is None else -1,
        max_steps=-1 if steps is None else steps,
        gradient_clip_val=clip,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_model_summary=False,
        enable_progress_bar=bar,
    )
    with _interruptible(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")  # rows follow the step
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # lightning 2.6 on torch 2.13
        trainer.fit(module.train(), batches, ckpt_path=resume, weights_only=False if resume else None)


class SideBySide(DDPStrategy):
    """Processes that each run the module as it is; gradients are summed by `harness.learn`, as all that learns does."""

    def configure_ddp(self) -> None:
        """Nothing is wrapped, so that a module may leave parameters out."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM as they were: Lightning makes an exit of its own of them, and ignores Ctrl-C from then on."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


class Curves(lightning.Callback):
    """Numbers that are told step by step; a checkpoint keeps them, so that a resumed training has them from the start.

    Lightning calls what keeps checkpoints last: they hold all that is told of their step.
    """

    def __init__(self, metric: Callable[[str, float, int], None], told: Told) -> None:
        """Know whom to tell.

        Args:
            metric: Records a number: key, value, step.
            told: Called after every step.
        """
        self.points: list[tuple[str, float, int]] = []
        self._metric, self._told = metric, told

    def add(self, key: str, value: float, step: int) -> None:
        """Record a number."""
        self.points.append((key, value, step))
        self._metric(key, value, step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell of the step."""
        self._told(trainer.global_step, pl_module.last_loss)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"points": list(self.points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint: all is recorded again, in the run that goes on."""
        for point in state_dict["points"]:
            self.add(*point)


class Training(lightning.LightningModule):
    """One expert's training; every step's rows and random numbers follow from the seed and the step alone."""

    last_loss: float  # of the last step, over all devices

    def __init__(
        self,
        fabric: Fabric,
        module: nn.Module,
        loss: Loss,
        batches: Sequence[list[int]],
        optimiser: Mapping[str, float],
        seed: int,
        signature: Mapping[str, Any],
    ) -> None:
        """Know what is trained, and how.

        Args:
            fabric: Devices, each of which has its share of every step's rows.
            module: What has parameters that require a gradient.
            loss: Of the module on rows.
            batches: Positions of each step.
            optimiser: lr, weight_decay, warmup.
            seed: Of dropout.
            signature: What a checkpoint must agree with, to be gone on from.
        """
        super().__init__()
        self.module, self._loss, self._batches, self._devices = module, loss, batches, fabric
        self._optimiser, self._seed, self._signature = dict(optimiser), seed, dict(signature)

    def steps(self) -> DataLoader:
        """As many items as there are steps, of which each looks up its own rows."""
        return DataLoader(range(len(self._batches)), batch_size=None)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw from this step's own seed."""
        torch.manual_seed(self._seed * _STRIDE + self.global_step + (self._devices.global_rank << _FAR))

    def training_step(self, batch: Any) -> Tensor:
        """The loss of this step's rows; of several devices, its part of the loss of all.

        Raises:
            FloatingPointError: It is no number.
        """
        rows = self._batches[self.global_step]
        loss, count = self._loss([rows[index] for index in own_share(self._devices, len(rows))])
        whole = loss.detach()
        if self._devices.world_size > 1:
            both = sum_over_devices(self._devices, torch.stack([whole * count, whole.new_tensor(count)]))
            loss, whole = loss * (count / both[1]), both[0] / both[1]
        self.last_loss = float(whole)
        if not math.isfinite(self.last_loss):
            raise FloatingPointError(
                f"the loss is {self.last_loss} at step {self.global_step}; a smaller finetune.lr than "
                f"{self._optimiser['lr']} may help; nothing was written"
            )
        return loss

    def on_after_backward(self) -> None:
        """Sum gradients over the devices."""
        sum_gradients(self._devices, {name: own for name, own in self.module.named_parameters() if own.requires_grad})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle rate, of what requires a gradient."""
        own, weights = self._optimiser, [weight for weight in self.module.parameters() if weight.requires_grad]
        return one_cycle([weights], [own["lr"]], len(self._batches), own["weight_decay"], own["warmup"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed training is compared with."""
        checkpoint["crucible"] = self._signature


def keeping(directory: Path, every: int) -> ModelCheckpoint:
    """Keep the newest state, every so many steps."""
    return ModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=every, save_top_k=1)


def newest(directory: Path, resume: bool, signature: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from; None where a training starts.

    Args:
        directory: Where checkpoints are kept.
        resume: Whether to go on.
        signature: What the checkpoint must agree with.

    Raises:
        UserError: There is none, or one and it is of another training, broken, or not to be gone on with; or the
            directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"finetune.checkpoints={directory} is no directory to write in: {error}") from error
    found = {int(file.stem.removeprefix("step=")): file for file in directory.glob("step=*.ckpt")}
    if resume and not found:
        raise UserError(f"finetune.resume=true: there is no checkpoint in {directory}; leave it out to start anew")
    if not resume and found:
        raise UserError(
            f"finetune.checkpoints={directory}: there is {found[max(found)].name}; finetune.resume=true goes on "
            "with it, or name another directory"
        )
    if not found:
        return None
    place = found[max(found)]
    try:
        known = torch.load(place, map_location="cpu", weights_only=False, mmap=True).get("crucible")
    except Exception as error:  # torch's, pickle's and the archive's
        raise UserError(f"{place} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if known is None:
        raise UserError(f"{place} is a checkpoint of another program; name another finetune.checkpoints")
    differing = [
        f"{key} was {known.get(key)!r} and is {value!r}" for key, value in signature.items() if known.get(key) != value
    ]
    if differing:
        raise UserError(f"finetune.resume=true: {place} is of another training: {'; '.join(differing)}")
    return place
