"""A small grey canvas: put a mask into a pose, then develop it into a noisy picture, both from a seeded generator."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageFilter

SIZE = 28  # pixels, side of a finished picture
DRAFT = 84  # pixels, side of the mask that drawers work on (three times finer)
GREYS = 16  # grey levels of a finished picture; few, so that the PNG files stay small


@dataclass(frozen=True)
class Style:
    """How far pictures of one kind vary; every range is drawn from uniformly."""

    turn: float = 0.0  # degrees, rotation up to this much either way
    zoom: tuple[float, float] = (1.0, 1.0)  # size of the drawing, 1 as drawn
    shift: float = 0.0  # share of the canvas, move up to this much either way
    shear: float = 0.0  # slant up to this much either way
    blur: float = 0.0  # pixels of the draft, Gaussian radius up to this
    noise: float = 0.0  # standard deviation, grey in [0, 1]
    contrast: tuple[float, float] = (0.9, 1.0)  # difference of ink and paper, in (0, 1]
    inverted: float = 0.0  # share of pictures with light ink on dark paper
    shade: float = 0.0  # strength of a linear gradient of light over the paper
    clutter: int = 0  # up to this many stray strokes
    ruled: str = ""  # the paper's lines: "" (none), "lines", "grid", "slanted" or "dots"
    hollow: float = 0.0  # share of drawings of which only the contour is left


def posed(mask: Image.Image, style: Style, rng: Generator) -> Image.Image:
    """Return the mask (mode L, DRAFT x DRAFT) turned, sized, slanted and moved as the style allows."""
    angle = np.deg2rad(rng.uniform(-style.turn, style.turn))
    zoom = rng.uniform(*style.zoom)
    slant = rng.uniform(-style.shear, style.shear)
    move = rng.uniform(-style.shift, style.shift, 2) * DRAFT
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / zoom
    matrix = turn @ np.array([[1.0, slant], [0.0, 1.0]])
    centre = np.full(2, DRAFT / 2)
    offset = centre - matrix @ (centre + move)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    return mask.transform((DRAFT, DRAFT), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def developed(mask: Image.Image, style: Style, rng: Generator) -> np.ndarray:
    """Turn a mask (mode L, any size) into a picture: (SIZE, SIZE) uint8 with GREYS levels."""
    if rng.random() < style.hollow:
        mask = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(7)))
    if style.blur:
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, style.blur)))
    ink = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255
    contrast = rng.uniform(*style.contrast)
    paper = rng.uniform(contrast, 1.0)
    grey = paper - contrast * np.maximum.reduce([ink, strokes(style.clutter, rng), ruling(style.ruled, rng)])
    if rng.random() < style.inverted:
        grey = 1 - grey
    slope = rng.uniform(-style.shade, style.shade, 2)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    grey = grey + slope[0] * rows + slope[1] * columns + style.noise * rng.standard_normal((SIZE, SIZE))
    return quantised(grey)


def quantised(grey: np.ndarray) -> np.ndarray:
    """Round greys in [0, 1] to GREYS levels: uint8 in 0..255."""
    levels = np.round(np.clip(grey, 0, 1) * (GREYS - 1))
    return np.round(levels * 255 / (GREYS - 1)).astype(np.uint8)


def strokes(most: int, rng: Generator) -> np.ndarray:
    """Draw up to `most` short stray strokes: (SIZE, SIZE), ink in [0, 1]."""
    ink = np.zeros((SIZE, SIZE))
    for _ in range(rng.integers(0, most + 1)):
        start, angle, length = rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi), rng.integers(3, 9)
        steps = start[:, None] + np.arange(length) * np.array([[np.sin(angle)], [np.cos(angle)]])
        rows, columns = np.clip(steps, 0, SIZE - 1).astype(int)
        ink[rows, columns] = rng.uniform(0.4, 1.0)
    return ink


def ruling(kind: str, rng: Generator) -> np.ndarray:
    """Draw the lines of ruled paper, of varying pitch and strength: (SIZE, SIZE), ink in [0, 1]."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + rng.integers(0, 8, 2)[:, None, None]
    pitch, strength = rng.integers(4, 8), rng.uniform(0.25, 0.55)
    across, along = rows % pitch == 0, columns % pitch == 0
    lines = {
        "": lambda: np.zeros((SIZE, SIZE)),
        "lines": lambda: across,
        "grid": lambda: across | along,
        "slanted": lambda: (rows + columns) % pitch == 0,
        "dots": lambda: across & along,
    }
    return strength * lines[kind]()
