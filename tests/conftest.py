"""Fixtures that real parts need: a tiny CLIP pool in the hub's layout, and a tiny task as parquet."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def pytest_configure(config: pytest.Config) -> None:
    """No hub, and caches that go with the run: set before any library reads its environment."""
    place = tempfile.mkdtemp(prefix="crucible-tests-")
    config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
    if hasattr(config, "workerinput"):  # one process for each core: no more threads than that
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {"HF_HOME": place, "XDG_CACHE_HOME": place, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class TinyPool:
    """Where a random CLIP and three experts of it are, in the hub's layout: `root/base`, `root/red`, ..."""

    root: Path
    experts: dict[str, str]
    base: str = "base"


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory: pytest.TempPathFactory) -> TinyPool:
    root = tmp_path_factory.mktemp("pool")
    write_tiny_clip(root / "base")
    for seed, name in enumerate(COLORS, start=1):
        write_tiny_expert(root / "base", root / name, seed)
    return TinyPool(root, {name: name for name in COLORS})


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train, validation and test of noisy patches in three colours."""
    import datasets
    import numpy as np
    from PIL import Image

    directory = tmp_path_factory.mktemp("tasks") / "colors"
    directory.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLORS))})
    generator = np.random.default_rng(0)
    for split, n in {"train": 30, "validation": 12, "test": 21}.items():
        labels = [index % len(COLORS) for index in range(n)]
        images = []
        for label in labels:
            noise = generator.normal(list(COLORS.values())[label], 40, size=(16, 16, 3))
            images.append(Image.fromarray(noise.clip(0, 255).astype("uint8")))
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(directory / f"{split}.parquet")
    return directory


def write_tiny_clip(directory: Path, seed: int = 0, longest_prompt: int = 32) -> None:
    """A random CLIP of two layers on images of 16 x 16, with tokenizer and processor."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes
        | {
            "vocab_size": 514,
            "max_position_embeddings": longest_prompt,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():  # biases and norms are zeros and ones at first, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 16},
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


def write_tiny_tokenizer(directory: Path) -> None:
    """CLIP's byte-level tokenizer without a single merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32, "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_expert(base: Path, directory: Path, seed: int) -> None:
    """The base's vision tower, moved a little, as transformers writes a `CLIPVisionModel`."""
    import torch
    from transformers import CLIPModel

    tower = CLIPModel.from_pretrained(base).vision_model
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tower.save_pretrained(directory)
