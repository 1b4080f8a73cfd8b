"""Adapters as experts: what peft makes of the same files, bit for bit whatever the cut, and what is refused."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pools.adapters import LoraExpert, adapter_faults, is_adapter
from pools.checkpoint import Checkpoint
from pools.headers import CheckpointError
from pools.reading import Source
from tests.pools.language_models import write_model
from tests.pools.lora_adapters import loaded, trained, write_adapter_by_hand

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, about what it corrects itself


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama", attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


LLAMA = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {
            "layers.1.self_attn.q_proj": 5, "^model.layers.0.mlp.up_proj": 1, r"layers\.\d\.mlp.up_proj": 4,
        },
        "alpha_pattern": {"o_proj": 9, "^model.layers.0.self_attn.q_proj": 1},
    },
    "rslora_patterns": {
        "r": 2, "lora_alpha": 3, "use_rslora": True,
        "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 6},
    },
    "regex_targets": {"r": 2, "lora_alpha": 2, "target_modules": r".*layers\.1\..*(gate|up)_proj"},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "embedding": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "k_proj"]},
    "dora_embedding": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["embed_tokens"]},
    "head": {"r": 3, "lora_alpha": 5, "target_modules": ["lm_head"]},
    "whole": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "biases": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "all_biases": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "all"},
    "lora_bias": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "lora_bias": True},
}  # fmt: skip
GPT2 = {
    "transposed": {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj"]},
    "transposed_dora": {"r": 3, "lora_alpha": 7, "use_dora": True, "target_modules": ["c_attn", "c_proj"]},
    "square": {"r": 3, "lora_alpha": 7, "target_modules": ["attn.c_proj"]},
    "positions": {"r": 2, "lora_alpha": 7, "target_modules": ["wpe", "c_fc"]},
}


@pytest.mark.parametrize(("kind", "case"), [*(("llama", case) for case in LLAMA), *(("gpt2", case) for case in GPT2)])
def test_an_expert_is_what_peft_merges_to(kind, case, tmp_path, request):
    directory = request.getfixturevalue(kind)
    config = (LLAMA | GPT2)[case]
    merged = trained(loaded(directory), tmp_path / "adapter", **config)
    base = Checkpoint(directory)
    expert = LoraExpert(tmp_path / "adapter", "mine", base)
    assert is_adapter(tmp_path / "adapter")
    assert isinstance(expert, Source)
    assert set(expert) == set(base)
    assert expert.shapes == base.shapes
    assert expert.dtypes == base.dtypes
    moved = 0
    for name in expert:
        key = name if name in merged else f"transformer.{name}"
        torch.testing.assert_close(
            expert[name], merged[key], rtol=1e-6, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}"
        )
        assert (name in expert.changes) == (not torch.equal(expert[name], base[name])), name
        moved += name in expert.changes
    assert moved


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1), nn.Conv1d(4, 6, 5)], ids=["3x3", "1x1", "1d"])
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_are_what_peft_merges_them_to(conv, dora, tmp_path):
    model = nn.Sequential(nn.Sequential(conv, nn.ReLU()))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    merged = trained(model, tmp_path / "adapter", r=2, lora_alpha=3, target_modules=["0.0"], use_dora=dora)
    expert = LoraExpert(tmp_path / "adapter", "conv", Checkpoint(tmp_path / "base.safetensors"))
    torch.testing.assert_close(expert["0.0.weight"], merged["0.0.weight"], rtol=1e-6, atol=1e-6)
    assert set(expert.changes) == {"0.0.weight"}


def test_grouped_convolutions_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"conv: 0 has factors \(2, 4, 3, 3\) and .*do not fit the base's 0.weight"
    ):
        LoraExpert(tmp_path / "adapter", "conv", Checkpoint(tmp_path / "base.safetensors"))


def pieces(expert: Source, name: str, cuts: list[int]) -> torch.Tensor:
    """A tensor read in parts."""
    found = torch.empty(torch.Size(expert.shapes[name]).numel())
    for start, stop in itertools.pairwise(cuts):
        expert.read(name, start, found[start:stop])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["linear", "dora", "transposed", "transposed_dora", "embedding"])
def test_the_bits_do_not_depend_on_the_cut_or_on_threads(case, dtype, tmp_path):
    shape, r = (613, 701), 13
    generator = torch.Generator().manual_seed(1)
    out, inside = shape[::-1] if "transposed" in case or case == "embedding" else shape
    a, b = torch.randn(r, inside, generator=generator), torch.randn(out, r, generator=generator)
    keys = ("lora_embedding_A", "lora_embedding_B") if case == "embedding" else ("lora_A.weight", "lora_B.weight")
    tensors = {f"base_model.model.x.{key}": tensor for key, tensor in zip(keys, (a, b), strict=True)}
    if "dora" in case:
        tensors["base_model.model.x.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 1
    write_adapter_by_hand(tmp_path / "adapter", tensors, r=r, lora_alpha=5, use_dora="dora" in case)
    save_file({"x.weight": torch.randn(shape, generator=generator).to(dtype)}, tmp_path / "base.safetensors")
    size = shape[0] * shape[1]
    uneven = sorted({0, size, *torch.randint(0, size, (40,), generator=generator).tolist()})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        whole = LoraExpert(tmp_path / "adapter", "x", Checkpoint(tmp_path / "base.safetensors"))["x.weight"].flatten()
        torch.set_num_threads(1)
        expert = LoraExpert(tmp_path / "adapter", "x", Checkpoint(tmp_path / "base.safetensors"))
        for cuts in (uneven, [0, 1, 2, size], [*range(0, size, 65536), size], [*range(0, size, shape[1] * 50), size]):
            assert torch.equal(pieces(expert, "x.weight", cuts), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.isfinite(whole).all()
    assert expert["x.weight"].dtype == torch.float32


FACTORS = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(6, 2)}


def by_hand(
    tmp_path: Path, base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], **config: Any
) -> LoraExpert:
    save_file(base, tmp_path / "base.safetensors")
    write_adapter_by_hand(tmp_path / "adapter", adapter, **config)
    return LoraExpert(tmp_path / "adapter", "mine", Checkpoint(tmp_path / "base.safetensors"))


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ("model.layers.0.q", "base_model.model.model.layers.0.q"),
        ("layers.0.q", "base_model.model.model.layers.0.q"),
        ("model.layers.0.q", "base_model.model.layers.0.q"),
        ("layers.0.q", "layers.0.q"),
    ],
)
@pytest.mark.parametrize("named", ["", ".default", ".my_adapter"])
def test_names_may_have_a_prefix_or_the_adapters_name(there, told, named, tmp_path):
    factors = {f"{told}.{key.replace('.weight', f'{named}.weight')}": tensor for key, tensor in FACTORS.items()}
    base = {f"{there}.weight": torch.zeros(6, 4), "other.weight": torch.zeros(6, 4)}
    expert = by_hand(tmp_path, base, factors)
    assert torch.equal(expert[f"{there}.weight"], torch.full((6, 4), 2.0))
    assert torch.equal(expert["other.weight"], torch.zeros(6, 4))


def test_a_name_that_may_mean_several_is_refused(tmp_path):
    base = {f"{tower}.layers.0.q.weight": torch.zeros(6, 4) for tower in ("text", "vision")}
    with pytest.raises(
        CheckpointError, match=r"layers.0.q.weight, which may be any of the base's text.layers.*, vision"
    ):
        by_hand(tmp_path, base, {f"layers.0.q.{key}": tensor for key, tensor in FACTORS.items()})


BAD = [
    ({"peft_type": "IA3"}, {}, "peft_type\\) is IA3"),
    ({"peft_type": "ADALORA"}, {}, "ADALORA"),
    ({"peft_type": None}, {}, "peft_type\\) is None"),
    ({"use_qalora": True}, {}, "use_qalora"),
    ({"target_parameters": ["experts.w"]}, {}, "target_parameters"),
    ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    ({"alora_invocation_tokens": [1]}, {}, "no merged weights exist"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "path_initial_model_for_weight_conversion"),
    ({"r": 3}, {}, "gives it rank 3"),
    ({"r": 0}, {}, "r, the rank, is 0"),
    ({"lora_alpha": None}, {}, "lora_alpha is None"),
    ({"rank_pattern": {"(": 3}}, {}, "no regular expression"),
    ({"use_dora": True}, {}, "no lora_magnitude_vector"),
    ({}, {"x.lora_A.weight": None}, "lora_B without lora_A"),
    ({}, {"x.lora_A.weight": torch.ones(2, 5)}, r"do not fit the base's x.weight \(6, 4\)"),
    ({}, {"y.lora_A.weight": torch.ones(2, 4), "y.lora_B.weight": torch.ones(6, 2)}, "y.weight, and the base has no"),
    ({}, {"lm_head.weight": torch.ones(6, 4)}, "base may tie it"),
    ({}, {"norm.weight": torch.ones(6)}, r"replaces norm.weight \(6,\), where the base has norm.weight \(4,\)"),
    ({}, {"x.lora_A.second.weight": torch.ones(2, 4), "x.lora_B.first.weight": torch.ones(6, 2)}, "several adapters"),
    ({}, {"x.lora_magic.weight": torch.ones(2)}, "of no known kind"),
    ({}, {"x.lora_magnitude_vector": torch.ones(4)}, r"lora_magnitude_vector \(4,\) does not fit"),
    ({}, {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(6, 2)}, "quantised base"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), BAD, ids=[message for _, _, message in BAD])
def test_what_cannot_be_read_is_refused_by_name(config, tensors, message, tmp_path):
    base = {"x.weight": torch.ones(6, 4), "norm.weight": torch.ones(4), "q.weight": torch.ones(6, 4, dtype=torch.uint8)}
    adapter = {f"x.{key}": tensor for key, tensor in FACTORS.items()} | tensors
    adapter = {f"base_model.model.{key}": tensor for key, tensor in adapter.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=rf"mine: .*{message}"):
        by_hand(tmp_path, base, adapter, **config)
    assert adapter_faults(tmp_path / "adapter", Checkpoint(tmp_path / "base.safetensors"))


def test_all_faults_come_at_once(tmp_path):
    adapter = {f"{module}.{key}": tensor.clone() for module in ("y", "z") for key, tensor in FACTORS.items()}
    with pytest.raises(CheckpointError, match=r"(?s)y\.weight.*z\.weight"):
        by_hand(tmp_path, {"x.weight": torch.ones(6, 4)}, adapter)


def test_weights_only_as_a_pickle_are_refused(tmp_path):
    expert = by_hand(tmp_path, {"x.weight": torch.ones(6, 4)}, {f"x.{key}": tensor for key, tensor in FACTORS.items()})
    (expert.path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json and no adapter_model"):
        LoraExpert(expert.path, "mine", expert.base)
    torch.save({}, expert.path / "adapter_model.bin")
    assert "pickles run code" in adapter_faults(expert.path, expert.base)[0]
    (expert.path / "adapter_config.json").write_text("{")
    assert "cannot be read" in adapter_faults(expert.path, expert.base)[0]


def test_a_head_of_its_own_is_kept_beside(tmp_path):
    adapter = {f"x.{key}": tensor for key, tensor in FACTORS.items()} | {"score.weight": torch.ones(3, 4)}
    expert = by_hand(tmp_path, {"x.weight": torch.ones(6, 4)}, adapter, task_type="SEQ_CLS")
    assert expert.own == {"score.weight": "score.weight"}
    assert set(expert) == {"x.weight"}
    other = {"x.weight": torch.ones(6, 4), "score.weight": torch.ones(2, 4)}  # the base has one for other classes
    assert by_hand(tmp_path, other, adapter, task_type="SEQ_CLS").own == {"score.weight": "score.weight"}
    same = {"x.weight": torch.ones(6, 4), "score.weight": torch.zeros(3, 4)}
    assert torch.equal(by_hand(tmp_path, same, adapter, task_type="SEQ_CLS")["score.weight"], torch.ones(3, 4))


def test_fingerprint_and_stamp_tell_adapters_and_bases_apart(tmp_path):
    adapter = {f"x.{key}": tensor for key, tensor in FACTORS.items()}
    one = by_hand(tmp_path, {"x.weight": torch.ones(6, 4)}, adapter)
    prints, stamps = [one.fingerprint], [one.stamp]
    assert pickle.loads(pickle.dumps(one)).fingerprint == one.fingerprint
    for base, factors, config in [
        ({"x.weight": torch.zeros(6, 4)}, adapter, {}),
        ({"x.weight": torch.ones(6, 4)}, adapter, {"lora_alpha": 3}),
        ({"x.weight": torch.ones(6, 4)}, adapter | {"x.lora_A.weight": torch.zeros(2, 4)}, {}),
    ]:
        other = by_hand(tmp_path, base, factors, **config)
        prints.append(other.fingerprint)
        stamps.append(other.stamp)
    assert len(set(prints)) == len(set(stamps)) == 4
    again = by_hand(tmp_path, {"x.weight": torch.ones(6, 4)}, adapter, base_model_name_or_path="/elsewhere")
    assert again.fingerprint == prints[0]
    assert again.nbytes == 6 * 4 * 4 + (2 * 4 + 6 * 2) * 4


def test_a_file_changed_after_opening_is_noticed(tmp_path):
    expert = by_hand(tmp_path, {"x.weight": torch.ones(6, 4)}, {f"x.{key}": tensor for key, tensor in FACTORS.items()})
    save_file(
        load_file(expert.path / "adapter_model.safetensors") | {"y": torch.ones(3)},
        expert.path / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        expert["x.weight"]


def test_a_large_tensor_is_read_in_little_memory(tmp_path):
    rows, columns, r = 40_000, 256, 4
    adapter = {"x.lora_A.weight": torch.ones(r, columns), "x.lora_B.weight": torch.ones(rows, r)}
    expert = by_hand(tmp_path, {"x.weight": torch.zeros(rows, columns)}, adapter, r=r, lora_alpha=r)
    seen: list[int] = []
    made = torch.empty

    def counted(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = made(*shape, **options)
        seen.append(tensor.nbytes)
        return tensor

    out = torch.empty(1 << 20)
    torch.empty = counted  # type: ignore[assignment]
    try:
        expert.read("x.weight", 123_457, out)
    finally:
        torch.empty = made
    assert torch.equal(out, torch.full_like(out, 4.0))
    assert max(seen, default=0) <= max(rows * r, 1 << 18) * 4
