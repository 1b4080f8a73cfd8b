import pytest
import torch
from torch import nn

from pools.faults import Spec, specs_of
from pools.roles import ModuleRoles, NamedRoles, depths


def on_meta(config, cls):
    with torch.device("meta"):
        return cls(config)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    return on_meta(LlamaConfig(**sizes), LlamaForCausalLM)


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return on_meta(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8), GPT2LMHeadModel)


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    return on_meta(T5Config(**sizes), T5ForConditionalGeneration)


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return on_meta(CLIPVisionConfig(**sizes, image_size=16, patch_size=8), CLIPVisionModel)


@pytest.fixture(params=["llama", "gpt2", "t5", "clip"])
def module(request):
    return request.getfixturevalue(request.param)


def test_names_alone_say_the_same_as_the_module(module):
    exact, named = ModuleRoles(module), NamedRoles(specs_of(module.state_dict()))
    transposed = {name for name in module.state_dict() if exact.is_transposed(name)}
    for name in module.state_dict():
        assert named.is_buffer(name) == exact.is_buffer(name), name
        assert named.layer_of(name) == exact.layer_of(name), name
        assert named.is_linear(name) == (exact.is_linear(name) or name in transposed), name
    assert named.n_layers == exact.n_layers


def test_names_in_a_files_order_say_the_same(clip, llama):
    """Headers are sorted: `pre_layrnorm` comes after `encoder` there, and before it in the model."""
    for module in (clip, llama):
        state = module.state_dict()
        exact = ModuleRoles(module)
        by_file = NamedRoles({name: specs_of(state)[name] for name in sorted(state)})
        assert {name: by_file.layer_of(name) for name in state} == {name: exact.layer_of(name) for name in state}


def test_llama(llama):
    roles = ModuleRoles(llama)
    assert roles.n_layers == 3
    assert roles.layer_of("model.embed_tokens.weight") == 0
    assert roles.layer_of("model.layers.0.mlp.up_proj.weight") == 1
    assert roles.layer_of("model.layers.2.input_layernorm.weight") == 3
    assert roles.layer_of("model.norm.weight") == 4
    assert roles.is_linear("model.layers.0.self_attn.q_proj.weight")
    assert roles.is_linear("lm_head.weight")
    assert not roles.is_linear("model.embed_tokens.weight")
    assert not roles.is_linear("model.norm.weight")
    assert roles.mlps() == tuple(f"model.layers.{i}.mlp" for i in range(3))


def test_gpt2_stores_linear_weights_the_other_way_round(gpt2):
    roles = ModuleRoles(gpt2)
    name = "transformer.h.0.attn.c_attn.weight"
    assert gpt2.state_dict()[name].shape == (16, 48)
    assert roles.is_transposed(name)
    assert not roles.is_linear(name)
    assert not roles.is_transposed("transformer.wte.weight")
    assert roles.layer_of("transformer.wpe.weight") == 0
    assert roles.layer_of("transformer.ln_f.bias") == 3
    assert roles.mlps() == ("transformer.h.0.mlp", "transformer.h.1.mlp")


def test_two_stacks_follow_each_other(t5):
    roles = ModuleRoles(t5)
    assert roles.n_layers == 4
    assert roles.layer_of("shared.weight") == 0
    assert roles.layer_of("encoder.block.1.layer.1.DenseReluDense.wi.weight") == 2
    assert roles.layer_of("decoder.block.0.layer.0.SelfAttention.q.weight") == 3
    assert roles.layer_of("lm_head.weight") == 5
    assert not roles.is_linear("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")


def test_only_merged_names_count(clip):
    names = [name for name in clip.state_dict() if not name.startswith("encoder.layers.1.")]
    roles = ModuleRoles(clip, names)
    assert roles.mlps() == ("encoder.layers.0.mlp",)
    assert not roles.is_linear("encoder.layers.1.mlp.fc1.weight")
    assert roles.n_layers == 1


def test_buffers():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    exact, named = ModuleRoles(module), NamedRoles(specs_of(module.state_dict()))
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for roles in (exact, named):
        assert {name for name in module.state_dict() if roles.is_buffer(name)} == buffers
    module.register_buffer("mine", torch.ones(1))
    assert ModuleRoles(module).is_buffer("mine")


def test_gpt2s_causal_mask_is_a_buffer_and_an_attention_bias_is_not():
    mask, bias = Spec((1, 1, 8, 8), torch.bool), Spec((8,), torch.float32)
    roles = NamedRoles({"h.0.attn.bias": mask, "h.1.attn.bias": bias})
    assert roles.is_buffer("h.0.attn.bias")
    assert not roles.is_buffer("h.1.attn.bias")


def test_a_model_without_blocks_has_no_depth():
    assert depths(["w", "embed.w"]) == ({"w": 1, "embed.w": 0}, 0)
