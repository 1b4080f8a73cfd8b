"""Every method by its name: the rows that the engine, the configuration, the tests and the listings read."""

from __future__ import annotations

import difflib
from typing import Any

from methods.kinds import Base, Kind, Row, Veneer

_INPUTS, _WITH_HEAD = "unlabelled inputs", "unlabelled inputs, head"


def _row(name: str, paper: str, kind: Kind = Kind.rule, file: str = "", **facts: Any) -> Row:
    """A row whose method and parameters stand in the file of its name, or in the one that its family shares."""
    module = f"methods.{file or name}"
    facts.setdefault("function", f"{module}:{name}")
    facts.setdefault("params", f"{module}:{''.join(word.capitalize() for word in name.split('_'))}Params")
    return Row(name=name, kind=kind, paper=paper, **facts)


_REFERENCES = (
    _row("base", "reference", n_experts=(0, None), members="methods.base:members"),
    _row("expert", "reference", base=Base.unused, ordered=True, members="methods.expert:members"),
)  # fmt: skip

_AVERAGES = (
    _row("simple_average", "arXiv:2203.05482", base=Base.unused),
    _row("weighted_average", "arXiv:2203.05482", base=Base.unused, ordered=True),
    _row("linear_interpolation", "arXiv:2109.01903", base=Base.optional, ordered=True, n_experts=(1, 2)),
    _row("model_stock", "arXiv:2403.19522", n_experts=(2, None), elementwise=False, may_rest=True),
    _row("expo", "arXiv:2404.16792", prepare="methods.expo:thresholds", per_tensor=True),
    _row("nan", "arXiv:2505.16148", base=Base.optional, prepare="methods.nan:coefficients", unread=("scale",)),
    _row("metagpt", "arXiv:2406.11385", prepare="methods.metagpt:coefficients", unread=("scale",)),
)  # fmt: skip

_TASK_VECTORS = (
    _row("task_arithmetic", "arXiv:2212.04089"),
    _row(
        "ties", "arXiv:2306.01708", prepare="methods.ties:thresholds", prepared="methods.ties:prepared",
        unread=("scale", "weights", "disjoint", "elect"), kept="methods.ties:magnitudes",
    ),
    _row(
        "dare", "arXiv:2311.03099", random=True, prepare="methods.dare:thresholds", prepared="methods.dare:prepared",
        unread=("scale", "weights", "disjoint"),
    ),
    _row(
        "dare_ties", "arXiv:2311.03099", file="dare", function="methods.dare:dare", random=True,
        prepare="methods.dare:thresholds", prepared="methods.dare:prepared", unread=("scale", "weights", "disjoint"),
    ),
    _row("della", "arXiv:2406.11617", random=True, elementwise=False),
    _row(
        "della_linear", "arXiv:2406.11617", file="della", function="methods.della:della", random=True,
        elementwise=False,
    ),
    _row("breadcrumbs", "arXiv:2312.06795", prepare="methods.breadcrumbs:bounds", per_tensor=True),
    _row(
        "breadcrumbs_ties", "arXiv:2312.06795", file="breadcrumbs", function="methods.breadcrumbs:breadcrumbs",
        prepare="methods.breadcrumbs:bounds", per_tensor=True,
    ),
    _row("magmax", "arXiv:2407.06322"),
    _row("consensus_ta", "arXiv:2405.07813", file="consensus", n_experts=(2, None)),
    _row(
        "consensus_ties", "arXiv:2405.07813", file="consensus", n_experts=(2, None), prepare="methods.ties:thresholds",
        prepared="methods.ties:prepared", unread=("scale", "agree", "selectivity", "selectivities", "disjoint"),
        kept="methods.ties:magnitudes",
    ),
    _row(
        "pcb", "arXiv:2410.02396", prepare="methods.pcb:ranges", prepared="methods.pcb:prepared",
        unread=("scale", "weights"),
    ),
    _row("cabs", "arXiv:2503.01874", ordered=True, elementwise=False),
    _row("sce", "arXiv:2408.07990", prepare="methods.sce:selection", per_tensor=True),
    _row("ram", "arXiv:2601.13572"),
    _row(
        "ramplus_tl", "arXiv:2601.13572", file="ram", prepare="methods.ram:factors", prepared="methods.ram:prepared",
        unread=("scale",),
    ),
    _row("magnitude_prune", "arXiv:1506.02626", elementwise=False),
)  # fmt: skip

