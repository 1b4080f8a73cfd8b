"""Language tasks: what a row is, for each kind, and what is refused."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from tasks.image_classification import ImageClassification
from tasks.language import LanguageTask
from tasks.open import open_task
from tasks.splits import TaskError

QUESTIONS = {"prompt": ["1+1=", "2+2="], "target": ["2", "4"], "n": [2, 4], "text": ["a", "b"], "label": [1, 0]}


def write(directory: Path, columns: dict, split: str = "test", features: datasets.Features | None = None) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(directory / f"{split}.parquet")
    return str(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("questions"), QUESTIONS)


def opened(place: str, kind: str, **columns) -> LanguageTask:
    task = open_task("q", kind, place, {"test": "test"}, columns.pop("labels", None), **columns)
    assert isinstance(task, LanguageTask)
    return task


def test_rows_of_each_kind(place):
    assert list(opened(place, "perplexity").rows("test")) == ["a", "b"]
    assert list(opened(place, "perplexity", text=None).rows("test")) == [("1+1=", "2"), ("2+2=", "4")]
    assert list(opened(place, "exact_match").rows("test")) == [("1+1=", "2"), ("2+2=", "4")]
    assert list(opened(place, "text_classification", labels=["no", "yes"]).rows("test")) == [("a", 1), ("b", 0)]


def test_a_column_may_be_a_template_of_columns(place):
    asked = opened(place, "exact_match", prompt="Q: {prompt}{text} A:", target="{n}")
    assert asked.rows("test")[1] == ("Q: 2+2=b A:", "4")


def test_what_a_task_says_of_itself(place):
    task = opened(place, "perplexity", block=64, version=2)
    assert (task.metric, task.higher_is_better, task.block, task.version) == ("perplexity", False, 64, 2)
    assert (task.labels, task.templates, task.columns) == ((), (), {"text": "string"})
    asked = opened(place, "exact_match", stop=".", max_new_tokens=3)
    assert (asked.metric, asked.higher_is_better, asked.stop, asked.max_new_tokens) == ("exact_match", True, ".", 3)
    assert asked.columns == {"prompt": "string", "target": "string"}
    sorted_texts = opened(place, "text_classification", labels=["no", "yes"])
    assert (sorted_texts.metric, sorted_texts.labels) == ("accuracy", ("no", "yes"))
    assert sorted_texts.columns == {"text": "string", "label": "long"}


def test_images_are_opened_by_the_same_door(tiny_task):
    task = open_task("c", "image_classification", str(tiny_task), {"test": "test"}, templates=["a {}"], root=None)
    assert isinstance(task, ImageClassification)
    assert task.templates == ("a {}",)


def test_the_fingerprint_is_of_what_the_model_sees(place, tmp_path):
    plain = opened(place, "exact_match").fingerprint("test")
    assert opened(place, "exact_match", target="{n}").fingerprint("test") == plain
    assert opened(place, "perplexity", text=None).fingerprint("test") == plain
    assert opened(place, "exact_match", prompt="{prompt} ").fingerprint("test") != plain
    moved = {"prompt": ["1+1=2", "2+2="], "target": ["", "4"]}  # the same letters, cut elsewhere
    assert opened(write(tmp_path / "moved", moved), "exact_match").fingerprint("test") != plain


def test_missing_columns_are_all_named(place):
    with pytest.raises(TaskError, match=r"has no column ask and no column answer; it has prompt, target, n, text"):
        opened(place, "exact_match", prompt="ask", target="{answer}")
    with pytest.raises(TaskError, match=r"'\{prompt' is no template of columns"):
        opened(place, "exact_match", prompt="{prompt")
    with pytest.raises(TaskError, match=r"has no column words; it has"):
        opened(place, "perplexity", text="words")
    with pytest.raises(TaskError, match="has no class names; give them as labels"):
        opened(place, "text_classification")
    with pytest.raises(TaskError, match="from 0 to 0, found 1"):
        opened(place, "text_classification", labels=["one"]).rows("test")
    with pytest.raises(TaskError, match="task q has no split 'train'; it has test"):
        opened(place, "perplexity").rows("train")


def test_what_is_no_text_is_refused(place, tmp_path):
    with pytest.raises(TaskError, match=r"the column n of .* holds int64; '\{n\}' makes a text of it"):
        opened(place, "exact_match", target="n")
    gaps = write(tmp_path / "gaps", {"text": ["a", None], "prompt": ["x", "y"], "target": ["1", None]})
    rows = opened(gaps, "perplexity").rows("test")
    assert rows[0] == "a"
    with pytest.raises(TaskError, match=r"task q, test split, row 1: the column text holds None, which is no text$"):
        rows[1]
    with pytest.raises(TaskError, match=r"row 1: the column to \{target\} holds None"):
        opened(gaps, "exact_match", target="to {target}").fingerprint("test")


def test_own_class_names_are_taken(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    place = write(tmp_path / "d", {"text": ["x"], "label": [1]}, features=features)
    assert opened(place, "text_classification").labels == ("a", "b")
    with pytest.raises(TaskError, match=r"3 labels are given, .* has 2 classes"):
        opened(place, "text_classification", labels=["a", "b", "c"])
