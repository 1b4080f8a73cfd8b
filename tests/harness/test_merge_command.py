"""`crucible merge` as a user meets it: what it writes, what it prints, and what it refuses in one clear message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import cli
from harness.merge import merge_state_dicts
from pools.checkpoint import INDEX, Checkpoint
from pools.headers import OpenFiles
from tests.harness.engine_parts import ROOT, bits, files_of
from tests.pools.language_models import change_config, change_tensors, write_model

MEMBERS = ("base", "chat", "code")
HEAD = "lm_head.weight"


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(MEMBERS):
        write_model(root / name, "llama", seed)
    return root


@pytest.fixture
def place(written, tmp_path) -> Path:
    """A base and two experts, tiny Llamas that a test may spoil."""
    for name in MEMBERS:
        shutil.copytree(written / name, tmp_path / name)
    return tmp_path


def overrides(place: Path, *more: str, pool: str = "causal_lm") -> list[str]:
    experts = [f"+pool.experts.{name}={place / name}" for name in MEMBERS[1:]]
    return [f"pool={pool}", f"pool.base={place / 'base'}", *experts, *more]


def merged(place: Path, *more: str, pool: str = "causal_lm", out: str = "out") -> Path:
    assert cli.main(["merge", *overrides(place, *more, pool=pool), f"output={place / out}"]) == 0
    return place / out


@pytest.fixture
def refused(place, capfd, monkeypatch):
    """Runs a merge that must be refused, by default without a weight having been read; gives what it said."""

    def refuse(*more: str, reads: bool = False, pool: str = "causal_lm") -> str:
        before = {path.name for path in place.iterdir()}
        read, fill = [], OpenFiles.fill

        def watched(self, file, block, offset, name):
            read.append(name)
            return fill(self, file, block, offset, name)

        monkeypatch.setattr(OpenFiles, "fill", watched)
        capfd.readouterr()
        given = more if any(text.startswith("output=") for text in more) else (*more, f"output={place / 'out'}")
        assert cli.main(["merge", *overrides(place, *given, pool=pool)]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.startswith("crucible: ")
        assert said.err.count("crucible: ") == 1
        assert "Traceback" not in said.err
        assert {path.name for path in place.iterdir()} == before
        assert reads or not read
        return said.err.removeprefix("crucible: ").strip()

    return refuse


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_output_loads_in_transformers_as_it_is(place, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = merged(place, "method=task_arithmetic", "method.scale=0.5")
    said = capfd.readouterr()
    assert f"the merged model is in {out}" in said.out
    assert "rounding error" in said.out
    members = {name: Checkpoint(place / name) for name in MEMBERS}
    base = members.pop("base")
    expected = merge_state_dicts(base, members, "task_arithmetic", {"scale": 0.5})
    assert bits(Checkpoint(out)) == bits(expected)
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    assert model.config.to_dict() == AutoModelForCausalLM.from_pretrained(place / "base").config.to_dict() | {
        "_name_or_path": model.config.to_dict().get("_name_or_path")
    }
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert (
        AutoTokenizer.from_pretrained(out)("ab").input_ids
        == AutoTokenizer.from_pretrained(place / "base")("ab").input_ids
    )
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_shards_index_and_card(place):
    out = merged(place, "method=ties", "engine.shard_bytes=9000", "engine.dtype=bfloat16", "seed=5")
    files = files_of(out)
    index = json.loads(files[INDEX])
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert set(files) >= {*shards, "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    tensors = Checkpoint(out)
    assert index["metadata"]["total_size"] == tensors.nbytes
    assert set(tensors.dtypes.values()) == {torch.bfloat16}
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"
    card = files["README.md"].decode()
    for name in MEMBERS:  # found while merging, block by block; here from scratch
        assert f"| {name} | {place / name} | {Checkpoint(place / name).fingerprint[:16]} |" in card
    assert "| density | 0.2 |" in card
    assert "| seed | 5 |" in card


@pytest.mark.parametrize("method", ["simple_average", "ties", "slerp", "dare"])
def test_fingerprints_on_the_card_are_those_of_the_files_whatever_was_read(place, method):
    experts = ["experts=[code]"] if method == "slerp" else []
    out = merged(place, f"method={method}", *experts)
    card = (out / "README.md").read_text()
    for name in ("base", "code"):
        assert f"| {Checkpoint(place / name).fingerprint[:16]} |" in card


def test_workers_and_shards_change_no_bit(place):
    one = merged(place, "method=dare", "engine.workers=1", out="one")
    two = merged(place, "method=dare", "engine.workers=3", "engine.shard_bytes=9000", out="two")
    assert bits(Checkpoint(one)) == bits(Checkpoint(two))


def test_every_tensor_is_in_the_output_or_named_as_dropped(place, capfd):
    def stale(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_tensors(place / "base", stale)
    change_tensors(place / "code", stale)
    on_disk = {name: set(Checkpoint(place / name)) for name in MEMBERS}
    assert cli.main(["merge", *overrides(place), "method=simple_average", "dry_run=true"]) == 0
    said = capfd.readouterr().out
    dropped = {
        line.split("not in the output, of ")[1].split()[0]: line.rpartition("  ")[2].strip()
        for line in said.splitlines()
        if "not in the output, of " in line
    }
    out = set(Checkpoint(merged(place, "method=simple_average")))
    for name, names in on_disk.items():
        assert names - out == set(filter(None, dropped.get(name, "").split(", ")))
    assert set(dropped) == {"base", "code"}


def test_dry_run_prints_and_writes_nothing(place, capfd):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    for given in ((), (f"output={place / 'new' / 'out'}",)):
        assert cli.main(["merge", *overrides(place, *given), "method=ties", "method.density=0.4", "dry_run=true"]) == 0
        said = capfd.readouterr()
        lines = said.out.splitlines()
        for name in Checkpoint(place / "base"):
            (line,) = (line for line in lines if line.split()[:1] == [name])
            assert "merged" in line
            assert "0.4" in line
        for fact in ("tensors", "to read", "to write", "free on the disk", "peak memory", "time"):
            assert any(line.lstrip().startswith(fact) for line in lines), fact
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_it_starts_without_what_only_evaluation_needs(place):
    code = (
        "import sys\n"
        "from harness.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "slow = {'transformers', 'peft', 'datasets', 'lightning', 'mlflow', 'sklearn', 'pandas', 'matplotlib'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, "merge", *overrides(place, f"output={place / 'out'}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_no_output(place, capfd):
    assert cli.main(["merge", *overrides(place)]) == 2
    assert "output=DIR says where the merged model is written" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_output_that_is_taken(refused, place, kind):
    taken = place / "taken"
    if kind == "file":
        taken.touch()
    else:
        taken.mkdir()
        (taken / "precious").touch()
    for more in ((), ("dry_run=true",), ("engine.resume=true",)):
        assert f"{taken} exists already and is not overwritten" in refused(f"output={taken}", *more)


def test_an_empty_directory_may_be_the_output(place):
    (place / "out").mkdir()
    assert (merged(place) / "config.json").exists()


@pytest.mark.parametrize("method", ["fisher", "adamerging", "we_moe"])
def test_a_method_that_is_fed_data(refused, method):
    assert f"{method} is fed data: merge with `crucible run method={method}`" in refused(f"method={method}")


def test_all_faults_of_headers_at_once(refused, place):
    change_tensors(place / "chat", lambda tensors: {k: v for k, v in tensors.items() if k != "model.norm.weight"})
    change_tensors(place / "code", lambda tensors: tensors.update({HEAD: torch.zeros(260, 8)}))
    said = refused()
    assert "expert chat misses model.norm.weight (16,), which the base has" in said
    assert f"expert code has {HEAD} of shape (260, 8), where the base has (260, 16)" in said


def test_members_that_are_not_there_are_all_named(refused, place):
    shutil.rmtree(place / "chat")
    said = refused(f"pool.base={place / 'bases'}")
    assert "there is no checkpoint at" in said
    assert f"{place / 'chat'}" in said
    assert f"{place / 'bases'}; {place} has base" in said


def sharded(directory: Path) -> dict:
    """Cut a member's file into two shards; gives the index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[:4], "two.safetensors": names[4:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def test_an_index_that_names_a_missing_tensor(refused, place):
    index = sharded(place / "chat")
    index["weight_map"]["model.nothing.weight"] = "two.safetensors"
    (place / "chat" / INDEX).write_text(json.dumps(index))
    assert "puts model.nothing.weight into two.safetensors, which lacks it" in refused()