_GEOMETRY = (
    _row(
        "slerp", "Shoemake 1985", base=Base.optional, ordered=True, prepare="methods.slerp:coefficients",
        per_tensor=True,
    ),
    _row("nuslerp", "mergekit", base=Base.origin, n_experts=(2, 2), elementwise=False),
    _row("multislerp", "mergekit", base=Base.origin, prepare="methods.multislerp:coefficients", per_tensor=True),
    _row("karcher", "Karcher 1977", base=Base.unused, prepare="methods.karcher:coefficients", per_tensor=True),
    _row("nearswap", "mergekit", n_experts=(1, 1)),
    _row("arcee_fusion", "mergekit", n_experts=(1, 1), elementwise=False, may_rest=True),
)  # fmt: skip

_SPECTRA: tuple[Row, ...] = (
    _row("iso_c", "arXiv:2502.04959", file="iso", elementwise=False, placed=True),
    _row("iso_cts", "arXiv:2502.04959", file="iso", elementwise=False, placed=True),
    _row("tsv_m", "arXiv:2412.00081", elementwise=False, placed=True),
    _row("cart", "arXiv:2412.12153", base=Base.unused, elementwise=False, placed=True),
    _row("star", "arXiv:2502.10339", elementwise=False, placed=True),
    _row("subspace_boosting", "arXiv:2506.16506", elementwise=False, placed=True),
    _row(
        "singular_projection", "arXiv:2408.10174", n_experts=(1, 1), elementwise=False, placed=True, may_rest=True,
    ),
    _row("wudi", "arXiv:2503.08099", elementwise=False, placed=True),
    _row(
        "doge_ta", "arXiv:2501.01230", elementwise=False, placed=True, prepare="methods.doge_ta:thresholds",
        prepared="methods.doge_ta:prepared",
        unread=("scale", "eta", "lr", "steps", "subspace", "others"),
    ),
    _row("ace", "arXiv:2603.02945", elementwise=False, placed=True),
    _row(
        "awd", "arXiv:2411.18729", prepare="methods.awd:coefficients", prepared="methods.awd:prepared",
        unread=("scale",), kept="methods.awd:products",
    ),
)  # fmt: skip

_INFORMED = (
    _row(
        "fisher", "arXiv:2111.09832", Kind.informed, base=Base.unused, stats="fisher",
        prepare="methods.fisher:weights", prepared="methods.fisher:prepared", data="inputs, head",
    ),
    _row(
        "regmean", "arXiv:2212.09849", Kind.informed, base=Base.unused, stats="gram", elementwise=False, data="inputs",
    ),
    _row(
        "regmean_plusplus", "arXiv:2508.03121", Kind.informed, base=Base.unused, stats="gram", layerwise=True,
        elementwise=False, data="inputs",
    ),
    _row(
        "trust_region", "arXiv:2501.15065", Kind.informed, stats="gradient", prepare="methods.trust_region:threshold",
        prepared="methods.trust_region:prepared", unread=("scale",), data="labelled inputs, head",
    ),
    _row(
        "trust_region_zero_shot", "arXiv:2501.15065", file="trust_region", may_rest=True,
        prepare="methods.trust_region:threshold_zero_shot", prepared="methods.trust_region:prepared",
        unread=("scale",),
    ),
    _row(
        "ada_svd", "FusionBench", Kind.informed, stats="inputs", layerwise=True, prepare="methods.ada_svd:routing",
        prepared="methods.ada_svd:prepared", unread=("scale", "average_rest"), placed=True, elementwise=False,
        data="inputs",
    ),
    _row("cat_merging", "arXiv:2505.06977", placed=True, ordered=True, elementwise=False),
    _row(
        "cat_merging_informed", "arXiv:2505.06977", Kind.informed, file="cat_merging", stats="features", ordered=True,
        elementwise=False, data="inputs",
    ),
)  # fmt: skip

_FOLDED: dict[str, Any] = {"ordered": True, "elementwise": False, "n_experts": (2, None)}
_FOLDS = (
    _row("opcm", "arXiv:2501.09522", Kind.fold, **_FOLDED),
    _row("dop", "NeurIPS 2025 (zD5cUX67b9)", Kind.fold, **_FOLDED),
    _row("continual_average", "arXiv:2203.05482", Kind.fold, "continual", **{**_FOLDED, "base": Base.unused}),
    _row("continual_task_arithmetic", "arXiv:2212.04089", Kind.fold, "continual", **_FOLDED),
    _row("continual_ties", "arXiv:2306.01708", Kind.fold, "continual", **_FOLDED),
)  # fmt: skip

