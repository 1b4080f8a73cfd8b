"""The configuration as plain dataclasses: what every key is, and which values are refused.

The values stand in conf/; only `harness/compose.py` brings the two together.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods.parameters import at_least, in_unit_interval, one_of

ROOT = Path(__file__).resolve().parents[1]

SPLITS = ("train", "validation", "test")
FAMILIES = ("clip", "causal_lm", "seq2seq", "sequence_classification", "state_dict")
KINDS = {  # family -> the kinds of task that its models can be scored on
    "clip": ("image_classification",),
    "causal_lm": ("perplexity", "exact_match"),
    "seq2seq": ("perplexity", "exact_match"),
    "sequence_classification": ("text_classification", "preference"),
    "state_dict": (),
}
DTYPES = ("float32", "bfloat16", "float16")
VOCABULARIES = ("same", "base", "union")
TOKEN_RULES = ("owner", "mean", "base")
OUTPUT_KINDS = ("model", "adapter")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")  # of lightning.Fabric: weights stay float32, as merging wants them


class UserError(Exception):
    """What the user can put right: the command line shows the message alone and ends with status 2."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, gathered."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(dict.fromkeys(faults))
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{count} in the configuration, nothing was started:", *map(_bullet, self.faults)]))


def _bullet(fault: str) -> str:
    return "  - " + fault.strip().replace("\n", "\n    ")


def closest(name: str, known: Iterable[str], spelled: Mapping[str, str] | None = None) -> str:
    """A hint for a name that is not known: the closest one, or all of them.

    Args:
        name: What was given.
        known: What there is.
        spelled: How to write a known name in full, where that differs.

    >>> closest("tise", ["ties", "dare"])
    'did you mean ties?'
    >>> closest("xyz", ["ties", "dare"])
    'known are ties, dare'
    """
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    written = [spelled[match] if spelled else match for match in matches or known]
    if matches:
        return f"did you mean {written[0]}?"
    return f"known are {', '.join(written)}" if known else "there is none"


def hold(*checks: tuple[Callable[..., None], *tuple[Any, ...]]) -> None:
    """Run every check, a function and its arguments, and raise what they refuse together."""
    refused = []
    for check, *arguments in checks:
        try:
            check(*arguments)
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("\n".join(refused))


@dataclass(frozen=True)
class PoolSettings:
    """Where the base and the experts are.

    A member is a hub id (`org/name`, `org/name@revision`), a local path, `models:/...` or `runs:/...`.
    """

    family: str
    base: str | None = None
    experts: dict[str, str] = field(default_factory=dict)
    root: str | None = None  # with it, a hub id or a relative path is looked up as root/<id> and nowhere else
    trust_remote_code: bool = False
    merge: list[str] = field(default_factory=lambda: ["*"])  # patterns of the tensors that are merged
    rest: str = "base"  # who gives the tensors that are not: base, or an expert's name
    slices: list[dict[str, Any]] | None = None  # layers stacked by ranges: docs/language.md
    mixture: dict[str, Any] | None = None  # set by methods that make one mixture of experts of the pool's models
    tokenizer: str = "same"  # same: equal vocabularies or an error; base; union
    new_tokens: str = "owner"  # rows of tokens that a member lacks: owner, mean, base
    tokens: dict[str, str] = field(default_factory=dict)  # token -> rule or member's name, over `new_tokens`
    chat_template: str | None = None  # base, an expert's name or a file; None: the base's, an error where they differ

    def __post_init__(self) -> None:
        hold(
            (one_of, "family", self.family, FAMILIES),
            (_filled, "merge", self.merge),
            (one_of, "tokenizer", self.tokenizer, VOCABULARIES),
            (one_of, "new_tokens", self.new_tokens, TOKEN_RULES),
        )


