"""mergekit's methods and what they are here: a function for each gives our method's name and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.mergekit_document import REQUIRED, Document

NAMES = (
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear",
    "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl", "model_stock", "nearswap",
    "arcee_fusion", "passthrough",
)  # fmt: skip

Made = tuple[str, dict[str, Any]]


def _linear(document: Document) -> Made:
    document.base_merges = True
    listed = [given.reference for piece in document.pieces for given in piece.inputs]
    if document.base is not None and document.base not in listed:
        document.fault(
            "base_model: linear averages the models that are listed, and mergekit stops at a base that is not"
        )
    weights = document.per_expert("weight", REQUIRED)
    return "weighted_average", {"weights": weights, "normalize": document.flag("normalize", True)}


def _slerp(document: Document) -> Made:
    _ask_base(document)
    _ask_count(document, 1)
    return "slerp", {"t": document.scalar("t", REQUIRED)}


def _nuslerp(document: Document) -> Made:
    if document.base is not None:
        _ask_base(document)
    _ask_count(document, 2)
    weights = document.per_expert("weight", REQUIRED)
    if not any(isinstance(weight, list) for weight in weights) and abs(sum(weights)) < 1e-6:
        document.fault("weight: weights of nuslerp that sum to zero have no counterpart; equal ones go half the way")
    flat, columns = document.flag("nuslerp_flatten", True), document.flag("nuslerp_row_wise", False)
    return "nuslerp", {"weights": weights, "along": "tensor" if flat else "first" if columns else "last"}


def _multislerp(document: Document) -> Made:
    if document.base is not None:
        _ask_base(document)
    weights = document.per_expert("weight", REQUIRED)
    document.ignored("eps", "it keeps mergekit from dividing by zero, which is done otherwise here")
    return "multislerp", {"weights": weights, "normalize": document.flag("normalize_weights", True)}


def _karcher(document: Document) -> Made:
    document.base_merges = True
    listed = [given.reference for piece in document.pieces for given in piece.inputs]
    if document.base is not None and document.base not in listed:
        document.fault("base_model: karcher averages it in like the others; list it among the models, or remove it")
    steps, tolerance = (_one_number(document, name, default) for name, default in (("max_iter", 10), ("tol", 1e-5)))
    return "karcher", {"steps": int(steps), "tolerance": tolerance}


def _model_stock(document: Document) -> Made:
    _ask_base(document)
    by_filter = document.flag("filter_wise", False)
    if by_filter:
        document.note("filter_wise takes each output filter of a convolution, mergekit each row of its kernels")
    return "model_stock", {"filter_wise": by_filter, "clamp": False}


def _nearswap(document: Document) -> Made:
    _ask_base(document)
    _ask_count(document, 1)
    return "nearswap", {"t": document.scalar("t", REQUIRED)}


def _arcee_fusion(document: Document) -> Made:
    _ask_base(document)
    _ask_count(document, 1)
    document.note("arcee_fusion takes exact quantiles, where mergekit samples tensors of more than a million entries")
    return "arcee_fusion", {}


def _passthrough(document: Document) -> Made:
    document.base_merges = True
    listed = [given.reference for piece in document.pieces for given in piece.inputs]
    if document.base is not None and document.base not in listed:
        document.fault("base_model: passthrough takes one model in each slice, and a base that is not it makes two")
    if any(len(piece.inputs) != 1 for piece in document.pieces):
        document.fault("passthrough takes one model in each slice")
        return "passthrough", {}
    return "passthrough", _unless({"scale": document.per_expert("scale", 1.0)[0]}, scale=1.0)


def _task_arithmetic(document: Document) -> Made:
    _ask_base(document)
    document.ignored("density", "task_arithmetic does not trim; mergekit passes over it, and so is done here")
    weights, scale = document.per_expert("weight", REQUIRED), document.scalar("lambda", 1.0)
    _common(document)
    if document.flag("normalize", False):
        scale = _normalized(document, scale, weights)
    _refuse_rescale(document, "task_arithmetic")
    return "task_arithmetic", {"scale": scale, "weights": weights}


def _ties(document: Document) -> Made:
    _ask_base(document)
    params: dict[str, Any] = {"scope": "tensor", "scale": document.scalar("lambda", 1.0)}
    params["disjoint"] = "mean" if document.flag("normalize", True) else "sum"
    params["weights"] = document.per_expert("weight", REQUIRED)
    _common(document)
    if document.flag("rescale", False):
        params["rescale"] = "l1"
    return "ties", params | _densities(document)


def _dare(base_rule: str) -> Callable[[Document], Made]:
    def convert(document: Document) -> Made:
        params = _dropped(document, base_rule == "ties", normalize=False) | {"scope": "tensor"}
        return ("dare_ties", params | {"trim": 1.0}) if base_rule == "ties" else ("dare", params)

    return convert


def _della(base_rule: str) -> Callable[[Document], Made]:
    def convert(document: Document) -> Made:
        epsilon = _of_all(document, "epsilon", 0.15)
        name = "della" if base_rule == "ties" else "della_linear"
        return name, {"epsilon": epsilon, **_dropped(document, base_rule == "ties", normalize=base_rule == "ties")}

    return convert


def _breadcrumbs(base_rule: str) -> Callable[[Document], Made]:
    def convert(document: Document) -> Made:
        gamma = _of_all(document, "gamma", 0.01)
        params = _summed(document, base_rule == "ties", normalize=False)
        _refuse_rescale(document, document.method)
        return document.method, {"gamma": gamma, **params}

    return convert


def _sce(document: Document) -> Made:
    _ask_base(document)
    _common(document)
    document.note("sce weighs experts by their changes however small, mergekit equally where all changes are tiny")
    return "sce", {"density": document.scalar("select_topk", 1.0)}


def _ram(document: Document) -> Made:
    _ask_base(document)
    return "ram", {"epsilon": document.scalar("epsilon", 1e-5)}


def _ramplus_tl(document: Document) -> Made:
    _ask_base(document)
    found = {name: document.scalar(name, default) for name, default in (("r", 0.1), ("alpha", 0.2), ("epsilon", 1e-5))}
    return "ramplus_tl", {**found, "scope": "tensor"}


METHODS: dict[str, Callable[[Document], Made]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_ties": _dare("ties"),
    "dare_linear": _dare("linear"),
    "della": _della("ties"),
    "della_linear": _della("linear"),
    "breadcrumbs": _breadcrumbs("linear"),
    "breadcrumbs_ties": _breadcrumbs("ties"),
    "sce": _sce,
    "ram": _ram,
    "ramplus_tl": _ramplus_tl,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "passthrough": _passthrough,
}


def _ask_base(document: Document) -> None:
    """The method starts from a base, which every slice has to have layers of."""
    if document.base is None:
        document.fault(f"base_model: {document.method} needs one")
    for index, piece in enumerate(document.pieces):
        count = sum(given.reference == document.base for given in piece.inputs)
        if document.sliced and count != 1:
            document.fault(
                f"slices[{index}]: {document.method} needs the base among its sources once, it is there {count} times"
            )


def _ask_count(document: Document, wanted: int) -> None:
    """The method merges so many models besides the base."""
    for index, piece in enumerate(document.pieces):
        found = len(piece.without(document.base))
        if found != wanted:
            besides = " besides the base" if document.base is not None else ""
            document.fault(f"{document.method} merges {wanted} model(s){besides}, slice {index} has {found}")


def _summed(document: Document, votes: bool, normalize: bool) -> dict[str, Any]:
    """Weights, densities and scale of a sum of task vectors, which `votes` or not."""
    _ask_base(document)
    weights, scale = document.per_expert("weight", REQUIRED), document.scalar("lambda", 1.0)
    normalized = document.flag("normalize", normalize)
    disjoint = {"disjoint": "mean" if normalized else "sum"} if votes else {}
    if normalized and not votes:
        scale = _normalized(document, scale, weights)
    _common(document)
    return {**disjoint, "scale": scale, "weights": weights, **_densities(document)}


def _dropped(document: Document, votes: bool, normalize: bool) -> dict[str, Any]:
    """The same where entries are dropped at random."""
    params = {"rescale": "l1" if document.flag("rescale", True) else "none", **_summed(document, votes, normalize)}
    if params.get("density") != 1.0:
        document.note("the entries that are dropped follow from this tool's seed, they are not mergekit's")
    return params


def _common(document: Document) -> None:
    document.ignored("int8_mask", "it saves mergekit memory and changes no result")


def _refuse_rescale(document: Document, method: str) -> None:
    if document.flag("rescale", False):
        document.fault(f"rescale: true has no counterpart for {method}")


def _normalized(document: Document, scale: Any, weights: list[Any]) -> Any:
    """Division by the sum of the weights, as part of the scale."""
    if isinstance(scale, list) or any(isinstance(weight, list) for weight in weights):
        document.fault(
            f"normalize: with weights or lambda that differ by tensor it has no counterpart for {document.method}"
        )
        return scale
    total = sum(weights)
    return scale / (total if abs(total) >= 1e-8 else 1.0)


def _densities(document: Document) -> dict[str, Any]:
    """One density, or one for each expert."""
    found = document.per_expert("density", 1.0)
    for value in _values(found):
        if not 0 < value <= 1:
            document.fault(f"density: {value} is no share in (0, 1]; to leave a model out give it the weight 0")
    if all(density == found[0] for density in found) and not isinstance(found[0], list):
        return {"density": found[0]}
    return {"densities": found}


def _of_all(document: Document, name: str, default: float) -> Any:
    """One number or schedule that all experts share."""
    found = document.per_expert(name, default)
    if any(value != found[0] for value in found):
        document.fault(f"{name}: one for all models has a counterpart, different ones have none")
    return found[0] if found else default


def _one_number(document: Document, name: str, default: float) -> float:
    """A number that is the same for all tensors."""
    found = document.scalar(name, default)
    if isinstance(found, list):
        document.fault(f"{name}: one number for all tensors has a counterpart, nothing else")
        return default
    return float(found)


def _values(found: Any) -> list[float]:
    """All numbers in schedules."""
    if isinstance(found, dict):
        return _values(found["value"])
    if isinstance(found, list):
        return [value for one in found for value in _values(one)]
    return [found]


def _unless(params: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """The parameters without those at their defaults."""
    return {name: value for name, value in params.items() if value != defaults.get(name)}
