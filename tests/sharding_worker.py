"""One of two processes that share eight devices, for `test_sharding.test_two_processes`.

    python -m tests.sharding_worker ADDRESS PLACE NAME ...

Prints a line of JSON for every case. A module of its own, since processes must meet before anything asks for devices.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def explain(name: str) -> dict[str, Any]:
    """Relevance of a batch that lies on the devices of both, compared with what this process finds alone."""
    from tests.test_sharding import CASES, LABELS, alone, explainer, grid

    params, x, want = alone(name)
    mesh = grid(8, 1)

    def put(array: Any, spec: P) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec), lambda index: whole[index])

    params = jax.tree.map(lambda a: put(a, P()), params)
    got = jax.jit(explainer(CASES[name]))(params, put(x, P("data")), put(LABELS, P("data")))
    shards = got.addressable_shards
    return {
        "name": name,
        "samples": [s.index[0].start for s in shards],
        "error": max(np.abs(s.data - want[s.index]).max().item() for s in shards),
        "largest": np.abs(want).max().item(),
        "total": float(jax.jit(lambda r: abs(r).sum())(got)),  # over both processes
        "total alone": np.abs(want).sum().item(),
    }


def main() -> None:
    address, place, *names = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(place), initialization_timeout=60)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    for name in names:
        print(json.dumps(explain(name)), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
