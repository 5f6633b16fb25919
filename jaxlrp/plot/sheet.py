"""Many pictures on one page: the photo and its maps side by side, a row for each photo."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .heatmap import COLOUR_MAPS, as_rgb, demo_extra, diverging

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

_INK, _FAINT, _LINE, _PAPER = "#1A1A1A", "#5A5A5A", "#C8C8C8", "#FFFFFF"

_SMALLEST_TILE = 144  # pixels on the long side; smaller tiles are enlarged to have room for titles

# What rule names and captions are likely to hold beyond ASCII, besides Greek letters and dashes.
_SPELLED = {
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{ALMOST EQUAL TO}": "~",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{LATIN SMALL LETTER SHARP S}": "ss",
}


def contact_sheet(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    *,
    title: str = "",
    caption: str = "",
    cmap: str | None = COLOUR_MAPS[0],
) -> NDArray[np.uint8]:
    """Lay out rows of pictures with titles and the legend of their colours.

    Tiles appear pixel for pixel, or, if their long side is below 144 pixels, enlarged by one whole
    factor for all. A title too long for its place is wrapped (two lines above a column, three
    beside a row) and then shortened with an ellipsis; what a newline sets apart, such as a score
    below the name of a class, keeps a line of its own.

    Pillow's font, the only one sure to be there, has the letters of ASCII: others lose their
    accents, are spelled out (Greek), or become a question mark.

    Args:
        rows: the tiles, `[h, w, 3]` uint8, all of one size; None leaves a place empty.
        column_titles: one for each column. "" for a column without.
        row_titles: one for each row. If all are "", no room is kept for them.
        title: a heading for the page.
        caption: a remark below the grid, such as what the colours are scaled by.
        cmap: the colour map of the legend, a name in `COLOUR_MAPS`; None leaves the legend out.

    Returns:
        `[H, W, 3]`, uint8, RGB, for `save_png`.

    Raises:
        ValueError: if there is no tile, rows differ in length, titles do not match rows and
            columns, a tile is not `[h, w, 3]` uint8 or of another size, or `cmap` is unknown.
        ModuleNotFoundError: if pillow is not installed.
    """
    height, width = _tile_size(rows, column_titles, row_titles)
    with demo_extra("pillow"):
        from PIL import Image, ImageDraw

    zoom = max(1, -(-_SMALLEST_TILE // max(height, width)))  # rounded up
    layout = _Layout(
        tile=(height * zoom, width * zoom),
        columns=list(column_titles),
        rows=list(row_titles),
        title=title,
        caption=caption,
        legend=cmap is not None,
    )
    page = Image.new("RGB", (layout.width, layout.height), _PAPER)
    draw = ImageDraw.Draw(page)
    layout.write_titles(draw)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            if tile is None:
                continue
            x, y = layout.corner(r, c)
            # The hairline runs around the tile, not on it: a white map needs an edge to be seen.
            frame = (x - 1, y - 1, x + layout.tile[1], y + layout.tile[0])
            draw.rectangle(frame, outline=_LINE)
            enlarged = np.repeat(np.repeat(tile, zoom, axis=0), zoom, axis=1)
            page.paste(Image.fromarray(enlarged), (x, y))
    if cmap is not None:
        bar = layout.bar
        ramp = np.tile(np.linspace(-1, 1, bar.width), (bar.height, 1))
        page.paste(Image.fromarray(diverging(ramp, cmap)), (bar.x, bar.y))
        layout.write_legend(draw)
    return np.array(page)


@dataclass(frozen=True)
class _Bar:
    """The colour bar of the legend: its corner and size in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class _Line:
    """One line of a title and the colour to write it in."""

    text: str
    ink: str


