import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from pools.checkpoint import SINGLE
from pools.headers import CheckpointError
from pools.open import open_pool


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0).integers(0, 255, (6, 20, 24, 3), dtype="uint8")
    return [Image.fromarray(array) for array in noise]


@pytest.fixture(scope="module")
def whole(tiny_pool):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(tiny_pool.root / "base").eval()


def test_base_and_experts_agree_on_names(pool):
    assert list(pool.experts) == ["red", "green", "blue"]
    assert pool.faults() == []
    for expert in pool.experts.values():
        assert expert.shapes == pool.base.shapes
        assert expert.fingerprint != pool.base.fingerprint
    assert all(name.startswith("vision_model.") for name in pool.base)
    assert "text_projection.weight" in pool.base.others


def test_the_experts_file_lacks_the_prefix_that_the_base_has(tiny_pool):
    """transformers 5 writes a CLIPVisionModel so; should that change, `select_tower` has less to do."""
    assert "post_layernorm.bias" in load_file(tiny_pool.root / "red" / SINGLE)
    assert "vision_model.post_layernorm.bias" in load_file(tiny_pool.root / "base" / SINGLE)


def test_old_files_are_read_without_their_position_ids(copied, pool, change):
    ids = {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.embeddings.position_ids": torch.ones(1),
    }
    change(copied / "base", lambda tensors: tensors.update(ids))
    change(copied / "red", lambda tensors: {f"vision_model.{name}": tensor for name, tensor in tensors.items()})
    change(copied / "red", lambda tensors: tensors.update(dict(list(ids.items())[:1])))
    old = open_pool("clip", "base", {"red": "red"}, root=copied)
    assert set(old.base.dropped) == set(ids)
    assert old.experts["red"].dropped == ("vision_model.embeddings.position_ids",)
    assert old.faults() == []
    assert old.base.fingerprint == pool.base.fingerprint
    assert old.experts["red"].fingerprint == pool.experts["red"].fingerprint


def test_outputs_are_those_of_transformers(pool, whole, images):
    inputs = pool.feed(images)
    with torch.inference_mode():
        expected = normalize(whole.get_image_features(**inputs).pooler_output, dim=-1)
        found = pool.module()(**inputs)
    assert torch.equal(found, expected)
    assert torch.allclose(found.norm(dim=-1), torch.ones(len(images)))


def test_an_experts_outputs_are_those_of_transformers(pool, whole, images, tiny_pool):
    from transformers import CLIPVisionModel

    inputs = pool.feed(images)
    tower = CLIPVisionModel.from_pretrained(tiny_pool.root / "red").eval()
    with torch.inference_mode():
        expected = normalize(whole.visual_projection(tower(**inputs).pooler_output), dim=-1)
        assert torch.equal(pool.module(pool.experts["red"])(**inputs), expected)


def test_the_modules_names_are_the_tensors_names(pool):
    module = pool.module()
    assert set(module.state_dict()) == {*pool.base, "visual_projection.weight"}
    assert not module.training
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad, name
        assert not parameter.is_meta


def test_the_module_shares_no_memory(pool):
    tensors = dict(pool.base)
    module = pool.module(tensors)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(torch.equal(tensors[name], pool.base[name]) for name in tensors)
    assert pool.module().visual_projection.weight.any()


def test_the_module_takes_other_precisions_and_its_own_projection(pool, images):
    inputs = pool.feed(images)
    half = {name: tensor.half() for name, tensor in pool.base.items()}
    projection = torch.ones(8, 16)
    module = pool.module(half | {"visual_projection.weight": projection})
    assert torch.equal(module.visual_projection.weight, projection)
    assert torch.allclose(pool.module(half)(**inputs), pool.module()(**inputs), atol=1e-2)


def test_wrong_tensors_are_named(pool):
    tensors = dict(pool.base)
    tensors.pop("vision_model.post_layernorm.bias")
    tensors["extra"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"(?s)post_layernorm\.bias.*extra"):
        pool.module(tensors)


def test_per_sample_gradients_work(pool, images):
    """Fisher takes them through vmap; attention then runs by its plain formula."""
    from torch.func import functional_call, grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module, inputs = pool.module(), pool.feed(images)
    weights = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def loss(weights, pixels):
        return functional_call(module, weights, (), {"pixel_values": pixels[None]}).square().sum(0)[0]

    with sdpa_kernel(SDPBackend.MATH):
        slopes = vmap(grad(loss), in_dims=(None, 0))(weights, inputs["pixel_values"])
    module(pixel_values=inputs["pixel_values"][2:3]).square().sum(0)[0].backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(slopes[name][2], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_images_of_every_mode_become_rgb(pool, mode):
    inputs = pool.feed([Image.new(mode, (16, 16)), Image.new("RGB", (30, 20))])
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert inputs["pixel_values"].dtype == torch.float32


def test_the_processor_is_the_bases(pool):
    inputs = pool.feed([Image.new("RGB", (16, 16), (255, 255, 255))])
    assert torch.allclose(inputs["pixel_values"], torch.full((1, 3, 16, 16), 2.0))  # (1 - mean 0.5) / std 0.25


def test_heads_are_zero_shot_weights(pool, whole, tiny_pool):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_pool.root / "base")
    labels, templates = ["red", "dark {green}"], ["a photo of {}.", "{}", "my {}!"]
    expected = []
    with torch.inference_mode():
        for label in labels:
            texts = [template.replace("{}", label) for template in templates]
            singly = [
                whole.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0] for text in texts
            ]
            expected.append(normalize(normalize(torch.stack(singly), dim=-1).mean(0), dim=0))
        expected = whole.logit_scale.exp() * torch.stack(expected)
    head = pool.head(labels, templates)
    torch.testing.assert_close(head, expected)
    assert not head.requires_grad
    (head * torch.ones(8, requires_grad=True)).sum().backward()  # may stand in a loss


