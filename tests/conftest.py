"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os

# Set before anything imports jax, which reads them once: tests run on CPU unless told otherwise,
# and on several virtual devices, so that sharding can be tested on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of a test's time is LLVM's, on programs that run once. The program itself, and so what is
# counted in it, stays as optimised as a user's.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "jaxlrp",
    deadline=None,  # the first example of a shape compiles
    derandomize="CI" in os.environ,
    max_examples=30,
    # Examples share a fixture. Only `rng` minds: in a property test, draw a seed instead.
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("jaxlrp")


@pytest.fixture
def optimised() -> Iterator[None]:
    """LLVM's optimisations, as a user has them: multiplications and additions are joined, and so rounded otherwise."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in double precision; arrays made outside of the test keep theirs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def no_compiling() -> Callable[[], AbstractContextManager[None]]:
    """Return a context that fails if jax traces, lowers or compiles anything within.

    It listens to what jax reports. The size of a function's cache would not do: all functions of a process
    share room for 8192 programs, and once that is full, a new function's cache stays empty.
    """

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        events: list[str] = []

        def listen(event: str, seconds: float, **details: Any) -> None:
            if event.startswith("/jax/core/compile/"):
                events.append(f"{event} {details.get('fun_name')}")

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert not events, "\n".join(events)

    return context


@pytest.fixture
def key() -> jax.Array:
    """Return the same random key in every test."""
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a NumPy generator in the same state in every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the folder of reference values; see the README in it."""
    return Path(__file__).parent / "goldens"
