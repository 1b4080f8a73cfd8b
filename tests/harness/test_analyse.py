"""What an analysis finds, held against NumPy on the same weights; its tables and figures; what is refused."""

from __future__ import annotations

import json
import math

import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import analysis_plots, cli
from harness.analysis_lines import along, place_of, spaced
from harness.analysis_settings import AnalysisSettings
from harness.analysis_weights import GRID, spectra, survey
from harness.crew import ALONE, crew
from harness.inputs import Inputs, MergeError
from pools.roles import NamedRoles

EXPERTS = ("red", "green", "blue")
QUICK = "points=3", "plane_points=3", "rows=12", "lines=[base:red,red:green,base:sum]"


def inputs(change=lambda tensors: None) -> Inputs:
    """A model of two blocks and three experts, some of whose weights stay."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (5, 4), "h.0.fc.weight": (6, 4), "h.1.fc.weight": (4, 6), "h.1.norm.weight": (4,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {}
    for expert in EXPERTS:
        deltas = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        kept = {name: torch.rand(tensor.shape, generator=generator) < 0.7 for name, tensor in base.items()}
        experts[expert] = {name: base[name] + deltas[name] * kept[name] for name in base}
    change(experts)
    from pools.faults import specs_of

    return Inputs(base, experts, NamedRoles(specs_of(base)))


def flat_changes(given: Inputs, names) -> np.ndarray:
    """(T, n) float64."""
    rows = [
        [(expert[name] - given.base[name]).double().flatten() for name in names] for expert in given.experts.values()
    ]
    return np.stack([torch.cat(row).numpy() for row in rows])


@pytest.mark.parametrize("workers", [1, 2])
def test_cosines_signs_and_norms_are_those_of_numpy(workers) -> None:
    given = inputs()
    with crew(workers) as hands:
        found = survey(given, hands)
    changes = flat_changes(given, given.base)
    norms = np.linalg.norm(changes, axis=1)
    np.testing.assert_allclose(found.cosines, changes @ changes.T / np.outer(norms, norms), atol=1e-6)
    signs = np.sign(changes)
    for i in range(3):
        for j in range(3):
            both = (signs[i] != 0) & (signs[j] != 0)
            assert found.opposed[i, j] == pytest.approx((both & (signs[i] != signs[j])).sum() / both.sum())
    layers = {0: ["embed.weight"], 1: ["h.0.fc.weight"], 2: ["h.1.fc.weight", "h.1.norm.weight"], 3: []}
    for layer, names in layers.items():
        own = flat_changes(given, names) if names else np.zeros((3, 0))
        moved = np.abs(np.sign(own))
        shared = moved.sum(0) >= 2
        mixed = shared & (np.sign(own).max(0, initial=-1) > 0) & (np.sign(own).min(0, initial=1) < 0)
        assert found.shared[layer] == shared.sum()
        assert found.conflicts[layer] == mixed.sum()
        np.testing.assert_allclose(found.squares[layer], (own**2).sum(1), rtol=1e-5)
        if names:
            lost = 1 - np.abs(own.sum(0)).sum() / np.abs(own).sum()
            assert found.cancelled[layer] == pytest.approx(lost, abs=1e-6)
            base = sum(float(given.base[name].double().square().sum()) for name in names)
            assert found.base[layer] == pytest.approx(base, rel=1e-6)


def test_spectra_are_those_of_numpy_on_linear_layers_alone() -> None:
    given = inputs()
    found = spectra(given, ALONE)
    assert {row["tensor"] for row in found.rows} == {"h.0.fc.weight", "h.1.fc.weight"}
    for row in found.rows:
        change = (given.experts[row["expert"]][row["tensor"]] - given.base[row["tensor"]]).double().numpy()
        squares = np.linalg.svd(change, compute_uv=False) ** 2
        shares = squares / squares.sum()
        rank = math.exp(-(shares * np.log(shares)).sum())
        assert row["effective_rank"] == pytest.approx(rank, rel=1e-6)
        assert row["share"] == pytest.approx(rank / len(squares), rel=1e-6)
        assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert row["stable_rank"] == pytest.approx(squares.sum() / squares[0], rel=1e-6)
        assert row["rank_90"] == int((np.cumsum(shares) < 0.9).sum()) + 1
    for curve in found.curves.values():
        assert len(curve) == GRID
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1)
        assert all(
            b - a <= c - b + 1e-12 for c, b, a in zip(curve, curve[1:], curve[2:], strict=False)
        ) or curve == sorted(curve)
    by_layer = found.by_layer(EXPERTS, 2)
    assert [math.isnan(row[0]) for row in by_layer] == [True, False, False, True]


def test_an_expert_that_changed_nothing_counts_as_nothing() -> None:
    def still(experts) -> None:
        experts["red"] = {name: tensor.clone() for name, tensor in inputs().base.items()}

    given = inputs(still)
    seen = survey(given, ALONE)
    assert seen.cosines[0].tolist() == [0.0, 0.0, 0.0]
    assert seen.opposed[0].tolist() == [0.0, 0.0, 0.0]
    found = spectra(given, ALONE)
    assert {row["effective_rank"] for row in found.rows if row["expert"] == "red"} == {0.0}
    assert "red" not in found.curves


def test_weights_that_are_no_numbers_are_named() -> None:
    def broken(experts) -> None:
        experts["green"]["h.0.fc.weight"][1, 1] = math.nan

    with pytest.raises(MergeError, match=r"h\.0\.fc\.weight has NaN or infinite weights in expert green"):
        survey(inputs(broken), ALONE)


def test_lines_go_from_one_end_to_the_other() -> None:
    assert place_of("base", EXPERTS) == {}
    assert place_of("sum", EXPERTS) == {"red": 1.0, "green": 1.0, "blue": 1.0}
    assert [dict(point) for _, point in along("red:green", EXPERTS, 3, [0.0, 1.0])] == [
        {"red": 1.0, "green": 0.0},
        {"red": 0.5, "green": 0.5},
        {"red": 0.0, "green": 1.0},
    ]
    assert spaced(3, [-0.5, 1.5]) == [-0.5, 0.5, 1.5]


@pytest.fixture(scope="module")
def place(tmp_path_factory, build_workplace):
    return build_workplace(tmp_path_factory.mktemp("analyse"))


@pytest.fixture(scope="module")
def done(place) -> mlflow.entities.Run:
    """One run of all parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with place.entered():
        assert cli.main(["analyse", *place.choices, *QUICK]) == 0
        (run,) = place.runs().values()
    torch.set_num_threads(before)
    return run


