"""The eight tasks of the embedded suite: what each shows, how each is worded, and seeded splits of each.

Two tasks are real data (handwritten digits, patches of photographs and scans); six are drawn. Every task also has a
`gallery`: plainer pictures of the same things in another style, which the base is trained on and no split contains.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image
from sklearn.datasets import load_digits

from tasks import figures, glyphs, photographs
from tasks.canvas import SIZE, Style, developed, posed, quantised

SIZES = {"train": 1200, "validation": 280, "test": 400}  # rows; digits has 1797 in all and keeps fewer for training
GALLERY = Style(turn=8, zoom=(0.7, 1.05), shift=0.07, blur=1.0, contrast=(0.6, 1.0), noise=0.04, inverted=0.5)
LOOSE = Style(turn=10, zoom=(0.75, 1.1), shift=0.07, shear=0.15, blur=1.0, contrast=(0.5, 1.0), noise=0.05)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# fmt: off
GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ",
    "kappa": "κ", "lambda": "λ", "mu": "μ", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ",
    "chi": "χ", "psi": "ψ", "omega": "ω",
}
SIGNS = {
    "plus": "+", "minus": "−", "times": "×", "division": "÷", "equal": "=", "not equal": "≠", "less than": "<",
    "greater than": ">", "infinity": "∞", "integral": "∫", "sum": "∑", "product": "∏", "root": "√", "element": "∈",
    "union": "∪", "intersection": "∩", "for all": "∀", "exists": "∃",
}
# fmt: on

Painter = Callable[[str, Generator], np.ndarray]


@dataclass(frozen=True)
class Split:
    """Rows of one split: images (n, SIZE, SIZE) uint8 and labels (n,) int64."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class DrawnTask:
    """One task: its classes as prompts name them, its templates, and how to paint a class."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    gallery: Painter  # plain pictures for the base
    paint: Painter | None = None  # the task's own pictures; None where the data are given (digits, photographs)


def _letter(name: str, rng: Generator) -> np.ndarray:
    mask = glyphs.any_glyph(name.upper(), glyphs.DEJAVU + glyphs.STIX + glyphs.MODERN, rng)
    style = replace(LOOSE, ruled="lines", inverted=0.5)
    return developed(posed(mask, style, rng), style, rng)


def _greek(name: str, rng: Generator) -> np.ndarray:
    mask = glyphs.any_glyph(GREEK[name], glyphs.DEJAVU + glyphs.STIX, rng)
    style = replace(LOOSE, ruled="slanted", inverted=1.0, noise=0.07)
    return developed(posed(mask, style, rng), style, rng)


def _sign(name: str, rng: Generator) -> np.ndarray:
    mask = glyphs.any_glyph(SIGNS[name], glyphs.DEJAVU[:5] + glyphs.STIX[:2], rng)
    style = replace(LOOSE, ruled="grid", turn=8, zoom=(0.8, 1.2))
    return developed(posed(mask, style, rng), style, rng)


def _shape(name: str, rng: Generator) -> np.ndarray:
    style = replace(LOOSE, turn=25, zoom=(0.55, 1.1), inverted=0.5, shade=0.3)
    return developed(posed(figures.shape(name, rng), style, rng), style, rng)


def _arrow(name: str, rng: Generator) -> np.ndarray:
    style = replace(LOOSE, ruled="dots", inverted=0.5, shade=0.5, clutter=8)
    return developed(posed(figures.arrow(name, rng), style, rng), style, rng)


def _texture(name: str, rng: Generator) -> np.ndarray:
    style = replace(LOOSE, turn=0, shift=0, zoom=(1.0, 1.0), shear=0.0, contrast=(0.3, 0.9), noise=0.12, shade=0.3)
    return developed(figures.texture(name, rng), style, rng)


def _plain_glyph(characters: Callable[[str], str], style: Style = GALLERY) -> Painter:
    def paint(name: str, rng: Generator) -> np.ndarray:
        return developed(posed(glyphs.any_glyph(characters(name), glyphs.PLAIN, rng), style, rng), style, rng)

    return paint


def _plain_figure(draw: Callable[..., Image.Image]) -> Painter:
    def paint(name: str, rng: Generator) -> np.ndarray:
        return developed(posed(draw(name, rng, True), GALLERY, rng), GALLERY, rng)

    return paint


def _plain_texture(name: str, rng: Generator) -> np.ndarray:
    return developed(figures.texture(name, rng, True), GALLERY, rng)


def _faded_photograph(name: str, rng: Generator) -> np.ndarray:
    return photographs.patch(name, "train", Style(contrast=(0.3, 0.6), inverted=0.5, noise=0.04), rng)


TASKS: dict[str, DrawnTask] = {
    "digits": DrawnTask(tuple("0123456789"), ("a photo of the number: {}", "a handwritten digit {}", "the digit {}"),
                        _plain_glyph(str, replace(GALLERY, zoom=(0.9, 1.5), blur=6.0))),
    "photographs": DrawnTask(tuple(photographs.REGIONS), ("a photo of a {}", "a patch of a {}", "a picture of the {}"),
                             _faded_photograph),
    "letters": DrawnTask(tuple(LETTERS), ("a photo of the letter {}", "the letter {} in print", "letter {}"),
                         _plain_glyph(str.upper), _letter),
    "greek": DrawnTask(tuple(GREEK), ("the greek letter {}", "a greek {} in chalk", "a photo of the greek letter {}"),
                       _plain_glyph(GREEK.__getitem__), _greek),
    "signs": DrawnTask(tuple(SIGNS), ("the mathematical sign {}", "a photo of the {} sign", "{} in a formula"),
                       _plain_glyph(SIGNS.__getitem__), _sign),
    "shapes": DrawnTask(figures.SHAPES, ("a drawing of a {}", "the shape of a {}", "a photo of a {} shape"),
                        _plain_figure(figures.shape), _shape),
    "arrows": DrawnTask(tuple(figures.TURNS), ("an arrow pointing {}", "a photo of an arrow {}", "the direction {}"),
                        _plain_figure(figures.arrow), _arrow),
    "textures": DrawnTask(figures.TEXTURES, ("a texture of {}", "a photo of a {} texture", "a pattern with {}"),
                          _plain_texture, _texture),
}  # fmt: skip


def balanced(count: int, classes: int, rng: Generator) -> np.ndarray:
    """Return `count` labels with every class as often as any other (to within one), shuffled: (count,) int64."""
    return rng.permutation(np.arange(count) % classes).astype(np.int64)


def gallery(name: str, count: int, seed: int) -> Split:
    """Draw the plain pictures of one task that the base learns from."""
    task = TASKS[name]
    rng = np.random.default_rng([seed, *name.encode(), 99])
    labels = balanced(count, len(task.classes), rng)
    return Split(np.stack([task.gallery(task.classes[label], rng) for label in labels]), labels)


def split(name: str, part: str, seed: int) -> Split:
    """Draw or collect one split ("train", "validation" or "test") of one task; the same seed gives the same bytes."""
    if name == "digits":
        return _digits(seed)[part]
    task = TASKS[name]
    rng = np.random.default_rng([seed, *name.encode(), list(SIZES).index(part)])
    labels = balanced(SIZES[part], len(task.classes), rng)
    if name == "photographs":
        style = Style(contrast=(0.8, 1.2), noise=0.02)
        images = [photographs.patch(task.classes[label], part, style, rng) for label in labels]
    else:
        paint = task.paint or task.gallery
        images = [paint(task.classes[label], rng) for label in labels]
    return Split(np.stack(images), labels)


@lru_cache(maxsize=2)
def _digits(seed: int) -> dict[str, Split]:
    """Enlarge scikit-learn's handwritten digits and deal them, shuffled, into the three splits."""
    rng = np.random.default_rng([seed, *b"digits"])
    data = load_digits()
    order = rng.permutation(len(data.images))
    side = (SIZE, SIZE)
    small = [Image.fromarray(np.uint8(image * 255 / 16)) for image in data.images[order]]
    images = np.stack([quantised(np.asarray(image.resize(side, Image.Resampling.BICUBIC)) / 255) for image in small])
    labels = data.target[order].astype(np.int64)
    test, validation = SIZES["test"], SIZES["test"] + SIZES["validation"]
    cuts = {"test": slice(0, test), "validation": slice(test, validation), "train": slice(validation, None)}
    return {part: Split(images[cut], labels[cut]) for part, cut in cuts.items()}