@dataclass(frozen=True)
class _Layout:
    """Where everything stands, in pixels from the top left corner.

    From left to right: margin, row titles, gap, tiles with gaps between, margin. From top to
    bottom: margin, heading, column titles, tiles, legend, caption, margin. All distances derive
    from the size of the type, and that from the size of a tile.
    """

    tile: tuple[int, int]  # height, width
    columns: list[str]
    rows: list[str]
    title: str
    caption: str
    legend: bool

    @cached_property
    def type_size(self) -> int:
        """Of titles; it grows with the tiles, slowly, and stays legible."""
        return int(np.clip(8 + min(self.tile) / 22, 13, 40))

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return _font(self.type_size)

    @cached_property
    def small(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Of the caption and the legend."""
        return _font(round(self.type_size * 0.85))

    @cached_property
    def large(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Of the heading."""
        return _font(round(self.type_size * 1.35))

    @cached_property
    def line(self) -> int:
        """From one line of a title to the next."""
        return round(self.type_size * 1.25)

    @cached_property
    def large_line(self) -> int:
        """From one line of the heading to the next."""
        return round(self.line * 1.35)

    @cached_property
    def gap(self) -> int:
        """Between tiles, and between a title and its tile."""
        return round(self.type_size * 0.6)

    @cached_property
    def margin(self) -> int:
        return round(self.type_size * 1.5)

    @cached_property
    def column_lines(self) -> list[list[_Line]]:
        return [_fit(text, self.tile[1], 2, self.font) for text in self.columns]

    @cached_property
    def row_lines(self) -> list[list[_Line]]:
        room = max(round(self.tile[1] * 0.8), 8 * self.type_size)
        lines = min(max(self.tile[0] // self.line, 1), 3)  # no more than stand beside a tile
        return [_fit(text, room, lines, self.font) for text in self.rows]

    @cached_property
    def heading_lines(self) -> list[_Line]:
        return _fit(self.title, self.width - 2 * self.margin, 2, self.large)

    @cached_property
    def caption_lines(self) -> list[_Line]:
        return _fit(self.caption, self.grid_width, 3, self.small)

    @cached_property
    def left(self) -> int:
        """Where the tiles begin."""
        widths = [self.font.getlength(line.text) for lines in self.row_lines for line in lines]
        return self.margin + (int(np.ceil(max(widths))) + 2 * self.gap if widths else 0)

    @cached_property
    def top(self) -> int:
        """Where the tiles begin."""
        heading = len(self.heading_lines) * self.large_line
        titles = max(len(lines) for lines in self.column_lines) * self.line
        gaps = (bool(heading) + bool(titles)) * self.gap
        return self.margin + heading + titles + gaps

    @cached_property
    def grid_width(self) -> int:
        return len(self.columns) * (self.tile[1] + self.gap) - self.gap

    @cached_property
    def bottom(self) -> int:
        """Where the tiles end."""
        return self.top + len(self.rows) * (self.tile[0] + self.gap) - self.gap

    @cached_property
    def bar(self) -> _Bar:
        width = min(self.grid_width, 18 * self.type_size) | 1  # odd, so that 0 has a pixel
        return _Bar(
            x=self.left + (self.grid_width - width) // 2,
            y=self.bottom + self.margin,
            width=width,
            height=round(self.type_size * 0.8),
        )

    @cached_property
    def caption_top(self) -> int:
        if not self.legend:
            return self.bottom + self.gap
        return self.bar.y + self.bar.height + self.gap // 2 + self.line + self.gap

    @cached_property
    def width(self) -> int:
        return self.left + self.grid_width + self.margin

    @cached_property
    def height(self) -> int:
        if not self.legend and not self.caption_lines:
            return self.bottom + self.margin
        return self.caption_top + len(self.caption_lines) * self.line + self.margin

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The x and y of a tile."""
        return (
            self.left + column * (self.tile[1] + self.gap),
            self.top + row * (self.tile[0] + self.gap),
        )

    def write_titles(self, draw: ImageDraw.ImageDraw) -> None:
        """Heading, column titles, row titles and caption."""
        for i, line in enumerate(self.heading_lines):
            at = (self.margin, self.margin + i * self.large_line)
            draw.text(at, line.text, fill=_INK, font=self.large, anchor="la")
        for c, lines in enumerate(self.column_lines):  # the last line stands on the tile
            middle = self.corner(0, c)[0] + self.tile[1] / 2
            for i, line in enumerate(reversed(lines)):
                at = (middle, self.top - self.gap - i * self.line)
                draw.text(at, line.text, fill=line.ink, font=self.font, anchor="md")
        for r, lines in enumerate(self.row_lines):  # half-way down the tile
            middle = self.corner(r, 0)[1] + self.tile[0] / 2
            for i, line in enumerate(lines):
                at = (self.left - 2 * self.gap, middle + (i - (len(lines) - 1) / 2) * self.line)
                draw.text(at, line.text, fill=line.ink, font=self.font, anchor="rm")
        for i, line in enumerate(self.caption_lines):
            at = (self.left + self.grid_width / 2, self.caption_top + i * self.line)
            draw.text(at, line.text, fill=_FAINT, font=self.small, anchor="ma")

    def write_legend(self, draw: ImageDraw.ImageDraw) -> None:
        """Frame, ticks and words of the colour bar."""
        bar = self.bar
        draw.rectangle((bar.x - 1, bar.y - 1, bar.x + bar.width, bar.y + bar.height), outline=_LINE)
        below = bar.y + bar.height
        words = (
            (bar.x, "negative", "la"),
            (bar.x + bar.width // 2, "0", "ma"),
            (bar.x + bar.width - 1, "positive", "ra"),
        )
        for x, word, anchor in words:
            draw.line((x, below, x, below + self.gap // 3), fill=_FAINT)
            at = (x, below + self.gap // 2 + 2)
            draw.text(at, word, fill=_FAINT, font=self.small, anchor=anchor)


def _fit(text: str, room: float, lines: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[_Line]:
    """Break a title into at most `lines` lines of at most `room` pixels; none for an empty one.

    Each paragraph is left a line, and the earlier ones share what remains: the name of a class
    must not push out the score below it.
    """

    def fits(words: str) -> bool:
        return font.getlength(words) <= room

    paragraphs = [part for part in map(str.strip, _printable(text).split("\n")) if part]
    if len(paragraphs) > lines:
        paragraphs = [*paragraphs[: lines - 1], paragraphs[lines - 1] + "…"]
    fitted: list[_Line] = []
    for i, paragraph in enumerate(paragraphs):
        later = len(paragraphs) - 1 - i
        wrapped = _wrap(paragraph, fits)
        kept = wrapped[: lines - len(fitted) - later]
        if len(kept) < len(wrapped):
            kept[-1] = kept[-1].rstrip("…") + "…"
        ink = _INK if i == 0 else _FAINT
        fitted += [_Line(_shorten(line, fits), ink) for line in kept]
    return fitted


def _wrap(paragraph: str, fits: Callable[[str], bool]) -> list[str]:
    """Break where a line would not fit: after words, and after the ( , / _ of names from code."""
    lines: list[str] = []
    for piece in re.findall(r"[^\s(,/_]*[(,/_]*\s*", paragraph):
        if lines and fits((lines[-1] + piece).rstrip()):
            lines[-1] += piece
        elif piece:
            lines.append(piece)
    return [line.rstrip() for line in lines]


def _shorten(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or its longest beginning that fits with an ellipsis after it."""
    if fits(text):
        return text
    text = text.rstrip("…")
    kept = bisect(range(1, len(text)), False, key=lambda n: not fits(text[:n] + "…"))
    return text[:kept].rstrip() + "…"


def _printable(text: str) -> str:
    """The text in letters that pillow's font has, which are those of ASCII."""
    return "".join(map(_ascii, unicodedata.normalize("NFKD", text)))


def _ascii(character: str) -> str:
    """A stand-in for one character; accents, which NFKD makes characters of their own, vanish."""
    if " " <= character <= "~" or character == "\n":
        return character
    if character.isspace():
        return " "
    if unicodedata.combining(character):
        return ""
    if unicodedata.category(character) == "Pd":  # dashes of all lengths
        return "-"
    name = unicodedata.name(character, "")
    if name.startswith("GREEK ") and " LETTER " in name:
        return name.split()[-1].lower().replace("lamda", "lambda")
    return _SPELLED.get(character, "?")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _tile_size(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
) -> tuple[int, int]:
    """Height and width that all tiles share; ValueError for a grid that is not one."""
    if len(rows) != len(row_titles):
        raise ValueError(f"{len(rows)} rows have {len(row_titles)} row titles")
    for r, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(f"row {r} has {len(row)} tiles, but there are {len(column_titles)} column titles")
    tiles = {(r, c): tile for r, row in enumerate(rows) for c, tile in enumerate(row)}
    size: tuple[int, int] | None = None
    for (r, c), tile in tiles.items():
        if tile is None:
            continue
        found = as_rgb(tile, f"the tile in row {r}, column {c}").shape[:2]
        if size is None:
            size = found
        elif found != size:
            raise ValueError(
                f"the tile in row {r}, column {c} has {found} pixels, but the first {size}; bring all tiles to one size"
            )
    if size is None:
        raise ValueError("a contact sheet needs at least one tile")
    return size
