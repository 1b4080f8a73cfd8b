"""Brings a language pool's members together: accounted for, of one vocabulary, layers stacked, tensors chosen.

Nothing but headers, configurations, tokenizer files and a sample of output heads is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pools.checkpoint import Checkpoint
from pools.choices import Choices
from pools.chosen import Parts, choose, members_of, stack
from pools.faults import dtype_notes, header_faults, specs_of
from pools.headers import CheckpointError
from pools.kept import Kept, fit, keep_own, set_heads_aside
from pools.language_config import CONFIG, config_faults, member_faults, read_config
from pools.members import Place, open_members, refuse_gguf, whose
from pools.picked import Picked, Tensors

_COPIED = ("generation_config.json",)
_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "architectures", "classifier_dropout")


class Gathered:
    """Members of a pool and all that goes with them; what is wrong is gathered in `found`, not raised.

    Attributes:
        members: Member (None is the base, the first where there is one) -> merged tensors, under the base's names.
        whole: The same before tensors were chosen among them.
        originals: The members as they were named, before vocabularies and layers were changed.
        first: The member that names, configuration and files are taken from: the base, or the first expert.
        configs: Member -> its config.json.
        heads: Member -> the head of its classifier.
        around: Tensors that are written as they are.
        dropped: Member (`base`, or the expert's name) -> names on disk that are in no merged model.
        copies: Files to copy beside the weights.
        texts: Files to write beside the weights: name -> content.
        changes: What of the first member's config.json changes.
        notes: What is worth knowing, a line each.
    """

    def __init__(self, places: Mapping[str | None, Place], choices: Choices, classifiers: bool) -> None:
        """Go through the steps.

        Args:
            places: Member -> where it is, and what the user calls it; the base first.
            choices: What the user chose.
            classifiers: The members are classifiers: heads are set aside.

        Raises:
            CheckpointError: All files that cannot be opened, a line each.
        """
        self.places, self.choices = dict(places), choices
        self.found: list[str] = []
        self.notes: list[str] = []
        self.heads: dict[str | None, Tensors] = {}
        self.dropped: dict[str, tuple[str, ...]] = {}
        self.copies: tuple[Path, ...] = ()
        self.texts: dict[str, str] = {}
        self.changes: dict[str, Any] = {}
        self._refused: set[str | None] = set()  # members of which nothing more need be said
        self._vocabularies_told = self._mixed = False
        kept = self._accounted(classifiers)
        self._gone = {name: list(one.dropped) for name, one in kept.items()}
        self.members = self.originals = {name: one.tensors for name, one in kept.items()}
        self._unify()
        self._restack()
        routers = self._mix()
        self.whole = self.members
        self.around = Picked(self._rest() | self._head() | routers, "what is not merged")
        self.dropped = {name or "base": tuple(dict.fromkeys(gone)) for name, gone in self._gone.items() if gone}
        self.copies = (*self.copies, *self._files())

    @property
    def base(self) -> Tensors | None:
        """The base's merged tensors."""
        return self.members.get(None)

    @property
    def experts(self) -> dict[str, Tensors]:
        """The experts' merged tensors."""
        return {name: one for name, one in self.members.items() if name is not None}

    def faults(self) -> list[str]:
        """All that was found, and how names, shapes and dtypes differ."""
        if self.first in self._refused:
            return list(self.found)
        sound = {name: one for name, one in self.experts.items() if name not in self._refused}
        lines = header_faults(self.base, sound)
        return self.found + [
            line for line in lines if not (self._vocabularies_told and " has a vocabulary of " in line)
        ]

    def all_notes(self) -> list[str]:
        """Notes, and what is to be said of dtypes."""
        return self.notes + dtype_notes({whose(n): one for n, one in self.members.items() if n not in self._refused})

    def config(self) -> dict[str, Any]:
        """The merged model's configuration."""
        config = {key: value for key, value in self.configs[self.first].items() if key != "_name_or_path"}
        owner = next(iter(self.heads), self.first)
        config |= {key: value for key, value in self.configs[owner].items() if key in _LABELS}
        config |= self.changes
        if not self._mixed:
            return config
        from pools.moe import DEFAULTS
        from pools.moe_targets import config_of_mixture

        wanted = DEFAULTS | dict(self.choices.mixture or {})
        return config_of_mixture(config, len(wanted["experts"]), wanted["top_k"])

    def _accounted(self, classifiers: bool) -> dict[str | None, Kept]:
        """All members under the base's names, without what is no weight of theirs; heads of classifiers set aside."""
        adapters = {name: place for name, place in self.places.items() if name is not None and _is_adapter(place[0])}
        full = {name: place for name, place in self.places.items() if name not in adapters}
        if adapters and None not in full:
            told = ", ".join(f"expert {name}" for name in adapters)
            raise CheckpointError(
                f"{told}: a LoRA adapter is an expert of a base, and the pool has none; pool.base=PATH"
            )
        raw = open_members(full, _open_full)
        self.first = next(iter(raw))
        self.configs = {name: self._read_config(name) for name in raw}
        kept = {name: keep_own(tensors, self.configs[name]) for name, tensors in raw.items()}
        for name, one in kept.items():
            specs, source = specs_of(one.tensors), self.places[name][1]
            own = member_faults(source, self.configs[name], specs, self.choices.trust_remote_code)
            self.found += [f"{whose(name)}: {line}" for line in own]
            self._refused |= {name} if own else set()
        self._compare_configs()
        reference = kept[self.first]
        kept = {name: one if name == self.first else fit(one, reference) for name, one in kept.items()}
        if adapters:
            kept |= self._adapted(adapters, kept[None].tensors)
        kept = {name: kept[name] for name in self.places}
        if classifiers:
            kept, self.heads = set_heads_aside(kept)
            brought = _own_heads(kept, self.heads)
            if brought and not self.heads:  # the base's configuration knows nothing of them
                self.changes |= _labels(next(iter(brought.values())))
            self.heads |= brought
            if not self.heads:
                self.found.append("no member has the head of a classifier (score, classifier, classification_head)")
        self.notes += [note for one in kept.values() for note in one.notes]
        return kept

    def _adapted(self, adapters: Mapping[str, Place], base: Tensors) -> dict[str | None, Kept]:
        """LoRA adapters as experts of the base."""
        from pools.adapters import LoraExpert

        opened = open_members(adapters, lambda path, source: LoraExpert(path, source, base))  # type: ignore[arg-type]
        self.configs |= dict.fromkeys(adapters, self.configs[None])
        return {name: Kept(tensors) for name, tensors in opened.items()}

    def _unify(self) -> None:
        """Bring the vocabularies together as it was chosen."""
        from pools.vocabulary import unify

        if self._refused:
            return
        chosen = self.choices
        try:
            unified = unify(
                self.base,  # type: ignore[arg-type]
                self.experts,  # type: ignore[arg-type]
                {name: _directory(path) for name, (path, _) in self.places.items()},
                chosen.tokenizer,
                chosen.new_tokens,
                chosen.tokens,
                chosen.chat_template,
                self.configs,
            )
        except CheckpointError as error:
            self._vocabularies_told = True
            self.found += str(error).splitlines()
            return
        self.members = members_of(unified.base, unified.experts)  # type: ignore[arg-type]
        self.notes += unified.notes
        self.copies, self.texts = tuple(unified.copies), dict(unified.texts)
        self.changes |= unified.config_changes

    def _restack(self) -> None:
        """Stack layers anew where slices say so."""
        if self.choices.slices is None:
            return
        from pools.views import layer_config_changes

        try:
            self.members, origins = stack(self.members, self.choices.slices, self._gone)
            if None not in self.places:
                self.first = origins[0][0]
            config = self.configs[self.first] | self.changes
            self.changes |= layer_config_changes(config, [layer for _, layer in origins])
        except CheckpointError as error:
            self.found += str(error).splitlines()

    def _mix(self) -> Parts:
        """Put models side by side where a mixture is asked for; returns its routers."""
        if self.choices.mixture is None or self.found:
            return {}
        from pools.moe import mix
        from pools.thinned import thin

        config = self.configs[self.first] | self.changes
        try:
            if "kept" in self.choices.mixture:
                self.members, changes = thin(self.members, config, self.choices.mixture["kept"], self._gone)
                self.changes |= changes
                return {}
            self.members, routers = mix(self.members, config, self.choices.mixture, self._gone)
        except CheckpointError as error:
            self.found += str(error).splitlines()
            return {}
        self._mixed = True
        return routers

    def _rest(self) -> Parts:
        """Leave in the members what is merged; returns the rest."""
        if not self.choices.selects:
            return {}
        try:
            self.members, rest = choose(self.members, self.choices.merge, self.choices.rest, self._gone)
        except CheckpointError as error:
            self.found += str(error).splitlines()
            return {}
        return rest

    def _head(self) -> Parts:
        """The merged classifier's head: that of the first member that has one."""
        owner = next(iter(self.heads), None)
        for member, head in self.heads.items():
            self._gone[member] += [] if member == owner else list(head)
        return {name: (self.heads[owner], name) for name in self.heads[owner]} if self.heads else {}

    def _read_config(self, member: str | None) -> dict[str, Any]:
        """A member's config.json; nothing where there is none."""
        directory = _directory(self.places[member][0])
        try:
            config = read_config(directory)
        except CheckpointError as error:
            self.found.append(f"{whose(member)}: {error}")
            return {}
        if config is None and member == self.first:
            self.found.append(
                f"{whose(member)}: {directory / CONFIG}, which says what the model is built like, is missing"
            )
        return config or {}

    def _compare_configs(self) -> None:
        """Gather how the configurations differ."""
        reference = self.configs[self.first]
        called = "the base" if self.first is None else whose(self.first)
        for name, config in self.configs.items():
            if name != self.first and config and reference:
                sliced = self.choices.slices is not None
                faults, notes = config_faults(whose(name), config, reference, called, sliced)
                self.found += faults
                self.notes += notes

    def _files(self) -> list[Path]:
        """Files that are copied beside configuration and tokenizer."""
        directory = _directory(self.places[self.first][0])
        found = [directory / name for name in _COPIED if (directory / name).is_file()]
        return found + (sorted(directory.glob("*.py")) if self.choices.trust_remote_code else [])


def _open_full(path: Path, source: str) -> Tensors:
    refuse_gguf(path)
    return Checkpoint(path, source)


def _is_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter."""
    if not (path / "adapter_config.json").is_file():
        return False
    from pools.adapters import is_adapter

    return is_adapter(path)


def _own_heads(kept: Mapping[str | None, Kept], known: Mapping[str | None, Tensors]) -> dict[str | None, Tensors]:
    """Heads that adapters bring where the base has none."""
    owned = {name: one.tensors for name, one in kept.items() if name not in known and getattr(one.tensors, "own", None)}
    return {
        name: Picked({told: (one.weights, key) for told, key in one.own.items()}, one.source)  # type: ignore[attr-defined]
        for name, one in owned.items()
    }


def _labels(head: Tensors) -> dict[str, Any]:
    """Of a head that no configuration describes: as many classes as the last of its matrices has rows."""
    n = [spec.shape[0] for spec in specs_of(head).values() if len(spec.shape) == 2][-1]
    names = [f"LABEL_{index}" for index in range(n)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent
