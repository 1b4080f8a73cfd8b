"""Where a result comes from: the commit of this code, the libraries' versions, the process that computes it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
from pathlib import Path

LIBRARIES = ("torch", "transformers", "mlflow")


def git_tags() -> dict[str, str]:
    """Commit and state of the checkout this code runs from; empty when it is installed, or git is not there."""
    here = Path(__file__).resolve()
    if shutil.which("git") is None or _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return {}
    commit = _git(here.parent, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit, "git_state": "changed" if changed else "clean"}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_tags() -> dict[str, str]:
    """Versions of what decides the numbers, read from package metadata: nothing is imported."""
    return {f"version.{name}": found for name in (*LIBRARIES, "crucible") if (found := version(name))}


def version(package: str) -> str | None:
    """The installed version of a package, or None (as for crucible run from a bare checkout)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def process_tags() -> dict[str, str]:
    """Tags by which a later run can tell whether this process still lives."""
    import psutil

    born = psutil.Process().create_time()
    return {
        "crucible.host": socket.gethostname(),
        "crucible.pid": str(os.getpid()),
        "crucible.process": f"{_namespace()} {born:.2f}",
    }


def is_dead(tags: dict[str, str]) -> bool:
    """Whether the process of `process_tags` is known to have ended: same host, same process namespace, and gone."""
    import psutil

    namespace, _, born = tags.get("crucible.process", "").rpartition(" ")
    if tags.get("crucible.host") != socket.gethostname() or namespace != _namespace():
        return False
    try:
        process = psutil.Process(int(tags["crucible.pid"]))
        reused = abs(process.create_time() - float(born)) > 1
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _namespace() -> str:
    """Two containers may share a host name and count processes apart; where the system cannot tell, 'pid'."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "pid"
