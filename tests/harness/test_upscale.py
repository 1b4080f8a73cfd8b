"""Mixtures of experts out of small language models that are written, opened by transformers and run; SMILE saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from harness.built import build
from harness.compose import compose
from harness.config import UserError
from harness.direct import look, merge_only
from harness.examples import Texts
from harness.inputs import MergeError
from harness.rebuild import open_directory, recipe
from harness.upscale import mean_embedding, mean_inputs
from methods.catalogue import find
from methods.low_rank_experts import Smile
from methods.mixtures import fix_gates, routing
from pools.checkpoint import Checkpoint
from pools.headers import CheckpointError
from pools.open import Pool, open_pool
from pools.wrapped import save_wrapped
from tests.conftest import TinyPool

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=3, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
TOKENS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))


SLOW = pytest.mark.slow
SOME = ["llama", pytest.param("mistral", marks=SLOW), "qwen2", pytest.param("qwen3", marks=SLOW)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND/base, KIND/a and KIND/b of each architecture, all different."""
    root = tmp_path_factory.mktemp("dense")
    for kind, config in KINDS.items():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name in ("base", "a", "b"):
            model.save_pretrained(root / kind / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return root


def words(place: Path, method: str, *more: str, experts: str = "{a: a, b: b}") -> list[str]:
    """Overrides of a merge."""
    return [
        "pool=causal_lm",
        f"pool.root={place}",
        "pool.base=base",
        f"+pool.experts={experts}",
        f"method={method}",
        *more,
    ]


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(TOKENS).logits


MADE = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
COUNTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}


@pytest.mark.parametrize("kind", SOME)
def test_copies_of_one_model_are_that_model(dense: Path, tmp_path: Path, kind: str) -> None:
    """Whatever the random router says; of an expert, and of the base where there is none. Nothing is missing in it."""
    for experts, source in (("{a: a}", "a"), ("{}", "base")):
        out = tmp_path / source
        more = ("method.experts=3", f"output={out}")
        merge_only(compose(words(dense / kind, "moe_upscaling", *more, experts=experts)))
        model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(told.values()), told
        torch.testing.assert_close(model.eval()(TOKENS).logits.detach(), logits(dense / kind / source))
        config = json.loads((out / "config.json").read_text())
        assert (config["model_type"], config["num_experts_per_tok"]) == (MADE[kind], 2)
        assert config[COUNTS[MADE[kind]]] == 3
        name = "block_sparse_moe" if MADE[kind] == "mixtral" else "mlp"
        assert Checkpoint(out)[f"model.layers.1.{name}.gate.weight"].shape == (3, 16)


def test_several_models_side_by_side(dense: Path, tmp_path: Path) -> None:
    """Expert e is model e's; the rest the base's, or the mean; equal seeds give equal routers."""
    place, found = dense / "llama", {}
    for name, more in {
        "one": (), "same": (), "other": ("seed=5",), "mean": ("method.rest=mean",), "none": ("pool.base=null",),
    }.items():  # fmt: skip
        merge_only(compose(words(place, "moe_merging", *more, f"output={tmp_path / name}")))
        found[name] = Checkpoint(tmp_path / name)
    own = {name: Checkpoint(place / name) for name in ("base", "a", "b")}
    for number, name in enumerate("ab"):
        for theirs, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            path = f"model.layers.1.block_sparse_moe.experts.{number}.{ours}.weight"
            for one in found.values():
                assert torch.equal(one[path], own[name][f"model.layers.1.mlp.{theirs}.weight"])
    q, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(found["one"][q], own["base"][q])
    assert torch.equal(found["none"][q], own["a"][q])
    torch.testing.assert_close(found["mean"][q], (own["a"][q] + own["b"][q]) / 2)
    assert torch.equal(found["one"][gate], found["same"][gate])
    assert not torch.equal(found["one"][gate], found["other"][gate])
    assert logits(tmp_path / "one").isfinite().all()


def test_a_router_that_only_knows_one_expert_gives_its_blocks(dense: Path, tmp_path: Path) -> None:
    """Top 1, and a router for which expert b is always best, with b's attention: the model b."""
    place = dense / "mistral"
    out = tmp_path / "out"
    swapped = words(
        place, "moe_merging", "method.top_k=1", "method.router_std=0", f"output={out}", experts="{b: b, a: a}"
    )
    merge_only(compose([*swapped, "pool.base=null"]))  # of equal rows the first is chosen
    torch.testing.assert_close(logits(out), logits(place / "b"))


def test_architectures_that_are_no_mixture_are_named(dense: Path) -> None:
    said = r"model_type 'gpt2'; mixtures are made .*: llama \(MixtralForCausalLM\), .*qwen3 \(Qwen3MoeForCausalLM\)"
    with pytest.raises(UserError, match=said):
        look(compose(words(dense / "gpt2", "moe_merging")))


