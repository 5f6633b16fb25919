"""A web page of explained texts in one file: no script, nothing loaded from elsewhere, readable in light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from .text import Piece, html_words, printable


@dataclass(frozen=True)
class Table:
    """A table of a page; columns in `right` are aligned to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """One explained text.

    Attributes:
        title: the heading.
        note: a line below it.
        pieces: the words, from `join_words`.
        bars: `(name, share, whether it is the explained one)` each; shares between 0 and 1.
        tables: set side by side where there is room.
        rest: a remark behind the text, such as how much of it is not shown.
    """

    title: str
    note: str
    pieces: Sequence[Piece]
    bars: Sequence[tuple[str, float, bool]] = ()
    tables: Sequence[Table] = field(default_factory=tuple)
    rest: str = ""


def html_page(title: str, sections: Sequence[Section], *, caption: str = "") -> str:
    """A whole page, to be written as UTF-8.

    Full colour is the strongest word of each text. Whatever comes from outside is escaped.

    Args:
        title: the heading, and the title of the window.
        sections: the texts.
        caption: a remark at the end, such as what was explained and how.

    Example:
        >>> page = html_page("Two words", [Section("One", "", [Piece("good", 1.0), Piece(" & "), Piece("bad", -0.5)])])
        >>> page.startswith("<!doctype html>"), "http" in page, page.count('data-r="')
        (True, False, 2)
    """
    body = "\n".join(map(_section, sections))
    legend = _LEGEND if sections else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_escape(title)}</h1>\n{legend}\n{body}\n"
        f"<footer>{_escape(caption)}</footer>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    rest = f' <em class="rest">{_escape(section.rest)}</em>' if section.rest else ""
    bars = "".join(map(_bar, section.bars))
    return (
        f"<section>\n<h2>{_escape(section.title)}</h2>\n<p>{_escape(section.note)}</p>\n"
        + (f'<table class="bars">{bars}</table>\n' if bars else "")
        + f'<p class="text">{html_words(section.pieces)}{rest}</p>\n'
        + f'<div class="tables">{"".join(map(_table, section.tables))}</div>\n</section>'
    )


def _bar(bar: tuple[str, float, bool]) -> str:
    name, share, explained = bar
    mark = ' class="explained"' if explained else ""
    return (
        f"<tr{mark}><th>{_escape(name)}</th><td>{share:.3f}</td>"
        f'<td class="track"><i style="width:{100 * share:.1f}%"></i></td></tr>'
    )


def _table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        flush = dict.fromkeys(table.right, ' class="number"')
        return "".join(f"<{tag}{flush.get(i, '')}>{_escape(cell)}</{tag}>" for i, cell in enumerate(row))

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    title = f"<caption>{_escape(table.title)}</caption>" if table.title else ""
    return f"<table>{title}<tr>{cells(table.head, 'th')}</tr>{rows}</table>"


def _escape(text: str) -> str:
    return html.escape(printable(text))


_LEGEND = (
    '<p class="legend"><span class="against" style="--r:1">against</span><span class="against" style="--r:.5">&nbsp;'
    '</span><span>0</span><span class="for" style="--r:.5">&nbsp;</span><span class="for" style="--r:1">for</span> '
    "the explained class; hover over a word to see its number</p>"
)

# The ground of a word is mixed with the page's, so that letters in the page's own colour stay readable on it.
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --faint: #666; --line: #ddd; --red: 226, 60, 48;
  --blue: 56, 110, 230; --most: .62; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e8e8e8; --faint: #9a9a9a; --line: #383c44;
  --red: 226, 60, 56; --blue: 64, 118, 255; --most: .72; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 56rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-bottom: 0; }
section { border-top: 1px solid var(--line); margin-top: 2rem; }
section > p { margin: .3rem 0; }
.text { white-space: pre-line; line-height: 1.9; overflow-wrap: break-word; margin: 1rem 0; }
.text span, .legend span { border-radius: .2em; position: relative; }
.text span { padding: .1em .1em; margin: 0 -.1em; }
.for { background: rgba(var(--red), calc(var(--r) * var(--most))); }
.against { background: rgba(var(--blue), calc(var(--r) * var(--most))); }
.text .special { font: .75em monospace; outline: 1px dotted var(--faint); padding: .1em .3em; margin: 0; }
.text span:hover { outline: 1px solid var(--ink); }
.text span:hover::after { content: attr(data-r); position: absolute; left: 0; bottom: 100%; z-index: 1;
  background: var(--ink); color: var(--page); font: .8rem/1.4 monospace; padding: 0 .4em; border-radius: .2em;
  white-space: nowrap; pointer-events: none; }
.rest, .legend, footer { color: var(--faint); font-size: .85rem; }
.legend span { color: var(--ink); padding: .1em .6em; }
footer { border-top: 1px solid var(--line); margin-top: 2rem; padding: .5rem 0; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
table { border-collapse: collapse; font-size: .85rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .2rem; }
th, td { text-align: left; padding: .1rem .8rem .1rem 0; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--faint); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.bars { margin-top: .6rem; } .bars th, .bars td { border: 0; padding: 0 .8rem 0 0; }
.bars td { font-variant-numeric: tabular-nums; }
.track { width: 12rem; } .track i { display: block; height: .6rem; background: var(--faint); min-width: 1px; }
.explained th { color: var(--ink); font-weight: bold; } .explained i { background: rgb(var(--red)); }
"""
