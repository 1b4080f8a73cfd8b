"""Pruned models: what is told of their sparsity is what is in them, and blocks are fed what pruned ones before make."""

from __future__ import annotations

from dataclasses import replace

import mlflow
import pytest
import torch
import yaml
from torch import nn

from harness import cli
from harness.adapt import gram_matrices
from harness.bench import open_bench
from harness.compose import compose
from harness.crew import crew
from harness.examples import Texts
from harness.execute import launch
from harness.inputs import Inputs, MergeError
from harness.layerwise import merged_by_layers
from harness.merge import Memory, Merge, merge, merge_into, ready
from harness.output import Alone, _together, merge_key
from harness.sparsity import Zeros, count_zeros, total
from harness.track import local_path
from methods.catalogue import CATALOGUE, find
from methods.prune import PruningParams
from pools.checkpoint import Checkpoint
from pools.roles import ModuleRoles
from pools.write import Layout
from tests.harness.engine_parts import on_disk, plain
from tests.harness.test_language_run import settings
from tests.harness.test_layerwise import STATES, TOKENS, Stack, grams_of
from tests.methods.samples import SampleRoles, models
from tests.pools.language_models import write_model

PRUNERS = [row for row in CATALOGUE.values() if row.prunes]
INFORMED = [row.name for row in PRUNERS if row.layerwise]


def counted(tensors: dict[str, torch.Tensor], pruned: set[str], merged: set[str]) -> Zeros:
    """Zeros by hand."""
    sizes = {name: (int((tensors[name] == 0).sum()), tensors[name].numel()) for name in merged}
    own = [sizes[name] for name in pruned]
    return Zeros(*map(sum, zip(*own, strict=True)), *map(sum, zip(*sizes.values(), strict=True)))


def test_zeros_are_counted_and_summed() -> None:
    one = count_zeros(torch.tensor([0.0, -0.0, 1e-30, 2.0]), pruned=True)
    assert one == Zeros(2, 4, 2, 4)
    both = total([one, count_zeros(torch.zeros(4), pruned=False), Zeros()])
    assert both == Zeros(2, 4, 6, 8)
    assert both.metrics() == {"prune/sparsity": 0.5, "prune/sparsity_model": 0.75}
    assert dict(both.summary()) == {
        "sparsity": "0.5000 of 4 weights in pruned tensors are zero",
        "of the model": "0.7500 of 8 merged weights",
    }
    assert Zeros().metrics() == {}
    assert Zeros().summary() == []


@pytest.mark.parametrize("name", ["prune_random", "prune_magnitude"])
@pytest.mark.parametrize("scope", ["row", "model"])
def test_what_is_told_is_what_is_there(name: str, scope: str) -> None:
    """By one process with two workers, and by two processes' shares; zeros that were there before count as well."""
    _, experts = models(1)
    experts["ant"]["embeddings.class_embedding"][:3] = 0
    row = find(name)
    asked = Merge(row, row.load_params()(scope=scope), Inputs(None, experts, SampleRoles()))
    job = ready(asked)
    with crew(2) as hands:
        sink = Memory(job.specs)
        done = merge_into(sink, job, hands)
    weights = {each for each in job.inputs.specs if job.inputs.is_weight(each)}
    pruned = {each for each in weights if SampleRoles().is_linear(each)}
    assert done.zeros == counted(sink.tensors, pruned, weights)
    assert done.zeros.pruned_zeros > 0.4 * done.zeros.pruned
    assert done.zeros.zeros == done.zeros.pruned_zeros + 3
    shares = [merge_into(Memory(job.specs), job, share=(rank, 2)).zeros for rank in (0, 1)]
    assert all(share.weights for share in shares)
    assert total(shares) == done.zeros
    assert _together(done, Alone()).zeros == done.zeros


def test_finished_files_are_not_gone_on_with(tmp_path) -> None:
    """Their zeros would not be counted."""
    saved = on_disk(tmp_path / "one", {"layers.0.fc.weight": torch.ones(2, 4)})
    keys = [merge_key(plain(m, None, {"a": saved}), Layout({}), 100) for m in ("prune_magnitude", "simple_average")]
    assert keys[0] is None
    assert keys[1] is not None


def test_rounding_to_zero_counts() -> None:
    """What a float16 file cannot hold is as much a zero as what was pruned."""
    state = {"layers.0.fc.weight": torch.tensor([[1e-9, 1.0, 2.0, 3.0]])}
    job = plain("prune_magnitude", None, {"a": state}, dtype=torch.float16, density=1.0)
    assert merge_into(Memory(job.specs), job).zeros == Zeros(1, 4, 1, 4)


@pytest.mark.parametrize("row", PRUNERS, ids=lambda row: row.name)
def test_rows_that_prune(row) -> None:
    assert issubclass(row.load_params(), PruningParams)
    assert row.placed
    assert row.layerwise == (row.stats == "gram")


