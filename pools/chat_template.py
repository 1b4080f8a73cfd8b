"""Which chat template the output gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pools.headers import CheckpointError
from pools.tokenizer_files import TokenizerFiles


def chosen_template(
    files: Mapping[str | None, TokenizerFiles], reference: str | None, choice: str | None
) -> tuple[Any, list[str]]:
    """The template, or None where there is none; and notes.

    Args:
        files: Member (None is the base) -> its tokenizer files.
        reference: Whose template is the base's: the base, or the first expert without one.
        choice: `base`, an expert's name or a file. None: the only template there is.

    Raises:
        CheckpointError: Templates differ and none is chosen; the one that is chosen does not exist.
    """
    templates = {member: found.template for member, found in files.items() if found.template}
    named = {"base" if member is None else member: template for member, template in templates.items()}
    named.setdefault("base", templates.get(reference))
    if choice is None:
        return _only(templates, reference)
    if named.get(choice):
        who = reference if choice == "base" else choice
        return named[choice], _ends(files, reference, who)
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8"), []
    have = ", ".join(name for name, template in named.items() if template) or "none"
    raise CheckpointError(
        f"pool.chat_template={choice}: there is no file of that name and no member with a template; members with one: "
        f"{have}"
    )


def _only(templates: Mapping[str | None, Any], reference: str | None) -> tuple[Any, list[str]]:
    """The template that all members have who have one."""
    if not templates:
        return None, []
    first = reference if reference in templates else next(iter(templates))
    differ = [str(member) for member, template in templates.items() if template != templates[first]]
    if differ:
        who = "base" if first is None else first
        raise CheckpointError(
            f"the chat template of {', '.join(differ)} differs from {who}'s; choose one: "
            f"pool.chat_template=base|{'|'.join(differ)}|FILE"
        )
    notes = [] if first == reference else [f"the chat template is expert {first}'s: the base has none"]
    return templates[first], notes


def _ends(files: Mapping[str | None, TokenizerFiles], reference: str | None, who: str | None) -> list[str]:
    """Whether the template's owner ends its turns with another token than the output's tokenizer does."""
    if who not in files or reference not in files:
        return []
    theirs, own = files[who].roles.get("eos_token"), files[reference].roles.get("eos_token")
    if theirs == own:
        return []
    return [f"the chat template is {who}'s, whose eos_token is {theirs!r}; the output's is {own!r}"]
