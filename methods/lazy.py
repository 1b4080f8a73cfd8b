"""Torch, imported when arithmetic first touches it: a listing or a faulty configuration answers without the wait."""

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch as torch
else:

    def _lazily(name: str):
        """The standard library's recipe for a module that is executed at its first attribute access."""
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    torch = _lazily("torch")
