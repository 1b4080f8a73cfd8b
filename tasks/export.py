"""Write the drawn tasks as the parquet files that `datasets` reads: one folder per task, one file per split."""

import io
import json
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tasks.draw import SIZES, TASKS, Split, split


def write_tasks(out: Path, seed: int) -> None:
    """Draw every split of every task into `out/<task>/<split>.parquet` and the templates into `out/templates.json`."""
    for name, task in TASKS.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for part in SIZES:
            _write_split(out / name / f"{part}.parquet", split(name, part, seed), task.classes)
    templates = {name: list(task.templates) for name, task in TASKS.items()}
    (out / "templates.json").write_text(json.dumps(templates, indent=2) + "\n")


def _write_split(path: Path, rows: Split, classes: tuple[str, ...]) -> None:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(classes))})
    stored = {"bytes": Value("binary"), "path": Value("string")}
    images = [{"bytes": _png(Image.fromarray(image)), "path": None} for image in rows.images]
    plain = Dataset.from_dict(
        {"image": images, "label": rows.labels.tolist()}, features=Features({"image": stored, "label": Value("int64")})
    )
    plain.cast(features).to_parquet(path)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
