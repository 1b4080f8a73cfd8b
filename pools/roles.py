"""What a tensor's name means: buffer or weight, linear layer or not, how deep; and which blocks are feed-forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from pools.faults import Spec

if TYPE_CHECKING:
    from torch import nn

_BUFFERS = frozenset(
    {
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "position_ids",
        "token_type_ids",
        "inv_freq",
        "original_inv_freq",
        "masked_bias",
        "relative_position_index",
        "cos_cached",
        "sin_cached",
        "freqs_cis",
    }
)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias|class_token|cls_token|pos)(\.|$)")
_BEFORE = re.compile(r"embed|(^|\.)(wte|wpe|shared|stem|conv1|bn1|cls_token|pre_\w+|ln_pre)(\.|$)")
_BLOCK = re.compile(r"^(?:(.*?)\.)?(\d+)\.")  # the first number in a name: the block it belongs to
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_MLP_SEGMENTS = ("mlp", "ffn", "feed_forward", "feedforward", "DenseReluDense")
_MLP_CLASSES = re.compile(r"(MLP|FFN|FeedForward|DenseActDense|DenseGatedActDense)$")


class NamedRoles:
    """Roles read off names and shapes alone, for state dicts whose module is not known."""

    def __init__(self, specs: Mapping[str, Spec], transposed: bool = False) -> None:
        """Look at names.

        Args:
            specs: Shape and dtype by name.
            transposed: The blocks' linear layers are stored as (in, out), as GPT-2's `Conv1D` does.
        """
        self._specs = dict(specs)
        self._transposed = transposed
        self._depths, self.n_layers = depths(self._specs)

    def is_buffer(self, name: str) -> bool:
        """Whether the name is a buffer (running statistics, position ids) and no parameter."""
        if name.rpartition(".")[2] in _BUFFERS:
            return True
        shape = self._specs[name].shape if name in self._specs else ()
        mask = name.endswith(("attn.bias", "attention.bias"))  # the causal mask of GPT-2, GPT-Neo and GPT-NeoX
        return mask and len(shape) == 4 and shape[:2] == (1, 1)

    def is_linear(self, name: str) -> bool:
        """Whether the name is taken for the weight of a linear layer, (out, in)."""
        spec = self._specs.get(name)
        matrix = spec is not None and len(spec.shape) == 2 and spec.dtype.is_floating_point
        linear = matrix and name.rpartition(".")[2] == "weight" and not _EMBEDDING.search(name)
        return linear and not self.is_transposed(name)

    def is_transposed(self, name: str) -> bool:
        """Whether the name is the weight of a linear layer stored as (in, out)."""
        return self._transposed and bool(_CONV1D.search(name))

    def layer_of(self, name: str) -> int:
        """Depth: 0 for what comes before the first block, 1 to n for the blocks, n + 1 for what follows."""
        return self._depths[name]

    def mlps(self) -> tuple[str, ...]:
        """Module paths with a segment that says feed-forward."""
        found: dict[str, None] = {}
        for name in self._specs:
            parts = name.split(".")
            for index, part in enumerate(parts[:-1]):
                if part in _MLP_SEGMENTS:
                    found[".".join(parts[: index + 1])] = None
                    break
        return tuple(found)


class ModuleRoles:
    """Roles read off a module, which may be on the meta device; exact where names only hint.

    A weight that is stored as (in, out), as transformers' `Conv1D` does, is not `is_linear` but `is_transposed`.
    """

    def __init__(self, module: nn.Module, names: Iterable[str] | None = None) -> None:
        """Look at a module.

        Args:
            module: Its state-dict names are the tensors' names.
            names: The tensors that are merged; by default all in the module's state dict.
        """
        self._module = module
        wanted = None if names is None else set(names)
        self._names = tuple(name for name in module.state_dict() if wanted is None or name in wanted)
        self._depths, self.n_layers = depths(self._names, in_order=True)

    def is_buffer(self, name: str) -> bool:
        """Whether the name is a buffer (running statistics, position ids) and no parameter."""
        return name in self._buffers or name.rpartition(".")[2] in _BUFFERS

    def is_linear(self, name: str) -> bool:
        """Whether the name is the weight of a linear layer, (out, in), and among the merged tensors."""
        return name in self._linear

    def is_transposed(self, name: str) -> bool:
        """Whether the name is the weight of a linear layer stored as (in, out)."""
        return name in self._transposed

    def layer_of(self, name: str) -> int:
        """Depth: 0 for what comes before the first block, 1 to n for the blocks, n + 1 for what follows."""
        return self._depths[name]

    def mlps(self) -> tuple[str, ...]:
        """Module paths of the feed-forward blocks, outermost only, that hold merged tensors."""
        found: list[str] = []
        for path, module in self._module.named_modules():
            named = path.rpartition(".")[2] in _MLP_SEGMENTS or _MLP_CLASSES.search(type(module).__name__)
            inside = any(path.startswith(f"{outer}.") for outer in found)
            if path and named and not inside and any(name.startswith(f"{path}.") for name in self._names):
                found.append(path)
        return tuple(found)

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return frozenset(name for name, _ in self._module.named_buffers())

    @cached_property
    def _linear(self) -> frozenset[str]:
        from torch import nn

        return self._weights_of(lambda module: isinstance(module, nn.Linear))

    @cached_property
    def _transposed(self) -> frozenset[str]:
        return self._weights_of(lambda module: type(module).__name__ == "Conv1D")

    def _weights_of(self, is_wanted) -> frozenset[str]:
        names = set(self._names)
        paths = (f"{path}.weight" for path, module in self._module.named_modules() if is_wanted(module))
        return frozenset(path for path in paths if path in names)


def block_of(name: str) -> str | None:
    """Path of the block that a name is in; None for what is in none.

    >>> block_of("encoder.layers.3.mlp.fc1.weight")
    'encoder.layers.3'
    """
    match = _BLOCK.match(name)
    return match and ".".join(part for part in match.groups() if part is not None)


def depths(names: Iterable[str], in_order: bool = False) -> tuple[dict[str, int], int]:
    """Each name's depth, and the number of blocks.

    A block is what stands behind the first number in a name (`encoder.layers.3.`, `h.3.`, `blocks.3.`). Stacks of
    blocks follow each other as they first appear. What is in no block is 0 before the first block, n + 1 after it.

    Args:
        names: Tensor names.
        in_order: The names are in the module's order, so that what comes first comes before the blocks; otherwise (a
            file's header, which is sorted) only what they are called tells.
    """
    names = list(names)
    blocks: dict[tuple[str, int], int] = {}
    stems: dict[str, set[int]] = {}
    for name in names:
        match = _BLOCK.match(name)
        if match:
            stems.setdefault(match[1] or "", set()).add(int(match[2]))
    for stem, indices in stems.items():
        for index in sorted(indices):
            blocks[stem, index] = len(blocks) + 1
    found: dict[str, int] = {}
    seen = False
    for name in names:
        match = _BLOCK.match(name)
        seen = seen or match is not None
        if match:
            found[name] = blocks[match[1] or "", int(match[2])]
        else:
            before = (in_order and not seen) or bool(_BEFORE.search(name))
            found[name] = 0 if before else len(blocks) + 1
    return found, len(blocks)
