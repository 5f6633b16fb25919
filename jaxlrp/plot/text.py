"""Relevance of words: joined from word pieces, listed, and coloured for a terminal or a web page.

The steps follow each other in this order::

    relevance [tokens]  --join_words-->  [Piece, ...], whose texts put together are the text
                        --rank_words-->  what speaks most for and against, a word with all its occurrences
                        --colour_words-> `rich.text.Text`, or --mark_words-> plain "+" and "-"
                        --html_words-->  `<span>`s; `page.html_page` puts them on a page

Red speaks for, blue against. Only `colour_words` needs rich (`pip install 'jaxlrp[text]'`).
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from rich.text import Text

# From which share of the largest |relevance| on a word gets one, two or three marks.
_LEVELS = (0.15, 0.35, 0.65)
# Readable on dark and on light terminals: letters in a middle tone, then white on a dark one.
_STYLES = {
    sign: (middle, f"bold {middle}", f"bold #ffffff on {dark}")
    for sign, middle, dark in ((+1, "#e5484d", "#b3202a"), (-1, "#4a83f0", "#1b45b4"))
}
_FAINTEST = 0.01  # shares below this stay uncoloured on a page


@dataclass(frozen=True)
class Piece:
    """A stretch of text.

    Attributes:
        text: the characters.
        relevance: that of the word; None for what stands between words.
        special: whether the tokeniser added it, such as ``[CLS]``: it is no part of the text.
    """

    text: str
    relevance: float | None = None
    special: bool = False


def join_words(
    text: str,
    tokens: Sequence[str],
    spans: Sequence[tuple[int, int]],
    words: Sequence[int | None],
    relevance: ArrayLike,
) -> list[Piece]:
    """Join the word pieces of a tokeniser to words; a word's relevance is the sum of its pieces'.

    Args:
        text: what was tokenised.
        tokens: the word pieces.
        spans: for each of them where in the text it stands, `(start, end)`.
        words: for each of them the number of its word; None for what the tokeniser added.
        relevance: `[tokens]`.

    Returns:
        Pieces in order. Their relevance adds up to that of the tokens, and without the special ones their texts are
        the text, up to the end of the last token.

    Raises:
        ValueError: the arguments differ in length.

    Example:
        >>> spans, words = [(0, 0), (0, 4), (4, 5), (6, 9), (0, 0)], [None, 0, 0, 1, None]
        >>> tokens = ["[CLS]", "goal", "##s", "won", "[SEP]"]
        >>> for piece in join_words("Goals won", tokens, spans, words, [0.0, 2.0, 1.0, 0.5, -0.5]):
        ...     print(repr(piece.text), piece.relevance)
        '[CLS]' 0.0
        'Goals' 3.0
        ' ' None
        'won' 0.5
        '[SEP]' -0.5
    """
    values = np.asarray(relevance, np.float64)
    if not len(tokens) == len(spans) == len(words) == len(values) or values.ndim != 1:
        raise ValueError(
            f"{len(tokens)} tokens, {len(spans)} spans, {len(words)} word numbers and relevance of shape "
            f"{values.shape} do not belong together"
        )
    pieces: list[Piece] = []
    end, last = 0, None
    for token, (start, stop), word, value in zip(tokens, spans, words, map(float, values), strict=True):
        if word is None:
            pieces.append(Piece(token, value, special=True))
            continue
        # Some characters are normalised to several words, which have but these characters to be shown at.
        if pieces and not pieces[-1].special and (word == last or start < end):
            grown = pieces.pop()
            pieces.append(Piece(grown.text + text[end:stop], (grown.relevance or 0.0) + value))
        else:
            if start > end:
                pieces.append(Piece(text[end:start]))
            pieces.append(Piece(text[start:stop], value))
        end, last = max(end, stop), word
    return pieces


def rank_words(pieces: Iterable[Piece], count: int = 10) -> tuple[list[tuple[str, float, int]], ...]:
    """The words that speak most for and most against, each with all its occurrences added up.

    Args:
        pieces: from `join_words`; what stands between words, special tokens and punctuation are left out.
        count: how many of either side, at most.

    Returns:
        `(those for, those against)`, lists of `(word, relevance, occurrences)`, the strongest first. Upper and lower
        case are one word, written as it is first met.

    Example:
        >>> rank_words([Piece("Goal", 2.0), Piece(" "), Piece("goal", 1.0), Piece("tax", -0.5)])
        ([('Goal', 3.0, 2)], [('tax', -0.5, 1)])
    """
    found: dict[str, tuple[str, float, int]] = {}
    for piece in pieces:
        if piece.relevance is None or piece.special or not any(map(str.isalnum, piece.text)):
            continue
        shown, total, times = found.get(piece.text.casefold(), (piece.text, 0.0, 0))
        found[piece.text.casefold()] = shown, total + piece.relevance, times + 1
    ranked = sorted(found.values(), key=lambda entry: -entry[1])
    return [e for e in ranked if e[1] > 0][:count], [e for e in reversed(ranked) if e[1] < 0][:count]


def strongest(pieces: Iterable[Piece]) -> float:
    """The largest |relevance| of a word, for full colour; 0 where there is none. Special tokens do not count."""
    return max((abs(p.relevance) for p in pieces if p.relevance is not None and not p.special), default=0.0)


def colour_words(pieces: Sequence[Piece], limit: float | None = None) -> Text:
    """The text for a terminal: words in red (for) and blue (against), strong ones on a ground of that colour.

    Args:
        pieces: from `join_words`.
        limit: the |relevance| of full colour; None takes `strongest`.

    Raises:
        ModuleNotFoundError: if rich is not installed.
    """
    from rich.text import Text

    coloured = Text()
    for piece, level in _levels(pieces, limit):
        style = _STYLES[1 if level > 0 else -1][abs(level) - 1] if level else "dim" if piece.special else ""
        coloured.append(printable(piece.text), style)
    return coloured


def mark_words(pieces: Sequence[Piece], limit: float | None = None) -> str:
    """The text without colours: words that speak for have one to three `+` in front, those against `-`.

    Example:
        >>> mark_words([Piece("Great", 3.0), Piece(" "), Piece("old", 0.0), Piece(" "), Piece("tax", -1.0)])
        '+++Great old -tax'
    """
    return "".join(("+" * level or "-" * -level) + printable(p.text) for p, level in _levels(pieces, limit))


def html_words(pieces: Sequence[Piece], limit: float | None = None) -> str:
    """The text as HTML: a `<span>` for each word, with its number to be shown by hovering. Everything is escaped.

    The spans have the classes `for` and `against`, the variable `--r` (0 to 1) and the attribute `data-r`; the style
    sheet of `page.html_page` makes colours of them.

    Example:
        >>> html_words([Piece("<b>", 1.0), Piece(" & ")])
        '<span class="for" style="--r:1.00" data-r="+1.0000">&lt;b&gt;</span> &amp; '
    """
    scale = _scale(pieces, limit)
    return "".join(_span(piece, scale) for piece in pieces)


def _span(piece: Piece, scale: float) -> str:
    text = html.escape(printable(piece.text))
    if piece.relevance is None:
        return text
    share = min(abs(piece.relevance) / scale, 1.0)
    side = "" if share < _FAINTEST else "for" if piece.relevance > 0 else "against"
    names = " ".join(filter(None, (side, "special" if piece.special else "")))
    attributes = f' class="{names}"' if names else ""
    colour = f' style="--r:{share:.2f}"' if side else ""
    return f'<span{attributes}{colour} data-r="{piece.relevance:+.4f}">{text}</span>'


def printable(text: str) -> str:
    """Text without lone surrogates and control characters: no escape sequence in a file may reach the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _unprintable(c) else c for c in text)


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"


def _levels(pieces: Sequence[Piece], limit: float | None) -> Iterable[tuple[Piece, int]]:
    """Each piece with its level: 1 to 3 for, -1 to -3 against, 0 where there is little."""
    scale = _scale(pieces, limit)
    for piece in pieces:
        value = piece.relevance or 0.0
        level = sum(abs(value) >= share * scale for share in _LEVELS)
        yield piece, level if value > 0 else -level if value < 0 else 0


def _scale(pieces: Sequence[Piece], limit: float | None) -> float:
    if limit is not None and not (limit > 0 and np.isfinite(limit)):
        raise ValueError(f"limit must be a positive, finite number, not {limit}")
    return limit or strongest(pieces) or 1.0
