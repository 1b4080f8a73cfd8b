"""Scores are exact: every row counts once, in whichever batch it comes."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness import evaluate as evaluating
from harness.evaluate import TaskScore, evaluate
from harness.examples import Examples, Texts
from harness.execute import launch, own_share
from pools.open import open_pool
from tasks.splits import TaskError
from tests.pools.language_models import write_model


class Feeds:
    def feed(self, rows):
        return {"x": torch.stack(list(rows))}


class Passes(nn.Module):
    """Gives its input back, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


@pytest.fixture(scope="module")
def fabric():
    return launch("cpu", 1, "32-true", 0)


def examples(n: int, n_classes: int) -> Examples:
    generator = torch.Generator().manual_seed(n)
    rows = [(torch.randn(4, generator=generator), index % n_classes) for index in range(n)]
    return Examples(rows, Feeds(), torch.randn(n_classes, 4, generator=generator), range(n))


@pytest.mark.parametrize("batch_size", [1, 4, 17, 1000])
def test_scores_are_those_of_all_rows_at_once(fabric, batch_size):
    tasks = {"a": examples(17, 3), "b": examples(5, 5)}
    ticks: list[int] = []
    found = list(evaluate(fabric, Passes(), tasks, batch_size, ticks.append))
    assert [score.task for score in found] == ["a", "b"]
    assert sum(ticks) == 22
    for score, fed in zip(found, tasks.values(), strict=True):
        logits = 2 * torch.stack([row for row, _ in fed.rows]) @ fed.head.T
        labels = torch.tensor([label for _, label in fed.rows])
        right = int((logits.argmax(1) == labels).sum())
        assert round(score.value * len(fed), 4) == right
        assert (score.metric, score.higher_is_better) == ("accuracy", True)
        assert score.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert score.n == len(fed)


def test_a_result_comes_before_the_next_task_is_read(fabric):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise RuntimeError("read")

    tasks = {"a": examples(3, 2), "b": Examples(Broken(), Feeds(), torch.ones(2, 4), range(3))}
    arriving = evaluate(fabric, Passes(), tasks, 8)
    assert isinstance(next(arriving), TaskScore)
    with pytest.raises(RuntimeError, match="read"):
        next(arriving)


def test_evaluation_leaves_no_gradients(fabric):
    module = Passes().train()
    list(evaluate(fabric, module, {"a": examples(3, 2)}, 8))
    assert module.scale.grad is None
    assert not module.training


@pytest.mark.parametrize(("n", "world"), [(21, 2), (1, 4), (8, 3), (0, 2)])
def test_every_row_belongs_to_just_one_process(n, world):
    class Rank:
        world_size = world

        def __init__(self, rank):
            self.global_rank = rank

    shares = [list(own_share(Rank(rank), n)) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


WORDS = ["the quick brown fox", "jumps", "over the lazy dog, twice", "a", "", "and sleeps"]
ASKED = [("say a:", "aa"), ("say longer words:", " b"), ("?", "cc")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_model(root / "llama", "llama")
    write_model(root / "t5", "t5", auto="AutoModelForSeq2SeqLM")
    for seed, n in enumerate((2, 3, 4)):
        write_model(root / f"bert{n}", "bert", seed, "AutoModelForSequenceClassification", num_labels=n)
    return root


@pytest.fixture(scope="module")
def llama(models):
    pool = open_pool("causal_lm", str(models / "llama"), {})
    return pool, pool.module()


def scored(fabric, module, batch_size=4, tick=lambda n: None, **texts) -> TaskScore:
    given = {"indices": range(len(texts["rows"])), **texts}
    (found,) = evaluate(fabric, module, {"t": Texts(**given)}, batch_size, tick)
    return found


@torch.no_grad()
def one_by_one(pool, module, rows) -> tuple[float, int]:
    """Nats and tokens, a row at a time and a token at a time."""
    nats, n = 0.0, 0
    for row in filter(None, rows):
        inputs = pool.feed([row])
        told = torch.log_softmax(module(input_ids=inputs["input_ids"]).logits[0].double(), -1)
        for place, label in enumerate(inputs["labels"][0].tolist()):
            if place and label != -100:
                nats, n = nats - float(told[place - 1, label]), n + 1
    return nats, n


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_perplexity_is_of_every_token_once(fabric, llama, batch_size):
    pool, module = llama
    ticks: list[int] = []
    found = scored(fabric, module, batch_size, ticks.append, kind="perplexity", rows=WORDS, pool=pool)
    nats, n = one_by_one(pool, module, WORDS)
    assert n == sum(len(text) for text in WORDS)  # a token for each byte, after the one that begins a text
    assert (found.metric, found.higher_is_better, found.n) == ("perplexity", False, 6)
    assert found.loss == pytest.approx(nats / n, rel=1e-5)
    assert found.value == pytest.approx(math.exp(nats / n), rel=1e-5)
    assert found.more == {"tokens": n, "bits_per_byte": pytest.approx(nats / n / math.log(2), rel=1e-5)}
    assert sum(ticks) == 6


def test_perplexity_of_targets_leaves_the_prompts_out(fabric, llama):
    pool, module = llama
    found = scored(fabric, module, kind="perplexity", rows=ASKED, pool=pool)
    nats, n = one_by_one(pool, module, ASKED)
    assert found.more["tokens"] == n == 6
    assert found.loss == pytest.approx(nats / n, rel=1e-5)


@pytest.mark.parametrize(("block", "batch_size"), [(2, 3), (7, 2), (11, 100), (64, 4)])
def test_blocks_predict_the_same_tokens_with_what_stands_before_them(fabric, llama, block, batch_size):
    pool, module = llama
    ticks: list[int] = []
    how = {"kind": "perplexity", "rows": WORDS, "pool": pool, "block": block}
    found = scored(fabric, module, batch_size, ticks.append, **how)
    assert found.more["tokens"] == sum(len(text) for text in WORDS)
    assert sum(ticks) == 6
    ids = torch.tensor([each for text in WORDS if text for each in pool.tokenizer(text)["input_ids"]])
    nats, n = 0.0, 0
    for place in range(1, len(ids)):
        if ids[place] != pool.tokenizer.bos_token_id:
            start = (place - 1) // (block - 1) * (block - 1)
            told = module(input_ids=ids[None, start:place]).logits[0, -1].double().log_softmax(-1)
            nats, n = nats - float(told[ids[place]].detach()), n + 1
    assert found.loss == pytest.approx(nats / n, rel=1e-5)


def test_batches_that_would_fill_the_memory_are_cut(fabric, llama, monkeypatch):
    pool, module = llama
    whole = scored(fabric, module, 100, kind="perplexity", rows=WORDS, pool=pool)
    sizes, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda **given: sizes.append(len(given["input_ids"])) or forward(**given))
    monkeypatch.setattr(evaluating, "LOGITS_BYTES", 4 * 25 * 260 * 2)
    cut = scored(fabric, module, 100, kind="perplexity", rows=WORDS, pool=pool)
    assert sizes == [2, 2, 1]
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)


