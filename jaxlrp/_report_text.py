"""What ``jaxlrp explain-text`` prints and writes."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ._explain import CommandError
from .accounts import Ledger
from .models.minilm import Tokens
from .models.news import NewsClassifier
from .plot.page import Section, Table, html_page
from .plot.text import Piece, colour_words, join_words, mark_words, printable, rank_words
from .tables import table

PAGE = "explanation.html"
_LISTED = 10  # words for and against


@dataclass
class Text:
    """One text on its way through the command."""

    name: str
    tokens: Tokens
    target: int = 0
    rival: int | None = None
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros(0))
    relevance: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the word embeddings, [tokens, hidden]
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the position embeddings, [tokens]
    types: float = 0.0  # of the type embeddings
    ledger: Ledger | None = None

    @property
    def scores(self) -> np.ndarray:
        """Relevance of every token, ``[tokens]``."""
        return self.relevance.sum(-1, dtype=np.float64)

    @property
    def pieces(self) -> list[Piece]:
        """The words."""
        t = self.tokens
        return join_words(t.text, t.tokens, t.spans, t.words, self.scores)


def write(out: Path, texts: Sequence[Text], model: NewsClassifier, arguments: argparse.Namespace) -> None:
    """Write a folder for each text, and the page when all of them are there."""
    try:
        for text in texts:
            folder = out / text.name
            folder.mkdir(exist_ok=True)
            buffer = io.BytesIO()
            np.save(buffer, text.relevance.astype(np.float32), allow_pickle=False)
            _save(folder / "relevance.npy", buffer.getvalue())
            document = json.dumps(_document(text, model, arguments), ensure_ascii=False, indent=1)
            _save(folder / "tokens.json", document.encode())
        page = html_page("Why this class?", [_section(t, model) for t in texts], caption=_caption(model, arguments))
        _save(out / PAGE, page.encode())
    except OSError as error:
        raise CommandError(f"cannot write to {error.filename or out}: {error.strerror or error}") from error


def _save(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that no half of it is ever seen."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _caption(model: NewsClassifier, arguments: argparse.Namespace) -> str:
    return (
        f"Layer-wise relevance propagation, {arguments.composite}. Full colour is the strongest word of each text. "
        f"The classifier, MiniLM with a linear head, is right on {100 * model.accuracy:.1f} % of "
        f"{len(model.news.held_out)} held-out news articles."
    )


def _document(text: Text, model: NewsClassifier, arguments: argparse.Namespace) -> dict[str, Any]:
    t, ledger = text.tokens, _ledger(text)
    columns = zip(t.tokens, t.ids.tolist(), t.spans, t.words, text.scores, text.positions, strict=True)
    return {
        "name": text.name,
        "composite": arguments.composite,
        "target": model.news.classes[text.target],
        "contrast": "all others"
        if arguments.contrastive
        else None
        if text.rival is None
        else model.news.classes[text.rival],
        "probabilities": {c: float(p) for c, p in zip(model.news.classes, text.probabilities, strict=True)},
        "relevance": {
            "output": float(ledger.start),
            "words": float(text.scores.sum()),
            "positions": float(text.positions.sum()),
            "types": text.types,
        },
        "tokens_cut": t.cut,
        "tokens": [
            {"token": token, "id": i, "start": start, "end": end, "word": word, "relevance": r, "position": float(p)}
            for token, i, (start, end), word, r, p in columns
        ],
        "words": [
            {"text": p.text, "relevance": p.relevance, "special": p.special}
            for p in text.pieces
            if p.relevance is not None
        ],
    }


def _ledger(text: Text) -> Ledger:
    assert text.ledger is not None
    return text.ledger


def _section(text: Text, model: NewsClassifier) -> Section:
    words, blocks = _word_rows(text), _block_rows(text)
    bars = [
        (c, float(p), k == text.target)
        for k, (c, p) in enumerate(zip(model.news.classes, text.probabilities, strict=True))
    ]
    return Section(
        title=text.name,
        note=_headline(text, model),
        pieces=_flowing(text.pieces),
        bars=sorted(bars, key=lambda bar: -bar[1]),
        tables=[
            Table("words that speak most", _WORD_HEAD, words, _WORD_RIGHT),
            Table("relevance that each layer kept", _BLOCK_HEAD, blocks, _BLOCK_RIGHT),
        ],
        rest=_rest(text),
    )


def _rest(text: Text) -> str:
    return f"... {text.tokens.cut} more tokens were not read" if text.tokens.cut else ""


def _headline(text: Text, model: NewsClassifier) -> str:
    best = int(np.argmax(text.probabilities))
    explained = model.news.classes[text.target]
    if text.rival is not None:
        explained += f" and not {model.news.classes[text.rival]}"
    return f"predicted {model.news.classes[best]} ({text.probabilities[best]:.2f}), explained {explained}"


def _flowing(pieces: Sequence[Piece]) -> list[Piece]:
    """Without the runs of empty lines between paragraphs, and with a space around special tokens."""
    found = []
    for piece in pieces:
        space = [Piece(" ")] if piece.special else []
        flat = Piece(re.sub(r"\s*\n\s*", "\n", piece.text)) if piece.relevance is None else piece
        found += [*space, flat, *space]
    return found[1:-1] if found and pieces[0].special and pieces[-1].special else found


_WORD_HEAD, _WORD_RIGHT = ("for", "relevance", "times", "against", "relevance", "times"), (1, 2, 4, 5)
_BLOCK_HEAD, _BLOCK_RIGHT = ("block", "relevance in", "out", "kept", "lost to"), (1, 2, 3)


def _word_rows(text: Text) -> list[list[str]]:
    sides = rank_words(text.pieces, _LISTED)
    rows = [["", "", "", "", "", ""] for _ in range(max(map(len, sides)))]
    for column, side in enumerate(sides):
        for row, (word, relevance, times) in zip(rows, side, strict=False):
            row[3 * column : 3 * column + 3] = [printable(word), f"{relevance:+.3f}", str(times)]
    return rows


def _block_rows(text: Text) -> list[list[str]]:
    """Of the head, every layer of BERT and the embeddings: relevance in and out, and what it lost the rest to."""
    ledger = _ledger(text)
    losses = {**ledger.losses, "unnamed": ledger.unnamed}
    arrived = start = float(ledger.start)
    rows = []
    for name, members in _blocks(ledger.layers):
        lost = {n: float(np.sum(np.asarray(v)[members])) for n, v in losses.items()}
        handed = arrived - sum(lost.values())
        why = ", ".join(f"{n} {v:+.3f}" for n, v in lost.items() if abs(v) > 1e-3 * abs(start))
        rows.append([name, f"{arrived:.3f}", f"{handed:.3f}", _percent(handed, arrived), why])
        arrived = handed
    rows.append(["output to input", f"{start:.3f}", f"{arrived:.3f}", _percent(arrived, start), ""])
    words, positions = float(text.scores.sum()), float(text.positions.sum())
    for name, share in (("of which words", words), ("positions", positions), ("text type", text.types)):
        rows.append([f"  {name}", "", f"{share:.3f}", _percent(share, arrived), ""])
    return rows


def _blocks(layers: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """From the output to the input: the rows of the ledger that belong to each block."""
    numbers = [int(found[1]) if (found := re.search(r"layers_(\d+)/", name)) else None for name in layers]
    inside = [i for i, n in enumerate(numbers) if n is not None]
    yield "pooling and head", list(range(inside[-1] + 1, len(layers)))
    for number in sorted({n for n in numbers if n is not None}, reverse=True):
        yield f"layer {number}", [i for i, n in enumerate(numbers) if n == number]
    yield "embeddings", list(range(inside[0]))


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def report(texts: Sequence[Text], model: NewsClassifier, whole_ledger: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    for text in texts:
        pieces = _flowing(text.pieces)
        order = np.argsort(text.probabilities)[::-1]
        _say(f"{text.name}: {_headline(text, model)}")
        _say("  ".join(f"{model.news.classes[k]} {text.probabilities[k]:.3f}" for k in order) + "\n")
        if coloured:
            with console.capture() as captured:
                console.print(colour_words(pieces))
            _say(captured.get().rstrip("\n"))
        else:
            _say(mark_words(pieces))
        _say(f"{_rest(text)}\n" if _rest(text) else "")
        _say(table(_WORD_HEAD, _word_rows(text), right=_WORD_RIGHT) + "\n")
        if whole_ledger:
            _say(f"{_ledger(text)}\n")
        _say(table(_BLOCK_HEAD, _block_rows(text), right=_BLOCK_RIGHT) + "\n\n")


def _say(line: str) -> None:
    """Print, with question marks for what the terminal's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, errors="replace").decode(encoding))
