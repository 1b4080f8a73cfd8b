"""Shapes, arrows and textures as masks, drawn from a seeded generator."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from tasks.canvas import DRAFT

SHAPES = ("circle", "square", "triangle", "pentagon", "star", "heart", "diamond", "cross", "crescent", "ring", "oval",
          "half circle")  # fmt: skip
TURNS = {"right": 0, "down right": 45, "down": 90, "down left": 135, "left": 180, "up left": 225, "up": 270,
         "up right": 315}  # fmt: skip
TEXTURES = ("horizontal stripes", "vertical stripes", "diagonal stripes", "checkerboard", "dots", "waves", "circles",
            "zigzag", "grid", "bricks", "stains", "rays")  # fmt: skip


def polygon(corners: int, radius: float, inner: float = 1.0, start: float = -90.0) -> np.ndarray:
    """Corners of a regular polygon, every second one at `inner` times the radius: (corners, 2) on the draft."""
    angles = np.deg2rad(start + np.arange(corners) * 360 / corners)
    reach = radius * np.where(np.arange(corners) % 2, inner, 1.0)
    return DRAFT / 2 + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def outline(name: str, radius: float) -> np.ndarray:
    """Corners of the named shape that is one closed line: (n, 2) on the draft."""
    middle, t = DRAFT / 2, np.linspace(0, 2 * np.pi, 60)
    if name == "heart":
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return middle + radius / 16 * np.stack([x, -y], 1)
    if name == "oval":
        return middle + radius * np.stack([np.cos(t), 0.5 * np.sin(t)], 1)
    if name == "half circle":
        return middle + radius * np.stack([np.cos(t / 2), 0.4 - np.sin(t / 2)], 1)
    if name == "cross":
        steps = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1),
                 (-1, 3)]  # fmt: skip
        return middle + radius / 3 * np.array(steps, dtype=float)
    corners = {"circle": 60, "square": 4, "triangle": 3, "pentagon": 5, "star": 10, "diamond": 4}[name]
    start = -45.0 if name == "square" else -90.0
    points = polygon(corners, radius, 0.42 if name == "star" else 1.0, start)
    return np.stack([middle + (points[:, 0] - middle) * 0.62, points[:, 1]], 1) if name == "diamond" else points


def shape(name: str, rng: Generator, only_filled: bool = False) -> Image.Image:
    """Draw the named shape filled or, half the time, as a line: mode L, DRAFT x DRAFT."""
    mask = Image.new("L", (DRAFT, DRAFT))
    draw, middle, radius = ImageDraw.Draw(mask), DRAFT / 2, DRAFT * 0.36
    if name in ("ring", "crescent"):
        hole = rng.uniform(0.45, 0.65) if name == "ring" else rng.uniform(0.75, 0.9)
        aside = 0.0 if name == "ring" else radius * 0.42
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
        centre, reach = middle + aside, radius * hole
        draw.ellipse([centre - reach, middle - reach, centre + reach, middle + reach], fill=0)
        return mask
    points = [tuple(point) for point in outline(name, radius)]
    if only_filled or rng.random() < 0.5:
        draw.polygon(points, fill=255)
    else:
        draw.line([*points, points[0], points[1]], fill=255, width=int(rng.integers(5, 9)), joint="curve")
    return mask


def arrow(name: str, rng: Generator, plain: bool = False) -> Image.Image:
    """Draw an arrow that points where the name says, with a shaft and head of varying size: mode L, DRAFT x DRAFT."""
    mask = Image.new("L", (DRAFT, DRAFT))
    draw, middle = ImageDraw.Draw(mask), DRAFT / 2
    half, head = DRAFT * rng.uniform(0.26, 0.36), DRAFT * rng.uniform(0.12, 0.2)
    spread, width = rng.uniform(0.7, 1.1), 7 if plain else int(rng.integers(3, 11))
    angle = np.deg2rad(TURNS[name])
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    tip, tail, neck = middle + half * along, middle - half * along, middle + (half - head) * along
    barbs = [neck + side * spread * head * across for side in (-1, 1)]
    draw.line([tuple(tail), tuple(neck)], fill=255, width=width)
    if plain or rng.random() < 0.5:
        draw.polygon([tuple(barbs[0]), tuple(tip), tuple(barbs[1])], fill=255)
    else:
        draw.line([tuple(tail), tuple(tip)], fill=255, width=width)
        draw.line([tuple(barbs[0]), tuple(tip), tuple(barbs[1])], fill=255, width=max(width, 5), joint="curve")
    return mask


def texture(name: str, rng: Generator, plain: bool = False) -> Image.Image:
    """Fill the draft with the named texture, of varying pitch, phase and share of ink: mode L, DRAFT x DRAFT."""
    pitch = DRAFT / (3.5 if plain else rng.uniform(2.2, 5.0))
    rows, columns = np.mgrid[0:DRAFT, 0:DRAFT] + rng.uniform(0, pitch, 2)[:, None, None]
    share = 0.0 if plain else rng.uniform(-0.35, 0.35)
    field = _field(name, rows * 2 * np.pi / pitch, columns * 2 * np.pi / pitch, rng)
    return Image.fromarray(np.uint8(255 * (field > share)))


def _field(name: str, v: np.ndarray, u: np.ndarray, rng: Generator) -> np.ndarray:
    """Evaluate the texture at phases v (down) and u (right), in radians: values about -1..1, ink where large."""
    middle_v, middle_u = (x.mean() + rng.uniform(-2, 2) for x in (v, u))
    if name == "stains":
        waves = rng.uniform(-1.1, 1.1, (12, 2))
        return sum(np.cos(a * v + b * u + p) for (a, b), p in zip(waves, rng.uniform(0, 6.3, 12), strict=True)) / 3
    if name == "bricks":
        odd = np.floor(v / (2 * np.pi)) % 2
        return np.maximum(np.cos(v), np.cos(u / 2 + odd * np.pi)) - 0.75
    side = 1 if rng.random() < 0.5 else -1
    fields = {
        "horizontal stripes": lambda: np.sin(v),
        "vertical stripes": lambda: np.sin(u),
        "diagonal stripes": lambda: np.sin((v + side * u) * 0.71),
        "checkerboard": lambda: np.sin(v / 1.4) * np.sin(u / 1.4) * 3,
        "dots": lambda: np.cos(v) + np.cos(u) - 0.7,
        "waves": lambda: np.sin(v + 1.3 * np.sin(u * 0.8)),
        "circles": lambda: np.sin(np.hypot(v - middle_v, u - middle_u)),
        "zigzag": lambda: np.sin(v + 2.2 * np.abs((u * 0.8 / np.pi) % 2 - 1)),
        "grid": lambda: np.maximum(np.cos(v), np.cos(u)) - 0.7,
        "rays": lambda: np.sin(9 * np.arctan2(v - middle_v, u - middle_u)),
    }
    return fields[name]()