def test_a_split_without_a_token_to_predict_is_refused(fabric, llama):
    pool, module = llama
    with pytest.raises(TaskError, match="task t: no row has a token to predict"):
        scored(fabric, module, kind="perplexity", rows=["", ""], pool=pool)
    with pytest.raises(TaskError, match="task t: no row has a token to predict"):
        scored(fabric, module, kind="perplexity", rows=["", ""], pool=pool, block=4)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_an_exact_match_is_the_greedy_answer(fabric, llama, batch_size):
    pool, module = llama
    prompts = [prompt for prompt, _ in ASKED]
    answers = [pool.generate(module, [prompt], 5)[0] for prompt in prompts]
    rows = [(prompts[0], f" {answers[0]}\n"), (prompts[1], answers[1] + "!"), (prompts[2], answers[2])]
    ticks: list[int] = []
    how = {"kind": "exact_match", "pool": pool, "max_new_tokens": 5}
    found = scored(fabric, module, batch_size, ticks.append, rows=rows, **how)
    assert (found.metric, found.higher_is_better, found.n, sum(ticks)) == ("exact_match", True, 3, 3)
    assert found.value == pytest.approx(2 / 3)
    nats, n = one_by_one(pool, module, rows)
    assert found.loss == pytest.approx(nats / n, rel=1e-5)


def test_an_answer_ends_at_its_stop(fabric, llama):
    pool, module = llama
    seen = []
    watched = SimpleNamespace(
        family=pool.family,
        feed=pool.feed,
        generate=lambda module, prompts, most, stop: seen.append((list(prompts), most, stop)) or ["aa", "x", "cc "],
    )
    found = scored(fabric, module, rows=ASKED, pool=watched, kind="exact_match", stop=".", max_new_tokens=7)
    assert seen == [(["say longer words:", "say a:", "?"], 7, ".")]
    assert found.value == pytest.approx(1 / 3)


def test_seq2seq_models_are_scored_on_targets(fabric, models):
    pool = open_pool("seq2seq", str(models / "t5"), {})
    module = pool.module()
    found = scored(fabric, module, 2, kind="perplexity", rows=ASKED, pool=pool)
    nats, n = 0.0, 0
    for row in ASKED:
        inputs = pool.feed([row])
        n += inputs["labels"].shape[1]
        nats += float(module(**inputs).loss.detach()) * inputs["labels"].shape[1]
    assert found.more["tokens"] == n
    assert found.loss == pytest.approx(nats / n, rel=1e-5)
    answers = pool.generate(module, [prompt for prompt, _ in ASKED], 4)
    rows = [(prompt, answer) for (prompt, _), answer in zip(ASKED, answers, strict=True)]
    assert scored(fabric, module, kind="exact_match", rows=rows, pool=pool, max_new_tokens=4).value == 1.0


def test_a_classifier_wears_the_head_of_the_tasks_expert(fabric, models):
    places = {name: str(models / f"bert{n}") for name, n in (("moods", 3), ("topics", 4))}
    pool = open_pool("sequence_classification", str(models / "bert2"), places)
    module = pool.module()
    texts = [(text, index % 3) for index, text in enumerate(["one", "a longer text", "three"])]
    how = {"kind": "text_classification", "rows": texts, "pool": pool}
    found = scored(fabric, module, 2, labels=["a", "b", "c"], expert="moods", **how)
    own = pool.with_head(pool.module(), "moods")
    logits = torch.cat([own(**pool.feed([text])).logits for text, _ in texts]).detach()
    labels = torch.tensor([label for _, label in texts])
    assert found.value == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    with pytest.raises(TaskError, match="task t has 3 classes, the model's head 4"):
        scored(fabric, module, labels=["a", "b", "c"], expert="topics", **how)
    base = scored(fabric, module, labels=["a", "b"], **{**how, "rows": [("one", 1)]})
    plain = pool.module()(**pool.feed(["one"])).logits.detach()
    assert base.loss == pytest.approx(float(nn.functional.cross_entropy(plain, torch.tensor([1]))), rel=1e-5)
