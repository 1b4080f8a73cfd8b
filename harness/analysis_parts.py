"""The parts of an analysis: each computes, records its tables and figures, and tells what it found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.fabric import Fabric
from tqdm import tqdm

from harness import analysis_plots, plots
from harness.analysis_lines import Between, along, ends_of, mean_loss, mean_value, place_of, spaced
from harness.analysis_settings import AnalysisSettings
from harness.analysis_weights import Survey, spectra, survey
from harness.bench import Bench
from harness.config import RunConfig
from harness.crew import count_workers, crew
from harness.inputs import Inputs
from harness.report import SHARES
from harness.track import Run

Told = list[tuple[str, str]]


@dataclass(frozen=True)
class Session:
    """An analysis that is going on."""

    config: RunConfig
    settings: AnalysisSettings
    bench: Bench
    fabric: Fabric
    tracked: Run

    @property
    def experts(self) -> list[str]:
        """Their names."""
        return list(self.bench.pool.experts)

    @property
    def layers(self) -> list[str]:
        """Names of layers."""
        return analysis_plots.layer_names(self.bench.pool.roles.n_layers)

    def inputs(self) -> Inputs:
        """The weights."""
        pool = self.bench.pool
        return Inputs(pool.base, pool.experts, pool.roles)


def looked_at(session: Session) -> Told:
    """Every part that is asked for; weights are walked over once for cosines, signs and norms together."""
    parts, found = session.settings.parts, list[tuple[str, str]]()
    of_weights = {"cosine": _cosine, "signs": _signs, "norms": _norms}
    wanted = [part for part in parts if part in of_weights]
    workers = count_workers(session.config.engine.workers)
    if wanted:
        with session.tracked.phase("survey"), crew(workers) as hands:
            seen = survey(session.inputs(), hands)
        for part in wanted:
            found += of_weights[part](session, seen)
    rest: dict[str, Callable[[Session], Told]] = {"spectra": _spectra, "line": _line, "plane": _plane}
    for part, look in rest.items():
        if part in parts:
            with session.tracked.phase(part):
                found += look(session)
    return found


def _cosine(session: Session, seen: Survey) -> Told:
    names, cosines = session.experts, seen.cosines.tolist()
    session.tracked.table(_pairs(names, cosines, "cosine"), "cosine.json")
    session.tracked.figure(plots.similarity(cosines, names), "plots/cosine.png")
    return _extremes(session, "cosine", names, cosines)


def _signs(session: Session, seen: Survey) -> Told:
    names, shares, opposed = session.experts, seen.conflict_shares.tolist(), seen.opposed.tolist()
    whole = float(seen.conflicts.sum() / seen.shared.sum().clamp(min=1))
    cancelled = seen.cancelled.tolist()
    columns = zip(session.layers, seen.shared, seen.conflicts, shares, cancelled, strict=True)
    rows = [
        {"layer": layer, "shared_weights": int(n), "conflicts": int(k), "share": share, "cancelled": lost}
        for layer, n, k, share, lost in columns
    ]
    session.tracked.table(rows, "signs.json")
    session.tracked.table(_pairs(names, opposed, "opposite"), "signs_pairs.json")
    session.tracked.figure(analysis_plots.conflicts(shares, cancelled, session.layers), "plots/sign_conflicts.png")
    session.tracked.figure(analysis_plots.opposed(opposed, names), "plots/signs_pairs.png")
    session.tracked.metric("signs/conflict_share", whole)
    lost = float(1 - seen.summed.sum() / seen.apart.sum().clamp(min=1e-30))
    session.tracked.metric("signs/cancelled", lost)
    told = f"{100 * whole:.1f} % of the weights that two or more experts change; {100 * lost:.1f} % of change cancels"
    return [("sign conflicts", told), *_extremes(session, "opposite signs", names, opposed)]


def _norms(session: Session, seen: Survey) -> Told:
    names, norms, base = session.experts, seen.squares.sqrt(), seen.base.sqrt()
    relative = norms / base.clamp(min=1e-30)[:, None]
    rows = [
        {"layer": layer, "expert": name, "norm": own, "base": below, "relative": share}
        for layer, below, of_layer, shares in zip(
            session.layers, base.tolist(), norms.tolist(), relative.tolist(), strict=True
        )
        for name, own, share in zip(names, of_layer, shares, strict=True)
    ]
    session.tracked.table(rows, "norms.json")
    meaning = "norm in % of the base's"
    figure = analysis_plots.by_layer(relative.tolist(), session.layers, names, meaning)
    session.tracked.figure(figure, "plots/norms.png")
    whole = (seen.squares.sum(0) / seen.base.sum().clamp(min=1e-30)).sqrt().tolist()
    for name, value in zip(names, whole, strict=True):
        session.tracked.metric(f"norms/{name}", value)
    return [("norms", _range(dict(zip(names, whole, strict=True))) + " of the base's")]


def _spectra(session: Session) -> Told:
    with crew(count_workers(session.config.engine.workers)) as hands:
        found = spectra(session.inputs(), hands)
    session.tracked.table(found.rows, "spectra.json")
    names = session.experts
    if found.curves:
        session.tracked.figure(analysis_plots.energies(found.curves), "plots/spectra.png")
    ranks = found.by_layer(names, session.bench.pool.roles.n_layers)
    kept = [index for index, row in enumerate(ranks) if not all(math.isnan(value) for value in row)]
    layers, table = [session.layers[index] for index in kept], [ranks[index] for index in kept]
    meaning = "effective rank in % of the full rank"
    session.tracked.figure(analysis_plots.by_layer(table, layers, names, meaning), "plots/effective_rank.png")
    shares = {}
    for name in names:
        own = [row["share"] for row in found.rows if row["expert"] == name]
        shares[name] = math.fsum(own) / len(own)
        session.tracked.metric(f"spectra/{name}/effective_rank_share", shares[name])
    return [("effective rank", _range(shares) + " of the full rank")]


def _between(session: Session, experts: list[str]) -> Between:
    config = session.config
    evaluation = config.evaluation
    return Between(
        session.bench,
        session.fabric,
        tuple(experts),
        evaluation.split,
        session.settings.rows,
        evaluation.batch_size,
        config.seed,
    )


def _line(session: Session) -> Told:
    """Every line, each with its own table rows and figure."""
    settings, names = session.settings, session.experts
    ends = [end for line in settings.lines for end in ends_of(line)]
    between = _between(session, [name for name in names if any(name in place_of(end, names) for end in ends)])
    rows: list[dict[str, Any]] = []
    told: Told = []
    with _bar("lines", settings.points * len(settings.lines)) as bar:
        for line in settings.lines:
            tasks = between.tasks_of(ends_of(line))
            means = {}
            for index, (t, coefficients) in enumerate(along(line, names, settings.points, settings.span)):
                scores = between.scores(coefficients, tasks, lambda n: None)
                means[t] = mean_loss(scores)
                session.tracked.metric(f"line/{line.replace(':', '_')}/loss", means[t], index)
                own = [{"task": s.task, "loss": s.loss, "metric": s.metric, "value": s.value} for s in scores]
                rows += [{"line": line, "t": t, **each} for each in own]
                bar.update()
            shown = [row for row in rows if row["line"] == line]
            figure = analysis_plots.line(shown, ends_of(line))
            session.tracked.figure(figure, f"plots/line_{line.replace(':', '_')}.png")
            best = min(means, key=means.__getitem__)
            told.append((f"line {line}", f"lowest loss {means[best]:.4f} at t={best:.3g}"))
    session.tracked.table(rows, "line.json")
    return told


def _plane(session: Session) -> Told:
    """Losses, and scores where the tasks share a metric, over the plane of two task vectors."""
    settings = session.settings
    first, second = settings.plane
    between = _between(session, [first, second])
    tasks, sides = between.tasks_of((first, second)), spaced(settings.plane_points, settings.plane_span)
    losses: list[list[float]] = []
    values: list[list[float]] = []
    metric = {session.bench.tasks[task].metric for task in tasks}
    with _bar("plane", len(sides) ** 2) as bar:
        for y in sides:
            scores = []
            for x in sides:
                scores.append(between.scores({first: x, second: y}, tasks, lambda n: None))
                bar.update()
            losses.append([mean_loss(each) for each in scores])
            values.append([mean_value(each) for each in scores])
    rows = [
        {first: x, second: y, "loss": losses[j][i], "value": values[j][i]}
        for j, y in enumerate(sides)
        for i, x in enumerate(sides)
    ]
    session.tracked.table(rows, "plane.json")
    over = "mean over " + ", ".join(tasks) if len(tasks) <= 3 else f"mean over {len(tasks)} tasks"
    figure = analysis_plots.plane(losses, sides, (first, second), f"loss in nats, {over}")
    session.tracked.figure(figure, "plots/plane_loss.png")
    if len(metric) == 1 and session.bench.tasks[tasks[0]].higher_is_better:
        name = next(iter(metric))
        factor, unit = (100, f"{name.replace('_', ' ')} in %") if name in SHARES else (1, name)
        shown = [[factor * value for value in row] for row in values]
        figure = analysis_plots.plane(shown, sides, (first, second), f"{unit}, {over}", rising=True)
        session.tracked.figure(figure, f"plots/plane_{name}.png")
    best = min(rows, key=lambda row: row["loss"])
    session.tracked.metric("plane/lowest_loss", best["loss"])
    return [("plane", f"lowest loss {best['loss']:.4f} at {best[first]:.3g} {first}, {best[second]:.3g} {second}")]


def _pairs(names: list[str], table: list[list[float]], key: str) -> list[dict[str, Any]]:
    """A symmetric table as rows, each pair once."""
    return [
        {"expert": one, "other": other, key: table[i][j]}
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i < j
    ]


def _extremes(session: Session, what: str, names: list[str], table: list[list[float]]) -> Told:
    """The mean over pairs as a metric, and the pair that stands out."""
    pairs = {f"{row['expert']} and {row['other']}": row["_"] for row in _pairs(names, table, "_")}
    session.tracked.metric(f"{what.replace(' ', '_')}/mean", math.fsum(pairs.values()) / len(pairs))
    most = max(pairs, key=pairs.__getitem__)
    return [(what, f"mean {math.fsum(pairs.values()) / len(pairs):.3f}, highest {pairs[most]:.3f} ({most})")]


def _range(values: dict[str, float]) -> str:
    """Least and most, with their names."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{100 * values[low]:.1f} % ({low}) to {100 * values[high]:.1f} % ({high})"


def _bar(what: str, total: int) -> tqdm:
    """A progress bar at a terminal."""
    return tqdm(total=total, desc=what, unit="model", delay=0.5, disable=None)
