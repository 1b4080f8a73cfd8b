"""The tiny pool, opened; and a copy of its files to be spoilt."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from pools.checkpoint import SINGLE
from pools.open import open_pool


@pytest.fixture(scope="session")
def pool(tiny_pool):
    return open_pool("clip", tiny_pool.base, tiny_pool.experts, root=tiny_pool.root)


@pytest.fixture
def copied(tiny_pool, tmp_path):
    """The pool's files, to be spoilt."""
    shutil.copytree(tiny_pool.root, tmp_path / "pool")
    return tmp_path / "pool"


@pytest.fixture
def change():
    """Edits the tensors of a directory: in place, or by giving back others."""

    def changed(directory, edit):
        tensors = load_file(directory / SINGLE)
        found = edit(tensors)
        save_file(found if isinstance(found, dict) else tensors, directory / SINGLE, {"format": "pt"})

    return changed