def test_a_shard_that_is_missing(refused, place):
    sharded(place / "chat")
    (place / "chat" / "two.safetensors").unlink()
    assert f"{place / 'chat'} lacks the shard two.safetensors that its index names; fetch it again" in refused()


@pytest.mark.parametrize("path", ["../base/model.safetensors", "/etc/passwd", "sub/one.safetensors", ".."])
def test_an_index_that_leaves_its_directory(refused, place, path):
    index = sharded(place / "chat")
    index["weight_map"][HEAD] = path
    (place / "chat" / INDEX).write_text(json.dumps(index))
    assert f"names {path!r}, which leaves the checkpoint's directory; refused" in refused()


def test_a_shard_that_the_index_does_not_name(refused, place):
    index = sharded(place / "chat")
    del index["weight_map"][HEAD]
    (place / "chat" / INDEX).write_text(json.dumps(index))
    assert f"holds 1 tensors ({HEAD}, ...) its index does not name" in refused()


def test_a_truncated_file(refused, place):
    file = place / "chat" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    assert f"{file} is truncated" in refused()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("method", ["simple_average", "ties", "dare"])
def test_weights_that_are_no_numbers(refused, place, method, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value

    change_tensors(place / "code", spoil)
    said = refused(f"method={method}", reads=True)
    assert "model.layers.1.mlp.up_proj.weight has NaN or infinite weights in expert code; a merge would" in said
    assert "chat" not in said


def test_a_result_beyond_the_range_of_its_dtype(refused, place):
    def far(tensors):
        tensors["model.norm.weight"] += 60000.0

    change_tensors(place / "code", far)
    said = refused("method=task_arithmetic", "method.scale=2", "engine.dtype=float16", reads=True)
    assert "model.norm.weight (16,) came out beyond the range of torch.float16; a smaller scale may help" in said


def test_quantised_checkpoints(refused, place):
    change_config(place / "chat", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised: gptq" in refused()
    change_config(place / "chat", quantization_config=None)
    change_tensors(place / "chat", lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.float8_e4m3fn)}))
    assert "is quantised" in refused()


