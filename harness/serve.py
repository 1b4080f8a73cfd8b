"""What MLflow calls to load a model that a run has logged; for CLIP: images in, labels and probabilities out.

An MLmodel file names this module as its `loader_module`; the weights are safetensors, nothing is unpickled.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.rebuild import open_directory
from harness.serve_language import Served, chosen, open_served

if TYPE_CHECKING:
    import pandas
    from PIL.Image import Image
    from torch import Tensor


BATCH = 64  # images at a time


def _load_pyfunc(path: str) -> Served:
    """MLflow's door."""
    directory = Path(path)
    told = _metadata(directory)
    family = told.get("family", "clip")  # models logged before there were others do not say
    if family == "clip":
        return ZeroShot(directory)
    return open_served(directory, family, bool(told.get("trust_remote_code")))


class ZeroShot:
    """An image classifier whose classes are named when it is asked."""

    def __init__(self, directory: Path) -> None:
        """Open a model directory: a CLIP checkpoint, or one that `pools.wrapped` wrote."""
        self._tasks = _metadata(directory).get("tasks") or {}
        self._module, self._pool = open_directory(directory)
        self._heads: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def predict(self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None) -> pandas.DataFrame:
        """Classify images.

        Args:
            model_input: A column `image`: encoded bytes (PNG, JPEG, ...), the same in base64, or PIL images.
            params: `task`, one of the tasks the model was scored on; or `classes`, and optionally `templates`
                with `{}` for the class, as a task has them. `expert`: of compressed experts the one that answers, by
                default the one of the task's name. `preference`: of a model that trades tasks for each other, a number
                for each expert.

        Returns:
            A row for each image: `label`, and `probabilities` in the order of the classes.
        """
        import pandas
        import torch

        module = chosen(self._module, params or {}, "task")
        labels, templates = self._classes(params or {})
        head = self._head(labels, templates)
        images = [decoded(each) for each in _column(model_input)]
        shares = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                embeddings = module(**self._pool.feed(images[start : start + BATCH]))  # (B, D)
                shares += (embeddings @ head.T).softmax(-1).tolist()
        winners = [labels[max(range(len(labels)), key=row.__getitem__)] for row in shares]
        return pandas.DataFrame({"label": winners, "probabilities": shares}, index=model_input.index)

    def _classes(self, params: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        given = tuple(str(name) for name in params.get("classes") or ())
        task = params.get("task")
        known = self._tasks.get(str(task), {})
        templates = tuple(params.get("templates") or (() if given else known.get("templates", ())))
        labels = given or tuple(known.get("labels", ()))
        if not labels:
            names = ", ".join(self._tasks) or "none"
            raise ValueError(
                f"params must name classes (a list of labels), or a task this model was scored on ({names}); "
                f"got task={task!r} and classes={params.get('classes')!r}"
            )
        return labels, templates or ("a photo of a {}",)

    def _head(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        key = (labels, templates)
        if key not in self._heads:
            self._heads[key] = self._pool.head(labels, templates)
        return self._heads[key]


def _metadata(directory: Path) -> Mapping[str, Any]:
    """What the MLmodel file keeps of the run: `family`, and `tasks` with labels and templates."""
    import yaml

    described = yaml.safe_load((directory / "MLmodel").read_text(encoding="utf-8"))
    return described.get("metadata") or {}


def _column(model_input: pandas.DataFrame) -> Sequence[Any]:
    if "image" not in model_input:
        raise ValueError(f"the input needs a column 'image', got {', '.join(map(str, model_input))}")
    return list(model_input["image"])


def decoded(value: Any) -> Image:
    """An image in RGB from encoded bytes, base64 text or a PIL image.

    Raises:
        ValueError: It is none of these.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else bytes(value)
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"an image is PNG or JPEG bytes, the same in base64, or a PIL image; got {type(value).__name__}: {error}"
        ) from error
