"""Temporary memory that is kept between calls, see "Fresh memory on CPUs" in docs/devices.md.

Without, a tenth to a quarter of a large network's time goes to pages that the system hands out afresh and fills with
zeros at every call, for relevance as for gradients. Where that is not what a benchmark is about, it keeps memory.
"""

from __future__ import annotations

import os
import sys

KEEPING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def environment(keeping: bool) -> dict[str, str]:
    """The environment of a process that keeps memory, or of one that gives it back."""
    others = {name: value for name, value in os.environ.items() if name not in KEEPING}
    return others | KEEPING if keeping else others


def keep_memory() -> None:
    """Start this script again with these settings, which glibc reads before anything else runs.

    Not where any of them is set already: somebody chose it, or this is the second start. For ``main`` of a script.
    """
    if sys.platform == "linux" and not KEEPING.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(keeping=True))
