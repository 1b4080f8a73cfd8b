"""The contract of a build, run against every catalogue row that makes modules, over pools of every family of models."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.built import build
from harness.rebuild import open_directory, recipe
from methods.catalogue import CATALOGUE
from methods.kinds import Kind, Row
from methods.mixtures import fix_gates, routing
from methods.routed import Router
from pools.open import open_pool
from pools.wrapped import save_wrapped
from tests.harness.test_logged_model import tiny_clip
from tests.pools.language_models import write_model

ROOT = Path(__file__).parents[2]
ROWS = [row for row in CATALOGUE.values() if row.kind is Kind.build]
MERGING = [row for row in ROWS if row.name != "smile"]  # which leaves at the base what is no linear layer
KINDS = {  # of model -> its pool's family, and the class that transformers makes
    "clip": ("clip", ""),
    "gpt2": ("causal_lm", "AutoModelForCausalLM"),
    "llama": ("causal_lm", "AutoModelForCausalLM"),
    "t5": ("seq2seq", "AutoModelForSeq2SeqLM"),
    "bert": ("sequence_classification", "AutoModelForSequenceClassification"),
}
# Nothing is cut off, and as much of each change as makes copies of one expert that expert.
WHOLE = {"scale": 0.5, "density": 1.0, "rank": 64}
FEED_FORWARD = ("mlp.", "DenseReluDense.", "intermediate.dense", "layer.0.output.dense", "layer.1.output.dense")
ROUTED = ("we_moe", "sparse_we_moe", "rankone_moe", "pwe_moe", "dawe", "twin_merging")
UNFIT = {("smile", "gpt2")}  # whose linear layers are none of torch's
every_kind = pytest.mark.parametrize(
    "kind", [kind if kind == "clip" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
routed = pytest.mark.parametrize("name", ROUTED)


def fitting(kind: str) -> list[Row]:
    """The rows for which there is something to work on."""
    return [row for row in ROWS if (row.name, kind) not in UNFIT]


def every_fit(*kinds: str) -> pytest.MarkDecorator:
    """Every row on the kinds that fit it."""
    cases = [
        pytest.param(row, kind, marks=() if kind == "clip" else pytest.mark.slow, id=f"{row.name}-{kind}")
        for kind in kinds
        for row in fitting(kind)
    ]
    return pytest.mark.parametrize(("row", "kind"), cases)


def params_of(row: Row, **given: Any) -> Any:
    known = row.load_params().__dataclass_fields__
    return row.load_params()(**{name: value for name, value in (WHOLE | given).items() if name in known})


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Any:
    """Of a kind a base, two experts, and two (`deep_*`) that differ from the base in feed-forward weights only."""

    @functools.cache
    def written(kind: str) -> Path:
        auto, root = KINDS[kind][1], tmp_path_factory.mktemp(kind)
        for seed, name in enumerate(("base", "ant", "bee")):
            if kind == "clip":
                tiny_clip(root / name)
                move(root / name, root / name, seed, lambda name: "vision_model" in name)
            else:
                write_model(root / name, kind, seed, auto)
        for seed, name in enumerate(("deep_ant", "deep_bee"), start=5):
            (root / name).mkdir()
            for file in (root / "base").iterdir():
                (root / name / file.name).write_bytes(file.read_bytes())
            move(root / "base", root / name, seed, is_feed_forward)
        return root

    return written


def is_feed_forward(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in FEED_FORWARD)


def move(source: Path, target: Path, seed: int, which) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
        if which(name) and tensor.is_floating_point()
    }
    assert moved or seed == 0
    save_file(tensors | (moved if seed else {}), target / "model.safetensors", {"format": "pt"})


def pool_of(places: Any, kind: str, experts: dict[str, str]) -> Any:
    root = places(kind)
    return open_pool(KINDS[kind][0], str(root / "base"), {key: str(root / own) for key, own in experts.items()})


def built(row: Row, pool: Any, **given: Any) -> Any:
    torch.manual_seed(0)
    names = [name for name in pool.reference if not pool.roles.is_buffer(name)]
    return build(row, params_of(row, **given), pool, names).eval()


TEXTS = ["a b", "longer text", "mid"]


def rows_of(kind: str) -> list[Any]:
    if kind == "clip":
        return [Image.new("RGB", (16, 16), (40 * index, 90, 200 - 30 * index)) for index in range(3)]
    return [(text, "yes"[: index + 1]) for index, text in enumerate(TEXTS)] if kind == "t5" else list(TEXTS)


def answers(module: Any, pool: Any, kind: str, rows: list[Any] | None = None) -> torch.Tensor:
    """Embeddings, or logits of what is no padding."""
    inputs = pool.feed(rows_of(kind) if rows is None else rows)
    labels = inputs.pop("labels", None) if kind in ("gpt2", "llama") else inputs.get("labels")
    with torch.no_grad():
        found = module(**inputs)
    if not isinstance(found, torch.Tensor) and not hasattr(found, "logits"):
        return found @ torch.eye(8)  # of an ensemble's embeddings
    if isinstance(found, torch.Tensor):
        return found
    counted = None if labels is None else labels != -100
    return found.logits if counted is None else found.logits[counted]


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("row", MERGING, ids=lambda row: row.name)
def test_copies_of_one_expert_give_that_expert(places, row, kind) -> None:
    pool = pool_of(places, kind, {"one": "ant", "two": "ant"})
    module = built(row, pool)
    fix_gates(module, [0.5, 0.5])
    assert_close(answers(module, pool, kind), answers(pool.module(pool.experts["one"]), pool, kind))


@every_kind
@routed
def test_gates_fixed_on_one_expert_give_that_expert(places, name, kind) -> None:
    pool = pool_of(places, kind, {"ant": "deep_ant", "bee": "deep_bee"})
    module = built(CATALOGUE[name], pool, scale=0.0)
    for gates, expert in (([0.0, 1.0], "bee"), ([1.0, 0.0], "ant")):
        fix_gates(module, gates)
        assert_close(answers(module, pool, kind), answers(pool.module(pool.experts[expert]), pool, kind))
    assert not torch.allclose(answers(module, pool, kind), answers(pool.module(), pool, kind), atol=1e-3)


def stir(module: Any) -> None:
    """Routers whose gates differ between inputs."""
    generator = torch.Generator().manual_seed(1)
    for router in module.modules():
        if isinstance(router, Router):
            for parameter in router.parameters():
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)


@every_fit(*KINDS)
def test_a_row_does_not_depend_on_the_others(places, row, kind) -> None:
    """Nor on their length: padding does not count."""
    pool = pool_of(places, kind, {"ant": "ant", "bee": "bee"})
    module = built(row, pool)
    stir(module)
    rows = rows_of(kind)
    apart = torch.cat([answers(module, pool, kind, [own]) for own in rows])
    assert_close(answers(module, pool, kind), apart)


@every_fit(*KINDS)
def test_written_and_loaded_it_answers_the_same(places, row, kind, tmp_path) -> None:
    pool = pool_of(places, kind, {"ant": "ant", "bee": "bee"})
    module = built(row, pool)
    stir(module)
    save_wrapped(tmp_path / "built", module, facts(row, module, pool), pool)
    loaded, own = open_directory(tmp_path / "built")
    assert_close(answers(loaded, own, kind), answers(module, pool, kind))
    assert {file.suffix for file in (tmp_path / "built").iterdir() if file.is_file()} == {".json", ".safetensors"}


def facts(row: Row, module: Any, pool: Any) -> dict[str, Any]:
    return recipe(row.name, params_of(row), list(pool.experts), module.merged_names)


@pytest.mark.slow
def test_a_fresh_process_gives_equal_outputs(places, tmp_path) -> None:
    expected = {}
    for kind in KINDS:
        pool = pool_of(places, kind, {"ant": "ant", "bee": "bee"})
        for row in fitting(kind):
            module = built(row, pool)
            stir(module)
            save_wrapped(tmp_path / kind / row.name, module, facts(row, module, pool), pool)
            expected[f"{kind}/{row.name}"] = answers(module, pool, kind).tolist()
    command = (
        "import json, sys; from pathlib import Path\n"
        "from tests.methods.test_every_build import KINDS, answers, fitting\n"
        "from harness.rebuild import open_directory\n"
        "print(json.dumps({f'{kind}/{row.name}': answers(*open_directory(Path(sys.argv[1]) / kind / row.name), kind)"
        ".tolist() for kind in KINDS for row in fitting(kind)}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
@every_fit("gpt2", "llama", "t5")
def test_continuations_are_those_that_the_logits_tell(places, row, kind) -> None:
    """Greedy, token by token, whatever the padding; with caches and without."""
    pool = pool_of(places, kind, {"ant": "ant", "bee": "bee"})
    module = built(row, pool)
    prompts = ["ab", "a longer one"]
    together = pool.generate(module, prompts, 4)
    assert together == [pool.generate(module, [prompt], 4)[0] for prompt in prompts]
    if row not in MERGING:
        return
    one = pool_of(places, kind, {"one": "ant", "two": "ant"})
    copies = built(row, one)
    fix_gates(copies, [0.5, 0.5])
    assert one.generate(copies, prompts, 4) == one.generate(one.module(one.experts["one"]), prompts, 4)


def test_the_rows_with_routers_are_these(places) -> None:
    """And gates are one for each expert that a router was made for."""
    pool = pool_of(places, "clip", {"ant": "ant", "bee": "bee"})
    made = {row.name: built(row, pool) for row in ROWS}
    having = {name for name, module in made.items() if any(isinstance(part, Router) for part in module.modules())}
    assert having == {*ROUTED, "smile"}  # whose routers answer for tokens: test_smile.py
    with pytest.raises(ValueError, match="the router was made for 2 experts, got 3 gates"):
        fix_gates(made["we_moe"], [0.0, 0.0, 1.0])


@routed
def test_routing_is_counted_by_expert(places, name) -> None:
    pool = pool_of(places, "clip", {"ant": "ant", "bee": "bee"})
    module = built(CATALOGUE[name], pool)
    fix_gates(module, [0.25, 0.75])
    answers(module, pool, "clip")
    rows = routing(module, ["ant", "bee"])
    if name == "pwe_moe":  # the same for all inputs
        assert rows == []
        return
    assert {(row["expert"], row["first"]) for row in rows} == {("ant", 0.0), ("bee", 1.0)}
    assert all(row["examples"] == len(rows_of("clip")) for row in rows if name != "sparse_we_moe")
    assert {row["mean"] for row in rows} == {0.25, 0.75}
    assert routing(module, ["ant", "bee"]) == []
