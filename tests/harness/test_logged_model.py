"""The merged model in the store: written once, complete or absent, and the same through every door."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
import transformers
from PIL import Image

from harness import track
from harness.built import build
from harness.rebuild import recipe
from harness.serve import ZeroShot, decoded
from methods.catalogue import find
from pools.open import open_pool
from pools.wrapped import save_wrapped

TASKS = {"tasks": {"animals": {"labels": ["cat", "dog", "emu"], "templates": ["a {}", "the {}"]}}}
KNOWN = {"", ".json", ".md", ".safetensors", ".txt"}  # no suffix: MLmodel


def tiny_clip(directory: Path) -> None:
    """A CLIP with random weights, in the hub's layout."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = transformers.CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(words), "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(directory)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(directory)
    side = {"height": 16, "width": 16}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side).save_pretrained(directory)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A working directory with MLflow's default store in it, shared by this file."""
    directory = tmp_path_factory.mktemp("store")
    before = Path.cwd(), {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MLFLOW_")}
    os.chdir(directory)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory}/mlflow.db"
    yield directory
    os.chdir(before[0])
    del os.environ["MLFLOW_TRACKING_URI"]
    os.environ.update(before[1])


@pytest.fixture(scope="module")
def logged(store):
    with track.open_run("crucible", "ties", {"method": "ties"}, {"method": "ties"}) as run:
        run.inputs([track.DataInput("animals", "org/animals", "ab" * 32, "test", 3)])
        run.metric("animals/accuracy", 0.5)
        run.log_model(tiny_clip, TASKS)
        run.metric("average/accuracy", 0.5)
    return run


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 20, 24, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in pixels]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def test_shows_on_the_run_and_in_the_models_tab(logged):
    model = mlflow.get_logged_model(logged.model.id)
    assert (model.status, model.name, model.source_run_id) == ("READY", "model", logged.id)
    assert model.params["method"] == "ties"
    assert model.tags["method"] == "ties"
    scores = {metric.key: (metric.value, metric.dataset_name) for metric in model.metrics}
    assert scores == {"animals/accuracy": (0.5, "animals/test"), "average/accuracy": (0.5, None)}
    assert mlflow.get_run(logged.id).outputs.model_outputs[0].model_id == logged.model.id
    history = mlflow.MlflowClient().get_metric_history(logged.id, "animals/accuracy")
    assert {(metric.value, metric.step) for metric in history} == {(0.5, 0)}


def test_weights_lie_in_the_store_once(logged, store):
    found = list(store.rglob("*.safetensors"))
    assert [each.parent for each in found] == [logged.model.directory]
    assert [each.name for each in logged.model.directory.parent.iterdir()] == ["artifacts"]
    assert not [each for each in store.rglob("*") if each.suffix in (".pkl", ".bin", ".pt")]