def table(place, run, name: str) -> list[dict]:
    with place.entered():
        found = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{name}"))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


@pytest.mark.slow
def test_one_run_holds_every_table_and_figure(place, done) -> None:
    assert done.info.status == "FINISHED"
    assert done.data.tags["kind"] == "analysis"
    with place.entered():
        client = mlflow.MlflowClient()
        files = {item.path for top in ("", "plots") for item in client.list_artifacts(done.info.run_id, top)}
    tables = {"cosine.json", "signs.json", "signs_pairs.json", "norms.json", "spectra.json", "line.json", "plane.json"}
    figures = {"cosine", "sign_conflicts", "signs_pairs", "norms", "spectra", "effective_rank", "plane_loss"}
    figures |= {"plane_accuracy", "line_base_red", "line_red_green", "line_base_sum"}
    assert tables | {f"plots/{name}.png" for name in figures} <= files
    assert {"cosine/mean", "signs/conflict_share", "norms/red", "spectra/red/effective_rank_share"} <= set(
        done.data.metrics
    )
    assert {row["layer"] for row in table(place, done, "norms.json")} == {"before", "1", "2", "after"}


@pytest.mark.slow
def test_the_ends_of_a_line_are_the_models_themselves(place, done) -> None:
    rows = {(row["line"], row["t"]): row["loss"] for row in table(place, done, "line.json") if row["task"] == "red"}
    limited = "evaluation.split=validation", "evaluation.limit=12", "evaluation.plots=false", "tracking.log_model=false"
    limited += ("evaluation.references=false",)

    def loss(*overrides: str) -> float:
        return {score.task: score.loss for score in place.run(*limited, *overrides).scores}["red"]

    base = loss("method=base")
    red = loss("method=expert", "method.expert=red")
    assert rows["base:red", 0.0] == rows["base:sum", 0.0] == pytest.approx(base, rel=1e-6)
    assert rows["base:red", 1.0] == rows["red:green", 0.0] == pytest.approx(red, rel=1e-5)
    assert rows["base:sum", 0.5] == pytest.approx(loss("method=task_arithmetic", "method.scale=0.5"), rel=1e-5)
    assert rows["base:sum", 1.0] == pytest.approx(loss("method=task_arithmetic", "method.scale=1.0"), rel=1e-5)


