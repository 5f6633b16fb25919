"""Run the commands that a README shows, so that what it promises is what is tested.

A fenced block is run if this comment stands before it, with nothing but blank lines between:

    <!-- ci: run -->

Languages: `bash` and `sh` (stops at the first command that fails), `console` (only the lines after
a `$ ` prompt and their `> ` continuations) and `python`. The blocks run in order in one copy of the
project, as a reader would type them: a block may use a file that an earlier one wrote, and the work
tree stays clean.

    python .ci/readme_commands.py README.md          # run them
    python .ci/readme_commands.py README.md --list   # only show them
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MARKER = re.compile(r"^<!--\s*ci:\s*run\s*-->$")
FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w-]*)")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache"
)


class Block(NamedTuple):
    line: int
    language: str
    text: str

    @property
    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


def blocks(readme: str) -> Iterator[Block]:
    """Find the marked blocks, and fail at a marker that marks nothing that can be run."""
    lines = enumerate(readme.splitlines(), start=1)
    for marked, line in lines:
        if not MARKER.match(line.strip()):
            continue
        number, line = next(((n, s) for n, s in lines if s.strip()), (marked, ""))
        if not (start := FENCE.match(line)):
            raise SystemExit(f"line {marked}: no fenced block follows this marker")
        fence, language = start["fence"], start["language"]
        body = []
        for _, line in lines:
            if line.strip() == fence:
                break
            body.append(line)
        else:
            raise SystemExit(f"line {number}: this block is not closed")
        if language == "console":
            body = [line[2:] for line in body if line.startswith(("$ ", "> "))]
        elif language not in ("bash", "sh", "python"):
            raise SystemExit(f"line {number}: cannot run a block in {language or 'no language'}")
        yield Block(number, language, "\n".join(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readme", type=Path)
    parser.add_argument("--list", action="store_true", help="show the blocks, run nothing")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each block")
    options = parser.parse_args()

    found = list(blocks(options.readme.read_text(encoding="utf-8")))
    if not found:
        raise SystemExit(f"{options.readme.name} marks no block to run")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        if not options.list:
            shutil.copytree(options.readme.resolve().parent, copy, ignore=NOT_COPIED)
        for block in found:
            print(f"--- line {block.line} ({block.language})\n{block.text}", flush=True)
            if options.list:
                continue
            start = time.monotonic()
            try:
                subprocess.run(
                    block.command,
                    cwd=copy,
                    check=True,
                    stdin=subprocess.DEVNULL,
                    timeout=options.timeout,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                reason = getattr(error, "returncode", None)
                said = f"exit status {reason}" if reason is not None else "took too long"
                raise SystemExit(f"line {block.line}: this block failed: {said}") from None
            print(f"--- ok, {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
