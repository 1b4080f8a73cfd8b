"""One vocabulary for members that have several: what differs, which ids the output has, which rows stand at them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pools.chat_template import chosen_template
from pools.headers import CheckpointError
from pools.reading import Source
from pools.revocabulary import view
from pools.tokenizer_files import CONFIG, TEMPLATES, TokenizerFiles, Vocabulary
from pools.union_tokenizer import union_texts
from pools.vocabulary_plan import RULES, Fill, make_plan, padded, union_ids
from pools.vocabulary_tensors import suspects, vocabulary_rows

MODES = ("same", "base", "union")
_CHOICES = "tokenizer=base takes the base's, tokenizer=union all tokens (docs/language.md, Tokenizers)"


@dataclass(frozen=True)
class Unified:
    """Members with one vocabulary, and the files and settings that go with it.

    Attributes:
        base: The base, its embedding and head rearranged where need be.
        experts: The experts likewise.
        copies: Tokenizer files to be copied as they are.
        texts: Tokenizer files that are written: name -> content.
        config_changes: What the output's config.json has otherwise than the base's; nested as it is.
        notes: What a user should know, a line each.
    """

    base: Source | None
    experts: dict[str, Source]
    copies: tuple[Path, ...]
    texts: dict[str, str]
    config_changes: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class _Members:
    """All members, the base as None, and who stands for it."""

    sources: dict[str | None, Source]
    reference: str | None  # the base; the first expert where there is none
    files: dict[str | None, TokenizerFiles | None]
    rows: dict[str | None, int | None]  # of the embedding; None without one

    def named(self, member: str | None) -> str:
        return "base" if member is None else f"expert {member}"

    def differing(self) -> list[str | None]:
        """Members whose vocabulary files are not the reference's to the byte."""
        own = self.files[self.reference]
        return [m for m, found in self.files.items() if found and own and found is not own and not found.same_as(own)]

    def vocabulary(self, member: str | None) -> Vocabulary:
        """A member's vocabulary: the reference's where it has no files or the same ones."""
        own, found = self.files[self.reference], self.files[member]
        assert own is not None
        return own.vocabulary if found is None or found.same_as(own) else found.vocabulary


def unify(
    base: Source | None,
    experts: dict[str, Source],
    directories: Mapping[str | None, Path],
    mode: str,
    new_tokens: str,
    tokens: Mapping[str, str],
    chat_template: str | None,
    configs: Mapping[str | None, Mapping[str, Any]],
) -> Unified:
    """Give all members one vocabulary.

    Args:
        base: The base; None where the pool has none: the first expert then stands for it.
        experts: Name -> expert.
        directories: Member (None is the base) -> where its tokenizer files are. One without any is taken to have the
            base's vocabulary.
        mode: `same`: equal vocabularies or an error. `base`: the base's tokenizer and size. `union`: all tokens; the
            base's ids stay, new ones follow in the order of their lowest ids in the experts, padded as the base is.
        new_tokens: What stands in the row of a token that a member lacks: `owner`, the mean of the rows of those who
            have it (in mode `base`: the base's row); `mean`, the mean of that member's own tokens; `base`, the base's
            row, else as owner.
        tokens: Token -> one of these words, or a member whose row is taken; over `new_tokens`.
        chat_template: `base`, an expert's name or a file; None: the only one there is, or an error.
        configs: Member -> its config.json.

    Raises:
        CheckpointError: The vocabularies differ and must not; a token or member is not known; a chat template must be
            chosen; a tokenizer's files cannot be read.
    """
    if mode not in MODES or new_tokens not in RULES:
        raise CheckpointError(
            f"pool.tokenizer is one of {', '.join(MODES)}, pool.new_tokens of {', '.join(RULES)}; "
            f"got {mode!r} and {new_tokens!r}"
        )
    sources: dict[str | None, Source] = ({} if base is None else {None: base}) | dict(experts)
    reference = None if base is not None else next(iter(experts))
    files = {member: TokenizerFiles.find(directories.get(member)) for member in sources}
    rows = {m: vocabulary_rows(source.shapes, _vocab_size(configs.get(m))) for m, source in sources.items()}
    members = _Members(sources, reference, files, rows)
    if mode == "same":
        found = _same(members, tokens)
    else:
        found = _rearranged(members, mode, Fill(mode, new_tokens, tokens, reference), configs.get(reference) or {})
    return _with_template(found, members, chat_template)


