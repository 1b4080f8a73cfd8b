"""The command line: `crucible run method=ties method.density=0.3`.

Everything heavy is imported by what needs it, so that help, listings and configuration errors answer at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import ROOT, UserError
from harness.listing import choices_of, in_words, method_page, methods, print_groups, print_table
from harness.usage import (
    ANALYSE,
    BENCHMARK,
    BUILD,
    EVALUATE,
    EXTRACT,
    FINETUNE,
    IMPORT,
    LIST,
    MERGE,
    OVERRIDES,
    RUN,
    SHOW,
    STUDY,
    TOP,
)

if TYPE_CHECKING:
    from harness.config import RunConfig
    from harness.run import Outcome


COMPOSED = ("run", "merge", "evaluate", "study", "benchmark", "show", "finetune", "analyse")  # that take overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0; 2 for what the user can put right; 130 or 143 when stopped."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads spin while they wait, and starve each other
    parser = _parser()
    given = parser.parse_args(_spelled(list(sys.argv[1:] if arguments is None else arguments)))
    try:
        given.command(given)
    except UserError as error:
        print(f"crucible: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # Ctrl-C, or SIGTERM as harness.track raises it
        print(f"crucible: stopped{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return 143 if str(stop) else 130
    except BrokenPipeError:  # the reader of a listing went away
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="crucible",
        description="Merge trained networks into one and score the result; every run is an MLflow run.",
        epilog=TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command, about: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command)
        return sub

    for name, command, about, examples in (
        ("run", _run, "merge a pool's experts and score the result on every task", RUN),
        ("merge", _merge, "merge checkpoints into a checkpoint, without evaluation or tracking", MERGE),
        ("evaluate", _evaluate, "score one model or one expert without merging", EVALUATE),
        ("study", _study, "search parameters with Optuna, each trial a run under the study's run", STUDY),
        ("benchmark", _benchmark, "search every method with the same budget, score each winner on test", BENCHMARK),
        ("show", _show, "print the resolved configuration, with the range each parameter is searched in", SHOW),
    ):
        sub = add(name, command, about, f"{OVERRIDES}\n{examples}")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
        start = sub.add_mutually_exclusive_group()
        start.add_argument("--from-run", metavar="ID", help="start from the configuration of an earlier MLflow run")
        start.add_argument("--from-config", type=Path, metavar="FILE", help="start from a run's config.yaml")
        sub.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="a directory like conf/ with choices of your own"
        )
    for name, command, about, examples in (
        ("finetune", _finetune, "train an expert of a pool's base on one task", FINETUNE),
        (
            "analyse",
            _analyse,
            "look at the experts of a pool: likeness, conflicts, spectra, loss between them",
            ANALYSE,
        ),
    ):
        sub = add(name, command, about, f"{OVERRIDES}\n{examples}")
        sub.set_defaults(from_run=None, from_config=None)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
        sub.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="a directory like conf/ with choices of your own"
        )
    sub = add("extract-lora", _extract_lora, "make a LoRA adapter of what fine-tuning has changed", EXTRACT)
    sub.add_argument("--base", required=True, metavar="MODEL", help="hub id, path or MLflow URI")
    sub.add_argument("--tuned", required=True, metavar="MODEL", help="the fine-tuned model")
    sub.add_argument("--output", required=True, type=Path, metavar="DIR", help="the adapter's directory")
    much = sub.add_mutually_exclusive_group(required=True)
    much.add_argument("--rank", type=int, help="of every matrix")
    much.add_argument("--energy", type=float, help="share of each matrix's squared norm to keep, in (0, 1]")
    sub.add_argument("--save-rest", action="store_true", help="keep what is no linear layer whole, in modules_to_save")
    sub = add("import-mergekit", _import_mergekit, "turn a mergekit recipe into a configuration", IMPORT)
    sub.add_argument("recipe", type=Path, help="the YAML file")
    sub.add_argument("--output", "-o", type=Path, metavar="FILE", help="write it here instead of printing it")
    sub = add("list", _list, "list what there is to choose from", LIST)
    sub.add_argument("what", choices=("methods", "pools", "tasks"))
    sub.add_argument("name", nargs="?", help="of one method: everything about it")
    sub.add_argument("--config-dir", type=Path, metavar="DIR", help="a directory like conf/ with choices of your own")
    sub = add("build-suite", _build_suite, "train the embedded suite again: base, experts and data", BUILD)
    sub.add_argument("--suite", choices=("mini_clip8", "mini_lm"), default="mini_clip8", help="default: mini_clip8")
    sub.add_argument("--output", type=Path, metavar="DIR", help="write DIR/pool and DIR/tasks (default: in place)")
    sub.add_argument("--seed", type=int, default=0, help="every random number follows from it (default: 0)")
    return parser


def _spelled(arguments: list[str]) -> list[str]:
    """MLflow's `--key value` and `--key=value` as `key=value`, options ahead of overrides.

    >>> _spelled(["run", "method=ties", "--method.density", "0.3", "--seed=1", "--from-run", "ab"])
    ['run', '--from-run', 'ab', 'method=ties', 'method.density=0.3', 'seed=1']
    """
    if not arguments or arguments[0] not in COMPOSED:
        return arguments
    options, overrides = arguments[:1], list[str]()
    rest = iter(arguments[1:])
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help") or not argument.startswith("-"):
            (options if argument.startswith("-") else overrides).append(argument)
        elif key in ("from-run", "from-config", "config-dir"):
            options += [argument] if equals else [argument, *_next(rest)]
        elif argument.startswith("--") and key:
            overrides.append(f"{key}={value}" if equals else "=".join([key, *_next(rest)]))
        else:
            options.append(argument)
    return [*options, *overrides]


def _next(rest) -> list[str]:
    value = next(rest, None)
    return [] if value is None else [value]


def _composed(given: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    from harness.compose import compose, from_yaml

    if given.from_config is not None:
        return from_yaml(_text(given.from_config), overrides, config_dir=given.config_dir)
    if given.from_run is None:
        return compose(overrides, config_dir=given.config_dir)
    from harness.track import config_of

    return from_yaml(config_of(given.from_run), overrides, config_dir=given.config_dir)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _run(given: argparse.Namespace) -> None:
    config = _composed(given, given.overrides)
    if config.model is not None:
        raise UserError(f"model={config.model}: a written model is scored with `crucible evaluate`, `run` would merge")
    if config.dry_run:
        _merge(given)
        return
    from harness.run import run

    _tell(run(config))


def _merge(given: argparse.Namespace) -> None:
    config = _composed(given, given.overrides)
    if config.model is not None:
        raise UserError(f"model={config.model}: a written model is scored with `crucible evaluate`")
    from harness.direct import look, merge_only
    from harness.track import termination_raises

    if config.dry_run:
        found = look(config)
        print_table(*found.table())
        print_table(("", ""), [*found.summary()])
        return
    with termination_raises():
        print_table(("", ""), [*merge_only(config)])
    print(f"the merged {config.output_kind} is in {config.output}")


def _study(given: argparse.Namespace) -> None:
    print_table(("", ""), _studied(given, given.overrides))


def _studied(given: argparse.Namespace, overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Run a study; returns what it came to, in words."""
    import importlib

    study = importlib.import_module("studies.command")  # the one place where harness calls studies
    return study.main(overrides, lambda overrides: _composed(given, overrides), given.config_dir)


