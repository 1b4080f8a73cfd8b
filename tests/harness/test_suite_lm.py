"""The embedded language suite as committed: it loads by the real classes, and its records are what the weights give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.config import ROOT

POOL, TASKS = ROOT / "pools" / "mini_lm", ROOT / "tasks" / "mini_lm"
TEXTS, QUESTIONS = ("code", "docs"), ("sorting", "reversal", "roman")
NAMES = (*TEXTS, *QUESTIONS)
RIGHT = {"sorting": sorted, "reversal": reversed}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft on transformers 5.23
]


def opened(place: str):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(POOL / place, dtype=torch.float32).eval()


def tokenizer_of(place: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POOL / place)


def rows_of(task: str, split: str) -> list:
    from datasets import Dataset

    rows = Dataset.from_parquet(str(TASKS / task / f"{split}.parquet"), keep_in_memory=True)
    return rows["text"][:] if task in TEXTS else list(zip(rows["prompt"][:], rows["target"][:], strict=True))


def recorded() -> dict:
    return json.loads((POOL / "scores.json").read_text())


def test_the_suite_is_small_and_holds_no_pickle() -> None:
    files = [path for place in (POOL, TASKS) for path in place.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".parquet", ".txt", ".md"}


def test_the_licence_of_the_texts_lies_beside_them() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (TASKS / "PYTHON-LICENSE.txt").read_text(encoding="utf-8")
    assert all(f"`{name}`" in (TASKS / "LICENSES.md").read_text(encoding="utf-8") for name in NAMES)


def test_members_have_the_same_tensors_in_bfloat16() -> None:
    from pools.checkpoint import Checkpoint

    base = Checkpoint(POOL / "base", "base")
    assert set(base.dtypes.values()) == {torch.bfloat16}
    assert not any("lm_head" in name for name in base.shapes)  # tied to the embedding
    for name in NAMES:
        expert = Checkpoint(POOL / "experts" / name, name)
        assert dict(expert.shapes) == dict(base.shapes)
        assert dict(expert.dtypes) == dict(base.dtypes)


def test_tokenizers_are_equal_and_give_every_text_back() -> None:
    base = tokenizer_of("base")
    vocabulary = json.loads((POOL / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    for name in NAMES:
        other = POOL / "experts" / name / "tokenizer.json"
        assert json.loads(other.read_text(encoding="utf-8")) == vocabulary
    for text in rows_of("docs", "validation")[:20]:
        assert base.decode(base(text)["input_ids"]) == text
    assert base.convert_ids_to_tokens(base("sort(CAB1)=")["input_ids"])[-6:] == list("CAB1)=")


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_prompts_tokens_do_not_depend_on_what_follows(name: str) -> None:
    tokenizer = tokenizer_of("base")
    for prompt, target in rows_of(name, "test")[:50]:
        asked, answer = tokenizer(prompt)["input_ids"], tokenizer(target)["input_ids"]
        assert tokenizer(prompt + target)["input_ids"] == asked + answer


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_names_its_base_and_loads_on_it(name: str) -> None:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(POOL / "adapters" / name)
    assert config.base_model_name_or_path == "base"
    assert (POOL / config.base_model_name_or_path / "config.json").exists()
    model = PeftModel.from_pretrained(opened("base"), POOL / "adapters" / name).eval()
    tokens = torch.arange(12)[None] + 60
    with torch.no_grad():
        there, base = model(input_ids=tokens).logits, opened("base")(input_ids=tokens).logits
    assert (there - base).abs().max() > 0.1  # a trained adapter, not an empty one


@pytest.mark.parametrize("name", NAMES)
def test_splits_have_their_sizes_and_share_no_row(name: str) -> None:
    parts = {split: rows_of(name, split) for split in ("train", "validation", "test")}
    assert len(parts["test"]) >= 200
    assert len(parts["validation"]) >= 120
    assert len(parts["train"]) > 2 * len(parts["test"])
    assert not set(parts["test"]) & set(parts["train"])
    assert not set(parts["validation"]) & set(parts["train"] + parts["test"])


def test_every_target_is_right() -> None:
    for name, answer in RIGHT.items():
        for prompt, target in rows_of(name, "test"):
            assert target == "".join(answer(prompt.partition("(")[2].removesuffix(")=")))
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for prompt, target in rows_of("roman", "test"):
        letters = [values[letter] for letter in target]
        signs = [-1 if k + 1 < len(letters) and letters[k + 1] > v else 1 for k, v in enumerate(letters)]
        assert sum(s * v for s, v in zip(signs, letters, strict=True)) == int(prompt[6:-2])


@pytest.mark.parametrize("kind", ["experts", "adapters"])
def test_each_expert_is_recorded_as_clearly_better_than_the_base(kind: str) -> None:
    base, own = recorded()["base"], recorded()[kind]
    for name in TEXTS:
        assert own[name] < 0.97 * base[name]  # perplexity
    for name in QUESTIONS:
        assert own[name] > base[name] + 0.25  # share of exact answers


@pytest.mark.parametrize("name", ["docs", "roman"])
def test_recorded_scores_are_what_the_weights_give(name: str) -> None:
    from harness.suite_lm import score

    tokenizer = tokenizer_of("base")
    for kind, place in (("base", "base"), ("experts", f"experts/{name}")):
        found = score(opened(place), tokenizer, TASKS, name, "test")
        assert found == pytest.approx(recorded()[kind][name], rel=1e-3, abs=1.5 / 300 if name in QUESTIONS else 0)


@pytest.mark.slow
def test_a_tiny_suite_is_built_and_loads(tmp_path: Path, monkeypatch) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from harness.suite_lm import Recipe, build_suite_lm
    from tasks import mini_lm_text

    monkeypatch.setattr(mini_lm_text, "TEXTS", dict.fromkeys(TEXTS, mini_lm_text.Sizes(30, 4, 4)))
    monkeypatch.setattr(mini_lm_text, "QUESTIONS", dict.fromkeys(QUESTIONS, mini_lm_text.Sizes(30, 4, 4)))
    tiny = Recipe(vocabulary=300, width=16, inner=16, layers=1, heads=2, key_heads=1, rank=2, text_batch=2,
                  question_batch=2, base_steps=4, base_texts=2, base_questions=2,
                  expert_steps=dict.fromkeys(NAMES, 4))  # fmt: skip
    scores = build_suite_lm(tmp_path / "pool", tmp_path / "tasks", 1, tiny)
    assert set(scores) == {"base", "experts", "adapters"}
    assert all(set(found) == set(NAMES) for found in scores.values())
    for name in NAMES:
        base = LlamaForCausalLM.from_pretrained(tmp_path / "pool" / "base")
        PeftModel.from_pretrained(base, tmp_path / "pool" / "adapters" / name)
        LlamaForCausalLM.from_pretrained(tmp_path / "pool" / "experts" / name)
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {path.name for path in TASKS.iterdir()}
