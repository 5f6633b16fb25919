"""This side of the process that a peer runs in, see peers_torch.py for the other."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

# as many as XLA takes
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PeerError(RuntimeError):
    """A peer cannot be run; the message says why."""


class Peer:
    """One method of one library on one network, in a process of its own."""

    def __init__(
        self,
        python: str,
        twin: str,
        sizes: dict[str, Any],
        folder: Path,
        name: str,
        method: str = "",
        timed: bool = False,
        double: bool = False,
    ):
        script = Path(__file__).with_name("peers_torch.py")
        options = {"network": twin, "weights": folder / "weights.npz", "sizes": json.dumps(sizes)}
        options |= {"peer": name, "method": method, "threads": THREADS}
        command = [python, str(script), *(f"--{key}={value}" for key, value in options.items())]
        command += ["--timed"] * timed + ["--double"] * double
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.result = folder / f"{name}_{method}.npy"
        about = self._answer()
        self.settings: list[str] = about["settings"]  # those that may be the fastest
        self.versions: dict[str, str] = about["versions"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # its input ends, and so does it

    def seconds(self, setting: str) -> float:
        """Run once."""
        return self._ask(do="run", setting=setting)["seconds"]

    def array(self) -> np.ndarray:
        """The relevance, that of images with channels last."""
        found = np.load(self._ask(do="save", path=str(self.result))["saved"], allow_pickle=False)
        return found.transpose(0, 2, 3, 1) if found.ndim == 4 else found

    def _ask(self, **command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": f"it ended with status {self.process.wait()}"}
        if "error" in found:
            self.process.communicate()
            raise PeerError(found["error"])
        return found