def test_every_uri_names_the_same_directory(logged):
    for uri in (logged.model.uri, f"runs:/{logged.id}/model"):
        assert track.local_path(uri) == logged.model.directory
    mlflow.register_model(logged.model.uri, "registered")
    again = track.local_path("models:/registered/1")
    assert (again / "model.safetensors").read_bytes() == (logged.model.directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("uri", ["models:/m-0", "models:/none/1", "runs:/abc/model"])
def test_an_unknown_model_is_named(store, uri):
    with pytest.raises(track.TrackingError, match=uri):
        track.local_path(uri)


def expected(directory: Path, images: list[Image.Image]) -> torch.Tensor:
    """The published zero-shot recipe with transformers alone, (B, K)."""
    model = transformers.CLIPModel.from_pretrained(directory).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(directory)(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        seen = torch.nn.functional.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
        rows = []
        for label in TASKS["tasks"]["animals"]["labels"]:
            prompts = tokenizer([f"a {label}", f"the {label}"], return_tensors="pt", padding=True)
            read = model.text_projection(model.text_model(**prompts).pooler_output)
            rows.append(torch.nn.functional.normalize(read, dim=-1).mean(0))
        head = torch.nn.functional.normalize(torch.stack(rows), dim=-1) * model.logit_scale.exp()
        return (seen @ head.T).softmax(-1)


@pytest.mark.parametrize("form", ["bytes", "base64", "PIL"])
def test_pyfunc_gives_the_probabilities_of_the_checkpoint(logged, images, form):
    forms = {"bytes": encoded, "base64": lambda image: base64.b64encode(encoded(image)).decode(), "PIL": lambda x: x}
    model = mlflow.pyfunc.load_model(logged.model.uri)
    answer = model.predict(pandas.DataFrame({"image": [forms[form](image) for image in images]}))
    probabilities = torch.tensor(answer["probabilities"].tolist())
    wanted = expected(logged.model.directory, images)
    torch.testing.assert_close(probabilities, wanted, rtol=1e-5, atol=1e-6)
    assert list(answer["label"]) == [["cat", "dog", "emu"][index] for index in wanted.argmax(-1)]


def test_classes_may_be_named(logged, images):
    model = mlflow.pyfunc.load_model(f"runs:/{logged.id}/model")
    answer = model.predict(pandas.DataFrame({"image": images[:1]}), params={"classes": ["sun", "moon"]})
    assert answer["label"][0] in ("sun", "moon")
    assert len(answer["probabilities"][0]) == 2


def test_bad_input_is_named(logged, images):
    model = ZeroShot(logged.model.directory)
    with pytest.raises(ValueError, match="column 'image'"):
        model.predict(pandas.DataFrame({"picture": images}), {"task": "animals"})
    with pytest.raises(ValueError, match=r"scored on \(animals\)"):
        model.predict(pandas.DataFrame({"image": images}), {"task": "plants"})
    with pytest.raises(ValueError, match="PNG or JPEG"):
        decoded(b"no image")


def test_transformers_flavor_loads_the_same_weights(logged, images):
    pipeline = mlflow.transformers.load_model(logged.model.uri)
    answer = pipeline(images[0], candidate_labels=["cat", "dog"], hypothesis_template="a {}")
    assert {each["label"] for each in answer} == {"cat", "dog"}
    direct = transformers.CLIPModel.from_pretrained(logged.model.directory)
    for name, tensor in pipeline.model.state_dict().items():
        torch.testing.assert_close(tensor, direct.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize(("method", "params"), [("simple_ensemble", {}), ("we_moe", {"steps": 1})])
def test_a_built_model_is_no_pickle_and_answers_the_same(logged, store, images, method, params):
    base = str(logged.model.directory)
    pool = open_pool("clip", base, {"one": base, "two": base})
    row = find(method)
    torch.manual_seed(0)
    given = row.load_params()(**params)
    module = build(row, given, pool, [name for name in pool.base if not pool.roles.is_buffer(name)]).eval()
    told = recipe(method, given, ["one", "two"], module.merged_names)
    with track.open_run("crucible", method, {}, {}) as run:
        run.log_model(lambda path: save_wrapped(path, module, told, pool), TASKS)
    assert {each.suffix for each in run.model.directory.rglob("*") if each.is_file()} <= KNOWN
    assert "transformers" not in mlflow.models.get_model_info(run.model.uri).flavors
    answer = mlflow.pyfunc.load_model(run.model.uri).predict(pandas.DataFrame({"image": images}))
    with torch.inference_mode():
        head = pool.head(**TASKS["tasks"]["animals"])
        wanted = (module(**pool.feed(images)) @ head.T).softmax(-1)
    torch.testing.assert_close(torch.tensor(answer["probabilities"].tolist()), wanted, rtol=1e-5, atol=1e-6)


def test_a_failed_write_leaves_nothing(store):
    def broken(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = set(store.glob("mlruns/*/models/*"))
    with pytest.raises(OSError, match="No space"), track.open_run("crucible", "full", {}, {}) as run:
        run.log_model(broken)
    found = mlflow.get_run(run.id)
    assert found.info.status == "FAILED"
    model = mlflow.get_logged_model(found.outputs.model_outputs[0].model_id)
    assert model.status == "FAILED"
    assert set(store.glob("mlruns/*/models/*")) == before
    with pytest.raises(track.TrackingError, match="FAILED"):
        track.local_path(f"models:/{model.model_id}")