def test_tensors_without_a_place_are_named(dense: Path) -> None:
    """A Llama with biases in its attention, and one whose blocks are of another kind."""
    place = {"experts": {"a": "a", "b": "b"}, "root": dense / "qwen2"}
    choice = {"experts": ["a", "b"]}
    from pools.moe import mix

    specs = dict(open_pool("causal_lm", None, **place).experts)
    with pytest.raises(CheckpointError, match=r"MixtralForCausalLM has no place for: model.*self_attn.k_proj.bias"):
        mix(specs, {"model_type": "llama"}, choice, {})
    gpt = open_pool("causal_lm", None, {"a": "a"}, root=dense / "gpt2").experts
    with pytest.raises(CheckpointError, match=r"has no layers \(model.layers.N\) with feed-forward blocks"):
        mix(dict(gpt), {"model_type": "llama"}, {"experts": ["a", "a"]}, {})


def test_bad_input(dense: Path) -> None:
    place = dense / "llama"
    with pytest.raises(UserError, match="top_k=3 sends a token to more experts than there are, 2"):
        look(compose(words(place, "moe_merging", "method.top_k=3")))
    with pytest.raises(UserError, match=r"leave pool.mixture out"):
        look(compose(words(place, "moe_merging", "pool.mixture={experts: [a]}")))
    with pytest.raises(
        UserError, match="models of the family causal_lm side by side; the pool's are of the family clip"
    ):
        look(compose(["pool=mini_clip8", "method=moe_merging"]))
    with pytest.raises(UserError, match=r"fed texts: give some as method.prompts, or .* called a, for its inputs"):
        look(compose(words(place, "moe_merging", "method.router=hidden")))
    told = open_pool("causal_lm", None, {"a": "a"}, root=place, mixture={"experts": ["a", "z"], "top": 3}).faults()
    assert told == ["pool.mixture has an unknown key 'top'; known are experts, rest, top_k, std, seed, routers",
                    "pool.mixture names z, which the pool lacks"]  # fmt: skip


PROMPTS = {"code": ["def add(a, b):", "return [x for x in"], "roman": ["roman 27 =", "roman 1984 ="]}
ASKED = "{" + ", ".join(f"{name}: {json.dumps(texts)}" for name, texts in PROMPTS.items()) + "}"
OF_LM = ["pool=mini_lm", "tasks=mini_lm", "method=moe_merging", "experts=[code,roman]", "method.top_k=1"]


@pytest.mark.parametrize(
    ("more", "least"),
    [
        (("method.router=hidden", f"method.prompts={ASKED}"), 0.7),
        (("method.router=embed", f"method.prompts={ASKED}"), 0.7),
        pytest.param(("method.router=hidden", "adaptation.examples=8"), 0.7, marks=pytest.mark.slow),  # of its task
    ],
)
def test_texts_decide_where_tokens_go(tmp_path: Path, more: tuple[str, ...], least: float) -> None:
    """On `mini_lm`: tokens of an expert's texts are sent to it more often than to the other."""
    made = tmp_path / "out"
    merge_only(compose([*OF_LM, *more, f"output={made}"]))
    pool = open_pool("causal_lm", str(made), {})
    model = pool.module()
    for expert, texts in enumerate(PROMPTS.values()):
        inputs = pool.feed(texts)
        inputs.pop("labels")
        with torch.no_grad():
            told = model(**inputs, output_router_logits=True).router_logits
        read = inputs["attention_mask"].bool().reshape(-1)
        chosen = torch.stack([one.argmax(-1)[read] for one in told]).float()
        assert ((chosen == expert).float().mean()) > least


