"""What stands around a CLIP's vision tower: projections, text tower, tokenizer, image processor, configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import normalize

from pools.checkpoint import STALE, Checkpoint
from pools.faults import specs_of
from pools.headers import CheckpointError

if TYPE_CHECKING:
    from PIL.Image import Image

TOWER = "vision_model."
PROJECTION = "visual_projection.weight"
_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
_SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)  # configuration, tokenizer and processor
_SHOWN = 8  # faults that are named; the rest is counted
_TEXTS = 256  # prompts embedded at a time


class ImageEncoder(nn.Module):
    """Vision tower and projection of a CLIP: images (B, 3, H, W) -> embeddings of length one (B, D)."""

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.visual_projection = visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D), each row of length one."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return normalize(self.visual_projection(pooled), dim=-1)


class ClipFrame:
    """One member's CLIP model, of which the pool takes all but the vision tower.

    Attributes:
        tensors: All of the model, the vision tower as `vision_model.*`.
        around: All but the vision tower.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.source = source
        self.directory = path if path.is_dir() else path.parent
        self.tensors = Checkpoint(path, source, select_all)
        self.around = Checkpoint(path, source, select_around)

    def faults(self) -> list[str]:
        """How the headers differ from what the configuration asks for, a line each."""
        try:
            expected = specs_of(self.meta_model().state_dict())
        except CheckpointError as error:
            return [str(error)]
        whose, shapes = f"{self.source}, from its config.json,", self.tensors.shapes
        found = [f"{whose} should have {name} {spec.shape}" for name, spec in expected.items() if name not in shapes]
        found += [
            f"{whose} should have {name} of shape {spec.shape}, and has {shapes[name]}"
            for name, spec in expected.items()
            if name in shapes and shapes[name] != spec.shape
        ]
        found += [f"{whose} should not have {name} {shape}" for name, shape in shapes.items() if name not in expected]
        more = len(found) - _SHOWN
        return [*found[:_SHOWN], f"{whose} and {more} more"] if more > 0 else found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors around the tower, the configuration, the tokenizer and the processor."""
        digest = hashlib.sha256(self.around.fingerprint.encode())
        for file in self.settings():
            digest.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
        return digest.hexdigest()

    def settings(self) -> list[Path]:
        """Configuration, tokenizer and processor files."""
        return [self.directory / name for name in _SETTINGS if (self.directory / name).is_file()]

    def skeleton(self) -> ImageEncoder:
        """The image encoder with parameters on the meta device and buffers in memory."""
        whole = self.meta_model()
        return ImageEncoder(whole.vision_model, whole.visual_projection).eval()

    def meta_model(self) -> Any:
        """A `CLIPModel` with parameters on the meta device and buffers in memory."""
        from transformers import CLIPModel

        with torch.device("meta"):
            model = CLIPModel(self.config)
        for name, buffer in list(model.named_buffers()):
            if not name.endswith(".position_ids"):
                raise CheckpointError(f"this transformers gives CLIP a buffer {name}, whose values are not known here")
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
        return model

    @cached_property
    def config(self) -> Any:
        """The whole model's configuration.

        Raises:
            CheckpointError: There is none, or it is not a whole CLIP's.
        """
        file = self.directory / "config.json"
        try:
            kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{file}, which says what the model is built like, cannot be read: {error}"
            ) from error
        if kind != "clip":
            raise CheckpointError(
                f"{self.source} is of the model_type {kind!r}; a whole CLIP model ('clip') is needed as the pool's "
                "base, for its projection and text tower make the classifier"
            )
        from transformers import CLIPConfig

        return CLIPConfig.from_pretrained(self.directory, local_files_only=True)

    def feed(self, rows: Sequence[Image]) -> dict[str, torch.Tensor]:
        """Images as the module takes them, `pixel_values` (B, 3, H, W); grey and palette images become RGB."""
        images = [image if image.mode == "RGB" else image.convert("RGB") for image in rows]
        return {"pixel_values": self._processor(images=images, return_tensors="pt")["pixel_values"]}

    @torch.no_grad()
    def head(self, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """Zero-shot classifier (K, D): see `ClipPool.head`."""
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        embedded = torch.cat([self._embed(prompts[start : start + _TEXTS]) for start in range(0, len(prompts), _TEXTS)])
        classes = embedded.view(len(labels), len(templates), -1).mean(dim=1)  # (K, D)
        temperature = self.needed("logit_scale").float().exp()
        return temperature * normalize(classes, dim=-1)

    def needed(self, name: str) -> torch.Tensor:
        """A tensor, or an error that says what it is needed for."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} lacks {name}; a whole CLIP model is needed as the pool's base")
        return self.tensors[name]

    def _embed(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> embeddings of length one (n, D)."""
        tokens = self._tokenizer(list(prompts), padding=True, return_tensors="pt")
        limit = self.config.text_config.max_position_embeddings
        lengths = tokens["attention_mask"].sum(dim=1)
        if int(lengths.max()) > limit:
            longest = prompts[int(lengths.argmax())]
            raise CheckpointError(
                f"the prompt {longest!r} has {int(lengths.max())} tokens, and the text tower reads at most {limit}; "
                "shorten the class name or the template"
            )
        pooled = self._texts["text_model"](
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return normalize(self._texts["text_projection"](pooled), dim=-1)

    @cached_property
    def _texts(self) -> nn.ModuleDict:
        """Text model and projection, with weights."""
        whole = self.meta_model()
        texts = nn.ModuleDict({"text_model": whole.text_model, "text_projection": whole.text_projection})
        return filled(texts, {name: self.needed(name).float() for name in texts.state_dict()})

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)

    @cached_property
    def _processor(self) -> Any:
        """The image processor's variant that needs PIL and numpy alone."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(
            self.directory, local_files_only=True, trust_remote_code=False, backend="pil"
        )


def filled(module: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """Give a module on the meta device its weights, all of them, without a copy.

    Raises:
        CheckpointError: Tensors are missing, left over or of another shape.
    """
    try:
        module.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"these tensors do not make the model: {error}") from error
    return module.eval()


def select_tower(names: tuple[str, ...]) -> dict[str, str]:
    """Names of the vision tower, as `vision_model.*`, however the file has them.

    transformers 5 writes a `CLIPVisionModel` without the prefix that older versions and whole models have.

    >>> select_tower(("encoder.layers.0.mlp.fc1.weight", "embeddings.position_ids"))
    {'vision_model.encoder.layers.0.mlp.fc1.weight': 'encoder.layers.0.mlp.fc1.weight'}
    """
    current = [name for name in names if name.rpartition(".")[2] not in STALE]
    prefixed = {name: name for name in current if name.startswith(TOWER)}
    return prefixed or {TOWER + name: name for name in current if name.startswith(_TOWER_PARTS)}


def select_around(names: tuple[str, ...]) -> dict[str, str]:
    """All that a current CLIP model has besides the vision tower."""
    tower = set(select_tower(names).values())
    return {name: name for name in names if name not in tower and name.rpartition(".")[2] not in STALE}


def select_all(names: tuple[str, ...]) -> dict[str, str]:
    """All that a current CLIP model has."""
    return select_around(names) | select_tower(names)