def _benchmark(given: argparse.Namespace) -> None:
    from harness.benchmark import benchmark

    compose = functools.partial(_composed, given)
    print_table(("", ""), [*benchmark(given.overrides, compose, functools.partial(_studied, given))])


def _finetune(given: argparse.Namespace) -> None:
    from harness.compose_section import section, split_section
    from harness.finetune_settings import SECTION, FinetuneSettings

    own, others = split_section(given.overrides, SECTION, FinetuneSettings)
    config = _composed(given, ["method=base", "evaluation.split=validation", *others])
    settings = section(FinetuneSettings, SECTION, own, config_dir=given.config_dir)
    from harness.finetune import finetune

    if told := finetune(config, settings).told():  # nothing, in processes that do not record
        print_table(("", ""), [*told])


def _analyse(given: argparse.Namespace) -> None:
    from harness.analysis_settings import SECTION, AnalysisSettings
    from harness.compose_section import section, split_section

    own, others = split_section(given.overrides, SECTION, AnalysisSettings)
    config = _composed(given, ["evaluation.split=validation", *others])
    settings = section(AnalysisSettings, SECTION, own, config_dir=given.config_dir)
    from harness.analyse import analyse

    print_table(("", ""), [*analyse(config, settings)])


def _extract_lora(given: argparse.Namespace) -> None:
    from harness.direct import refusals
    from harness.extraction import extract_lora

    with refusals():
        facts = extract_lora(given.base, given.tuned, given.output, given.rank, given.energy, given.save_rest)
    print(json.dumps(facts, indent=2))


