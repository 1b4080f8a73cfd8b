"""What there is to choose from, as tables: methods, pools, tasks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import ConfigError, UserError, closest

if TYPE_CHECKING:
    from methods.kinds import Row, Veneer
    from methods.parameters import Range

Lines = list[tuple[str, ...]]

_YOURS = "an_expert_of_yours"


def methods() -> tuple[tuple[str, ...], dict[str, Lines]]:
    """Every method by family with its kind, needs and paper, and what it does; the veneers last."""
    from harness.method_pages import about, families
    from methods.kinds import Row

    groups: dict[str, Lines] = {}
    for family, members in families():
        groups[family] = []
        for member in members:
            kind, needs = (member.kind.value, member.needs()) if isinstance(member, Row) else ("veneer", "a rule")
            groups[family].append((member.name, kind, needs, member.paper, about(member).summary))
    return ("name", "kind", "needs", "paper", "what it does"), groups


def method_page(name: str) -> str:
    """All of one method: formula, source, parameters, needs, cost.

    Raises:
        UserError: There is no such method or veneer.
    """
    from harness.method_pages import entry, figures
    from methods.catalogue import CATALOGUE, VENEERS

    known: dict[str, Row | Veneer] = {**CATALOGUE, **VENEERS}
    if name not in known:
        raise UserError(f"no method is called {name!r}; {closest(name, known)}")
    return entry(known[name], figures().get(name))


def in_words(span: Range | None) -> str:
    """Where a study searches a parameter; nothing where it does not.

    >>> from methods.parameters import Range
    >>> in_words(Range(0.1, 10.0, log=True))
    'in [0.1, 10.0], logarithmic'
    """
    if span is None:
        return ""
    if span.choices:
        return "among " + ", ".join(map(str, span.choices))
    return (
        f"in [{span.low}, {span.high}]"
        + (", logarithmic" if span.log else "")
        + (f", step {span.step}" if span.step else "")
    )


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


def print_groups(head: tuple[str, ...], groups: Mapping[str, Lines]) -> None:
    """Print one table in parts, each under its name."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for name, rows in groups.items():
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
            for row in rows:
                table.add_row(*row)
        Console().print(table)
        return
    columns = zip(head, *(row for rows in groups.values() for row in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    for name, rows in {"": [head], **groups}.items():
        if name:
            print(f"\n{name}")
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