def job(name: str, **params) -> Merge:
    row = find(name)
    return Merge(row, row.load_params()(**params), Inputs(STATES["a"], STATES, ModuleRoles(Stack(0))))


def by_layers(asked: Merge, module: nn.Module | None = None) -> Merge:
    module = module or Stack(0)
    return merged_by_layers(asked, module, lambda expert, wanted: grams_of(module, TOKENS[expert], wanted))


@pytest.mark.parametrize("name", INFORMED)
def test_blocks_are_fed_what_the_pruned_ones_before_make(name: str) -> None:
    """One expert, block after block by hand; embedding, norm and head are as they were."""
    done = merge(by_layers(job(name, expert="a")))
    by_hand = Stack(0)
    by_hand.load_state_dict(STATES["a"])
    roles, params = ModuleRoles(by_hand), {"density": 0.5}
    for block in ("blocks.0.", "blocks.1."):
        stats = grams_of(by_hand, TOKENS["a"], lambda key, block=block: key.startswith(block) and roles.is_linear(key))
        own = {key: tensor.clone() for key, tensor in by_hand.state_dict().items() if key.startswith(block)}
        row = find(name)
        inputs = Inputs(None, {"a": own}, roles, {"a": stats})
        by_hand.load_state_dict(by_hand.state_dict() | merge(Merge(row, row.load_params()(**params), inputs)))
    for key, tensor in by_hand.named_parameters():
        torch.testing.assert_close(done[key], tensor.detach(), msg=key)
    zeros = [int((done[f"blocks.{block}.{layer}.weight"] == 0).sum()) for block in (0, 1) for layer in (0, 2)]
    assert zeros == ([10, 12, 10, 12] if name == "wanda" else [10] * 4), "in rows of five two are kept"
    assert torch.equal(done["head.weight"], STATES["a"]["head.weight"])


@pytest.mark.parametrize("name", INFORMED)
def test_sparsity_is_told_of_merges_by_blocks_too(name: str) -> None:
    ready_one = ready(by_layers(job(name)))
    sink = Memory(ready_one.specs)
    done = merge_into(sink, ready_one)
    layers = {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)}
    weights = {key for key, _ in Stack(0).named_parameters()}
    assert done.zeros == counted(sink.tensors, layers, weights)
    assert done.zeros.shares[0] == (0.55 if name == "wanda" else 0.5), "in rows of five two are kept"


@pytest.mark.parametrize("name", INFORMED)
def test_only_the_named_experts_inputs_are_collected(name: str) -> None:
    fed, module = [], Stack(0)

    def collect(expert, wanted):
        fed.append(expert)
        return grams_of(module, TOKENS[expert], wanted)

    merged_by_layers(job(name, expert="b"), module, collect)
    assert fed == ["b", "b"], "once for each block"