def test_a_hub_id_when_offline(refused):
    said = refused("pool.base=org/base")
    assert (
        "org/base is not in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE); to use a local copy" in said
    )


def test_pickles(refused, place):
    torch.save({HEAD: torch.zeros(2)}, place / "chat" / "pytorch_model.bin")
    (place / "chat" / "model.safetensors").unlink()
    assert "only safetensors is taken" in refused()


def test_a_weight_too_many(refused):
    assert "weights lists 3 numbers for 2 experts" in refused("method=ties", "method.weights=[1,2,3]")


def test_a_parent_that_is_a_file(refused, place):
    (place / "file").touch()
    assert "could not be written" in refused(f"output={place / 'file' / 'out'}")


def test_a_file_that_changes_while_it_merges(refused, place, monkeypatch):
    """From the second chunk on the file is another."""
    import harness.pieces

    monkeypatch.setattr(harness.pieces, "CHUNK", 512)
    seen = []
    real = Checkpoint._fill

    def fill(self, name, start, raw):
        real(self, name, start, raw)
        seen.append(name)
        if len(seen) == 20:
            os.utime(place / "code" / "model.safetensors")

    monkeypatch.setattr(Checkpoint, "_fill", fill)
    said = refused("method=ties", reads=True)
    assert said == (
        f"{place / 'code' / 'model.safetensors'} has changed since it was opened; start again when nothing writes to it"
    )