def _import_mergekit(given: argparse.Namespace) -> None:
    from harness.import_mergekit import import_config

    imported = import_config(_text(given.recipe))
    for note in imported.notes:
        print(f"crucible: {note}", file=sys.stderr)
    if given.output is None:
        print(imported.yaml, end="")
    else:
        given.output.write_text(imported.yaml, encoding="utf-8")
        print(f"{given.output} is written; run it with `crucible merge experiment={given.output} output=DIR`")


def _evaluate(given: argparse.Namespace) -> None:
    config = _composed(given, _evaluated(given.overrides, fresh=given.from_run is None and given.from_config is None))
    if config.method_name not in ("base", "expert"):
        raise UserError(
            f"method={config.method_name}: `crucible evaluate` merges nothing; merge with `crucible run`,"
            " or name what to score with expert=NAME or model=PATH"
        )
    from harness.run import run, score_model

    _tell(score_model(config) if config.model is not None else run(config))


def _tell(outcome: Outcome) -> None:
    """What a run came to, for the terminal; rank zero alone has a run to tell of."""
    if outcome.run_id is None:
        return
    from harness import report

    if outcome.scores:
        print_table(*report.summary(outcome.scores, outcome.references.experts, outcome.references.base))
    print(f"run {outcome.run_id}" + (f", model {outcome.model_uri}" if outcome.model_uri else ""))
    print("look at it with `mlflow ui`, repeat it with `crucible run --from-run " + outcome.run_id + "`")


def _evaluated(overrides: Sequence[str], fresh: bool) -> list[str]:
    """The overrides of `evaluate`: the base unless they say otherwise, `expert=NAME` spelled out, no model logged."""
    experts = [text for text in overrides if text.startswith("expert=")]
    rest = [text for text in overrides if not text.startswith("expert=")]
    if experts:
        name = experts[-1].partition("=")[2]
        if any(text.startswith("model=") for text in rest):
            raise UserError("expert and model both say what to score; give one of them")
        return ["tracking.log_model=false", *rest, "method=expert", f"method.expert={name}"]
    model = any(text.startswith("model=") for text in rest)
    chosen = any(text.startswith("method=") for text in rest)
    chosen = chosen or not fresh
    return ["tracking.log_model=false", *rest, *(["method=base"] if model or not chosen else [])]


def _show(given: argparse.Namespace) -> None:
    from harness.compose import to_yaml

    config = _composed(given, given.overrides)
    ranges = _ranges(config.method)
    section = ""
    for line in to_yaml(config).splitlines():
        if not line.startswith((" ", "-")):
            section = line.partition(":")[0]
        name = line.strip().partition(":")[0]
        known = ranges.get(name) if section == "method" and line.startswith("  ") and line[2:3].isalpha() else None
        print(f"{line}  # {known}" if known else line)


def _ranges(params: object) -> dict[str, str]:
    """What to say of each parameter: its search range, or the words that it takes."""
    import dataclasses

    found = {}
    for field in dataclasses.fields(params):  # type: ignore[arg-type]
        if searched := in_words(field.metadata.get("range")):
            found[field.name] = f"searched {searched}"
        elif words := field.metadata.get("words"):
            found[field.name] = f"one of {', '.join(words)}"
    return found


def _list(given: argparse.Namespace) -> None:
    if given.what != "methods":
        if given.name is not None:
            raise UserError(f"list {given.what} {given.name}: methods alone have pages; `crucible list {given.what}`")
        print_table(*choices_of(given.what, given.config_dir))
    elif given.name is None:
        print_groups(*methods())
    else:
        print(method_page(given.name), end="")


def _build_suite(given: argparse.Namespace) -> None:
    pool, tasks = ROOT / "pools" / given.suite, ROOT / "tasks" / given.suite
    if given.output is not None:
        pool, tasks = given.output / "pool", given.output / "tasks"
    if given.suite == "mini_lm":
        from harness.suite_lm import build_suite_lm

        scores = build_suite_lm(pool, tasks, seed=given.seed)
    else:
        from harness.suite import build_suite

        scores = build_suite(pool, tasks, seed=given.seed)
    print(json.dumps(scores, indent=2))
