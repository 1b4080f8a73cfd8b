"""A directory that has its name only when it is complete, and what is left of those that were interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pools.headers import CheckpointError

JOURNAL = "merge.json"  # in a partial directory: which merge it is of, and which of its files are finished
_PARTIAL = re.compile(r"^\..+\.partial-(\d+)$")
_GIB = 1 << 30


class Journal:
    """In a partial directory: which merge it is of, and which of its weights files are finished."""

    def __init__(self, partial: Path, key: str, finished: Collection[str] = ()) -> None:
        self._file, self._key = partial / JOURNAL, key
        self.finished = list(finished)
        self._lock = threading.Lock()

    def finish(self, file: str) -> None:
        """Note that a file is whole and on the disk."""
        with self._lock:
            self.finished.append(file)
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps({"key": self._key, "finished": self.finished}), encoding="utf-8")
            os.replace(partial, self._file)


@contextmanager
def partial_directory(
    directory: Path, needed_bytes: int = 0, *, key: str | None = None, resume: bool = False
) -> Iterator[Path]:
    """A sibling of the directory to fill, `.<name>.partial-<pid>`: synced and renamed at the end, removed on any error.

    Args:
        directory: What it will be called.
        needed_bytes: What will be written.
        key: Of the merge, where it can be resumed: then a partial directory in which a `Journal` has noted finished
            files is left when the merge fails.
        resume: Go on with what an earlier process has left of the merge with this key.

    Raises:
        CheckpointError: The directory is taken, or the disk cannot hold what is to be written.
    """
    directory = Path(directory)
    refuse_taken(directory)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        left = _left_of(directory, key) if resume and key is not None else None
        if left != partial:
            shutil.rmtree(partial, ignore_errors=True)
        if left is not None:
            os.rename(left, partial)
        free = shutil.disk_usage(directory.parent).free
        held = sum(file.stat().st_blocks * 512 for file in partial.iterdir()) if left is not None else 0
        if needed_bytes - held > free:
            raise CheckpointError(
                f"{directory} cannot be written: {_sizes(needed_bytes - held, free)}; make room, or write elsewhere"
            )
        partial.mkdir(exist_ok=True)
        yield partial
        (partial / JOURNAL).unlink(missing_ok=True)
        for path in (*(path for path in partial.rglob("*")), partial):
            sync(path)
        os.rename(partial, directory)
        sync(directory.parent)
        for path in _leftovers(directory):  # nobody can resume into a name that is taken
            shutil.rmtree(path, ignore_errors=True)
    except BaseException as error:
        if key is None or not finished_files(partial, key):
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise CheckpointError(_failed(directory, needed_bytes, error)) from error
        raise


def finished_files(partial: Path, key: str) -> list[str]:
    """The weights files that a partial directory of the merge with this key holds whole."""
    try:
        journal = json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
        found = [str(file) for file in journal["finished"]] if journal["key"] == key else []
        return [file for file in found if (partial / file).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _left_of(directory: Path, key: str) -> Path | None:
    """What an earlier process has left of this merge: the one with most files finished."""
    known = {path: len(finished_files(path, key)) for path in _leftovers(directory)}
    best = max(known, key=lambda path: known[path], default=None)
    return best if best is not None and known[best] else None


def _leftovers(directory: Path) -> list[Path]:
    """Half-written directories of this name whose writers have ended, or had this process's number before it."""
    ended = find_partials(directory.parent)
    own = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    return [path for path in ended if path.name.rpartition(".partial-")[0] == f".{directory.name}"] + (
        [own] if own.is_dir() else []
    )


def refuse_taken(directory: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        CheckpointError: There is a file, or a directory that is not empty.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists already and is not overwritten; name another directory or remove it")


def find_partials(parent: Path) -> list[Path]:
    """Directories that writers of this machine left half-written when they were killed."""
    found = [path for path in sorted(Path(parent).glob(".*.partial-*")) if path.is_dir()]
    return [path for path in found if (match := _PARTIAL.match(path.name)) and not _lives(int(match[1]))]


def sync(path: Path, how: Callable[[int], None] = os.fsync) -> None:
    """Have a file or directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        how(descriptor)
    finally:
        os.close(descriptor)


def _sizes(needed: int, free: int) -> str:
    return f"{needed / _GIB:.3g} GiB are needed, its disk has {free / _GIB:.3g} GiB free"


def _failed(directory: Path, needed: int, error: OSError) -> str:
    """What to say when the system refuses to write."""
    try:
        room = _sizes(needed, shutil.disk_usage(directory.parent).free)
    except OSError:
        room = f"{needed / _GIB:.3g} GiB are needed"
    return f"{directory} could not be written: {error.strerror or error} ({room}); there is nothing under that name"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def linked(source: Path, target: Path) -> None:
    """A directory's files under another path too; copies where the file system cannot link."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link)
