"""Patches of real pictures that scikit-learn and matplotlib carry, with splits on disjoint tiles of each picture."""

import gzip
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.random import Generator
from PIL import Image
from sklearn.datasets import load_sample_image

from tasks.canvas import SIZE, Style, quantised

TILE = 52  # pixels, side of the tiles that splits are dealt from
FLAT = 0.06  # standard deviation, grey in [0, 1]; patches that show less are passed over
# class name: picture and the region that shows it (left, top, right, bottom)
REGIONS = {
    "pagoda": ("china", (80, 70, 344, 334)),
    "trees": ("china", (340, 295, 640, 427)),
    "flower": ("flower", (170, 85, 434, 349)),
    "flag": ("hopper", (0, 10, 176, 318)),
    "face": ("hopper", (168, 150, 388, 370)),
    "mountains": ("dem", (0, 80, 220, 344)),
    "brain": ("brain", (16, 16, 412, 412)),
}


@lru_cache(maxsize=1)
def pictures() -> dict[str, np.ndarray]:
    """Load the pictures in grey: name -> (height, width) float in [0, 1]."""
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    slope = np.load(samples / "jacksboro_fault_dem.npz")["elevation"].astype(float)
    with gzip.open(samples / "s1045.ima.gz") as file:
        scan = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(float)
    brain = Image.fromarray(np.uint8(255 * scan / scan.max())).crop((40, 30, 240, 160)).resize((600, 390))
    return {
        "china": _grey(Image.fromarray(load_sample_image("china.jpg"))),
        "flower": _grey(Image.fromarray(load_sample_image("flower.jpg"))),
        "hopper": _grey(Image.open(samples / "grace_hopper.jpg")),
        "dem": (slope - slope.min()) / np.ptp(slope),
        "brain": _grey(brain),
    }


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=float) / 255


def tiles(name: str, split: str) -> list[np.ndarray]:
    """Return the split's tiles of a class, dealt 3 : 1 : 1 (train, validation, test): list of (TILE, TILE)."""
    picture, (left, top, right, bottom) = REGIONS[name]
    region = pictures()[picture][top:bottom, left:right]
    spots = [
        (r, c) for r in range(0, region.shape[0] - TILE + 1, TILE) for c in range(0, region.shape[1] - TILE + 1, TILE)
    ]
    order = {0: "train", 1: "test", 2: "train", 3: "validation", 4: "train"}
    dealt = [(r, c) for k, (r, c) in enumerate(spots) if order[k % 5] == split]
    return [region[r : r + TILE, c : c + TILE] for r, c in dealt]


def patch(name: str, split: str, style: Style, rng: Generator) -> np.ndarray:
    """Cut a patch from one of the split's tiles, mirrored at random: (SIZE, SIZE) uint8."""
    choice = tiles(name, split)
    cut = np.zeros((SIZE, SIZE))
    while cut.std() < FLAT:
        tile = choice[rng.integers(len(choice))]
        side = int(rng.integers(36, TILE + 1))
        top, left = rng.integers(0, TILE - side + 1, 2)
        cut = tile[top : top + side, left : left + side]
    cut = cut[:, ::-1] if rng.random() < 0.5 else cut
    image = Image.fromarray(np.uint8(255 * cut)).resize((SIZE, SIZE), Image.Resampling.BOX)
    contrast = rng.uniform(*style.contrast)
    grey = 0.5 + contrast * (np.asarray(image) / 255 - 0.5)
    if rng.random() < style.inverted:
        grey = 1 - grey
    return quantised(grey + style.noise * rng.standard_normal((SIZE, SIZE)))
