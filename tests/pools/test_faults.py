"""What keeps language models from being merged, told from headers and configurations alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pools.checkpoint import INDEX
from pools.faults import dtype_notes, header_faults
from pools.headers import CheckpointError
from pools.language_config import config_faults, is_native, quantised
from pools.open import open_pool
from tests.pools.language_models import change_config, change_tensors, write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    write_model(root / "base", "llama", 0)
    for seed, name in enumerate(("a", "b", "c"), start=1):
        write_model(root / name, "llama", seed)
    return root


@pytest.fixture
def models(made, tmp_path):
    shutil.copytree(made, tmp_path / "models")
    return tmp_path / "models"


def opened(root: Path, *experts: str, family: str = "causal_lm", **choices):
    return open_pool(family, str(root / "base"), {name: str(root / name) for name in experts}, **choices)


def test_all_kinds_of_faults_of_all_members_are_in_one_report(models):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
        tensors["model.layers.0.extra.weight"] = torch.ones(2)

    change_tensors(models / "a", spoil)
    change_config(models / "b", num_attention_heads=4, hidden_act="gelu", rms_norm_eps=1e-3)
    change_config(models / "c", quantization_config={"quant_method": "gptq", "bits": 4})
    pool = opened(models, "a", "b", "c")
    faults = pool.faults()
    assert sorted(faults)[:3] == [
        "expert a has model.layers.0.extra.weight (2,), which the base lacks",
        "expert a has model.layers.0.mlp.up_proj.weight of shape (2, 2), where the base has (24, 16)",
        "expert a misses model.norm.weight (16,), which the base has",
    ]
    assert "expert b has num_attention_heads=4 in config.json, where the base has 2" in faults
    assert "expert b has hidden_act='gelu' in config.json, where the base has 'silu'" in faults
    (quant,) = [fault for fault in faults if fault.startswith("expert c")]
    assert "is quantised: gptq, 4 bits" in quant
    assert len(faults) == 6
    (note,) = pool.notes
    assert note == "expert b was trained with rms_norm_eps=0.001, the base with 1e-06; the merged model has the latter"


def test_another_architecture_is_named_as_such(models):
    write_model(models / "d", "qwen2", 4)
    faults = opened(models, "d").faults()
    assert faults[0].startswith("expert d is of the model_type 'qwen2', where the base is of 'llama'")


def test_vocabularies_of_other_sizes_are_named_as_such(models):
    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(3, 16)])

    change_tensors(models / "a", grow)
    change_config(models / "a", vocab_size=263)
    text = "\n".join(opened(models, "a").faults())
    assert "263" in text
    assert "260" in text
    assert "tokenizer=union" in text
    assert "of shape" not in text
    specs = {name: {"model.embed_tokens.weight": torch.ones(rows, 4)} for name, rows in (("base", 10), ("a", 12))}
    assert header_faults(specs["base"], {"a": specs["a"]}) == [
        "expert a has a vocabulary of 12 rows (model.embed_tokens.weight), where the base has 10: "
        "pool.tokenizer=union or pool.tokenizer=base brings them together"
    ]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"m.weight.SCB": torch.ones(4), "m.weight": torch.ones(4, 4, dtype=torch.int8)}, "bitsandbytes int8"),
        ({"m.weight.absmax": torch.ones(4), "m.weight": torch.ones(8, 1, dtype=torch.uint8)}, "bitsandbytes 4-bit"),
        ({"m.qweight": torch.ones(2, 4, dtype=torch.int32), "m.scales": torch.ones(1, 4)}, "GPTQ or AWQ"),
        ({"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(1, 1)}, "FP8"),
        ({"m.gate_up_proj_blocks": torch.ones(4, 4, dtype=torch.uint8)}, "MXFP4"),
        ({"m.weight": torch.ones(4, 4, dtype=torch.int8)}, "torch.int8 weights"),
    ],
)
def test_packed_tensors_are_named_with_their_scheme(models, tensors, told):
    change_tensors(models / "a", lambda old: old | tensors)
    (fault,) = opened(models, "a", "b").faults()
    assert fault.startswith("expert a: ")
    assert f"is quantised: {told}" in fault
    assert "cannot be merged" in fault


def test_a_quantised_base_is_told_once(models):
    change_config(models / "base", quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})
    (fault,) = opened(models, "a").faults()
    assert "base is quantised: bitsandbytes, 8 bits" in fault


def test_integers_that_are_no_weights_are_not_taken_for_packed():
    from pools.faults import Spec

    assert quantised({}, {"bn.num_batches_tracked": Spec((), torch.int64), "w": Spec((2, 2), torch.bfloat16)}) is None


def test_code_of_its_own_is_refused_unless_it_is_trusted(models):
    change_config(models / "a", auto_map={"AutoModelForCausalLM": "modeling.Own"}, model_type="its_own")
    faults = opened(models, "a").faults()
    assert "needs code of its own to run (auto_map in config.json, model_type 'its_own')" in faults[0]
    assert "pool.trust_remote_code=true" in faults[0]
    assert not any("code of its own" in fault for fault in opened(models, "a", trust_remote_code=True).faults())
    change_config(models / "a", model_type="llama")  # transformers has it, so the code is not needed
    assert opened(models, "a").faults() == []
    assert is_native("qwen2")
    assert not is_native("its_own")


def test_mixed_dtypes_are_noted_and_merged(models):
    change_tensors(models / "a", lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    pool = opened(models, "a")
    assert pool.faults() == []
    (note,) = pool.notes
    assert note.startswith("dtypes differ: base in float32, expert a in bfloat16; arithmetic is in float32")
    half = {"w": torch.ones(2).half()}
    assert dtype_notes({"a": half, "b": half}) == []


def test_rotary_settings_are_compared_however_they_are_written():
    old = {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": None}
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    longer = {"model_type": "llama", "rope_theta": 1e6, "rope_scaling": None}
    assert config_faults("expert a", old, new, "the base") == ([], [])
    faults, notes = config_faults("expert a", longer, new, "the base")
    assert faults == []
    assert len(notes) == 1
    assert "'rope_theta': 1000000.0" in notes[0]


def test_a_nested_text_model_is_compared_too():
    one, other = ({"model_type": "gemma3", "text_config": {"hidden_size": size}} for size in (16, 32))
    faults, _ = config_faults("expert a", one, other, "the base")
    assert faults == ["expert a has text_config.hidden_size=16 in config.json, where the base has 32"]


def test_a_configuration_that_is_missing_or_broken_is_told(models):
    (models / "base" / "config.json").unlink()
    faults = opened(models, "a").faults()
    assert "config.json, which says what the model is built like, is missing" in faults[0]
    (models / "base" / "config.json").write_text("{")
    (fault,) = opened(models, "a").faults()
    assert "config.json, which says what the model is built like, cannot be read" in fault


def test_pickles_and_gguf_are_refused_by_name(models):
    from safetensors.torch import load_file

    torch.save(load_file(models / "a" / "model.safetensors"), models / "a" / "pytorch_model.bin")
    (models / "a" / "model.safetensors").unlink()
    (models / "b" / "model.safetensors").rename(models / "b" / "model.Q4_K_M.gguf")
    with pytest.raises(CheckpointError) as caught:
        opened(models, "a", "b")
    pickled, gguf = str(caught.value).splitlines()
    assert "only safetensors is taken; convert it" in pickled
    assert "GGUF (model.Q4_K_M.gguf)" in gguf
    with pytest.raises(CheckpointError, match="GGUF"):
        open_pool("causal_lm", str(models / "b" / "model.Q4_K_M.gguf"), {})


def test_an_index_that_leaves_its_directory_is_refused(models):
    weights = dict.fromkeys(("model.norm.weight",), "../base/model.safetensors")
    (models / "a" / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(CheckpointError, match=r"expert a: .* leaves the checkpoint's directory; refused"):
        opened(models, "a")


def test_an_adapter_needs_a_base(models):
    (models / "lora").mkdir()
    (models / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (models / "lora" / "adapter_model.safetensors").write_bytes((models / "a" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"expert lora: a LoRA adapter is an expert of a base.*pool\.base=PATH"):
        open_pool("causal_lm", None, {"lora": str(models / "lora"), "a": str(models / "a")})


def test_choices_that_do_not_fit_are_told(models):
    (fault,) = opened(models, "a", merge=["*nothing*"]).faults()
    assert fault.startswith("pool.merge: ")
    (fault,) = opened(models, "a", merge=["*mlp*"], rest="z").faults()
    assert fault == "pool.rest=z is no member of the pool; known are base, a"
    (fault,) = opened(models, "a", slices=[{"experts": {"a": [0, 9]}}]).faults()
    assert fault.startswith("pool.slices: ")
    with pytest.raises(CheckpointError, match=r"pool\.tokenizer: pools of the family state_dict do not take that"):
        opened(models, "a", family="state_dict", tokenizer="union")
    with pytest.raises(CheckpointError, match="neither a base nor experts"):
        open_pool("causal_lm", None, {})


def test_models_of_another_family_are_told(models):
    pool = opened(models, "a", family="seq2seq")
    with pytest.raises(CheckpointError, match="is no model of the family seq2seq"):
        pool.module()
    assert opened(models, "a", family="sequence_classification").faults() == [
        "no member has the head of a classifier (score, classifier, classification_head)"
    ]


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "its_own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_trusted_code_runs_and_goes_with_the_merged_model(models, tmp_path):
    import transformers

    for name in ("base", "a"):
        (models / name / "own.py").write_text(OWN)
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        change_config(models / name, auto_map=classes, model_type="its_own")
    pool = opened(models, "a", trust_remote_code=True)
    assert pool.faults() == []
    assert type(pool.module()).__name__ == "OwnForCausalLM"
    pool.write(tmp_path / "out", pool.experts["a"].items(), {"method": "expert"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(model.lm_head.weight, pool.experts["a"]["lm_head.weight"])
