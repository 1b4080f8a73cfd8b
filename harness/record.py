"""What a run records: `Run` records nothing and is what every rank but zero holds, `recorded` has MLflow behind it.

With track.py, store.py and logged_model.py this is the gate to mlflow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.logged_model import ModelReference, log_model
from harness.measure import measure

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

LONGEST_PARAM, LONGEST_TAG = 6000, 8000  # characters, MLflow's own limits
DIGEST = 12  # characters of a fingerprint beside a data set's name; MLflow takes 36
PER_REQUEST = 100  # parameters, tags and data sets
SERIES_N, SERIES_S = 500, 2.0  # a series is sent when so many values wait, or the oldest has waited so long


@dataclass(frozen=True)
class DataInput:
    """One split of one data set, as it shows among a run's inputs."""

    name: str
    source: str  # a path, or a hub id
    fingerprint: str
    split: str
    n_rows: int | None = None
    labels: Sequence[str] = ()
    columns: Mapping[str, str] = field(default_factory=lambda: {"image": "binary", "label": "long"})  # name -> type


class Run:
    """A run that records nothing."""

    id: str | None = None
    model: ModelReference | None = None

    def metric(self, key: str, value: float, step: int | None = None) -> None:
        """Record a number: at once without a step; with one it is a value of a series and may wait `SERIES_S`."""

    def flush(self) -> None:
        """Send what waits of the series."""

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; a key the run already holds keeps its value."""

    def describe(self, markdown: str) -> None:
        """Set the description at the head of the run's page."""

    def inputs(self, inputs: Iterable[DataInput]) -> None:
        """Record data sets as the run's inputs."""

    def lineage(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        """Record where base and experts come from: {name: {source, fingerprint, ...}}."""

    def table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Write rows as a table artifact, `<name>.json`, which the interface shows as a table."""

    def figure(self, figure: Figure, file: str) -> None:
        """Write a figure as an artifact, `<name>.png`."""

    def text(self, text: str, file: str) -> None:
        """Write a text artifact."""

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Measure the body and record `time/<name>_s` and `memory/<name>_peak_bytes`."""
        return nullcontext()

    def log_model(
        self, write: Callable[[Path], Any], metadata: Mapping[str, Any] | None = None, name: str = "model"
    ) -> ModelReference | None:
        """Have `write` write the merged model into the store; see `harness.logged_model.log_model`."""
        return None


class _Recorded(Run):
    def __init__(self, client: MlflowClient, run_id: str, about: Mapping[str, str]) -> None:
        self.id = self._id = run_id
        self._client = client
        self._about = dict(about)
        self._waiting: list[Metric] = []
        self._sent_s = time.monotonic()
        self._data: dict[str, tuple[str, str]] = {}  # task -> name and digest of the data it is scored on
        self._scores: list[Metric] = []  # without a step: what a model logged later is credited with

    def metric(self, key: str, value: float, step: int | None = None) -> None:
        if step is None:
            score = self._metric(key, value)
            self._scores.append(score)
            self._client.log_batch(self._id, metrics=[score])
            return
        self._waiting.append(self._metric(key, value, step, linked=False))
        if len(self._waiting) >= SERIES_N or time.monotonic() - self._sent_s > SERIES_S:
            self.flush()

    def _metric(self, key: str, value: float, step: int = 0, linked: bool = True) -> Metric:
        from mlflow.entities import Metric

        model_id = self.model.id if self.model and linked else None
        name, digest = self._data.get(key.partition("/")[0], (None, None)) if linked else (None, None)
        now_ms = time.time_ns() // 1_000_000
        return Metric(key, float(value), now_ms, step, model_id, name, digest, self._id)

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._sent_s = time.monotonic()
        for start in range(0, len(waiting), SERIES_N):
            self._client.log_batch(self._id, metrics=waiting[start : start + SERIES_N])

    def tag(self, key: str, value: str) -> None:
        self.tags({key: value})

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, shortened(str(value), LONGEST_TAG)) for key, value in values.items()]
        for start in range(0, len(tags), PER_REQUEST):
            self._client.log_batch(self._id, tags=tags[start : start + PER_REQUEST])

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        held = self._client.get_run(self._id).data.params
        new = [Param(key, shortened(spelled(value), LONGEST_PARAM)) for key, value in values.items() if key not in held]
        for start in range(0, len(new), PER_REQUEST):
            self._client.log_batch(self._id, params=new[start : start + PER_REQUEST])

    def describe(self, markdown: str) -> None:
        self.tag("mlflow.note.content", markdown)

    def inputs(self, inputs: Iterable[DataInput]) -> None:
        inputs = list(inputs)
        found = [_dataset(each) for each in inputs]
        self._data.update({each.name: _identity(each) for each in inputs})
        for start in range(0, len(found), PER_REQUEST):
            self._client.log_inputs(self._id, found[start : start + PER_REQUEST])

    def lineage(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        self._client.log_dict(self._id, {name: dict(facts) for name, facts in members.items()}, "lineage.json")
        self.params({f"fingerprint.{name}": facts["fingerprint"] for name, facts in members.items()})

    def table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        import pandas

        columns = list(dict.fromkeys(key for row in rows for key in row))
        frame = pandas.DataFrame([[row.get(key) for key in columns] for row in rows], columns=columns, dtype=object)
        self._client.log_table(self._id, frame, file)

    def figure(self, figure: Figure, file: str) -> None:
        self._client.log_figure(self._id, figure, file, save_kwargs={"dpi": 120})

    def text(self, text: str, file: str) -> None:
        self._client.log_text(self._id, text, file)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with measure() as found:
            yield
        peaks = {"": found.peak_bytes, "device_": found.device_peak_bytes}
        values = {f"memory/{name}_{place}peak_bytes": peak for place, peak in peaks.items() if peak is not None}
        metrics = [self._metric(key, value, linked=False) for key, value in values.items()]
        metrics.append(self._metric(f"time/{name}_s", round(found.seconds, 4), linked=False))
        self._client.log_batch(self._id, metrics=metrics)

    def log_model(
        self, write: Callable[[Path], Any], metadata: Mapping[str, Any] | None = None, name: str = "model"
    ) -> ModelReference:
        tags = {key: value for key, value in self._about.items() if not key.startswith(("mlflow.", "crucible."))}
        self.model = log_model(self._client, self._id, write, name=name, metadata=metadata or {}, tags=tags)
        if self._scores:
            self._client.log_batch(self._id, metrics=[_credited(score, self.model.id) for score in self._scores])
        return self.model


def recorded(client: MlflowClient, run_id: str, about: Mapping[str, str]) -> Run:
    """An open run of a store; `about` are its tags, which its model gets too."""
    return _Recorded(client, run_id, about)


def _credited(score: Metric, model_id: str) -> Metric:
    from mlflow.entities import Metric

    data = score.dataset_name, score.dataset_digest
    return Metric(score.key, score.value, score.timestamp, score.step, model_id, *data, score.run_id)


def spelled(value: Any) -> str:
    """A parameter's value as an override on the command line would spell it.

    >>> spelled(0.3), spelled(None), spelled([1, 2]), spelled("ties")
    ('0.3', 'null', '[1, 2]', 'ties')
    """
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def shortened(text: str, longest: int) -> str:
    """The text, or its beginning with a mark that says so."""
    if len(text) <= longest:
        return text
    mark = f" ... [cut, {len(text)} characters; the whole is in the run's artifacts]"
    return text[: longest - len(mark)] + mark


def _identity(data: DataInput) -> tuple[str, str]:
    """Name and digest of a data set."""
    return f"{data.name}/{data.split}", data.fingerprint[:DIGEST]


def _dataset(data: DataInput) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    local = Path(data.source).exists()
    source = {"uri": str(Path(data.source).resolve())} if local else {"path": data.source, "split": data.split}
    schema = {"mlflow_colspec": [{"type": kind, "name": column} for column, kind in data.columns.items()]}
    profile = {"num_rows": data.n_rows, "num_classes": len(data.labels) or None, "fingerprint": data.fingerprint}
    name, digest = _identity(data)
    entity = Dataset(
        name=name,
        digest=digest,
        source_type="local" if local else "hugging_face",
        source=json.dumps(source),
        schema=json.dumps(schema),
        profile=json.dumps({key: value for key, value in profile.items() if value is not None}),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", data.split)])
