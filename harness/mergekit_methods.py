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
    for index, piece in enumerate(document.pieces):
        others = piece.without(document.base)
        if len(others) != 1:
            document.fault(f"slerp goes from the base to one model, slice {index} has {len(others)} besides the base")
    return "slerp", {"t": document.scalar("t", REQUIRED)}


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
    _refuse_rescale(document, "ties")
    return "ties", params | _densities(document)


def _dare(base_rule: str) -> Callable[[Document], Made]:
    def convert(document: Document) -> Made:
        _ask_base(document)
        params: dict[str, Any] = {"base_rule": base_rule, "rescale": document.flag("rescale", True)}
        weights, scale = document.per_expert("weight", REQUIRED), document.scalar("lambda", 1.0)
        normalize = document.flag("normalize", False)
        if base_rule == "ties":
            params |= {"trim": 1.0, "scope": "tensor", "disjoint": "mean" if normalize else "sum"}
        elif normalize:
            scale = _normalized(document, scale, weights)
        _common(document)
        found = _densities(document)
        if found != {"density": 1.0}:
            how = "is divided by its density, where mergekit matches the L1 norm of each tensor"
            rescaled = f"; what is left {how}" if params["rescale"] else ""
            document.note(
                f"the entries that are dropped follow from this tool's seed, they are not mergekit's{rescaled}"
            )
        return "dare", {**params, "scale": scale, "weights": weights, **found}

    return convert


METHODS: dict[str, Callable[[Document], Made]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_ties": _dare("ties"),
    "dare_linear": _dare("linear"),
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
