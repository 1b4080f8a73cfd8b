"""What the tokenizer files of a model directory say: tokens and their ids, merges, special tokens, the chat template.

Read as the plain JSON and text that they are, without a tokenizer library; sentencepiece's `.model` files are not read.
"""

from __future__ import annotations

import filecmp
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pools.headers import CheckpointError

FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
JINJA = "chat_template.jinja"
JINJA_JSON = "chat_template.json"  # as processors once wrote it
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Where the vocabulary stands: the first of these whose first file is there, all that are there of it.
_VOCABULARIES = (
    (FAST,),
    ("vocab.json", "merges.txt", "added_tokens.json"),
    ("vocab.txt", "added_tokens.json"),
    *((name, "added_tokens.json") for name in SENTENCEPIECE),
)
TEMPLATES = (JINJA, JINJA_JSON)
ALL = tuple(dict.fromkeys([name for group in _VOCABULARIES for name in group] + [CONFIG, SPECIAL, *TEMPLATES]))
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of one tokenizer.

    Attributes:
        kind: BPE, WordPiece, Unigram or WordLevel.
        ids: Token -> id, added tokens included.
        merges: Pairs in the order of their ranks; only BPE has them.
        added: Added token -> how it is matched, in the fields of tokenizer.json but for its id.
    """

    kind: str
    ids: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TokenizerFiles:
    """A directory's tokenizer files; each is read when it is asked for, once."""

    directory: Path

    @classmethod
    def find(cls, directory: Path | None) -> TokenizerFiles | None:
        """The files of a directory; None where it has no vocabulary, or there is no directory."""
        if directory is None or not Path(directory).is_dir():
            return None
        files = cls(Path(directory))
        return files if files.vocabulary_files else None

    @cached_property
    def vocabulary_files(self) -> tuple[Path, ...]:
        """The files that tokens, ids and merges come from."""
        for group in _VOCABULARIES:
            if (self.directory / group[0]).is_file():
                return tuple(self.directory / name for name in group if (self.directory / name).is_file())
        return ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All tokenizer files that are there."""
        return tuple(self.directory / name for name in ALL if (self.directory / name).is_file())

    @property
    def fast(self) -> bool:
        """Whether there is a tokenizer.json."""
        return self.vocabulary_files[0].name == FAST

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json; empty where there is none."""
        return _json_object(self.directory / CONFIG)

    @cached_property
    def roles(self) -> dict[str, str]:
        """Special token's role (`eos_token`) -> the token."""
        said = _json_object(self.directory / SPECIAL) | self.config
        found = {role: _content(said.get(role)) for role in ROLES}
        return {role: token for role, token in found.items() if token is not None}

    @cached_property
    def template(self) -> Any:
        """The chat template: Jinja text, a list of named ones as older versions have it, or None."""
        if (self.directory / JINJA).is_file():
            return (self.directory / JINJA).read_text(encoding="utf-8")
        beside = _json_object(self.directory / JINJA_JSON).get("chat_template")
        return beside if beside is not None else self.config.get("chat_template")

    @cached_property
    def document(self) -> dict[str, Any]:
        """The tokenizer in the form of tokenizer.json; other forms are converted by transformers.

        Raises:
            CheckpointError: A file cannot be read, or transformers cannot convert the tokenizer.
        """
        if self.fast:
            return _json_object(self.directory / FAST)
        return _convert(self.directory)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Tokens, ids and merges.

        Raises:
            CheckpointError: A file cannot be read, or the only one is sentencepiece's.
        """
        first = self.vocabulary_files[0]
        if first.name in SENTENCEPIECE:
            raise CheckpointError(
                f"{first} is a sentencepiece file, which is not read; write a tokenizer.json beside it: "
                f"transformers.AutoTokenizer.from_pretrained({str(self.directory)!r}).save_pretrained(...)"
            )
        try:
            found = of_document(self.document) if self.fast else self._plain()
            known = self.config.get("added_tokens_decoder", {})
            later = {spec["content"]: (int(at), spec) for at, spec in known.items() if spec["content"] not in found.ids}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{first} is no tokenizer that can be read: {error!r}") from error
        ids = found.ids | {token: at for token, (at, _) in later.items()}
        added = found.added | {token: spec for token, (_, spec) in later.items()}
        return Vocabulary(found.kind, ids, found.merges, added)

    def same_as(self, other: TokenizerFiles) -> bool:
        """Whether the vocabularies are the same to the byte, found without parsing them."""
        mine, theirs = self.vocabulary_files, other.vocabulary_files
        if [file.name for file in mine] != [file.name for file in theirs]:
            return False
        if self.config.get("added_tokens_decoder") != other.config.get("added_tokens_decoder"):
            return False
        return all(filecmp.cmp(one, two, shallow=False) for one, two in zip(mine, theirs, strict=True))

    def _plain(self) -> Vocabulary:
        """The vocabulary of vocab.json with merges.txt, or of vocab.txt."""
        first = self.vocabulary_files[0]
        added = {token: int(at) for token, at in _json_object(self.directory / "added_tokens.json").items()}
        specs = {token: added_token(token) for token in added}
        if first.name == "vocab.txt":
            lines = first.read_text(encoding="utf-8").splitlines()
            return Vocabulary("WordPiece", {token: at for at, token in enumerate(lines)} | added, [], specs)
        ids = {token: int(at) for token, at in _json_object(first).items()} | added
        file = self.directory / "merges.txt"
        if not file.is_file():
            return Vocabulary("WordLevel", ids, [], specs)
        lines = file.read_text(encoding="utf-8").split("\n")
        return Vocabulary("BPE", ids, [_pair(line) for line in lines if line and line[:9] != "#version:"], specs)


def of_document(document: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    >>> model = {"type": "WordLevel", "vocab": {"a": 0}}
    >>> of_document({"model": model, "added_tokens": [{"content": "<x>", "id": 1}]}).ids
    {'a': 0, '<x>': 1}
    """
    model = document["model"]
    held = model["vocab"]
    ids = dict(held) if isinstance(held, dict) else {piece[0]: at for at, piece in enumerate(held)}
    added = {spec["content"]: spec for spec in document.get("added_tokens") or ()}
    ids |= {token: int(spec["id"]) for token, spec in added.items()}
    merges = [_pair(merge) for merge in model.get("merges") or ()]
    kind = model.get("type") or ("Unigram" if isinstance(held, list) else "BPE" if merges else "WordPiece")
    specs = {token: {key: value for key, value in spec.items() if key != "id"} for token, spec in added.items()}
    return Vocabulary(kind, ids, merges, specs)


def added_token(content: str, special: bool = False, single_word: bool = False) -> dict[str, Any]:
    """An added token's fields in tokenizer.json but for its id: matched as it is spelled."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"content": content, "single_word": single_word, **plain}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _content(token: Any) -> str | None:
    """A special token as it stands in a configuration: its text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found


def _convert(directory: Path) -> dict[str, Any]:
    """A tokenizer of another form as tokenizer.json would hold it."""
    from transformers import AutoTokenizer  # seconds to import; most tokenizers are read without it

    advice = f"write a tokenizer.json into {directory} (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load the tokenizer of {directory}; {advice}: {error}") from error
    if not loaded.is_fast:
        raise CheckpointError(f"the tokenizer of {directory} has no fast form; {advice}")
    found: dict[str, Any] = json.loads(loaded.backend_tokenizer.to_str())
    return found