_STRUCTURE = (
    _row("passthrough", "frankenmerging", base=Base.unused, n_experts=(1, 1)),
    _row(
        "depth_upscaling", "arXiv:2312.15166", base=Base.unused, n_experts=(0, 1),
        ranges="methods.depth_upscaling:ranges",
    ),
    _row(
        "model_recombination", "arXiv:2305.10730", base=Base.unused, n_experts=(2, None), random=True, placed=True,
        prepare="methods.model_recombination:permutations",
    ),
)  # fmt: skip

_COMPRESSION = tuple(
    _row(name, paper, Kind.compression, restore=f"methods.{name}:restore", **facts)
    for name, paper, facts in (
        ("emr", "arXiv:2405.17461", {"prepare": "methods.emr:rescalers"}),
        ("tall_mask", "arXiv:2405.07813", {}),
        ("tsv_compress", "arXiv:2412.00081", {"elementwise": False, "placed": True}),
        (
            "bitdelta",
            "arXiv:2402.10193",
            {"elementwise": False, "placed": True, "members": "methods.bitdelta:members", "learns": "scales"},
        ),
        ("randes", "arXiv:2505.11204", {"elementwise": False, "placed": True, "random": True}),
    )
)

_PRUNES: dict[str, Any] = {"elementwise": False, "placed": True, "prunes": "methods.prune:is_pruned"}
_PRUNES |= {"base": Base.unused, "members": "methods.prune:members"}
_SPARSE_LOW_RANK: dict[str, Any] = {
    "kind": Kind.compression, "function": "methods.sparse_low_rank:sparse_low_rank", "file": "sparse_low_rank",
    "restore": "methods.sparse_low_rank:restore", "entries": "methods.sparse_low_rank:entries", "elementwise": False,
    "placed": True, "members": "methods.prune:members",
}  # fmt: skip
_PRUNING = (
    _row(
        "prune_random", "baseline", file="prune", random=True, prepare="methods.prune:thresholds",
        prepared="methods.prune:prepared", **_PRUNES,
    ),
    _row(
        "prune_magnitude", "arXiv:1506.02626", file="prune", prepare="methods.prune:thresholds",
        prepared="methods.prune:prepared", **_PRUNES,
    ),
    _row("wanda", "arXiv:2306.11695", Kind.informed, stats="gram", layerwise=True, data="inputs", **_PRUNES),
    _row(
        "moe_pruner", "arXiv:2410.12013", Kind.informed, file="wanda", function="methods.wanda:wanda", stats="routed",
        data="inputs", **_PRUNES,
    ),
    _row("sparse_gpt", "arXiv:2301.00774", Kind.informed, stats="gram", layerwise=True, data="inputs", **_PRUNES),
    _row("sparse_low_rank", "arXiv:2409.13652", **_SPARSE_LOW_RANK),
    _row("sparse_low_rank_random", "FusionBench", random=True, **_SPARSE_LOW_RANK),
    _row("sparse_low_rank_wanda", "FusionBench", stats="gram", data="inputs", **_SPARSE_LOW_RANK),
    _row(
        "expert_prune", "arXiv:2402.14800", base=Base.unused, n_experts=(0, 1), mixture="methods.expert_prune:mixture",
        data="inputs, or texts",
    ),
)  # fmt: skip

_LABELLED = "labelled inputs, head"
_ASKS: dict[str, Any] = {"rule": "task_arithmetic"}  # finds its coefficients in its own way
_LEARNT = (
    _row("adamerging", "arXiv:2310.02575", Kind.search, loss="entropy", data=_WITH_HEAD),
    _row("adamerging_plus", "arXiv:2310.02575", Kind.search, "adamerging", loss="entropy", data=_WITH_HEAD),
    _row("concrete_task_arithmetic", "arXiv:2312.06173", Kind.search, "concrete", loss="entropy", data=_WITH_HEAD),
    _row("concrete_adamerging", "arXiv:2312.06173", Kind.search, "concrete", loss="entropy", data=_WITH_HEAD),
    _row("concrete_tsv_m", "arXiv:2312.06173", Kind.search, "concrete", loss="entropy", data=_WITH_HEAD),
    _row(
        "safe_concrete_task_arithmetic", "arXiv:2410.13910", Kind.search, "safe_concrete", loss="entropy",
        adversary="universal", data="unlabelled images, head",
    ),
    _row(
        "safe_concrete_adamerging", "arXiv:2410.13910", Kind.search, "safe_concrete", loss="entropy",
        adversary="universal", data="unlabelled images, head",
    ),
    _row(
        "awm", "arXiv:2207.04497", Kind.search, loss="labels", adversary="universal", all_tasks=True,
        data="labelled images of all tasks, head",
    ),
    _row(
        "sau", "arXiv:2307.10562", Kind.search, loss="labels", adversary="shared", all_tasks=True,
        data="labelled images of all tasks, head",
    ),
    _row("ada_rank", "arXiv:2503.22178", Kind.search, loss="entropy", data=_WITH_HEAD),
    _row("fw_merging", "arXiv:2503.12649", Kind.search, loss="labels", whole=True, data=_LABELLED, **_ASKS),
    _row("gossip", "FusionBench", Kind.search, loss="entropy", data=_WITH_HEAD, ordered=True, **_ASKS),
    _row(
        "lorahub", "arXiv:2307.13269", Kind.search, loss="labels", whole=True, data=_LABELLED, random=True,
        n_experts=(2, None), fewest=5, **_ASKS,
    ),
    _row(
        "expert_merging", "arXiv:2509.25712", Kind.search, loss="experts", whole=True, data=_WITH_HEAD, fewest=5,
        **_ASKS,
    ),
)  # fmt: skip

