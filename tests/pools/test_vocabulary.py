"""Vocabularies of several members made one: rows against a plain reference, tokenizers against transformers."""

from __future__ import annotations

import json
import random
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pools.checkpoint import Checkpoint
from pools.headers import CheckpointError
from pools.revocabulary import Revocabulary, gather
from pools.tokenizer_files import TokenizerFiles
from pools.vocabulary import unify
from pools.vocabulary_tensors import vocabulary_tensors

BASE_TEXT = ["the cat sat on the mat and the dog sat on the log"] * 4
CODE_TEXT = ["def return import return def import class lambda"] * 4
WIDTH = 6
EMBEDDING, HEAD, BIAS, NORM = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.norm.weight"


def byte_bpe(texts, size, special=("<s>", "</s>")):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, learner)
    return tokenizer


def word_piece(texts, size):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    learner = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, learner)
    return tokenizer


def unigram(texts, size):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    learner = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, learner)
    return tokenizer


def with_tokens(tokenizer, *tokens, special=()):
    """A copy with added tokens."""
    copied = Tokenizer.from_str(tokenizer.to_str())
    copied.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    copied.add_special_tokens(list(special))
    return copied


def weights(rows, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (rows, WIDTH), HEAD: (rows, WIDTH), BIAS: (rows,), NORM: (WIDTH,)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


class Bench:
    """Members on the disk and what `unify` is given."""

    def __init__(self, root):
        self.root, self.sources, self.directories, self.configs = root, {}, {}, {}

    def member(self, name, tokenizer, rows=None, config=None, seed=None, dtype=torch.float32):
        directory = self.root / (name or "base")
        directory.mkdir()
        if tokenizer is not None:
            tokenizer.save(str(directory / "tokenizer.json"))
            said = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
            (directory / "tokenizer_config.json").write_text(json.dumps(said))
            rows = rows or tokenizer.get_vocab_size()
        tensors = weights(rows, len(self.sources) if seed is None else seed, dtype)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        self.sources[name] = Checkpoint(directory)
        self.directories[name] = directory
        self.configs[name] = {"vocab_size": rows, "hidden_size": WIDTH}
        return directory

    def unify(self, mode="same", new_tokens="owner", tokens=None, chat_template=None):
        experts = {name: source for name, source in self.sources.items() if name is not None}
        return unify(
            self.sources.get(None),
            experts,
            self.directories,
            mode,
            new_tokens,
            tokens or {},
            chat_template,
            self.configs,
        )

    def ids(self, name):
        return Tokenizer.from_file(str(self.directories[name] / "tokenizer.json")).get_vocab()


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture
def mixed(bench):
    """A padded base, an expert with one more token, one trained on other text whose ids are all different."""
    base = byte_bpe(BASE_TEXT, 275)
    bench.member(None, base, rows=288, config={"eos_token": "</s>"})
    bench.member("chat", with_tokens(base, "<tool>", special=["<|user|>", "<|end|>"]), rows=281)
    bench.member("code", byte_bpe(CODE_TEXT, 290, special=("<pad>", "</s>", "<|end|>")), rows=304)
    return bench


def whole(source, name):
    """A tensor read in one go, flat."""
    out = torch.empty(int(torch.tensor(source.shapes[name]).prod()))
    source.read(name, 0, out)
    return out


def members_of(found):
    return ({} if found.base is None else {None: found.base}) | found.experts


def union_ids_of(found):
    return Tokenizer.from_str(found.texts["tokenizer.json"]).get_vocab()


def expected_rows(bench, ids, size, name, rule, overrides=None):
    """Every member's rows by the rules as they are written down, one token at a time."""
    own = {member: bench.ids(member) for member in bench.sources}
    held = {member: source[name].float() for member, source in bench.sources.items()}
    base = next(iter(own))
    have = lambda member, token: own[member].get(token, 1 << 30) < len(held[member])  # noqa: E731
    row = lambda member, token: held[member][own[member][token]]  # noqa: E731
    mean = lambda member: torch.stack(  # noqa: E731
        [row(member, token).double() for token in ids if have(member, token)]
    ).mean(0)
    result = {}
    for member in own:
        out = [None] * size
        for at in range(size):
            out[at] = held[base][at] if at < len(held[base]) else mean(base)
        for token, at in ids.items():
            word = (overrides or {}).get(token, rule)
            owners = [who for who in own if have(who, token)]
            if have(member, token):
                out[at] = row(member, token)
            elif word in own:
                out[at] = row(word, token)
            elif word == "mean":
                out[at] = mean(member)
            elif word == "base" and have(base, token):
                out[at] = row(base, token)
            else:
                out[at] = torch.stack([row(who, token) for who in owners]).mean(0)
        result[member] = torch.stack([value.float() for value in out])
    return result


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, BIAS])
@pytest.mark.parametrize("rule", ["owner", "mean", "base"])
def test_every_row_of_the_union_is_the_rules(mixed, rule, name):
    overrides = {"<tool>": "mean", "<pad>": "code", "<|user|>": "owner"}
    found = mixed.unify("union", rule, overrides)
    ids = union_ids_of(found)
    own = {token for member in mixed.sources for token in mixed.ids(member)}
    assert ids.keys() == own
    assert sorted(ids.values()) == list(range(len(ids)))
    size = -(-len(ids) // 32) * 32  # 288 rows are padded to 32
    assert found.config_changes == {"vocab_size": size}
    wanted = expected_rows(mixed, ids, size, name, rule, overrides)
    for member, source in members_of(found).items():
        assert source.shapes[name][0] == size
        torch.testing.assert_close(whole(source, name), wanted[member].reshape(-1), rtol=1e-6, atol=1e-6)
        assert torch.equal(source[name].reshape(-1), whole(source, name))


def test_a_row_that_a_member_has_is_moved_and_not_touched(mixed):
    found = mixed.unify("union", "mean")
    ids = union_ids_of(found)
    for member, source in members_of(found).items():
        rows, own = source[HEAD], mixed.ids(member)
        assert all(torch.equal(rows[ids[token]], mixed.sources[member][HEAD][at]) for token, at in own.items())


def test_with_owner_nobody_but_the_owner_moves_a_new_token(mixed):
    found = mixed.unify("union", "owner")
    at = union_ids_of(found)["<tool>"]
    row = mixed.sources["chat"][EMBEDDING][mixed.ids("chat")["<tool>"]]
    assert all(torch.equal(source[EMBEDDING][at], row) for source in members_of(found).values())


def test_mode_base_keeps_tokenizer_and_size_and_permutes_the_experts(mixed):
    found = mixed.unify("base")
    base = mixed.sources[None]
    assert found.base is base
    assert found.config_changes == {}
    assert found.texts == {}
    assert {file.name for file in found.copies} == {"tokenizer.json", "tokenizer_config.json"}
    ids = mixed.ids(None)
    for name in ("chat", "code"):
        own, rows, inner = mixed.ids(name), found.experts[name][EMBEDDING], mixed.sources[name][EMBEDDING]
        assert rows.shape == (288, WIDTH)
        names = {at: token for token, at in ids.items()}
        for at in range(288):
            has = names.get(at) in own
            assert torch.equal(rows[at], inner[own[names[at]]] if has else base[EMBEDDING][at])
        assert torch.equal(found.experts[name][NORM], mixed.sources[name][NORM])
    assert any("<tool>" in note and "chat" in note for note in found.notes)


def test_mode_base_averages_where_it_is_told_to(mixed):
    found = mixed.unify("base", "mean", {"</s>": "base"})
    ids, own = mixed.ids(None), mixed.ids("code")
    lacking = next(token for token in ids if token not in own)
    held = mixed.sources["code"][EMBEDDING].double()
    wanted = held[[own[token] for token in ids if token in own]].mean(0)
    torch.testing.assert_close(found.experts["code"][EMBEDDING][ids[lacking]].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["owner", "mean"])
@pytest.mark.parametrize("chunk", [1, 5, 7, 64, 1000])
def test_chunks_give_the_bits_of_the_whole(mixed, chunk, rule):
    found = mixed.unify("union", rule)
    for source in members_of(found).values():
        for name in source:
            wanted = whole(source, name)
            out = torch.full_like(wanted, torch.nan)
            for start in reversed(range(0, len(out), chunk)):
                source.read(name, start, out[start : start + chunk])
            assert torch.equal(out, wanted)


def test_many_threads_read_the_same(mixed):
    wanted = {member: whole(source, HEAD) for member, source in members_of(mixed.unify("union", "mean")).items()}
    found = members_of(mixed.unify("union", "mean"))
    faults = []

    def work(member):
        out = torch.empty_like(wanted[member])
        for start in range(0, len(out), 50):
            found[member].read(HEAD, start, out[start : start + 50])
        if not torch.equal(out, wanted[member]):
            faults.append(member)

    threads = [threading.Thread(target=work, args=(member,)) for member in found for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_rows_scattered_over_a_large_embedding_are_found(bench):
    """More than the memory for scattered reading holds at once, near and far apart."""
    n = 60_000
    names = [f"w{at}" for at in range(n)]
    shuffled = random.Random(0).sample(names, n)
    swapped = names[: n // 2] + [names[at ^ 1] for at in range(n // 2, n)]
    for member, order in ((None, names), ("shuffled", shuffled), ("swapped", swapped)):
        vocabulary = {token: at for at, token in enumerate(order)}
        bench.member(member, Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))
    found = bench.unify("base")
    for member, order in (("shuffled", shuffled), ("swapped", swapped)):
        place = {token: at for at, token in enumerate(order)}
        wanted = bench.sources[member][EMBEDDING][[place[token] for token in names]]
        assert torch.equal(found.experts[member][EMBEDDING], wanted)
        part = torch.empty(9)
        found.experts[member].read(EMBEDDING, 100_003, part)
        assert torch.equal(part, wanted.view(-1)[100_003:100_012])


def test_scattered_rows_are_read_in_bounded_pieces():
    longest = []

    class Counted(dict):
        def read(self, name, start, out):
            longest.append(len(out))
            out.copy_(self[name].view(-1)[start : start + len(out)])

    tensor = torch.randn(50_000, 16)
    rows = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)).numpy()
    out = torch.empty(50_000, 16)
    gather(Counted(t=tensor), "t", rows, out, np.arange(50_000))
    assert torch.equal(out, tensor[torch.from_numpy(rows)])
    assert max(longest) <= 1 << 18
    assert len(longest) < 10  # and not one by one


