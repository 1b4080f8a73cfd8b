"""Texts and questions of the embedded language suite, and the parquet files that `datasets` reads.

Two tasks of plain text, both of the running Python: its own source code (`code`) and its language reference (`docs`).
Three of questions with one right answer: `sorting`, `reversal` and `roman`. No module, topic, string or number is in
two splits.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.random import Generator

PASSAGE = 320  # most characters of a row of text
LONG = 20_000  # a topic or module with more characters is for training only
SHARE = 15  # most rows that one topic or module gives to validation or test

OWN_TERMS = re.compile("copyright|licen[cs]e", re.IGNORECASE)  # a module that says so may have terms of its own
TABLES = {"_sysconfigdata", "stringprep", "keyword", "opcode"}  # mostly tables

NUMERALS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),
    (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip

Question = tuple[str, str]  # prompt, target
Row = str | Question


@dataclass(frozen=True)
class Sizes:
    """Rows of each split, at most: a task has what its material gives."""

    train: int
    validation: int
    test: int


TEXTS = {"code": Sizes(2500, 200, 300), "docs": Sizes(1000, 150, 200)}
QUESTIONS = {name: Sizes(3000, 200, 300) for name in ("sorting", "reversal", "roman")}
TASKS = (*TEXTS, *QUESTIONS)


def modules() -> dict[str, str]:
    """Source of the standard library's plain modules, by name; without those that name a licence or an owner."""
    library = Path(sysconfig.get_path("stdlib"))
    read = {path.stem: path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))}
    return {
        name: text
        for name, text in read.items()
        if not OWN_TERMS.search(text) and not any(name.startswith(table) for table in TABLES)
    }


def topics() -> dict[str, str]:
    """The language reference as `help()` shows it, by topic; a paragraph that stands in several is in the first."""
    seen: set[str] = set()
    found = {}
    for name, text in sorted(import_module("pydoc_data.topics").topics.items()):
        fresh = [part for part in text.split("\n\n") if part.strip() and part not in seen]
        seen.update(fresh)
        found[name] = "\n\n".join(fresh)
    return found


def passages(text: str) -> list[str]:
    """Cut a text at line ends into rows of at most `PASSAGE` characters; longer lines and empty rows are left out.

    >>> [len(row) for row in passages("x" * 299 + chr(10) + "y" * 150 + chr(10))]
    [300, 151]
    """
    rows, row = list[str](), ""
    for line in text.splitlines(keepends=True):
        if len(row) + len(line) > PASSAGE:
            rows, row = [*rows, row], ""
        row += line if len(line) <= PASSAGE else ""
    return [row for row in [*rows, row] if row.strip()]


def _texts(sources: dict[str, str], sizes: Sizes, rng: Generator) -> dict[str, list[str]]:
    """Deal whole sources, in a random order: first to test, then to validation, the rest to train."""
    dealt: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in rng.permutation(sorted(sources)):
        rows = passages(sources[name])
        open_to = [part for part in ("test", "validation") if len(dealt[part]) < getattr(sizes, part)]
        if open_to and len(sources[name]) <= LONG:
            dealt[open_to[0]] += [rows[k] for k in sorted(rng.permutation(len(rows))[:SHARE])]
        else:
            dealt["train"] += rows
    taken = {row for part in ("test", "validation") for row in dealt[part]}
    dealt["train"] = [row for row in dealt["train"] if row not in taken]
    chosen = {part: sorted(rng.permutation(len(rows))[: getattr(sizes, part)]) for part, rows in dealt.items()}
    return {part: [rows[k] for k in chosen[part]] for part, rows in dealt.items()}


def _words(rng: Generator) -> Iterator[str]:
    """Strings of 3 to 7 capitals, each once."""
    seen: set[str] = set()
    while True:
        word = "".join(map(chr, 65 + rng.integers(0, 26, rng.integers(3, 8))))
        if word not in seen:
            seen.add(word)
            yield word


def _sortings(rng: Generator) -> Iterator[Question]:
    """A string's letters in the order of the alphabet."""
    return ((f"sort({word})=", "".join(sorted(word))) for word in _words(rng))


def _reversals(rng: Generator) -> Iterator[Question]:
    """A string backwards."""
    return ((f"reverse({word})=", word[::-1]) for word in _words(rng))


def _romans(rng: Generator) -> Iterator[Question]:
    """Every number from 1 to 3999 once."""
    for number in rng.permutation(3999) + 1:
        yield f"roman({number})=", roman(int(number))


def roman(number: int) -> str:
    """Write a number from 1 to 3999 in Roman numerals.

    >>> roman(1987)
    'MCMLXXXVII'
    """
    written = ""
    for value, letters in NUMERALS:
        written += letters * (number // value)
        number %= value
    return written


ASKED: dict[str, Callable[[Generator], Iterator[Question]]] = {
    "sorting": _sortings,
    "reversal": _reversals,
    "roman": _romans,
}


def splits(name: str, seed: int) -> dict[str, list]:
    """Make all rows of a task: split -> texts, or pairs of prompt and target."""
    rng = np.random.default_rng([seed, TASKS.index(name)])
    if name in TEXTS:
        return _texts(modules() if name == "code" else topics(), TEXTS[name], rng)
    sizes, questions = QUESTIONS[name], ASKED[name](rng)
    return {part: [next(questions) for _ in range(getattr(sizes, part))] for part in ("test", "validation", "train")}


def write_texts(out: Path, seed: int) -> dict[str, dict[str, list]]:
    """Write every split of every task into `out/<task>/<split>.parquet`, and the notes on licences.

    Columns are `text`, or `prompt` and `target`. Returns what was written: task -> split -> rows.
    """
    made = {name: splits(name, seed) for name in TASKS}
    for name, parts in made.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, rows in parts.items():
            Dataset.from_dict(_columns(rows)).to_parquet(out / name / f"{part}.parquet")
    licence = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8")
    (out / "PYTHON-LICENSE.txt").write_text(licence, encoding="utf-8")
    (out / "LICENSES.md").write_text(NOTES.format(version=sys.version.split()[0], most=PASSAGE), encoding="utf-8")
    return made


def _columns(rows: Sequence[Row]) -> dict[str, list]:
    if isinstance(rows[0], str):
        return {"text": list(rows)}
    prompts, targets = zip(*rows, strict=True)
    return {"prompt": list(prompts), "target": list(targets)}


NOTES = """\
# Licences of the texts

- `code`: passages of modules of Python {version}'s standard library; `docs`: passages of its language reference, as
  `pydoc_data/topics.py` holds it. Both under the licence of Python, which is `PYTHON-LICENSE.txt` here, with its notice
  of copyright (Python Software Foundation; All Rights Reserved). Modules whose text speaks of a copyright or a licence
  were left out. Changes: the texts were cut at line ends into passages of at most {most} characters, and some passages
  were left out.
- `sorting`, `reversal`, `roman`: made by `tasks/mini_lm_text.py`, under the licence of this repository.
"""