@dataclass(frozen=True)
class TaskSettings:
    """One data set with its splits and columns, and how it is scored."""

    path: str
    splits: dict[str, str]  # of train, validation, test -> the split as `datasets` spells it
    kind: str = "image_classification"  # or perplexity, exact_match, text_classification, preference
    image: str = "image"  # column
    label: str = "label"  # column
    labels: list[str] | None = None  # class names, of images in prompts; None: the data set's own
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    text: str | None = "text"  # column, or a template of columns; None: the perplexity of targets that follow a prompt
    prompt: str = "prompt"  # column, or a template of columns
    target: str = "target"  # column, or a template of columns
    chosen: str = "chosen"  # column, or a template of columns: of two texts the better one
    rejected: str = "rejected"  # column, or a template of columns: the other
    max_new_tokens: int = 32  # of an answer
    stop: str | None = None  # what ends an answer; None: the model's own end of text
    block: int | None = None  # tokens seen at a time of all texts in a row; None: each text on its own
    subset: str | None = None  # the data set's configuration, where it has several
    version: int = 1

    def __post_init__(self) -> None:
        hold(
            *((one_of, "splits", name, SPLITS) for name in self.splits),
            (one_of, "kind", self.kind, tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))),
            (_filled, "templates", self.templates),
            *((_one_place, "templates", template) for template in self.templates),
            (at_least, "max_new_tokens", self.max_new_tokens, 1),
            (_filled, "stop", "any" if self.stop is None else self.stop),
            (at_least, "block", 2 if self.block is None else self.block, 2),
            (_text_for, self.kind, self.text, self.block),
            (at_least, "version", self.version, 1),
        )


@dataclass(frozen=True)
class LmEvalSettings:
    """Tasks of lm-evaluation-harness, in its own words; needs the extra: pip install 'crucible[lm-eval]'."""

    tasks: list[str] = field(default_factory=list)  # names, groups, tags or paths of YAML files
    include_path: str | None = None  # a directory with more tasks
    num_fewshot: int | None = None  # None: each task's own
    limit: int | None = None  # documents of each task; None: all
    batch_size: int = 8
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        hold(
            (_distinct, "tasks", self.tasks),
            (at_least, "num_fewshot", 0 if self.num_fewshot is None else self.num_fewshot, 0),
            (at_least, "limit", 1 if self.limit is None else self.limit, 1),
            (at_least, "batch_size", self.batch_size, 1),
        )


@dataclass(frozen=True)
class TasksSettings:
    """What a model is scored on; without tasks it is merged and written only."""

    tasks: dict[str, TaskSettings] = field(default_factory=dict)
    root: str | None = None  # with it, a task's path is looked up as root/<path> and nowhere else
    lm_eval: LmEvalSettings = field(default_factory=LmEvalSettings)


@dataclass(frozen=True)
class FabricSettings:
    """Devices and precision, in lightning.Fabric's own words."""

    accelerator: str
    devices: Any  # a number, or "auto" for all there are
    precision: str

    def __post_init__(self) -> None:
        hold(
            (one_of, "accelerator", self.accelerator, ACCELERATORS),
            (_count_or_auto, "devices", self.devices),
            (one_of, "precision", self.precision, PRECISIONS),
        )


@dataclass(frozen=True)
class EngineSettings:
    """How the streaming engine works; none of it changes a bit of the result, but for `dtype`."""

    dtype: str | None  # of the merged model; None: the base's
    workers: Any  # a number, or "auto" for one for each core
    shard_bytes: int  # most bytes of one weights file
    resume: bool  # go on with what an interrupted merge into `output` has finished

    def __post_init__(self) -> None:
        hold(
            *(((one_of, "dtype", self.dtype, DTYPES),) if self.dtype is not None else ()),
            (_count_or_auto, "workers", self.workers),
            (at_least, "shard_bytes", self.shard_bytes, 1),
        )


@dataclass(frozen=True)
class AdapterSettings:
    """A merged adapter (output_kind=adapter), and what `crucible extract-lora` makes."""

    rank: int | None  # None: exact, the sum of the experts' ranks
    energy: float | None  # instead of a rank: the share of each matrix's squared norm to keep, in (0, 1]

    def __post_init__(self) -> None:
        hold(
            (at_least, "rank", 1 if self.rank is None else self.rank, 1),
            (in_unit_interval, "energy", 1.0 if self.energy is None else self.energy),
        )


