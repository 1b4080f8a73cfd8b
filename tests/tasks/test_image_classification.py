import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tasks.image_classification import ImageClassification
from tasks.splits import TaskError

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": "train", "validation": "validation", "test": "test"}


@pytest.fixture
def task(tiny_task):
    return ImageClassification("colors", str(tiny_task), SPLITS)


def write(directory: Path, split: str, columns: dict, features: datasets.Features | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(directory / f"{split}.parquet")
    return directory


def patches(n: int) -> list[Image.Image]:
    return [Image.new("L", (4, 4), index) for index in range(n)]


def test_rows_are_images_with_labels(task):
    rows = task.rows("test")
    assert len(rows) == 21
    image, label = rows[4]
    assert isinstance(image, Image.Image)
    assert image.size == (16, 16)
    assert label == 1
    assert type(label) is int
    assert [label for _, label in rows] == [index % 3 for index in range(21)]
    assert task.rows("test") is rows
    assert rows[-1][1] == 2
    with pytest.raises(IndexError):
        rows[21]


def test_what_a_task_says_of_itself(task, tiny_task):
    assert task.labels == ("red", "green", "blue")
    assert task.templates == ("a photo of a {}.",)
    assert task.source == str(tiny_task)
    assert task.version == 1
    assert task.metric == "accuracy"


def test_given_labels_and_templates_come_first(tiny_task):
    task = ImageClassification("c", str(tiny_task), SPLITS, ["r", "g", "b"], ["{}!"], version=3)
    assert (task.labels, task.templates, task.version) == (("r", "g", "b"), ("{}!",), 3)


def test_splits_are_cut_as_datasets_spells_it(tiny_task):
    splits = {"train": "train[:80%]", "validation": "train[80%:]", "test": "test[:5]+validation[:2]"}
    task = ImageClassification("colors", str(tiny_task), splits)
    assert [len(task.rows(split)) for split in splits] == [24, 6, 7]
    whole = ImageClassification("colors", str(tiny_task), SPLITS).rows("train")
    cut = [image.tobytes() for split in ("train", "validation") for image, _ in task.rows(split)]
    assert sorted(cut) == sorted(image.tobytes() for image, _ in whole)  # each row in one of them
    assert cut != [image.tobytes() for image, _ in whole]  # in another order: sorted data sets are cut fairly
    again = ImageClassification("colors", str(tiny_task), splits)
    assert again.fingerprint("validation") == task.fingerprint("validation")


def test_a_root_takes_the_place_of_the_hub(tiny_task):
    task = ImageClassification("colors", "colors", SPLITS, root=tiny_task.parent)
    assert len(task.rows("test")) == 21
    assert task.source == "colors"
    assert ImageClassification("colors", "colors@main", SPLITS, root=str(tiny_task.parent)).labels == task.labels
    assert len(ImageClassification("colors", str(tiny_task), SPLITS, root="/nowhere").rows("test")) == 21
    with pytest.raises(TaskError, match=r"no data set at .*org/colors"):
        ImageClassification("colors", "org/colors", SPLITS, root=tiny_task.parent)


def test_the_hubs_layout_with_its_card(tiny_task, tmp_path):
    data = tmp_path / "org" / "colors" / "data"
    data.mkdir(parents=True)
    shutil.copy(tiny_task / "train.parquet", data / "train-00000-of-00002.parquet")
    shutil.copy(tiny_task / "validation.parquet", data / "train-00001-of-00002.parquet")
    shutil.copy(tiny_task / "test.parquet", data / "test-00000-of-00001.parquet")
    files = "  data_files:\n  - split: train\n    path: data/train-*\n  - split: test\n    path: data/"
    card = f"---\nconfigs:\n- config_name: full\n{files}test-*\n- config_name: odd\n{files}train-*\n"
    (tmp_path / "org" / "colors" / "README.md").write_text(card + "---\n# Colors\n")
    splits = {"train": "train", "test": "test"}
    task = ImageClassification("colors", "org/colors", splits, subset="full", root=tmp_path)
    assert [len(task.rows(split)) for split in splits] == [42, 21]
    assert len(ImageClassification("colors", "org/colors", splits, subset="odd", root=tmp_path).rows("test")) == 42
    with pytest.raises(TaskError, match=r"task colors: org/colors cannot be opened.*Config name is missing"):
        ImageClassification("colors", "org/colors", splits, root=tmp_path)


def test_the_fingerprint_is_of_the_content(task, tiny_task, tmp_path):
    shutil.copytree(tiny_task, tmp_path / "elsewhere")
    copy = ImageClassification("other", str(tmp_path / "elsewhere"), SPLITS, ["x", "y", "z"])
    assert copy.fingerprint("test") == task.fingerprint("test")
    assert len({task.fingerprint(split) for split in SPLITS}) == 3
    cut = ImageClassification("cut", str(tiny_task), {"test": "test[:20]", "train": "test[1:]", "validation": "test"})
    found = {cut.fingerprint(split) for split in SPLITS}
    assert len(found) == 3
    assert task.fingerprint("test") in found


def test_the_fingerprint_is_the_same_in_another_process_and_cache(task, tiny_task, tmp_path):
    script = (
        "import sys\nfrom tasks.image_classification import ImageClassification\n"
        "print(ImageClassification('c', sys.argv[1], {'test': 'test'}).fingerprint('test'))"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "error", "-c", script, str(tiny_task)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == task.fingerprint("test")
    assert done.stderr == ""  # and no progress bars


def test_labels_count_in_the_fingerprint(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for name, labels in (("one", [0, 1]), ("two", [1, 0])):
        write(tmp_path / name, "test", {"image": patches(2), "label": labels}, features)
    one, two = (ImageClassification(name, str(tmp_path / name), {"test": "test"}) for name in ("one", "two"))
    assert one.fingerprint("test") != two.fingerprint("test")


def test_other_columns_may_be_called_anything(tmp_path):
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.Value("int32"), "note": datasets.Value("string")}
    )
    write(tmp_path / "d", "test", {"img": patches(3), "fine": [0, 1, 1], "note": ["x"] * 3}, features)
    task = ImageClassification("d", str(tmp_path / "d"), {"test": "test"}, ["a", "b"], image="img", label="fine")
    assert task.rows("test")[2][1] == 1


def test_images_that_are_plain_bytes_are_decoded(tmp_path):
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (3, 5)).save(buffer, "PNG")
    write(tmp_path / "d", "test", {"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]})
    write(tmp_path / "e", "test", {"image": [buffer.getvalue()], "label": [0]})
    for name in "de":
        task = ImageClassification(name, str(tmp_path / name), {"test": "test"}, ["a"])
        assert task.rows("test")[0][0].size == (3, 5)
        assert len(task.fingerprint("test")) == 64


def test_a_missing_column_lists_what_there_is(tiny_task):
    with pytest.raises(TaskError, match=r"has no column img and no column fine; it has image, label"):
        ImageClassification("colors", str(tiny_task), SPLITS, image="img", label="fine")


@pytest.mark.parametrize("expression", ["dev", "train[9x", "train[50%", "train[:200%]", ""])
def test_an_unknown_split_lists_what_there_is(tiny_task, expression):
    with pytest.raises(
        TaskError, match=r"(?s)split '.*' cannot be read from .*, which has train, validation, test: .*; a split is"
    ):
        ImageClassification("colors", str(tiny_task), {"test": expression})


def test_a_split_the_task_lacks(task):
    with pytest.raises(TaskError, match="task colors has no split 'dev'; it has train, validation, test"):
        task.rows("dev")


def test_an_empty_split_is_refused(tiny_task, tmp_path):
    with pytest.raises(TaskError, match=r"validation split 'test\[:0\]' .* no data"):
        ImageClassification("colors", str(tiny_task), {"validation": "test[:0]", "test": "test"})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    write(tmp_path / "d", "train", {"image": patches(1), "label": [0]}, features)
    write(tmp_path / "d", "test", {"image": [], "label": []}, features)
    with pytest.raises(TaskError, match=r"test split 'test' .* no data"):
        ImageClassification("d", str(tmp_path / "d"), {"train": "train", "test": "test"})
    with pytest.raises(TaskError, match="has no splits"):
        ImageClassification("colors", str(tiny_task), {})


def test_labels_must_fit_the_classes(tiny_task, tmp_path):
    with pytest.raises(TaskError, match=r"2 labels are given, .* has 3 classes"):
        ImageClassification("colors", str(tiny_task), SPLITS, ["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    write(tmp_path / "d", "test", {"image": patches(3), "label": [0, 2, -1]}, features)
    with pytest.raises(TaskError, match=r"the column label of .* has no class names; give them as labels"):
        ImageClassification("d", str(tmp_path / "d"), {"test": "test"})
    with pytest.raises(TaskError, match=r"whole numbers from 0 to 1, found .*2"):
        ImageClassification("d", str(tmp_path / "d"), {"test": "test"}, ["a", "b"]).rows("test")


def test_labels_that_are_words_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    write(tmp_path / "d", "test", {"image": patches(2), "label": ["cat", "dog"]}, features)
    with pytest.raises(TaskError, match="whole numbers from 0 to 1, found 'cat', 'dog'"):
        ImageClassification("d", str(tmp_path / "d"), {"test": "test"}, ["cat", "dog"]).rows("test")


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="cannot be opened as a data set"):
        ImageClassification("x", str(tmp_path / "empty"), SPLITS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(TaskError, match="cannot be opened as a data set"):
        ImageClassification("x", str(tmp_path / "broken"), {"test": "test"})
    with pytest.raises(TaskError, match="there is no data set at digits"):
        ImageClassification("x", "digits", SPLITS)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "is switched off"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "does not answer"),
    ],
)
def test_a_hub_out_of_reach_is_told_at_once(env, words):
    script = "from tasks.image_classification import ImageClassification as C\nC('c', 'org/name', {'test': 'test'})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False, timeout=30
    )
    last = done.stderr.strip().splitlines()[-1]
    assert f"org/name is not in the cache, and the hub {words}" in last
    assert "put it under ROOT/org/name and set root=ROOT" in last