def test_a_mean_is_over_tokens_and_not_over_padding(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer, rows=320)
    bench.member("code", with_tokens(tokenizer, "<tool>"), rows=320)
    found = bench.unify("union", "mean")
    held = bench.sources[None][EMBEDDING]
    assert found.config_changes == {}
    torch.testing.assert_close(found.base[EMBEDDING][275].double(), held[:275].double().mean(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.experts["code"][EMBEDDING][276:], held[276:])  # padding is the base's in all


def test_equal_vocabularies_pass_as_they_are(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer)
    bench.member("one", tokenizer)
    bench.member("two", None, rows=275)
    again = bench.member("three", tokenizer) / "tokenizer.json"
    again.write_text(json.dumps(json.loads(again.read_text()) | {"truncation": None}, indent=1))  # another spelling
    for mode in ("same", "base", "union"):
        found = bench.unify(mode)
        assert found.base is bench.sources[None]
        if mode == "same":
            assert found.experts == {name: bench.sources[name] for name in ("one", "two", "three")}
        for name, source in found.experts.items():
            assert source is bench.sources[name]
        assert (found.texts, found.config_changes, found.notes) == ({}, {}, [])


def test_same_names_what_differs_and_what_to_do(mixed):
    with pytest.raises(CheckpointError) as caught:
        mixed.unify("same")
    said = str(caught.value)
    assert "expert chat differs from base's: it has 3 more tokens ('<tool>', '<|user|>', '<|end|>')" in said
    assert "expert code" in said
    assert "it lacks" in said
    assert "at another id (" in said
    assert "merge 0 is" in said
    assert "tokenizer=base" in said
    assert "tokenizer=union" in said
    assert "expert chat has 281 vocabulary rows, base 288" in said


def test_same_refuses_other_padding_and_rules_without_effect(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer, config={"eos_token": "</s>"})
    bench.member("padded", tokenizer, rows=320)
    with pytest.raises(CheckpointError, match="expert padded has 320 vocabulary rows, base 275"):
        bench.unify()
    assert bench.unify("base").experts["padded"].shapes[EMBEDDING] == (275, WIDTH)
    with pytest.raises(CheckpointError, match=r"pool\.tokens has no effect"):
        bench.unify(tokens={"<s>": "mean"})


def test_members_may_end_their_texts_with_different_tokens(bench):
    """As a base and its chat model do; the merged model ends as the base does, and a note says so."""
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer, config={"eos_token": "</s>"})
    bench.member("chat", tokenizer, config={"eos_token": {"content": "<s>"}})
    (note,) = bench.unify().notes
    assert note == "expert chat uses '<s>' as eos_token, base '</s>': the merged model has the latter"


