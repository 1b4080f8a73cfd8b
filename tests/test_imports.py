"""Who may import what: the table of the architecture, held against every file's imports."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("methods", "pools", "tasks", "harness", "studies")

ALLOWED = {
    "methods": {"methods", "torch", "numpy"},
    "pools": {"pools", "torch", "numpy", "xxhash", "safetensors", "transformers", "peft", "huggingface_hub", "PIL"},
    "tasks": {"tasks", "torch", "numpy", "datasets", "transformers", "huggingface_hub", "PIL"},
    "harness": {"harness", "methods", "pools", "tasks", "torch", "numpy", "PIL", "tqdm", "psutil"},
    "studies": {"studies", "harness", "methods", "optuna", "tqdm"},
}

# Libraries with a gate: the only files that import them, over and above the table.
MLFLOW = {
    "harness/track", "harness/store", "harness/record", "harness/logged_model", "harness/mlmodel", "harness/serve",
    "harness/serve_language", "harness/nested", "harness/registry",
}  # fmt: skip
GATES = {
    "mlflow": MLFLOW,  # one gate in pieces, each under 300 lines
    "pandas": MLFLOW,
    "sqlalchemy": {"harness/store", "studies/storage"},
    "hydra": {"harness/compose", "harness/compose_section"},
    "omegaconf": {"harness/compose", "harness/compose_section"},
    "yaml": {"harness/compose", "harness/serve", "harness/import_mergekit", "harness/mergekit_form"},
    "lightning": {  # execute makes the Fabric; the others are handed one
        "harness/adapt", "harness/analyse", "harness/analysis_lines", "harness/analysis_parts", "harness/assess",
        "harness/distill", "harness/evaluate", "harness/execute", "harness/finetune", "harness/finetune_loop",
        "harness/finetune_session", "harness/keep", "harness/learn", "harness/losses", "harness/make",
        "harness/matching", "harness/objective", "harness/references", "harness/routed_inputs", "harness/run",
        "harness/searching", "harness/suite", "harness/suite_lm", "harness/triggers",
    },
    "plotly": {"studies/plots"},
    "matplotlib": {
        "harness/plots", "harness/analysis_plots", "harness/learning_plots", "harness/record", "studies/plots",
        "tasks/glyphs", "tasks/photographs",
    },
    "sklearn": {"tasks/draw", "tasks/photographs", "harness/suite"},
    "transformers": {"harness/mlmodel", "harness/suite", "harness/suite_lm", "harness/suite_lm_tokens"},
    "datasets": {"harness/suite", "harness/suite_lm"},
    "tokenizers": {"harness/suite", "harness/suite_lm_tokens", "pools/union_tokenizer"},
    "peft": {"harness/suite_lm", "harness/finetune_lora"},
    "rich": {"harness/listing"},
    "lm_eval": {"harness/lm_eval"},  # an optional extra
    "cmaes": {"harness/sampler"},
    "scipy": {"methods/pwe_moe"},  # linear programs
}  # fmt: skip
# Imported for what their owner, a requirement, hands out or raises.
BROUGHT = {"pandas": "mlflow", "sqlalchemy": "mlflow", "tokenizers": "transformers"}
OPTIONAL = {"lm_eval"}  # of an extra of pyproject.toml

# What the command line touches before work starts: none of these may be imported at the top of such a file.
HEAVY = {"torch", "mlflow", "transformers", "datasets", "lightning", "matplotlib", "optuna", "sklearn", "rich"}
LIGHT_FILES = (
    "cli",
    "listing",
    "__main__",
    "__init__",
    "config",
    "schema",
    "schedules",
    "compose",
    "track",
    "store",
    "provenance",
)


def files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(nodes: ast.AST) -> set[str]:
    """First part of every absolute import below a node."""
    found: set[str] = set()
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found.add(str(node.module).partition(".")[0])
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", files(), ids=named)
def test_a_file_imports_only_what_its_folder_may(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    gated = {library for library, gate in GATES.items() if named(path).removesuffix(".py") in gate}
    foreign = imported(parsed(path)) - set(sys.stdlib_module_names) - ALLOWED[folder] - gated
    assert not foreign, f"{named(path)} imports {', '.join(sorted(foreign))}; see ARCHITECTURE.md for who may"


@pytest.mark.parametrize("name", LIGHT_FILES)
def test_what_starts_the_command_line_imports_nothing_heavy_at_its_top(name: str) -> None:
    path = ROOT / "harness" / f"{name}.py"
    if not path.exists():
        pytest.fail(f"{named(path)} is gone; take it out of LIGHT_FILES")
    top = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {library for node in top for library in imported(node)} & HEAVY


def test_every_library_is_a_requirement_and_every_requirement_has_a_reason() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+  # \S.+", line) for line in lines)
    required = {re.split(r"[<>=]", line)[0].lower().replace("_", "-") for line in lines}
    known = packages_distributions()
    libraries = {name for path in files() for name in imported(parsed(path))} - set(sys.stdlib_module_names)
    for library in sorted(libraries - set(FOLDERS) - OPTIONAL):
        owner = BROUGHT.get(library, library)
        names = {name.lower().replace("_", "-") for name in known.get(owner, [owner])}
        assert names & required, f"{library} is imported but not in requirements.txt"


def test_nothing_imports_the_tests() -> None:
    assert not [named(path) for path in files() if "tests" in imported(parsed(path))]
