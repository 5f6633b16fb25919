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

from collections.abc import Iterator
from pathlib import Path

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
def x64() -> Iterator[None]:
    """Run the test in double precision; arrays made outside of the test keep theirs."""
    with jax.enable_x64(True):
        yield


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
