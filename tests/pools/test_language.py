import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.open import open_pool
from tests.pools.language_models import change_config, change_tensors, write_model, write_tokenizer

AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}
KINDS = [("causal_lm", "llama"), ("causal_lm", "qwen2"), ("causal_lm", "gpt2"), ("seq2seq", "t5")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories by name: a base and two experts of each kind."""
    root = tmp_path_factory.mktemp("language")
    for family, kind in KINDS:
        for seed, name in enumerate(("base", "a", "b")):
            write_model(root / kind / name, kind, seed, AUTO[family])
    return root


@pytest.fixture
def copied(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


def opened(root, family, kind, *experts, **choices):
    return open_pool(family, str(root / kind / "base"), {name: str(root / kind / name) for name in experts}, **choices)


def loaded(family, directory):
    """The model as transformers loads it, and the names that did not fit."""
    import transformers

    model, told = getattr(transformers, AUTO[family]).from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    return model.eval(), {key: names for key, names in told.items() if names}


def averaged(pool):
    experts = list(pool.experts.values())
    return {name: sum(expert[name].float() for expert in experts).div(len(experts)).to(pool.reference[name].dtype)
            for name in pool.reference}  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_merged_model_loads_in_transformers_as_it_is(models, tmp_path, family, kind):
    pool = opened(models, family, kind, "a", "b")
    assert pool.faults() == []
    assert pool.notes == []
    merged = averaged(pool)
    pool.write(tmp_path / "out", merged.items(), {"method": "simple_average"})
    model, wrong = loaded(family, tmp_path / "out")
    assert wrong == {}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(models / kind / "base" / "model.safetensors")
    )
    rows = [("ab", "cd"), ("a", "xyz")]
    inputs = pool.feed(rows)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, pool.module(merged)(**inputs).logits, rtol=0, atol=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_module_is_the_one_that_transformers_loads(models, family, kind):
    pool = opened(models, family, kind, "a")
    inputs = pool.feed([("question", "answer"), ("q", "a longer answer")])
    with torch.no_grad():
        for module, name in ((pool.module(), "base"), (pool.module(pool.experts["a"]), "a")):
            theirs, _ = loaded(family, models / kind / name)
            torch.testing.assert_close(module(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=0)
            assert not module.training
            assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_skeleton_has_no_weights_and_all_buffers(models, family, kind):
    pool = opened(models, family, kind, "a")
    skeleton, module = pool.skeleton(), pool.module()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    buffers = dict(skeleton.named_buffers())
    assert list(buffers) == [name for name, _ in module.named_buffers()]
    for name, buffer in module.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_tensors_that_do_not_make_the_model_are_told(models):
    pool = opened(models, "causal_lm", "llama", "a")
    tensors = dict(pool.base)
    norm = tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"do not make a LlamaForCausalLM: 1 missing: model\.norm\.weight"):
        pool.module(tensors)
    with pytest.raises(CheckpointError, match=r"1 left over: model\.extra"):
        pool.module(tensors | {"model.norm.weight": norm, "model.extra": norm})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(3,\), wanted \(16,\)"):
        pool.module(tensors | {"model.norm.weight": norm[:3]})


def test_feed_pads_on_the_right_and_labels_what_is_to_be_predicted(models):
    pool = opened(models, "causal_lm", "llama", "a")
    tokens = pool.tokenizer
    fed = pool.feed([("ab", "cde"), ("a", "b"), "xyz"])
    assert fed["input_ids"].shape == (3, 6)
    assert fed["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert fed["input_ids"][0].tolist() == tokens("abcde")["input_ids"]
    cde, b, xyz = (tokens(text, add_special_tokens=False)["input_ids"] for text in ("cde", "b", "xyz"))
    assert fed["labels"].tolist() == [
        [-100, -100, -100, *cde],
        [-100, -100, *b, -100, -100, -100],
        [1, *xyz, -100, -100],
    ]
    assert all(tensor.dtype == torch.int64 for tensor in fed.values())
    with pytest.raises(CheckpointError, match=r"a text has 71 tokens, and .* reads at most 64"):
        pool.feed(["x" * 70])


def test_seq2seq_is_fed_pairs(models):
    pool = opened(models, "seq2seq", "t5", "a")
    fed = pool.feed([("ab", "cde"), ("abcd", "b")])
    assert fed["input_ids"].shape == (2, 5)
    assert fed["labels"].shape == (2, 4)
    assert fed["labels"][1, 2:].tolist() == [-100, -100]
    assert fed["labels"][1, 1] == pool.tokenizer.eos_token_id
    with pytest.raises(CheckpointError, match=r"fed \(prompt, target\) pairs"):
        pool.feed(["a text"])


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_generate_is_greedy_whatever_the_batch(models, family, kind):
    pool = opened(models, family, kind, "a")
    module, prompts = pool.module(), ["abc", "a longer prompt", "x"]
    together = pool.generate(module, prompts, 6)
    assert together == [pool.generate(module, [prompt], 6)[0] for prompt in prompts]
    if family == "causal_lm":
        ids = pool.tokenizer("abc", return_tensors="pt")["input_ids"]
        wanted = []
        for _ in range(6):
            with torch.no_grad():
                wanted.append(int(module(input_ids=ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[wanted[-1]]])], dim=1)
            if wanted[-1] == 2:
                break
        assert together[0] == pool.tokenizer.decode(wanted, skip_special_tokens=True)


def test_generate_is_cut_at_the_stop(models):
    pool = opened(models, "causal_lm", "llama", "a")
    module = pool.module()
    text = pool.generate(module, ["abc"], 12)[0]
    stop = text[4]
    assert pool.generate(module, ["abc", "x"], 12, stop)[0] == text.partition(stop)[0]


def test_a_tied_head_that_is_stored_is_dropped_and_named(copied):
    def untie(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    change_tensors(copied / "qwen2" / "a", untie)
    pool = opened(copied, "causal_lm", "qwen2", "a", "b")
    assert pool.faults() == []
    assert pool.dropped == {"a": ("lm_head.weight",)}
    assert "lm_head.weight" not in pool.experts["a"]
    change_tensors(copied / "qwen2" / "base", untie)
    pool = opened(copied, "causal_lm", "qwen2", "a", "b")
    assert pool.faults() == []
    assert pool.dropped == {"base": ("lm_head.weight",), "a": ("lm_head.weight",)}


def test_an_untied_base_reads_a_tied_experts_head_from_its_embedding(copied):
    change_config(copied / "qwen2" / "base", tie_word_embeddings=False)
    change_tensors(copied / "qwen2" / "base", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    pool = opened(copied, "causal_lm", "qwen2", "a")
    assert pool.faults() == []
    expert = pool.experts["a"]
    assert torch.equal(expert["lm_head.weight"], expert["model.embed_tokens.weight"])
    part = torch.empty(5)
    expert.read("lm_head.weight", 3, part)
    assert torch.equal(part, expert["model.embed_tokens.weight"].flatten()[3:8])
    assert any("lm_head.weight is read from model.embed_tokens.weight" in note for note in pool.notes)


def test_a_missing_head_that_is_not_tied_is_a_fault(copied):
    def behead(tensors):
        del tensors["lm_head.weight"]

    change_tensors(copied / "llama" / "a", behead)
    (fault,) = opened(copied, "causal_lm", "llama", "a", "b").faults()
    assert fault == "expert a misses lm_head.weight (260, 16), which the base has"


def test_t5_embeddings_that_are_stored_thrice_are_one(copied):
    def shares(tensors):
        return tensors | {f"{where}.embed_tokens.weight": tensors["shared.weight"].clone() for where in
                          ("encoder", "decoder")}  # fmt: skip

    change_tensors(copied / "t5" / "b", shares)
    pool = opened(copied, "seq2seq", "t5", "a", "b")
    assert pool.faults() == []
    assert set(pool.dropped["b"]) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def test_a_t5_with_a_head_of_its_own_keeps_it(copied, tmp_path):
    for name in ("base", "a"):
        change_config(copied / "t5" / name, tie_word_embeddings=False)
        change_tensors(copied / "t5" / name, lambda t: t | {"lm_head.weight": t["shared.weight"] + 1})
    pool = opened(copied, "seq2seq", "t5", "a")
    assert pool.faults() == []
    assert "lm_head.weight" in pool.base
    pool.write(tmp_path / "out", pool.experts["a"].items(), {"method": "expert"})
    module, model = pool.module(pool.experts["a"]), loaded("seq2seq", tmp_path / "out")[0]
    assert torch.equal(module.lm_head.weight, pool.experts["a"]["lm_head.weight"])
    assert torch.equal(model.lm_head.weight, module.lm_head.weight)


def test_buffers_of_old_checkpoints_are_dropped_and_named(copied):
    def old(tensors):
        return tensors | {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        }

    change_tensors(copied / "gpt2" / "base", old)
    change_tensors(
        copied / "llama" / "a", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )
    pool = opened(copied, "causal_lm", "gpt2", "a")
    assert pool.faults() == []
    assert set(pool.dropped["base"]) == {"transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"}
    pool = opened(copied, "causal_lm", "llama", "a")
    assert pool.faults() == []
    assert pool.dropped == {"a": ("model.layers.0.self_attn.rotary_emb.inv_freq",)}


def test_names_that_differ_by_a_prefix_are_brought_together(copied, tmp_path):
    change_tensors(copied / "gpt2" / "base", lambda t: {n.removeprefix("transformer."): x for n, x in t.items()})
    pool = opened(copied, "causal_lm", "gpt2", "a", "b")
    assert pool.faults() == []
    assert any("the names differ by a prefix" in note for note in pool.notes)
    assert "h.0.attn.c_attn.weight" in pool.experts["a"]
    pool.write(tmp_path / "out", pool.experts["a"].items(), {"method": "expert"})
    model, wrong = loaded("causal_lm", tmp_path / "out")
    assert wrong == {}
    theirs, _ = loaded("causal_lm", copied / "gpt2" / "a")
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_roles_know_how_gpt2_stores_its_linear_layers(models):
    roles = opened(models, "causal_lm", "gpt2", "a").roles
    name = "transformer.h.0.mlp.c_fc.weight"
    assert roles.is_transposed(name)
    assert not roles.is_linear(name)
    roles = opened(models, "causal_lm", "llama", "a").roles
    assert roles.is_linear("model.layers.0.mlp.up_proj.weight")
    assert not roles.is_linear("model.embed_tokens.weight")
    assert roles.mlps() == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert [roles.layer_of(name) for name in ("model.embed_tokens.weight", "model.norm.weight")] == [0, 3]


def test_another_dtype_is_written_and_told(models, tmp_path):
    from pools.write import write_directory

    pool = opened(models, "causal_lm", "llama", "a", merge=["model.layers.*"])
    layout = pool.layout({"method": "expert"}, torch.bfloat16)
    assert {spec.dtype for spec in layout.specs.values()} == {torch.bfloat16}
    write_directory(tmp_path / "out", layout, ((n, t.bfloat16()) for n, t in pool.experts["a"].items()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        written["lm_head.weight"], load_file(models / "llama/base/model.safetensors")["lm_head.weight"].bfloat16()
    )


def test_the_rest_of_a_selection_comes_from_a_member(models, tmp_path):
    pool = opened(models, "causal_lm", "llama", "a", "b", merge=["*mlp*"], rest="b")
    assert pool.faults() == []
    assert all("mlp" in name for name in pool.base)
    assert set(pool.around) == set(load_file(models / "llama/base/model.safetensors")) - set(pool.base)
    pool.write(tmp_path / "out", pool.experts["a"].items(), {"method": "expert"})
    written = load_file(tmp_path / "out" / "model.safetensors")
    theirs = {name: load_file(models / "llama" / name / "model.safetensors") for name in ("a", "b")}
    for name, tensor in written.items():
        assert torch.equal(tensor, theirs["a" if "mlp" in name else "b"][name])
    assert set(pool.dropped) == {"base", "a"}
    assert set(pool.dropped["a"]) == set(pool.around)
    inputs = pool.feed(["abc"])
    with torch.no_grad():  # an expert on its own is the whole expert
        whole = loaded("causal_lm", models / "llama" / "a")[0](**inputs).logits
        assert torch.equal(pool.module(pool.experts["a"])(**inputs).logits, whole)


def test_layers_are_stacked_and_the_model_runs(models, tmp_path):
    slices = [{"experts": {"a": [0, 2]}}, {"experts": {"b": [1, 2]}}]
    pool = opened(models, "causal_lm", "llama", "a", "b", slices=slices)
    assert pool.faults() == []
    (name,) = pool.experts
    pool.write(tmp_path / "out", pool.experts[name].items(), {"method": "passthrough"})
    model, wrong = loaded("causal_lm", tmp_path / "out")
    assert wrong == {}
    assert model.config.num_hidden_layers == 3
    theirs = loaded("causal_lm", models / "llama" / "b")[0]
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)
    assert "model.layers.0.mlp.up_proj.weight" in pool.dropped["b"]


def test_the_fingerprint_changes_with_the_tokenizer_and_the_rest(copied):
    prints = [opened(copied, "causal_lm", "llama", "a").context_fingerprint]
    prints.append(opened(copied, "causal_lm", "llama", "a", merge=["*mlp*"]).context_fingerprint)
    change_config(copied / "llama" / "base", rms_norm_eps=1e-3)
    prints.append(opened(copied, "causal_lm", "llama", "a").context_fingerprint)
    assert len(set(prints)) == 3
    assert opened(copied, "causal_lm", "llama", "b").context_fingerprint == prints[2]


def test_headers_are_all_that_is_needed_to_open_and_write(models, tmp_path):
    import subprocess
    import sys

    code = f"""
import sys
from pathlib import Path
from pools.open import open_pool
pool = open_pool("causal_lm", {str(models / "llama" / "base")!r}, {{"a": {str(models / "llama" / "a")!r}}})
assert not pool.faults() and pool.notes is not None and pool.roles and pool.context_fingerprint
pool.write(Path({str(tmp_path / "out")!r}), pool.experts["a"].items(), {{"method": "expert"}})
heavy = {{"transformers", "peft", "datasets", "tokenizers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


CLASSIFIERS = ["bert", "roberta", "llama"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Classifiers with 2 and 3 classes of a base that was trained for something else."""
    root = tmp_path_factory.mktemp("classifiers")
    auto = AUTO["sequence_classification"]
    for kind in CLASSIFIERS:
        before = "AutoModelForCausalLM" if kind == "llama" else "AutoModelForMaskedLM"
        write_model(root / kind / "base", kind, 0, before)
        write_model(root / kind / "two", kind, 1, auto, num_labels=2)
        write_model(root / kind / "three", kind, 2, auto, num_labels=3)
        for name in ("base", "two", "three"):
            write_tokenizer(root / kind / name)
    return root


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_are_merged_without_their_heads(classifiers, tmp_path, kind):
    pool = opened(classifiers, "sequence_classification", kind, "two", "three")
    if kind == "bert":  # the base was saved without the pooler that classifiers have: it goes with the head
        assert "bert.pooler.dense.weight" in pool.heads["two"]
    assert pool.faults() == []
    assert set(pool.heads) == {"two", "three"}
    assert any(name.startswith(("lm_head", "cls.")) for name in pool.dropped["base"])
    inputs = pool.feed(["abc", "a longer text"])
    with torch.no_grad():
        for name, classes in (("two", 2), ("three", 3)):
            module = pool.with_head(pool.module(pool.experts[name]), name)
            logits = module(**inputs).logits
            assert logits.shape == (2, classes)
            theirs, _ = loaded("sequence_classification", classifiers / kind / name)
            assert torch.equal(logits, theirs(**inputs).logits)
    pool.write(tmp_path / "out", averaged(pool).items(), {"method": "simple_average"})
    model, wrong = loaded("sequence_classification", tmp_path / "out")
    assert wrong == {}
    assert model.config.num_labels == 2
    assert pool.dropped["three"] == tuple(pool.heads["three"])
    with pytest.raises(CheckpointError, match="base has no head of a classifier"):
        pool.with_head(module, None)


def test_classifiers_of_a_base_with_a_pooler(classifiers, tmp_path):
    write_model(tmp_path / "base", "bert", 5, "AutoModel")
    experts = {name: str(classifiers / "bert" / name) for name in ("two", "three")}
    pool = open_pool("sequence_classification", str(tmp_path / "base"), experts)
    assert pool.faults() == []
    assert "embeddings.word_embeddings.weight" in pool.experts["two"]
    pool.write(tmp_path / "out", averaged(pool).items(), {"method": "simple_average"})
    _, wrong = loaded("sequence_classification", tmp_path / "out")
    assert wrong == {}


def test_language_models_have_no_zero_shot_head(models):
    with pytest.raises(CheckpointError, match="do not classify images"):
        opened(models, "causal_lm", "llama", "a").head(["a"], ["{}"])


def test_specs_come_from_headers(models):
    pool = opened(models, "causal_lm", "llama", "a")
    assert specs_of(pool.base) == specs_of(dict(pool.base))