def test_routers_of_texts_by_hand() -> None:
    """What enters a block is averaged over all tokens, whatever the batches; embeddings are the same for all layers."""
    pool = open_pool("causal_lm", "base", {}, root=Path(__file__).parents[2] / "pools" / "mini_lm")
    module = pool.module()
    texts, path = Texts("perplexity", ["roman 27 =", "x", "def add(a, b):"], pool, range(3)), "model.layers.2.mlp"
    inputs = pool.feed(texts.rows)
    read = inputs["attention_mask"].bool()
    seen = []
    module.get_submodule(path).register_forward_pre_hook(lambda block, given: seen.append(given[0]))
    with torch.no_grad():
        module(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        embedded = module.get_input_embeddings()(inputs["input_ids"])[read].mean(0)
    expected = seen[0][read].mean(0)
    for size in (1, 2, 3):
        found = mean_inputs(module, {path: module.get_submodule(path)}, texts, size)
        torch.testing.assert_close(found[path], expected)
    torch.testing.assert_close(mean_embedding(module.get_input_embeddings(), texts, 2), embedded)


def smile_of(pool: Pool) -> nn.Module:
    """Low-rank experts of a pool's experts."""
    row = find("smile")
    return build(row, row.load_params()(k=4, gate_k=2), pool, list(pool.base))


def kept(module: nn.Module, pool: Pool, directory: Path) -> Path:
    params = find("smile").load_params()(k=4, gate_k=2)
    save_wrapped(directory, module, recipe("smile", params, list(pool.experts), module.merged_names), pool)
    return directory


def whole(pool: Pool) -> nn.Module:
    """Low-rank experts that lose nothing; a token is sent to one, and the rest is the experts' mean."""
    row = find("smile")
    return build(row, row.load_params()(k=64, gate_k=2, average_rest=True), pool, list(pool.base))


def assert_sent_to_it(module: nn.Module, expert: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """With all gates on the second expert, and what has no experts its own, the outputs are that expert's."""
    fix_gates(module, [0.0, 1.0])
    inside = [path for path, part in module.named_modules() if isinstance(part, Smile)]
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if name.rpartition(".")[0] not in inside:
                own[name].copy_(parameter)
        found, expected = (one(**inputs) for one in (module, expert))
    found, expected = (one if isinstance(one, torch.Tensor) else one.logits for one in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SOME)
def test_smile_at_full_rank_is_the_expert_that_tokens_are_sent_to(dense: Path, kind: str) -> None:
    """Alone, by its own router, with nothing fixed; of two, by fixed gates."""
    one = open_pool("causal_lm", "base", {"a": "a"}, root=dense / kind)
    with torch.no_grad():
        found = whole(one)(TOKENS).logits
    torch.testing.assert_close(found, logits(dense / kind / "a"), atol=1e-4, rtol=1e-4)
    two = open_pool("causal_lm", "base", {"a": "a", "b": "b"}, root=dense / kind)
    assert_sent_to_it(whole(two), two.module(two.experts["b"]), {"input_ids": TOKENS})


def test_smile_of_images_at_full_rank_is_the_expert_that_tokens_are_sent_to(tiny_pool: TinyPool) -> None:
    pool = open_pool("clip", tiny_pool.base, dict(list(tiny_pool.experts.items())[:2]), root=tiny_pool.root)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_sent_to_it(whole(pool), pool.module(list(pool.experts.values())[1]), {"pixel_values": images})


@pytest.mark.parametrize("kind", SOME)
def test_smile_is_kept_and_opened_again(dense: Path, tmp_path: Path, kind: str) -> None:
    """The same outputs bit by bit; the layers of all blocks have experts, and the model is another than its base."""
    pool = open_pool("causal_lm", "base", {"a": "a", "b": "b"}, root=dense / kind)
    module = smile_of(pool)
    opened, _ = open_directory(kept(module, pool, tmp_path / "smile"))
    with torch.no_grad():
        expected = module(TOKENS).logits
        assert torch.equal(opened(TOKENS).logits, expected)
        assert not torch.allclose(pool.module()(TOKENS).logits, expected)
    assert sum(isinstance(one, Smile) for one in opened.modules()) == 2 * 7
    found = routing(opened, ["a", "b"])
    assert len(found) == 2 * 7 * 2
    assert sum(row["mean"] for row in found) == pytest.approx(14)


def test_smile_of_images_is_kept_and_opened_again(tiny_pool: TinyPool, tmp_path: Path) -> None:
    pool = open_pool("clip", tiny_pool.base, tiny_pool.experts, root=tiny_pool.root)
    module = smile_of(pool)
    opened, _ = open_directory(kept(module, pool, tmp_path / "smile"))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module(pixel_values=images)
        assert torch.equal(opened(pixel_values=images), whole)
        torch.testing.assert_close(module(pixel_values=images[1:2]), whole[1:2])  # no example sees another
    fewer = json.loads((tmp_path / "smile" / "recipe.json").read_text())
    fewer["recipe"]["experts"].pop()
    (tmp_path / "smile" / "recipe.json").write_text(json.dumps(fewer))
    with pytest.raises(CheckpointError, match="do not fit what its recipe builds"):
        open_directory(tmp_path / "smile")


def test_smile_without_linear_layers_is_refused(dense: Path) -> None:
    """GPT-2 keeps its layers as (in, out)."""
    pool = open_pool("causal_lm", "base", {"a": "a"}, root=dense / "gpt2")
    with pytest.raises(MergeError, match=r"linear layers .* of blocks, and this GPT2LMHeadModel has none"):
        smile_of(pool)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "clip"])
def test_smile_is_opened_by_a_fresh_process(dense: Path, tiny_pool: TinyPool, tmp_path: Path, kind: str) -> None:
    if kind == "clip":
        pool = open_pool("clip", tiny_pool.base, tiny_pool.experts, root=tiny_pool.root)
        inputs = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    else:
        pool = open_pool("causal_lm", "base", {"a": "a", "b": "b"}, root=dense / kind)
        inputs = {"input_ids": TOKENS}
    module = smile_of(pool)
    directory = kept(module, pool, tmp_path / "smile")
    with torch.no_grad():
        expected = module(**inputs)
    code = (
        "import sys, torch; from pathlib import Path; from harness.rebuild import open_directory\n"
        "module, pool = open_directory(Path(sys.argv[1]))\n"
        "found = module(**torch.load(sys.argv[2]))\n"
        "torch.save(found if isinstance(found, torch.Tensor) else found.logits, sys.argv[3])"
    )
    torch.save(inputs, tmp_path / "inputs.pt")
    places = [str(directory), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    subprocess.run([sys.executable, "-c", code, *places], check=True, cwd=Path(__file__).parents[2])
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    torch.testing.assert_close(torch.load(places[2]).detach(), expected)