def _vocab_size(config: Mapping[str, Any] | None) -> int | None:
    config = config or {}
    inner = config.get("text_config") or {}
    return config.get("vocab_size", inner.get("vocab_size"))


def _same(members: _Members, tokens: Mapping[str, str]) -> Unified:
    """Nothing is changed, since nothing differs."""
    faults = list(_faults(members))
    if tokens:
        faults.append("pool.tokens has no effect with tokenizer=same; use tokenizer=base or tokenizer=union")
    if faults:
        raise CheckpointError("\n".join(faults))
    return _unchanged(members)


def _unchanged(members: _Members) -> Unified:
    experts = {name: source for name, source in members.sources.items() if name is not None}
    giver = next((files for files in [members.files[members.reference], *members.files.values()] if files), None)
    return Unified(members.sources.get(None), experts, giver.files if giver else (), {}, {}, _roles_differ(members))


def _roles_differ(members: _Members) -> list[str]:
    """Tokens that members with the same vocabulary use for different ends, as a base and its chat model do."""
    own = members.files[members.reference]
    return [
        f"{members.named(member)} uses {other.roles[role]!r} as {role}, "
        f"{members.named(members.reference)} {own.roles[role]!r}: the merged model has the latter"
        for member, other in members.files.items()
        if own is not None and other is not None
        for role in sorted(own.roles.keys() & other.roles.keys())
        if own.roles[role] != other.roles[role]
    ]


def _faults(members: _Members) -> Iterator[str]:
    """Differences of vocabularies, special tokens and sizes, a line for each member."""
    known = [member for member in members.files if members.files[member]]
    first = members.reference if members.files[members.reference] else next(iter(known), None)
    for member in known:
        own, other = members.files[first], members.files[member]
        if member == first or own is None or other is None:
            continue
        said = [] if other.same_as(own) else differences(own.vocabulary, other.vocabulary)
        if said:
            yield f"the tokenizer of {members.named(member)} differs from {members.named(first)}'s: " + "; ".join(said)
            yield f"  {_CHOICES}"
    size = members.rows[members.reference]
    for member, rows in members.rows.items():
        if None not in (rows, size) and rows != size:
            yield (
                f"{members.named(member)} has {rows} vocabulary rows, {members.named(members.reference)} {size}; "
                "tokenizer=base keeps the base's size, tokenizer=union the larger"
            )


def differences(own: Vocabulary, other: Vocabulary) -> list[str]:
    """In what the second vocabulary differs from the first; empty where they are equal.

    >>> own, other = ({"a": 0, "b": 1}, {"a": 0, "c": 1})
    >>> differences(Vocabulary("WordLevel", own, [], {}), Vocabulary("WordLevel", other, [], {}))
    ["it has 1 more token ('c')", "it lacks 1 token ('b')"]
    """
    said = [f"it is {other.kind}, not {own.kind}"] if own.kind != other.kind else []
    more = [token for token in other.ids if token not in own.ids]
    lacks = [token for token in own.ids if token not in other.ids]
    moved = [token for token, at in own.ids.items() if other.ids.get(token, at) != at]
    said += [f"it has {_some(more, 'more token')}"] if more else []
    said += [f"it lacks {_some(lacks, 'token')}"] if lacks else []
    if moved:
        shown = [f"{token!r} is {other.ids[token]}, not {own.ids[token]}" for token in moved[:3]]
        said.append(f"{len(moved)} at another id ({', '.join(shown)}{', ...' if len(moved) > 3 else ''})")
    if own.merges != other.merges:
        pairs = enumerate(zip_longest(own.merges, other.merges))
        at, (one, two) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        said.append(f"merge {at} is {' + '.join(two or ['none'])}, not {' + '.join(one or ['none'])}")
    return said


def _some(tokens: Sequence[str], what: str) -> str:
    shown = ", ".join(map(repr, tokens[:4]))
    return f"{len(tokens)} {what}{'s' if len(tokens) > 1 else ''} ({shown}{', ...' if len(tokens) > 4 else ''})"


