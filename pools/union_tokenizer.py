"""The tokenizer that knows the tokens of several: written as a tokenizer.json that has every token at its id.

Tokens that a member has as added tokens are added tokens. Ordinary ones join the model where the other tokenizer is of
the same kind and spells alike (byte level, sentencepiece's underscore): WordPiece's and WordLevel's vocabulary,
Unigram's pieces with their scores, BPE's vocabulary and merges, the base's first. What BPE cannot reach so, since
an earlier merge takes its parts, and all tokens of another kind become added tokens that match whole words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pools.headers import CheckpointError
from pools.tokenizer_files import CONFIG, FAST, SPECIAL, TokenizerFiles, added_token, of_document

_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is; the classes of architectures rebuild parts of it
_LEFT_OUT = ("auto_map", "tokenizer_file", "vocab_file", "merges_file", "name_or_path", "sp_model_kwargs")


def union_texts(
    reference: TokenizerFiles, others: Mapping[str, TokenizerFiles], ids: Mapping[str, int]
) -> tuple[dict[str, str], list[str]]:
    """The files of the union tokenizer, and what is to be said about it.

    Args:
        reference: Whose rules, special tokens and ids stay as they are.
        others: Member -> its tokenizer.
        ids: Token -> id, of all tokens.

    Returns:
        File name -> content; notes.

    Raises:
        CheckpointError: A tokenizer cannot be converted, or the base's kind cannot hold the ids.
    """
    document = reference.document
    documents = {member: files.document for member, files in sorted(others.items())}
    new = [token for token in ids if token not in reference.vocabulary.ids]
    added = reference.vocabulary.added | _added(others, new)
    alike = {member: found for member, found in documents.items() if _spelling(found) == _spelling(document)}
    native = {token for found in alike.values() for token in of_document(found).ids}.difference(added)
    model = _extended(document["model"], alike, ids)
    if model["type"] == "BPE":
        native -= _unreachable(document | {"model": model, "added_tokens": []}, native.intersection(new))
    plain = [token for token in new if token not in native and token not in added]
    added |= {token: added_token(token, single_word=True) for token in plain}
    specs = [{"id": ids[token], **spec} for token, spec in sorted(added.items(), key=lambda item: ids[item[0]])]
    full = document | {"model": model, "added_tokens": specs, "truncation": None, "padding": None}
    texts = {FAST: json.dumps(full, ensure_ascii=False), CONFIG: _config(reference, document, specs)}
    if reference.roles:
        texts[SPECIAL] = json.dumps(reference.roles, ensure_ascii=False, indent=2) + "\n"
    return texts, _notes(plain, alike, documents)


def _added(others: Mapping[str, TokenizerFiles], new: list[str]) -> dict[str, dict[str, Any]]:
    """New tokens that a member has as added ones, in the fields of the first by name."""
    found: dict[str, dict[str, Any]] = {}
    for _, files in sorted(others.items()):
        found = files.vocabulary.added | found
    return {token: added_token(token) | found[token] for token in new if token in found}


def _spelling(document: dict[str, Any]) -> tuple[Any, ...]:
    """What two tokenizers must have in common for a token of one to mean the same text in the other."""
    model = document["model"]
    steps = json.dumps([document.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    marks = ("continuing_subword_prefix", "end_of_word_suffix")
    kind = of_document({"model": model}).kind
    return kind, *(model.get(mark) or "" for mark in marks), "ByteLevel" in steps, "▁" in steps


def _extended(model: dict[str, Any], alike: Mapping[str, dict[str, Any]], ids: Mapping[str, int]) -> dict[str, Any]:
    """The reference's model with every token at its id, and the merges or scores of those who spell alike."""
    kind = of_document({"model": model}).kind
    if kind == "Unigram":
        return model | {"type": kind, "vocab": _pieces(model["vocab"], alike, ids)}
    extended = model | {"type": kind, "vocab": dict(sorted(ids.items(), key=lambda item: item[1]))}
    if kind == "BPE":
        extended["merges"] = _merges(model, alike)
    return extended


def _merges(model: dict[str, Any], alike: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """The reference's merges, then the others' in the order of their lowest ranks.

    In every member a merge stands behind those that make its parts; with the lowest ranks it still does.
    """
    own = of_document({"model": model}).merges
    ranks: dict[tuple[str, str], int] = {}
    for document in alike.values():
        for rank, merge in enumerate(of_document(document).merges):
            ranks[merge] = min(rank, ranks.get(merge, rank))
    for merge in own:
        ranks.pop(merge, None)
    return [list(merge) for merge in own + sorted(ranks, key=lambda merge: (ranks[merge], merge))]


def _pieces(
    own: list[list[Any]], alike: Mapping[str, dict[str, Any]], ids: Mapping[str, int]
) -> list[tuple[str, float]]:
    """Unigram's pieces: a list, in which the place is the id; new ones have their highest score among the members."""
    scores: dict[str, float] = {}
    for document in alike.values():
        for piece, score in document["model"]["vocab"]:
            scores[piece] = max(score, scores.get(piece, score))
    least = min(score for _, score in own)  # of added tokens, which the model never sees
    names = {at: token for token, at in ids.items()}
    holes = [at for at in range(len(own), len(names)) if at not in names]
    if holes:
        raise CheckpointError(
            f"the base's tokenizer has no token with id {holes[0]}, and a Unigram tokenizer cannot leave an id out; "
            "use tokenizer=base"
        )
    later = [(names[at], scores.get(names[at], least)) for at in range(len(own), len(names))]
    return [(piece, score) for piece, score in own] + later


def _unreachable(document: dict[str, Any], tokens: set[str]) -> set[str]:
    """Tokens that the merges do not lead to: an earlier merge takes a part away."""
    from tokenizers import Tokenizer  # only a union needs it

    model = Tokenizer.from_str(json.dumps(document, ensure_ascii=False)).model
    return {token for token in tokens if [found.value for found in model.tokenize(token)] != [token]}


def _config(reference: TokenizerFiles, document: dict[str, Any], specs: list[dict[str, Any]]) -> str:
    """The reference's tokenizer_config.json, so that tokenizer.json is loaded as it is."""
    config = {key: value for key, value in reference.config.items() if key not in _LEFT_OUT}
    config |= reference.roles | {"tokenizer_class": _CLASS}
    steps = json.dumps(document.get("post_processor"))
    pairs = "BertProcessing" in steps or '"type_id": 1' in steps
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    config.setdefault("model_input_names", inputs)
    if "added_tokens_decoder" in config:
        fields = [(str(spec["id"]), {key: spec[key] for key in spec if key != "id"}) for spec in specs]
        config["added_tokens_decoder"] = dict(fields)
    return json.dumps(config, ensure_ascii=False, indent=2) + "\n"


def _notes(plain: list[str], alike: Mapping[str, Any], documents: Mapping[str, Any]) -> list[str]:
    notes = [
        f"the tokenizer of {member} is of another kind than the base's or spells otherwise: its ordinary tokens match "
        "whole words only"
        for member in documents
        if member not in alike
    ]
    if plain:
        shown = ", ".join(map(repr, plain[:4]))
        notes.append(f"{len(plain)} tokens ({shown}) became added tokens: the base's rules do not lead to them")
    return notes
