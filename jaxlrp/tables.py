"""Aligned text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns padded to their widest entry, two spaces apart, with a rule under the head.

    Args:
        head: column titles.
        rows: the cells.
        right: indices of columns that are aligned to the right (numbers).
    """
    lines = [list(map(str, row)) for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *lines]) for i in range(len(head))]
    flush = set(right)

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, lines)])