def _rearranged(members: _Members, mode: str, fill: Fill, config: Mapping[str, Any]) -> Unified:
    """Modes `base` and `union`."""
    own = members.files[members.reference]
    if own is None:
        who = members.named(members.reference)
        raise CheckpointError(f"tokenizer={mode} needs the tokenizer of the {who}, which has no tokenizer files")
    differing = members.differing()
    size = members.rows[members.reference]
    if not differing and len(set(members.rows.values())) == 1 and not fill.tokens:
        return _unchanged(members)
    _assert_room(members, own.vocabulary)
    found = {member: members.vocabulary(member).ids for member in members.sources}
    ids = found[members.reference]
    notes = []
    texts: dict[str, str] = {}
    copies = own.files
    if mode == "base":
        notes += [f"{members.named(m)}: {note}" for m in differing for note in _left_out(found[m], ids)]
    else:
        ids = union_ids(ids, [found[member] for member in differing])
    if len(ids) > len(found[members.reference]):
        texts, said = union_texts(own, {str(m): f for m in differing if (f := members.files[m])}, ids)
        notes += said
        copies = tuple(file for file in own.files if file.name in TEMPLATES)
    if size is None:  # no embedding among the tensors: the tokenizer is all there is to unify
        return dataclasses.replace(_unchanged(members), copies=copies, texts=texts, notes=notes)
    n_rows = size if mode == "base" else padded(size, 1 + max(own.vocabulary.ids.values()), 1 + max(ids.values()))
    plan = make_plan(members.sources, found, members.rows, ids, n_rows, fill)
    views = {member: view(plan, member, members.rows[member]) for member in members.sources}
    experts = {name: shown for name, shown in views.items() if name is not None}
    notes += [
        f"{name} has {size} rows as the vocabulary has, but its name does not say that it belongs to it: it is kept"
        for name in suspects(members.sources[members.reference].shapes, size)
    ]
    return Unified(views.get(None), experts, copies, texts, resized(config, size, n_rows), notes)


def _assert_room(members: _Members, own: Vocabulary) -> None:
    """A member without tokenizer files has the base's vocabulary, if it has as many rows."""
    least = min(members.rows[members.reference] or 0, 1 + max(own.ids.values()))
    faults = [
        f"{members.named(member)} has no tokenizer files and {rows} vocabulary rows: too few for the base's vocabulary "
        "that it is taken to have; put its tokenizer.json beside its weights"
        for member, rows in members.rows.items()
        if members.files[member] is None and rows is not None and rows < least
    ]
    if faults:
        raise CheckpointError("\n".join(faults))


def _left_out(ids: Mapping[str, int], kept: Mapping[str, int]) -> list[str]:
    """What a member loses when only the base's tokens are kept."""
    lost = [token for token in ids if token not in kept]
    return [f"{_some(lost, 'token')} left out, which the base lacks"] if lost else []


def resized(config: Mapping[str, Any], size: int, n_rows: int) -> dict[str, Any]:
    """Changes of a config.json that says `vocab_size` here or in parts of it.

    >>> resized({"vocab_size": 10, "text_config": {"vocab_size": 10, "hidden_size": 4}}, 10, 12)
    {'vocab_size': 12, 'text_config': {'vocab_size': 12}}
    """
    if size == n_rows:
        return {}
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size":
            changes[key] = n_rows
        elif isinstance(value, Mapping) and value.get("vocab_size") == size:
            changes[key] = resized(value, size, n_rows)
    return changes or {"vocab_size": n_rows}


def _with_template(found: Unified, members: _Members, choice: str | None) -> Unified:
    """The chosen chat template among the files."""
    names = {member: files for member, files in members.files.items() if files}
    template, notes = chosen_template(names, members.reference, choice)
    giver = next((files for files in [members.files[members.reference], *names.values()] if files), None)
    if giver is None or template is None or template == giver.template:
        return dataclasses.replace(found, notes=found.notes + notes)
    config = json.loads(found.texts[CONFIG]) if CONFIG in found.texts else dict(giver.config)
    written = json.dumps(config | {"chat_template": template}, ensure_ascii=False, indent=2) + "\n"
    copies = tuple(file for file in found.copies if file.name not in (CONFIG, *TEMPLATES))
    return dataclasses.replace(found, copies=copies, texts=found.texts | {CONFIG: written}, notes=found.notes + notes)
