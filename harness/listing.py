"""What there is to choose from, as tables: methods, pools, tasks."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from harness.config import ROOT, ConfigError

Lines = list[tuple[str, ...]]

_YOURS = "an_expert_of_yours"


def methods() -> tuple[tuple[str, ...], Lines]:
    """Every method with its kind, needs and paper, and what it does."""
    from methods.catalogue import CATALOGUE

    rows: Lines = []
    for row in CATALOGUE.values():
        path = ROOT.joinpath(*row.function.partition(":")[0].split(".")).with_suffix(".py")
        rows.append((row.name, row.kind.value, row.needs(), row.paper, _summary(path)))
    return ("name", "kind", "needs", "paper", "what it does"), rows


def _summary(path: Path) -> str:
    """The first line of a module's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def choices_of(what: str, config_dir: Path | None) -> tuple[tuple[str, ...], Lines]:
    """Pools or tasks, counted by composing each."""
    from harness.compose import choices, compose

    group = "pool" if what == "pools" else "tasks"
    extra = [f"+pool.experts.{_YOURS}=PATH"] if group == "pool" else []  # some pools are to be filled by the user
    rows: Lines = []
    for name, path in sorted(choices(group, config_dir=config_dir).items()):
        about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        try:
            config = compose([f"{group}={name}", "method=simple_average", *extra], config_dir=config_dir)
        except ConfigError as error:
            rows.append((name, "-", "-", f"faulty: {error.faults[0].splitlines()[0]}"))
            continue
        members = [name for name in (config.pool.experts if group == "pool" else config.tasks.tasks) if name != _YOURS]
        rows.append((name, str(len(members)), ", ".join(members), about))
    return ("name", "experts" if group == "pool" else "tasks", "names", "what it is"), rows


def print_table(head: tuple[str, ...], rows: Lines) -> None:
    """Print a table: drawn and fitted to a terminal, aligned plain lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
