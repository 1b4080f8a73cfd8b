"""Where Optuna keeps a study: SQLite beside the tracking store, PostgreSQL, a journal file, a gRPC proxy."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb.models import TrialIntermediateValueModel as Stepped
from optuna.storages._rdb.models import TrialModel
from optuna.trial import TrialState
from sqlalchemy import insert, update
from sqlalchemy.exc import SQLAlchemyError

from harness.config import UserError

WAIT_S = 10  # for a server to answer, or another process to let go of a file
STALE = 4  # heartbeats that may be missed
MEANWHILE = ("already exists", "unique constraint", "is locked", "locking protocol")  # another process was quicker
KINDS = "sqlite:///FILE, postgresql://USER@HOST/NAME, journal:FILE, grpc://HOST:PORT"


def open_storage(url: str, heartbeat_s: int, on_stale: Callable[[Any, Any], None] | None = None) -> BaseStorage:
    """Open a storage; a database and its tables are made if there are none.

    Args:
        url: As `KINDS`.
        heartbeat_s: Seconds between a running trial's signs of life; databases alone keep them.
        on_stale: What to do with a trial that gave none, once it is marked failed.

    Raises:
        UserError: It cannot be reached, or it is of no known kind.
    """
    kind = url.partition(":")[0].partition("+")[0]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if kind in ("sqlite", "postgresql", "postgres", "mysql"):
                return _made(partial(_database, _with_driver(url), kind, heartbeat_s, on_stale))
            if kind == "journal":
                return _journal(Path(url.partition(":")[2]))
            if kind == "grpc":
                return _proxy(url)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy's, the driver's, gRPC's, the file system's
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
        raise UserError(f"study.storage={_safe(url)} cannot be used, nothing was started: {reason}") from error
    raise UserError(f"study.storage={_safe(url)}: it is one of {KINDS}")


def write_steps(storage: BaseStorage, trial_id: int, values: Mapping[int, float]) -> None:
    """Write a running trial's values by step: in one transaction, where the storage has such."""
    if not isinstance(storage, RDBStorage):
        for step, value in values.items():
            storage.set_trial_intermediate_value(trial_id, step, value)
        return
    spelled = {step: Stepped.intermediate_value_to_stored_repr(value) for step, value in values.items()}
    rows = [
        {"trial_id": trial_id, "step": step, "intermediate_value": value, "intermediate_value_type": kind}
        for step, (value, kind) in spelled.items()
    ]
    if rows:
        with storage.engine.begin() as connection:
            connection.execute(insert(Stepped), rows)


def default_url(tracking_uri: str) -> str:
    """A SQLite file beside the tracking store; in the working directory where that is elsewhere."""
    head, _, rest = tracking_uri.partition("://")
    if head == "sqlite":
        folder = Path(rest.removeprefix("/")).parent
    elif head == "file" or not rest:
        folder = Path(urlsplit(tracking_uri).path if head == "file" else tracking_uri).parent
    else:
        folder = Path()
    return f"sqlite:///{folder.absolute() / 'studies.db'}"


def _made(make: Callable[[], RDBStorage], tries: int = 10) -> RDBStorage:
    """A database whose tables another process may be making in the same moment."""
    for _ in range(tries - 1):
        try:
            return make()
        except (SQLAlchemyError, StorageInternalError) as error:
            said = f"{error} {error.__cause__}".lower()
            if not any(word in said for word in MEANWHILE):
                raise
            time.sleep(0.2)
    return make()


def _database(url: str, kind: str, heartbeat_s: int, on_stale: Callable[[Any, Any], None] | None) -> RDBStorage:
    """A database; SQLite writes ahead and waits for the disk at checkpoints only: a killed process loses nothing."""
    if kind == "sqlite":
        place = Path(url.partition(":///")[2])
        if not place.parent.is_dir():
            raise UserError(f"study.storage={url}: there is no directory {place.parent}")
        _write_ahead(place)
    made = _File if kind == "sqlite" else RDBStorage
    patience = {"timeout": 6 * WAIT_S} if kind == "sqlite" else {"connect_timeout": WAIT_S}
    storage = made(
        url,
        engine_kwargs={"connect_args": patience},
        heartbeat_interval=heartbeat_s,
        grace_period=STALE * heartbeat_s,
        heartbeat_stale_trial_callback=on_stale,
    )
    if kind == "sqlite":
        from sqlalchemy import event

        @event.listens_for(storage.engine, "connect")
        def settle(connection: Any, record: Any) -> None:
            connection.execute("PRAGMA synchronous=NORMAL")

        storage.engine.dispose()  # connections from here on are settled
    return storage


class _File(RDBStorage):
    """A SQLite file, which knows no SELECT FOR UPDATE: a queued trial is taken by one statement, so by one worker."""

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's, which reads before it writes: two workers that read at once would both begin the trial."""
        if state != TrialState.RUNNING or values is not None:
            return super().set_trial_state_values(trial_id, state, values)
        queued = update(TrialModel).where(TrialModel.trial_id == trial_id, TrialModel.state == TrialState.WAITING)
        now = datetime.now(UTC).replace(tzinfo=None)  # as Optuna keeps it
        with self.engine.begin() as connection:
            result = connection.execute(queued.values(state=TrialState.RUNNING, _datetime_start_utc=now))
        return result.rowcount == 1


def _write_ahead(place: Path) -> None:
    """Have the file written ahead, which it stays; the switch does not wait for other processes, so it is repeated."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with closing(sqlite3.connect(place, timeout=WAIT_S)) as connection:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
        time.sleep(0.05)


def _with_driver(url: str) -> str:
    """A PostgreSQL address that names no driver, with the one that the extra `postgresql` installs."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg2://{rest}" if scheme in ("postgres", "postgresql") else url


def _journal(place: Path) -> BaseStorage:
    """A file that lines are added to; for shared file systems without a database."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not place.parent.is_dir():
        raise UserError(f"study.storage=journal:{place}: there is no directory {place.parent}")
    return JournalStorage(JournalFileBackend(str(place)))


def _proxy(url: str) -> BaseStorage:
    """A server of `optuna.storages.run_grpc_proxy_server`."""
    from optuna.storages import GrpcStorageProxy

    place = urlsplit(url)
    if not place.hostname or not place.port:
        raise UserError(f"study.storage={url}: write grpc://HOST:PORT")
    storage = GrpcStorageProxy(host=place.hostname, port=place.port)
    storage.wait_server_ready(timeout=WAIT_S)
    return storage


def _safe(url: str) -> str:
    """The address without a password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", "@") if parts.password else url
