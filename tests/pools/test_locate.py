import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pools.headers import CheckpointError
from pools.locate import is_hub_id, locate

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path) -> Path:
    """A hub's cache with one model of two revisions."""
    repo = tmp_path / "hf" / "hub" / "models--org--name"
    for commit, text in ((COMMIT, "main"), ("f" * 40, "older")):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(text)
    (repo / "refs" / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "refs" / "pr" / "7").write_text("f" * 40)
    return tmp_path / "hf"


def ask(member: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`locate` in a process of its own, for the hub's library reads its environment once."""
    script = "import sys\nfrom pools.locate import locate\nprint(locate(sys.argv[1]))"
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", script, member]
    return subprocess.run(command, cwd=ROOT, env=kept | env, capture_output=True, text=True, check=False, timeout=60)


def test_a_path_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(str(tmp_path / "org")) == tmp_path / "org"
    assert locate("~/org") == tmp_path / "org"
    assert locate("./org") == Path("org")
    assert locate("org/name") == Path("org/name")  # what is here comes before the hub, as in transformers


def test_with_a_root_everything_relative_is_there(tmp_path, monkeypatch):
    (tmp_path / "root" / "org" / "name").mkdir(parents=True)
    (tmp_path / "root" / "org" / "name@v2").mkdir()
    (tmp_path / "org" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    assert locate("org/name", root) == root / "org" / "name"
    assert locate("org/name@v2", root) == root / "org" / "name@v2"
    assert locate("org/name@main", root) == root / "org" / "name"
    assert locate("./org/here", root) == Path("org/here")
    assert locate(str(tmp_path / "org"), root) == tmp_path / "org"
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*root/org/here, the place of org/here"):
        locate("org/here", root)
    with pytest.raises(CheckpointError, match=r"root/org/nam, the place of org/nam; .* has name"):
        locate("org/nam", root)


def test_models_of_the_tracker_are_resolved(tmp_path):
    asked = []

    def resolve(uri: str) -> Path:
        asked.append(uri)
        return tmp_path

    assert locate("models:/m-1", resolve=resolve) == tmp_path
    assert locate("runs:/r/model", root="anywhere", resolve=resolve) == tmp_path
    assert asked == ["models:/m-1", "runs:/r/model"]
    with pytest.raises(CheckpointError, match="none is connected"):
        locate("models:/m-1")


def test_a_name_without_a_slash_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at digits"):
        locate("digits")
    assert not is_hub_id("a/b/c")
    assert not is_hub_id("models:/a")


@pytest.mark.parametrize(
    ("member", "text"), [("org/name", "main"), ("org/name@refs/pr/7", "older"), (f"org/name@{COMMIT}", "main")]
)
def test_the_hubs_cache_serves_without_the_hub(hub, member, text):
    done = ask(member, HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.json").read_text() == text


def test_offline_and_not_in_the_cache(hub):
    done = ask("org/other@v2", HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    last = done.stderr.strip().splitlines()[-1]
    assert "org/other@v2 is not in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE)" in last
    assert "put it under ROOT/org/other and set root=ROOT" in last


def test_a_hub_that_does_not_answer(hub):
    started = time.monotonic()
    done = ask("org/other", HF_HOME=str(hub), HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - started < 40
    assert "org/other is not in the hub's cache, and the hub does not answer" in done.stderr.strip().splitlines()[-1]
    cached = ask("org/name", HF_HOME=str(hub), HF_ENDPOINT="http://127.0.0.1:9")
    assert Path(cached.stdout.strip()).name == COMMIT