class Conv1D(nn.Module):
    """A linear layer stored as (in, out); the pools know such by this name, which transformers gives them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.weight + self.bias


@pytest.mark.parametrize("name", INFORMED)
def test_transposed_layers_are_fed_and_pruned(name: str) -> None:
    """The same layers stored either way come to the same weights."""
    torch.manual_seed(0)
    turned, straight = nn.ModuleDict({"h": nn.ModuleList([Conv1D(4, 6)])}), nn.Linear(4, 6)
    turned.forward = lambda tokens: turned["h"][0](tokens)
    weight = turned["h"][0].weight.detach().clone()
    state = {key: tensor.clone() for key, tensor in turned.state_dict().items()}
    row = find(name)
    asked = Merge(row, row.load_params()(), Inputs(None, {"a": state}, ModuleRoles(turned)))
    found = merge(merged_by_layers(asked, turned, lambda expert, wanted: grams_of(turned, TOKENS["a"], wanted)))
    straight.weight.data = weight.T.contiguous()
    blocks = nn.ModuleDict({"h": nn.ModuleList([straight])})
    own = {key: tensor.clone() for key, tensor in blocks.state_dict().items()}
    inputs = Inputs(None, {"a": own}, ModuleRoles(blocks), {"a": {"h.0.weight": TOKENS["a"].T @ TOKENS["a"] / 30}})
    expected = merge(Merge(row, row.load_params()(), inputs))
    torch.testing.assert_close(found["h.0.weight"].T, expected["h.0.weight"])
    assert int((found["h.0.weight"] == 0).sum()) == 12


@pytest.mark.parametrize("name", INFORMED)
def test_nothing_to_prune_is_refused_before_anything_is_fed(name: str) -> None:
    asked = job(name)
    few = {expert: {key: state[key] for key in ("embedding", "head.weight")} for expert, state in STATES.items()}
    with pytest.raises(MergeError, match=rf"{name} prunes weights of linear layers in blocks.* 2 tensors .*embedding"):
        merged_by_layers(replace(asked, inputs=replace(asked.inputs, base=None, experts=few)), Stack(0), pytest.fail)


# -- as a user meets it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part"), [("llama", "_proj."), ("gpt2", ".c_")])
def test_merge_tells_how_sparse_the_model_on_the_disk_is(tmp_path, capfd, kind, part) -> None:
    """Of GPT-2 the transposed layers are pruned; embeddings and the head are not."""
    write_model(tmp_path / "one", kind, 1)
    given = [f"+pool.experts.one={tmp_path / 'one'}", "method=prune_magnitude", "engine.dtype=bfloat16"]
    assert cli.main(["merge", "pool=causal_lm", *given, f"output={tmp_path / 'out'}"]) == 0
    said = capfd.readouterr().out
    tensors = {name: t for name, t in dict(Checkpoint(tmp_path / "out")).items() if t.is_floating_point()}
    layers = {name for name in tensors if part in name and name.endswith("weight")}
    found = counted(tensors, layers, set(tensors))
    assert found.shares[0] == pytest.approx(0.5, abs=0.01)
    assert 0 < found.shares[1] < found.shares[0]
    assert f"{found.shares[0]:.4f} of {found.pruned:,} weights in pruned tensors are zero" in said
    assert f"{found.shares[1]:.4f} of {found.weights:,} merged weights" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", INFORMED)
def test_a_run_logs_it(workplace, method) -> None:
    """Every expert's own task feeds its layers; what is logged is what the logged model holds."""
    asked = (f"method={method}", "method.n=2", "adaptation.batch_size=5", "evaluation.limit=4")
    outcome = workplace.once(*asked)
    config = compose([*workplace.choices, *asked])
    pool = open_bench(config.pool, config.tasks, local_path).pool
    roles, weights = pool.roles, {name for name in pool.base if not pool.roles.is_buffer(name)}
    layers = {name for name in weights if roles.is_linear(name) and 1 <= roles.layer_of(name) <= roles.n_layers}
    found = counted(dict(Checkpoint(local_path(str(outcome.model_uri)))), layers, weights)
    assert found.metrics() == {
        name: value for name, value in mlflow.get_run(outcome.run_id).data.metrics.items() if name.startswith("prune/")
    }
    assert found.shares[0] == 0.5


class Echo:
    """Of a pool, what feeds texts of any length: a token for each letter, padded on the right."""

    family = "causal_lm"

    def feed(self, rows: list[str]) -> dict[str, torch.Tensor]:
        mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        ids = torch.zeros_like(mask)
        for index, row in enumerate(rows):
            mask[index, : len(row)] = 1
            ids[index, : len(row)] = torch.tensor([ord(letter) % 7 for letter in row])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}


class Letters(nn.Module):
    """Looks letters up and sends them through a layer, which sees padding too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(input_ids))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_inputs_of_texts_are_those_of_their_letters_and_not_of_padding(batch_size: int) -> None:
    texts, module = ["abc", "", "a", "gfedcba", "bb"], Letters()
    fed = Texts("perplexity", texts, Echo(), range(len(texts)))
    wanted = lambda name: name == "layer.weight"  # noqa: E731
    found = gram_matrices(launch("cpu", 1, "32-true", 0), module, fed, batch_size, wanted)["layer.weight"]
    letters = module.embedding(torch.tensor([ord(letter) % 7 for letter in "".join(texts)])).double()
    torch.testing.assert_close(found, (letters.T @ letters / len(letters)).float().detach())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), [("llama", "causal_lm"), ("gpt2", "causal_lm"), ("t5", "seq2seq")])
@pytest.mark.parametrize("method", INFORMED)
def test_language_models_are_pruned_by_texts(tmp_path, build_workplace, kind, family, method) -> None:
    """GPT-2's layers are stored as (in, out); T5 has two stacks."""
    write_model(tmp_path / "one", kind, 1, "AutoModelForSeq2SeqLM" if family == "seq2seq" else "AutoModelForCausalLM")
    columns = {"prompt": ["1+1=", "12+3="], "target": ["2", "15"]}
    data = settings(tmp_path / "data", "exact_match", columns, max_new_tokens=2)
    pool = {"family": family, "base": None, "experts": {"one": "one"}, "root": str(tmp_path)}
    place = build_workplace(tmp_path / "work", pool)
    (place.directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"one": data}}))
    outcome = place.run(f"method={method}", "method.n=2", "evaluation.plots=false")
    with place.entered():
        metrics = mlflow.get_run(outcome.run_id).data.metrics
    assert metrics["prune/sparsity"] == 0.5
    assert 0.1 < metrics["prune/sparsity_model"] < 0.5