@dataclass(frozen=True)
class EvaluationSettings:
    """How the merged model is scored."""

    split: str
    batch_size: int
    limit: int | None  # rows of each task; None: all
    references: bool  # compare with the base and with each task's own expert
    plots: bool
    preference: list[float] | None = None  # of a `model` that trades tasks for each other; None: its own

    def __post_init__(self) -> None:
        hold(
            (one_of, "split", self.split, SPLITS),
            (at_least, "batch_size", self.batch_size, 1),
            (at_least, "limit", 1 if self.limit is None else self.limit, 1),
        )


@dataclass(frozen=True)
class AdaptationSettings:
    """What methods that look at data are fed."""

    split: str
    examples: int  # of each task
    batch_size: int
    checkpoint: str | None = None  # a directory in which learning is saved on the way
    checkpoint_every: int = 100  # steps
    resume: bool = False  # go on with what `checkpoint` holds
    task_vectors: str = "auto"  # of searches: held in `memory`, or read from `files` at each step

    def __post_init__(self) -> None:
        hold(
            (one_of, "split", self.split, SPLITS),
            (one_of, "task_vectors", self.task_vectors, ("auto", "memory", "files")),
            (at_least, "examples", self.examples, 1),
            (at_least, "batch_size", self.batch_size, 1),
            (at_least, "checkpoint_every", self.checkpoint_every, 1),
        )


@dataclass(frozen=True)
class TrackingSettings:
    """What is written down of a run."""

    experiment: str
    run_name: str | None  # None: a name that says what the run is
    log_model: bool
    tags: dict[str, str]

    def __post_init__(self) -> None:
        _filled("experiment", self.experiment.strip())


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told; the values stand in conf/."""

    method_name: str
    pool_name: str
    tasks_name: str
    method: Any  # the params dataclass of the method
    pool: PoolSettings
    tasks: TasksSettings
    seed: int
    fabric: FabricSettings
    evaluation: EvaluationSettings
    adaptation: AdaptationSettings
    tracking: TrackingSettings
    experts: list[str] | None  # the pool's experts to use, in this order; None: all (already applied to `pool`)
    model: str | None  # for `evaluate`: a written model to score instead of the method's
    output: str | None  # also write the merged model to this directory
    output_kind: str  # what is written there: model, or adapter
    dry_run: bool  # say what would be done, from headers alone
    engine: EngineSettings
    adapter: AdapterSettings
    veneers: list[str] = field(default_factory=list)  # what goes around the rule, the first innermost
    veneer: Any = None  # the parameters of every veneer, by its name
    schedules: dict[str, Any] = field(default_factory=dict)  # of `method`'s fields that differ by tensor; no key

    def __post_init__(self) -> None:
        hold(
            (_seed, "seed", self.seed),
            (_distinct, "experts", self.experts or []),
            (_distinct, "veneers", self.veneers),
            (one_of, "output_kind", self.output_kind, OUTPUT_KINDS),
        )


def _filled(name: str, value: Any) -> None:
    if not value:
        raise ValueError(f"{name} must not be empty")


def _one_place(name: str, template: str) -> None:
    if template.count("{}") != 1:
        raise ValueError(f"{name} have one {{}} each, where the class name goes, got {template!r}")


def _text_for(kind: str, text: str | None, block: int | None) -> None:
    if kind == "text_classification" and text is None:
        raise ValueError("text must name the column that is classified")
    if block is not None and (kind != "perplexity" or text is None):
        raise ValueError("block cuts the texts of a perplexity task; it goes with no prompts and no other kind")


def _count_or_auto(name: str, value: Any) -> None:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} is a whole number, at least 1, or auto, got {value!r}")


def _seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be from 0 to {2**32 - 1}, got {value}")


def _distinct(name: str, values: list[str]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{name} must name each one once, got {', '.join(values)}")