def test_logits_are_those_of_transformers(pool, whole, images, tiny_pool):
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(tiny_pool.root / "base")(
        ["a red", "green"], padding=True, return_tensors="pt"
    )
    inputs = pool.feed(images)
    with torch.inference_mode():
        logits = pool.module()(**inputs) @ pool.head(["a red", "green"], ["{}"]).T
        torch.testing.assert_close(logits, whole(**tokens, **inputs).logits_per_image)


def test_a_prompt_that_is_too_long_is_named(pool):
    with pytest.raises(CheckpointError, match=r"'a photo of x+\.' has \d+ tokens, and the text tower reads at most 32"):
        pool.head(["ok", "x" * 40], ["a photo of {}."])


def test_roles(pool):
    roles = pool.roles
    assert roles.n_layers == 2
    assert roles.mlps() == ("vision_model.encoder.layers.0.mlp", "vision_model.encoder.layers.1.mlp")
    assert roles.layer_of("vision_model.pre_layrnorm.weight") == 0
    assert roles.layer_of("vision_model.embeddings.class_embedding") == 0
    assert roles.layer_of("vision_model.encoder.layers.1.mlp.fc1.bias") == 2
    assert roles.layer_of("vision_model.post_layernorm.weight") == 3
    linear = {name for name in pool.base if roles.is_linear(name)}
    assert len(linear) == 2 * 6
    assert not roles.is_linear("visual_projection.weight")  # not merged
    assert not any(roles.is_buffer(name) for name in pool.base)


def test_what_is_written_is_a_clip_model(pool, images, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    merged = {name: (pool.experts["red"][name] + pool.experts["blue"][name]) / 2 for name in pool.base}
    lineage = {"method": "simple_average", "params": {"weights": [0.5, 0.5]}, "seed": 0}
    names = pool.write(tmp_path / "out", reversed(merged.items()), lineage, shard_bytes=20_000)
    assert {"README.md", "config.json", "vocab.json", "preprocessor_config.json", "model.safetensors.index.json"} <= {
        *names
    }
    loaded, report = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    inputs = pool.feed(images)
    with torch.inference_mode():
        expected = normalize(loaded.eval().get_image_features(**inputs).pooler_output, dim=-1)
        assert torch.equal(pool.module(merged)(**inputs), expected)
    again = open_pool("clip", str(tmp_path / "out"), {})
    assert torch.equal(again.head(["red"], ["{}"]), pool.head(["red"], ["{}"]))
    assert again.context_fingerprint == pool.context_fingerprint
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer("red").input_ids[0] == 512


def test_the_card_tells_the_lineage(copied, tmp_path):
    from huggingface_hub import ModelCard

    (copied / "org").mkdir()
    (copied / "base").rename(copied / "org" / "base")
    pool = open_pool("clip", "org/base@main", {"red": "red", "blue": "blue"}, root=copied)
    lineage = {"method": "ties", "params": {"density": 0.2, "scope": "model"}, "run_id": "abc|d"}
    pool.write(tmp_path / "out", pool.base.items(), lineage)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/base"]
    assert card.data.tags == ["merge", "crucible"]
    assert card.data.library_name == "transformers"
    assert f"| red | red | {pool.experts['red'].fingerprint[:16]} |" in card.text
    for line in ("| density | 0.2 |", "| scope | model |", r"| run_id | abc\|d |"):
        assert line in card.text


def test_the_context_is_all_but_the_tower(copied, change):
    def found():
        return open_pool("clip", "base", {}, root=copied).context_fingerprint

    first = found()
    change(copied / "base", lambda tensors: tensors["vision_model.post_layernorm.bias"].add_(1))
    assert found() == first
    change(copied / "base", lambda tensors: tensors["logit_scale"].add_(1))
    second = found()
    assert second != first
    (copied / "base" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert found() != second


def test_without_a_base_the_first_whole_model_gives_what_is_around(copied):
    shutil.copytree(copied / "base", copied / "whole")
    pool = open_pool("clip", None, {"red": "red", "whole": "whole"}, root=copied)
    assert pool.faults() == []
    assert pool.frame.source == "whole"
    assert pool.head(["red"], ["{}"]).shape == (1, 8)
    with pytest.raises(CheckpointError, match="has no base"):
        pool.module()
    towers = open_pool("clip", None, {"red": "red", "blue": "blue"}, root=copied)
    assert len(towers.faults()) == 1
    assert "a whole CLIP model ('clip') is needed" in towers.faults()[0]