_BUILT = (
    _row("simple_ensemble", "ensemble", Kind.build, "ensembles", base=Base.unused),
    _row("weighted_ensemble", "ensemble", Kind.build, "ensembles", base=Base.unused, ordered=True),
    _row("max_model_predictor", "FusionBench", Kind.build, "ensembles", base=Base.unused),
    _row("we_moe", "arXiv:2402.00433", Kind.build, loss="entropy", data=_WITH_HEAD),
    _row("sparse_we_moe", "arXiv:2410.21804", Kind.build, loss="entropy", data=_WITH_HEAD),
    _row("rankone_moe", "FusionBench", Kind.build, loss="entropy", data=_WITH_HEAD),
    _row("pwe_moe", "arXiv:2406.09770", Kind.build, loss="labels", ordered=True, data="labelled inputs, head"),
    _row("dawe", "FusionBench", Kind.build, loss="entropy", data=_WITH_HEAD),
    _row("twin_merging", "arXiv:2406.15479", Kind.build, loss="own", data=_INPUTS),
    _row("surgery", "arXiv:2402.02705", Kind.build, loss="own", data=_INPUTS),
    _row("surgery_v2", "arXiv:2410.14389", Kind.build, "surgery", loss="own", data=_INPUTS),
)  # fmt: skip

_UPSCALED = (
    _row("smile", "arXiv:2408.10174", Kind.build),
    _row(
        "moe_upscaling", "arXiv:2212.05055", base=Base.unused, n_experts=(0, 1),
        mixture="methods.moe_upscaling:mixture",
    ),
    _row(
        "moe_merging", "mergekit", base=Base.unused, ordered=True, file="moe_upscaling",
        function="methods.moe_upscaling:moe_upscaling", mixture="methods.moe_upscaling:mixture",
        data="inputs, or texts, where routers are made of them",
    ),
)  # fmt: skip

FAMILIES: dict[str, tuple[Row, ...]] = {
    "references": _REFERENCES,
    "averages": _AVERAGES,
    "task vectors": _TASK_VECTORS,
    "geometry": _GEOMETRY,
    "spectra": _SPECTRA,
    "informed by data": _INFORMED,
    "one after the other": _FOLDS,
    "structure": _STRUCTURE,
    "compression of experts": _COMPRESSION,
    "pruning": _PRUNING,
    "learnt coefficients": _LEARNT,
    "built modules": _BUILT,
    "upscaling": _UPSCALED,
}

CATALOGUE: dict[str, Row] = {row.name: row for rows in FAMILIES.values() for row in rows}


def _veneer(name: str, paper: str, **facts: Any) -> Veneer:
    """A veneer and its parameters stand in the file of its name."""
    return Veneer(name, f"methods.{name}:{name}", f"methods.{name}:{name.capitalize()}Params", paper, **facts)


_VENEERS = (
    _veneer("lines", "arXiv:2410.17146"),
    _veneer("larv", "arXiv:2602.09413", elementwise=False, aligns=True, prepare="methods.larv:factors"),
    _veneer("knots", "arXiv:2410.19735", elementwise=False, aligns=True),
    _veneer("svc", "arXiv:2602.05536", elementwise=False),
)

VENEERS: dict[str, Veneer] = {veneer.name: veneer for veneer in _VENEERS}


def find(name: str) -> Row:
    """The row of a method.

    Raises:
        KeyError: No method has that name; the message names the closest.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    closest = difflib.get_close_matches(name, CATALOGUE, n=1)
    hint = f"did you mean {closest[0]}?" if closest else f"known are {', '.join(CATALOGUE)}"
    raise KeyError(f"no method is called {name!r}; {hint}")