@pytest.mark.slow
def test_a_plane_has_the_models_at_its_corners(place, done) -> None:
    plane = {(row["red"], row["green"]): row["loss"] for row in table(place, done, "plane.json")}
    assert sorted({x for x, _ in plane}) == [-0.25, 0.5, 1.25]
    line = [row["loss"] for row in table(place, done, "line.json") if (row["line"], row["t"]) == ("red:green", 0.5)]
    assert plane[0.5, 0.5] == pytest.approx(sum(line) / len(line), rel=1e-6)


def test_weights_alone_are_looked_at_without_tasks(place) -> None:
    with place.entered():
        before = place.runs()
        assert cli.main(["analyse", place.choices[0], "tasks=none", "parts=[norms]"]) == 0
        (run,) = [run for run_id, run in place.runs().items() if run_id not in before]
    assert not run.inputs.dataset_inputs
    assert "norms/blue" in run.data.metrics


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("tasks=none",), "line, plane score models on tasks, and there are none; parts=[cosine,signs,norms,spectra]"),
        (("pool.base=null", "method=simple_average"), "the pool pool has none; pool.base=PATH"),
        (("experts=[red]",), "cosine, signs, plane compare two experts or more, the pool pool has 1"),
        (("lines=[base:rde]",), "'rde' is no end of a line; did you mean red?"),
        (("lines=[red]",), "lines are written A:B"),
        (("plane=[red,grene]",), "no expert 'grene'; did you mean green?"),
        (("plane=[red]",), "plane is spanned by two experts, got red"),
        (("parts=[cosines]",), "parts is one of cosine, signs, norms, spectra, line, plane; got 'cosines'"),
        (("parts=[]",), "parts must not be empty"),
        (("span=[1.0,0.0]",), "span is [low, high] with low below high, got [1.0, 0.0]"),
        (("fabric.devices=2",), "an analysis runs on one device"),
    ],
)
def test_bad_input_is_told_before_work(place, capfd, overrides, said) -> None:
    with place.entered():
        before = set(place.runs())
        capfd.readouterr()
        assert cli.main(["analyse", *place.choices, *overrides]) == 2
        assert set(place.runs()) == before
    assert said in capfd.readouterr().err


@pytest.mark.slow
def test_a_broken_expert_fails_the_run(place, tiny_pool, tmp_path, capfd) -> None:
    weights = load_file(tiny_pool.root / "red" / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = math.inf
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "config.json").write_text((tiny_pool.root / "red" / "config.json").read_text())
    save_file(weights, tmp_path / "red" / "model.safetensors", {"format": "pt"})
    with place.entered():
        assert cli.main(["analyse", *place.choices, f"pool.experts.red={tmp_path / 'red'}", "parts=[norms]"]) == 2
    assert "has NaN or infinite weights in expert red" in capfd.readouterr().err


def test_settings_default_to_every_part() -> None:
    assert AnalysisSettings().parts == ["cosine", "signs", "norms", "spectra", "line", "plane"]


@pytest.mark.slow
def test_figures_of_odd_numbers_are_drawn() -> None:
    flat = [[1.0, 1.0], [1.0, 1.0]]
    analysis_plots.plane(flat, [0.0, 1.0], ("a", "b"), "loss").canvas.draw()
    wild = [[0.01, 100.0], [math.inf, math.nan]]
    analysis_plots.plane(wild, [0.0, 1.0], ("a", "b"), "loss").canvas.draw()
    many = [str(index) for index in range(60)]
    analysis_plots.conflicts([0.5] * 60, [0.2] * 60, many).canvas.draw()
    analysis_plots.by_layer([[0.0] * 2] * 60, many, ["a", "b"], "norm").canvas.draw()
