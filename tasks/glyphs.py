"""Characters as masks, in the fonts that matplotlib carries (never the system's)."""

from functools import lru_cache
from pathlib import Path

import matplotlib
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from tasks.canvas import DRAFT

PLAIN = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")  # what the base's own pictures use
DEJAVU = (
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
)
STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
MODERN = ("cmr10", "cmss10", "cmtt10", "cmti10", "cmb10")  # Computer Modern, Latin letters only
POINTS = 60  # pixels, font size on the draft


@lru_cache(maxsize=64)
def font(name: str) -> ImageFont.FreeTypeFont:
    """Open one of matplotlib's bundled fonts by its file name without the ending."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), POINTS, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2048)
def glyph(character: str, font_name: str) -> Image.Image:
    """Return the character's mask, centred on the draft: mode L, DRAFT x DRAFT."""
    mask = Image.new("L", (DRAFT, DRAFT))
    face = font(font_name)
    left, top, right, bottom = face.getbbox(character)
    place = ((DRAFT - left - right) / 2, (DRAFT - top - bottom) / 2)
    ImageDraw.Draw(mask).text(place, character, fill=255, font=face)
    return mask


def any_glyph(characters: str, fonts: tuple[str, ...], rng: Generator) -> Image.Image:
    """Return the mask of one of the characters in one of the fonts, both drawn at random."""
    return glyph(characters[rng.integers(len(characters))], fonts[rng.integers(len(fonts))])