def test_a_member_without_a_tokenizer_needs_the_bases_rows(bench):
    bench.member(None, byte_bpe(BASE_TEXT, 275))
    bench.member("short", None, rows=274)
    with pytest.raises(CheckpointError, match="expert short has no tokenizer files and 274 vocabulary rows"):
        bench.unify("base")


def test_words_that_are_no_rules_are_refused(mixed):
    with pytest.raises(CheckpointError, match="same, base, union"):
        mixed.unify("Union")
    with pytest.raises(CheckpointError, match="owner, mean, base"):
        mixed.unify("union", "median")


def test_unknown_tokens_members_and_rows_are_errors(mixed):
    with pytest.raises(CheckpointError) as caught:
        mixed.unify("union", tokens={"<nowhere>": "mean", "<tool>": "code", "the": "nobody", "<s>": "whoever"})
    said = str(caught.value)
    assert "'<nowhere>' is in no member's vocabulary" in said
    assert "expert code has no row for '<tool>'" in said
    assert "'<s>' is given 'whoever'; give owner, mean, base or an expert (chat, code)" in said
    with pytest.raises(CheckpointError, match="'<tool>' is not in the base's vocabulary"):
        mixed.unify("base", tokens={"<tool>": "mean"})


def test_tokens_beyond_the_embedding_have_no_row(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer)
    bench.member("short", with_tokens(tokenizer, "<pad>"), rows=275)
    bench.member("long", with_tokens(tokenizer, "<pad>"), rows=276)
    found = bench.unify("union")
    row = bench.sources["long"][EMBEDDING][275]
    assert all(torch.equal(source[EMBEDDING][275], row) for source in members_of(found).values())


