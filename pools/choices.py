"""What a user chooses about a pool besides its members; the defaults are those of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Choices:
    """Which tensors are merged, how vocabularies are brought together, and whether code of the members may run."""

    merge: Sequence[str] = ("*",)  # patterns of the tensors that are merged
    rest: str = "base"  # who gives the others: base, or an expert's name
    slices: Sequence[Mapping[str, Any]] | None = None  # layers stacked by ranges
    mixture: Mapping[str, Any] | None = None  # models side by side in one mixture of experts: `pools.moe.mix`
    tokenizer: str = "same"  # same, base or union
    new_tokens: str = "owner"  # rows of tokens that a member lacks: owner, mean, base
    tokens: Mapping[str, str] = field(default_factory=dict)  # token -> rule or member's name
    chat_template: str | None = None  # base, an expert's name or a file
    trust_remote_code: bool = False

    @property
    def selects(self) -> bool:
        """Whether some tensors are left out of the merge."""
        return list(self.merge) != ["*"]

    def given(self) -> list[str]:
        """Names of the choices that are not left at their default."""
        default = Choices()
        return [field.name for field in fields(self) if _plain(self, field.name) != _plain(default, field.name)]


def _plain(choices: Choices, name: str) -> Any:
    value = getattr(choices, name)
    return list(value) if isinstance(value, tuple) else value
