import json

import pytest
import torch

from pools.checkpoint import SINGLE, Checkpoint
from pools.headers import CheckpointError
from pools.open import open_pool


def test_faults_of_all_members_are_gathered(copied, change):
    def spoil(tensors):
        del tensors["post_layernorm.bias"]
        tensors["pre_layrnorm.bias"] = torch.ones(3)
        tensors["encoder.extra"] = torch.ones(2)

    change(copied / "red", spoil)
    change(
        copied / "blue", lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.0" not in name}
    )
    faults = open_pool("clip", "base", {name: name for name in ("red", "green", "blue")}, root=copied).faults()
    assert [fault for fault in faults if fault.startswith("expert red")] == [
        "expert red misses vision_model.post_layernorm.bias (16,), which the base has",
        "expert red has vision_model.encoder.extra (2,), which the base lacks",
        "expert red has vision_model.pre_layrnorm.bias of shape (3,), where the base has (16,)",
    ]
    blue = [fault for fault in faults if fault.startswith("expert blue")]
    assert len(blue) == 9
    assert blue[-1] == "expert blue: and 8 more"
    assert len(faults) == 12


def test_a_base_unlike_its_configuration_is_told(copied):
    config = json.loads((copied / "base" / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 40
    (copied / "base" / "config.json").write_text(json.dumps(config))
    faults = open_pool("clip", "base", {}, root=copied).faults()
    assert len(faults) == 6
    assert "should have vision_model.encoder.layers.0.mlp.fc1.weight of shape (40, 16), and has (32, 16)" in "".join(
        faults
    )
    (copied / "base" / "config.json").unlink()
    (fault,) = open_pool("clip", "base", {}, root=copied).faults()
    assert "config.json, which says what the model is built like, cannot be read" in fault


def test_members_that_cannot_be_opened_are_gathered(copied):
    (copied / "red" / SINGLE).unlink()
    (copied / "blue" / SINGLE).write_bytes(b"1234")
    with pytest.raises(CheckpointError) as caught:
        open_pool("clip", "base", {"red": "red", "green": "green", "blue": "blue"}, root=copied)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("expert red:")
    assert "truncated" in lines[1]
    with pytest.raises(CheckpointError) as caught:
        open_pool("clip", "bas", {"red": "rad"}, root=copied)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["base", "expert red"]
    with pytest.raises(CheckpointError, match="neither a base nor experts"):
        open_pool("clip", None, {})
    with pytest.raises(CheckpointError, match=r"family is one of clip, .*; got 'clap'"):
        open_pool("clap", "base", {})


def test_what_is_no_vision_tower_is_told(copied, change):
    change(copied / "red", lambda tensors: {f"visual.{name}": tensor for name, tensor in tensors.items()})
    change(copied / "blue", lambda tensors: {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError) as caught:
        open_pool("clip", "base", {"red": "red", "blue": "blue"}, root=copied)
    red, blue = str(caught.value).splitlines()
    assert "expert red: red has no CLIP vision tower" in red
    assert "blue is a LoRA adapter; make it a model first" in blue


def test_not_a_number_is_left_for_the_engine_to_name(copied, change):
    change(copied / "red", lambda tensors: tensors["post_layernorm.bias"].fill_(float("nan")))
    pool = open_pool("clip", "base", {"red": "red"}, root=copied)
    assert pool.faults() == []
    assert pool.experts["red"]["vision_model.post_layernorm.bias"].isnan().all()


def test_a_merge_is_refused_before_it_overwrites_a_member(copied):
    pool = open_pool("clip", "base", {"red": "red"}, root=copied)
    with pytest.raises(CheckpointError, match="exists already"):
        pool.write(copied / "red", pool.base.items(), {})
    assert len(Checkpoint(copied / "red")) == len(pool.base)