def test_without_a_base_the_first_expert_stands_for_it(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member("first", tokenizer)
    bench.member("second", with_tokens(tokenizer, "<new>"))
    found = bench.unify("base")
    assert found.base is None
    assert found.experts["first"] is bench.sources["first"]
    assert found.experts["second"].shapes[HEAD] == (275, WIDTH)
    assert bench.unify("union").config_changes == {"vocab_size": 276}


def test_the_order_of_the_experts_does_not_matter(mixed):
    found = mixed.unify("union")
    mixed.sources = {name: mixed.sources[name] for name in (None, "code", "chat")}
    other = mixed.unify("union")
    assert other.texts == found.texts
    for name in found.experts:
        assert torch.equal(whole(other.experts[name], HEAD), whole(found.experts[name], HEAD))
        assert other.experts[name].fingerprint == found.experts[name].fingerprint


def test_fingerprints_follow_rows_rules_and_givers(mixed):
    found = mixed.unify("union")
    assert isinstance(found.experts["chat"], Revocabulary)
    before = found.experts["chat"].fingerprint, found.experts["chat"].stamp
    again = mixed.unify("union").experts["chat"]
    assert (again.fingerprint, again.stamp) == before
    ruled = mixed.unify("union", tokens={"<pad>": "mean"}).experts["chat"]
    assert ruled.fingerprint != before[0]
    assert ruled.stamp != before[1]
    save_file(weights(304, 77), mixed.directories["code"] / "model.safetensors", {"format": "pt"})
    mixed.sources["code"] = Checkpoint(mixed.directories["code"])
    changed = mixed.unify("union").experts["chat"]
    assert changed.fingerprint != before[0]
    assert changed.stamp != before[1]


def test_half_precision_is_kept_and_averaged_in_single(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer, dtype=torch.bfloat16)
    bench.member("one", with_tokens(tokenizer, "<x>"), dtype=torch.bfloat16)
    bench.member("two", with_tokens(tokenizer, "<x>"), dtype=torch.bfloat16)
    found = bench.unify("union")
    wanted = (bench.sources["one"][HEAD][275].float() + bench.sources["two"][HEAD][275].float()) / 2
    out = torch.empty(WIDTH)
    found.base.read(HEAD, 275 * WIDTH, out)
    assert torch.equal(out, wanted)
    assert found.base[HEAD].dtype is torch.bfloat16
    assert torch.equal(found.base[HEAD][275], wanted.bfloat16())
    assert found.base.nbytes == bench.sources[None].nbytes + 2 * (2 * WIDTH + 1)


def load(found, directory, architecture=None):
    """The output's tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    directory.mkdir()
    for file in found.copies:
        (directory / file.name).write_bytes(file.read_bytes())
    for name, text in found.texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(directory)


def test_byte_level_merges_join_and_the_experts_text_is_encoded_as_before(bench, tmp_path):
    base = byte_bpe(BASE_TEXT, 275)
    both = byte_bpe(BASE_TEXT, 275)
    state = json.loads(both.to_str())
    for left, right in (("d", "e"), ("de", "f"), ("Ġ", "def"), ("z", "a"), ("a", "b")):
        state["model"]["merges"].append([left, right])
        state["model"]["vocab"][left + right] = len(state["model"]["vocab"])
    extended = Tokenizer.from_str(json.dumps(state))
    bench.member(None, base, config={"eos_token": "</s>"})
    bench.member("code", with_tokens(extended, "<tool>"))
    found = bench.unify("union")
    loaded = load(found, tmp_path / "out")
    text = "the def def<tool> cat def zab"
    expert = bench.ids("code")
    assert (
        loaded.convert_ids_to_tokens(loaded(text)["input_ids"]) == with_tokens(extended, "<tool>").encode(text).tokens
    )
    assert loaded.convert_tokens_to_ids("Ġdef") == expert["Ġdef"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token == "</s>"
    assert list(loaded(text).keys()) == ["input_ids", "attention_mask"]
    assert found.notes == []


def test_what_an_earlier_merge_takes_apart_becomes_an_added_token_of_whole_words(bench, tmp_path):
    def bpe(*merges):
        state = json.loads(byte_bpe(BASE_TEXT, 270).to_str())
        for left, right in merges:
            state["model"]["merges"].append([left, right])
            state["model"]["vocab"].setdefault(left + right, len(state["model"]["vocab"]))
        return Tokenizer.from_str(json.dumps(state))

    base = bpe(("d", "q"))
    bench.member(None, base)
    bench.member("code", bpe(("q", "f"), ("d", "qf")))
    found = bench.unify("union")
    loaded = load(found, tmp_path / "out")
    at = loaded.convert_tokens_to_ids("dqf")
    assert loaded.encode("dqf") == [at]
    assert loaded.encode("qf") == [loaded.convert_tokens_to_ids("qf")]
    assert loaded.convert_ids_to_tokens(loaded.encode("xdqfx")) == ["x", "dq", "f", "x"] == base.encode("xdqfx").tokens
    assert any("'dqf'" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["bpe", "word_piece", "unigram", "mixed"])
def test_the_union_loads_and_has_every_token_at_its_row(bench, tmp_path, kind):
    make = {"bpe": (byte_bpe, byte_bpe, 290), "word_piece": (word_piece, word_piece, 60)}
    make |= {"unigram": (unigram, unigram, 40), "mixed": (byte_bpe, word_piece, 280)}
    first, second, size = make[kind]
    bench.member(None, with_tokens(first(BASE_TEXT, size), "<own>"))
    bench.member("code", with_tokens(second(CODE_TEXT, size), "<tool>", special=["<|end|>"]))
    found = bench.unify("union")
    loaded = load(found, tmp_path / "out")
    wanted = Tokenizer.from_str(found.texts["tokenizer.json"]).get_vocab()
    assert loaded.get_vocab() == wanted
    base, code = bench.ids(None), bench.ids("code")
    assert wanted.keys() == base.keys() | code.keys()
    assert {token: wanted[token] for token in base} == base
    backend = loaded.backend_tokenizer
    for token in code.keys() - base.keys():
        native = [piece.value for piece in backend.model.tokenize(token)] == [token]
        assert native or loaded.encode(token, add_special_tokens=False) == [wanted[token]] or kind == "unigram"
    assert loaded.encode("<tool>", add_special_tokens=False) == [wanted["<tool>"]]
    assert loaded.decode([wanted["<|end|>"]], skip_special_tokens=True) == ""
    own = Tokenizer.from_file(str(bench.directories[None] / "tokenizer.json"))
    assert loaded.encode("<own>", add_special_tokens=False) == own.encode("<own>").ids
    if kind != "unigram":  # there the experts' pieces compete with the base's
        assert loaded.encode("the mat", add_special_tokens=False) == own.encode("the mat").ids


def test_a_tiny_llama_loads_the_union(bench, tmp_path):
    from safetensors.torch import save_file as save
    from transformers import AutoModelForCausalLM, LlamaConfig

    base = byte_bpe(BASE_TEXT, 275)
    config = LlamaConfig(
        vocab_size=275, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    for name, tokenizer in (("base", base), ("code", with_tokens(base, "<tool>"))):
        directory = tmp_path / name
        model = AutoModelForCausalLM.from_config(config)
        model.resize_token_embeddings(tokenizer.get_vocab_size())
        model.save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        member = None if name == "base" else name
        bench.sources[member], bench.directories[member] = Checkpoint(directory), directory
        bench.configs[member] = json.loads((directory / "config.json").read_text())
    found = bench.unify("union")
    out = tmp_path / "out"
    tokenizer = load(found, out)
    (out / "config.json").write_text(json.dumps(bench.configs[None] | found.config_changes))
    save({name: found.base[name] for name in found.base}, out / "model.safetensors", {"format": "pt"})
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.vocab_size == 276
    ids = tokenizer("the cat<tool>", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == 275
    with torch.inference_mode():
        logits = merged(ids).logits
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids[:, :-1]).logits
    torch.testing.assert_close(logits[:, :-1, :275], before)


def test_older_files_are_read_as_transformers_reads_them(tmp_path):
    tokenizer = byte_bpe(BASE_TEXT, 290)
    state = json.loads(tokenizer.to_str())["model"]
    old, bert = tmp_path / "old", tmp_path / "bert"
    old.mkdir()
    bert.mkdir()
    (old / "vocab.json").write_text(json.dumps(state["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in state["merges"]) + "\n")
    (old / "added_tokens.json").write_text(json.dumps({"<x>": 290}))
    files = TokenizerFiles.find(old)
    assert files is not None
    found = files.vocabulary
    assert found.ids == tokenizer.get_vocab() | {"<x>": 290}
    assert found.merges == [tuple(pair) for pair in state["merges"]]
    assert found.kind == "BPE"
    pieces = word_piece(BASE_TEXT, 40).get_vocab()
    (bert / "vocab.txt").write_text("\n".join(sorted(pieces, key=pieces.get)) + "\n")
    assert TokenizerFiles(bert).vocabulary.ids == pieces
    assert TokenizerFiles.find(tmp_path) is None


def test_a_union_of_older_files_is_converted(bench, tmp_path):
    tokenizer = byte_bpe(BASE_TEXT, 290)
    state = json.loads(tokenizer.to_str())["model"]
    directory = bench.member(None, None, rows=290)
    (directory / "vocab.json").write_text(json.dumps(state["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in state["merges"]))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<s>"})
    )
    bench.member("code", with_tokens(tokenizer, "<tool>"))
    loaded = load(bench.unify("union"), tmp_path / "out")
    assert loaded.encode("the cat<tool>") == [*tokenizer.encode("the cat").ids, loaded.convert_tokens_to_ids("<tool>")]


def test_sentencepiece_files_pass_where_equal_and_are_refused_with_advice(bench):
    for name in (None, "one"):
        (bench.member(name, None, rows=16) / "tokenizer.model").write_bytes(b"\x0a\x0b")
    assert bench.unify("same").experts["one"] is bench.sources["one"]
    (bench.directories["one"] / "tokenizer.model").write_bytes(b"\x0a\x0c")
    with pytest.raises(CheckpointError, match=r"sentencepiece.*AutoTokenizer.*save_pretrained"):
        bench.unify("same")


def test_spoilt_files_are_named(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer)
    file = bench.member("one", tokenizer) / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"one/tokenizer\.json is no JSON file"):
        bench.unify()
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"one/tokenizer\.json is no tokenizer that can be read"):
        bench.unify()


def test_the_chat_template_is_chosen_and_not_guessed(bench, tmp_path):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer, config={"chat_template": "B"})
    bench.member("one", tokenizer, config={"chat_template": "B"})
    bench.member("none", tokenizer)
    assert bench.unify().texts == {}
    two = bench.member("two", tokenizer)
    (two / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    with pytest.raises(CheckpointError, match=r"template of two differs from base's; .*chat_template=base\|two\|FILE"):
        bench.unify()
    assert bench.unify(chat_template="base").texts == {}
    found = bench.unify(chat_template="two")
    loaded = load(found, tmp_path / "out")
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    (tmp_path / "mine.jinja").write_text("MINE")
    written = bench.unify(chat_template=str(tmp_path / "mine.jinja")).texts["tokenizer_config.json"]
    assert json.loads(written)["chat_template"] == "MINE"
    with pytest.raises(CheckpointError, match="no member with a template; members with one: base, one, two"):
        bench.unify(chat_template="none")


def test_the_only_chat_template_is_taken_and_named(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer)
    bench.member("chat", with_tokens(tokenizer, special=["<|end|>"]), config={"chat_template": "C"})
    for mode in ("base", "union"):
        found = bench.unify(mode)
        assert json.loads(found.texts["tokenizer_config.json"])["chat_template"] == "C"
        assert "tokenizer_config.json" not in {file.name for file in found.copies}
        assert any("chat template is expert chat's" in note for note in found.notes)


def test_tied_and_untied_heads_are_not_mixed(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    bench.member(None, tokenizer)
    directory = bench.member("tied", with_tokens(tokenizer, "<x>"))
    save_file({EMBEDDING: torch.zeros(276, WIDTH)}, directory / "model.safetensors", {"format": "pt"})
    bench.sources["tied"] = Checkpoint(directory)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has no elements a row in expert tied and 6 in the base"):
        bench.unify("union")


@pytest.mark.parametrize(
    "names",
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("transformer.wte.weight", "lm_head.bias"),
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
        ("model.language_model.embed_tokens.weight",),
    ],
)
def test_what_belongs_to_the_vocabulary_is_known_by_name_and_rows(names):
    shapes = {name: (10, 4) if name.endswith("weight") else (10,) for name in names}
    others = {"model.layers.0.mlp.up_proj.weight": (10, 4), "audio.embed_tokens.weight": (7, 4), "norm.bias": (10,)}
    assert set(vocabulary_tensors(shapes | others, 10)) == set(names)


def test_a_bias_with_the_vocabulary_last_is_rearranged(bench):
    tokenizer = byte_bpe(BASE_TEXT, 275)
    for name, known in ((None, tokenizer), ("code", byte_bpe(CODE_TEXT, 275))):
        directory = bench.member(name, known)
        tensors = weights(275, 3) | {"final_logits_bias": torch.randn(1, 275)}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        bench.sources[name] = Checkpoint(directory)
    found = bench.unify("union").experts["code"]
    ids, own = union_ids_of(bench.unify("union")), bench.ids("code")
    assert found["final_logits_bias"].shape == (1, len(ids))
    inner = bench.sources["code"]["final_logits_bias"]
    assert all(found["final_logits_bias"][0, ids[token]] == inner[0, at] for token, at in own.items())
