"""Read a PyTorch state dict with numpy alone, running nothing that the file asks for.

A ``.pth`` file is a pickle that describes tensors plus the raw bytes of their storages. Two
containers are in use: the zip archive that ``torch.save`` has written since torch 1.6, and the
older stream (magic number, four pickles, then the storages one after another).

A pickle is a small program, so it passes three gates before a single number is read:

1. ``_screen`` walks over the opcodes without running them and lets through only the few that a
   state dict is made of;
2. ``_TensorUnpickler`` resolves exactly the names in ``_GLOBALS``, each to an inert stand-in of
   this module, so that no opcode has anything with an effect to call or to change;
3. every size, stride and offset is checked against the storage, and every storage against the
   bytes that are really there, before memory is set aside.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeGuard, cast

import ml_dtypes
import numpy as np

_DAMAGED = "The file is probably damaged or cut short: download or install it again"
_RESAVE = "If you trust its origin, load it in PyTorch and keep the tensors alone: torch.save(model.state_dict(), path)"

_MAX_NDIM = 32
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


class WeightFileError(ValueError):
    """A weight file is damaged, hostile or not what it should be; the message says which."""


class _Problem(Exception):
    """What is wrong and what to do about it; ``read_state_dict`` adds the file's name."""

    def __init__(self, what: str, advice: str = _DAMAGED) -> None:
        super().__init__(f"{what}. {advice}.")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a PyTorch state dict, by name, in the file's order.

    Args:
        path: A ``.pth`` or ``.pt`` file written by ``torch.save(model.state_dict(), path)``, in
            the zip container or in the older stream container.

    Returns:
        One array per tensor with the tensor's own shape and dtype (``bfloat16`` comes from
        ``ml_dtypes``). Tensors that share a storage in the file share memory here too.

    Raises:
        WeightFileError: The file cannot be read, is damaged, asks for anything beyond rebuilding
            tensors, lies about a size, or holds something other than a flat state dict.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(_STREAM_MAGIC))
            file.seek(0)
            if start.startswith(_ZIP_MAGIC):
                return _read_zip(file, path.stat().st_size)
            if start == _STREAM_MAGIC:
                return _read_stream(file.read())
        raise _Problem("this is not a file that torch.save wrote", "Check the path, or the download")
    except _Problem as problem:
        raise WeightFileError(f"{path}: {problem}") from None
    except OSError as error:
        reason = error.strerror or error
        raise WeightFileError(f"{path}: cannot be read ({reason}). Check the path.") from error
    except Exception as error:
        # Malformed bytes surface as whatever the layer below trips over (BadZipFile, IndexError,
        # OverflowError, UnicodeDecodeError, ...); for the reader they all mean the same.
        reason = f"{type(error).__name__}: {_show(str(error))}"
        raise WeightFileError(f"{path}: cannot be decoded ({reason}). {_DAMAGED}.") from error


# --- gate 1: the opcodes -------------------------------------------------------------------------

# fmt: off
_OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
})
# fmt: on


def _screen(stream: io.BytesIO) -> bytes:
    """Return the bytes of the next pickle of ``stream`` and move past it, running nothing.

    The opcodes are followed just far enough to know which stack slots hold text. That is needed
    because hashing a dictionary key made of deeply nested tuples crashes the interpreter. A memo
    index out of order is turned away because it alone would make the unpickler set aside memory
    for every index below it.

    Raises:
        _Problem: An opcode, dictionary key or memo index that a state dict has no use for.
    """
    start = stream.tell()
    stack: list[bool] = []  # one slot per object above the last mark: is it text?
    below: list[list[bool]] = []  # what lies under each mark
    memo: list[bool] = []
    for opcode, argument, _ in pickletools.genops(stream):
        name, takes = opcode.name, opcode.stack_before
        if name not in _OPCODES:
            raise _Problem(f"its pickle uses {name}, which a state dict has no use for", _RESAVE)
        if name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[cast(int, argument)])
        elif name in ("BINPUT", "LONG_BINPUT"):
            if argument != len(memo):
                raise _Problem(f"its pickle puts entry {argument} into the memo out of order")
            memo.append(stack[-1])
        else:
            taken: list[bool] = []
            if pickletools.markobject in takes:
                taken, stack = stack, below.pop()
                takes = takes[: takes.index(pickletools.markobject)]
            if len(takes) > len(stack):
                raise _Problem("its pickle takes more from its stack than it has put there")
            taken = stack[len(stack) - len(takes) :] + taken
            del stack[len(stack) - len(takes) :]
            if name in ("SETITEM", "SETITEMS") and not all(taken[1::2]):
                raise _Problem("its pickle has a dictionary key that is not text", _RESAVE)
            stack += [kind is pickletools.pyunicode for kind in opcode.stack_after]
    return stream.getvalue()[start : stream.tell()]


# --- gate 2: the names ---------------------------------------------------------------------------


class _Inert:
    """Base of everything a pickle can get hold of.

    The BUILD opcode writes attributes into an object unless the object brings its own
    ``__setstate__``; this one drops them. (State dicts use BUILD for ``_metadata``, module
    versions that mean nothing here.)
    """

    def __setstate__(self, state: object) -> None:
        pass


class _Dict(dict[Any, Any], _Inert):
    """Stands in for ``collections.OrderedDict``; a plain dictionary keeps its order too."""


class _StorageType(_Inert):
    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)


@dataclass(frozen=True, eq=False)
class _Storage(_Inert):
    """A flat run of ``size`` numbers of one type, found in the file under ``key``."""

    key: str
    dtype: np.dtype[Any]
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Tensor(_Inert):
    """A strided window on a storage; offset and strides count elements, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Function(_Inert):
    """One of this module's functions, wrapped because BUILD could write to a bare function."""

    def __init__(self, function: Callable[..., _Inert]) -> None:
        self._function = function

    def __call__(self, *args: object) -> _Inert:
        return self._function(*args)


def _empty_dict(*items: object) -> _Dict:
    if items:
        raise _Problem("its pickle fills an OrderedDict in an unusual way", _RESAVE)
    return _Dict()


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> _Tensor:
    """Check the geometry of a tensor, without touching any data yet (gate 3, first half)."""
    if not isinstance(storage, _Storage):
        raise _Problem("a tensor refers to something that is no storage")
    if not (_is_count(offset) and _is_counts(shape) and _is_counts(strides)):
        raise _Problem("a tensor's offset, shape or strides are not whole numbers from 0 up")
    tensor = _Tensor(storage, offset, shape, strides)
    if len(shape) != len(strides) or len(shape) > _MAX_NDIM:
        raise _Problem(f"a tensor claims {len(shape)} dimensions and {len(strides)} strides")
    # The first bound keeps an expanded tensor (stride 0) from growing when someone copies it.
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (math.prod(shape) > storage.size or last >= storage.size):
        raise _Problem(
            f"a tensor of shape {_show(shape)}, strides {_show(strides)} and offset "
            f"{_show(offset)} does not fit into its storage of {storage.size} numbers"
        )
    return tensor


def _rebuild_parameter(data: object, requires_grad: object = True, hooks: object = None) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise _Problem("a parameter wraps something that is no tensor")
    return data


_GLOBALS: Mapping[tuple[str, str], _Inert] = MappingProxyType(
    {
        ("collections", "OrderedDict"): _Function(_empty_dict),
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
        ("torch", "DoubleStorage"): _StorageType(np.float64),
        ("torch", "FloatStorage"): _StorageType(np.float32),
        ("torch", "HalfStorage"): _StorageType(np.float16),
        ("torch", "BFloat16Storage"): _StorageType(ml_dtypes.bfloat16),
        ("torch", "LongStorage"): _StorageType(np.int64),
        ("torch", "IntStorage"): _StorageType(np.int32),
        ("torch", "ShortStorage"): _StorageType(np.int16),
        ("torch", "CharStorage"): _StorageType(np.int8),
        ("torch", "ByteStorage"): _StorageType(np.uint8),
        ("torch", "BoolStorage"): _StorageType(np.bool_),
        ("torch", "ComplexFloatStorage"): _StorageType(np.complex64),
        ("torch", "ComplexDoubleStorage"): _StorageType(np.complex128),
    }
)


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in ``_GLOBALS`` and no others."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> _Inert:
        """Resolve a name without importing anything."""
        found = _GLOBALS.get((module, name))
        if found is not None:
            return found
        full = _show(f"{module}.{name}")
        if module == "torch" and name.endswith("Storage"):
            raise _Problem(f"it holds numbers of an unsupported type, {full}", _RESAVE)
        raise _Problem(
            f"its pickle asks for {full}, which rebuilding tensors does not need; nothing was run",
            _RESAVE,
        )

    def persistent_load(self, pid: object) -> _Storage:
        """Note down which storage a tensor uses; its bytes are read after the pickle is done."""
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), size, *view):
                # Streams add a sixth item: None, unless the storage is a view of another one.
                if _is_count(size) and view in ([], [None]):
                    return self._note(_Storage(key, dtype, size))
        raise _Problem("it refers to something that is no tensor storage", _RESAVE)

    def _note(self, storage: _Storage) -> _Storage:
        known = self.storages.setdefault(storage.key, storage)
        if (known.dtype, known.size) != (storage.dtype, storage.size):
            raise _Problem(f"storage {_show(storage.key)} is described in two different ways")
        return known


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """Return the next object of ``stream`` and the storages it refers to, by key."""
    unpickler = _TensorUnpickler(_screen(stream))
    return unpickler.load(), unpickler.storages


# --- the two containers --------------------------------------------------------------------------

_ZIP_MAGIC = b"PK\x03\x04"
# The stream starts with its magic number, pickled: protocol 2, a long of ten bytes, stop.
_STREAM_MAGIC = b"\x80\x02\x8a\n" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
_STREAM_VERSION = 1001


def _read_zip(file: IO[bytes], file_size: int) -> dict[str, np.ndarray]:
    """Read ``<root>/data.pkl`` and the ``<root>/data/<key>`` entries it refers to."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch.save does not compress. Insisting on it, and on entries that fit side by side
        # into the file, leaves a zip bomb nothing to expand.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Problem("its zip entries are compressed, which torch.save never does", _RESAVE)
        if sum(entry.file_size for entry in entries) > file_size:
            raise _Problem("its zip entries claim more bytes than the file has")
        sizes = {entry.filename: entry.file_size for entry in entries}
        roots = [name.removesuffix("data.pkl") for name in sizes if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(sizes) != len(entries):
            raise _Problem("it is a zip archive, but not one that torch.save wrote", _RESAVE)
        root = roots[0]
        if f"{root}byteorder" in sizes and archive.read(f"{root}byteorder") != b"little":
            raise _Problem("its numbers are not in little-endian order", _RESAVE)
        state, storages = _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))

        flat: dict[str, np.ndarray] = {}
        for key, storage in storages.items():
            name = f"{root}data/{key}"
            if name not in sizes:
                raise _Problem(f"the entry {_show(name)} is missing")
            if sizes[name] != storage.nbytes:
                raise _Problem(
                    f"the entry {_show(name)} has {sizes[name]} bytes where its {storage.size} "
                    f"numbers of type {storage.dtype} take {storage.nbytes}"
                )
            flat[key] = _numbers(archive.read(name), 0, storage)
    return _tensors(state, flat)


def _read_stream(content: bytes) -> dict[str, np.ndarray]:
    """Read magic number, version, system, state dict and keys, then each key's size and bytes."""
    stream = io.BytesIO(content)
    stream.seek(len(_STREAM_MAGIC))
    version, _ = _unpickle(stream)
    system, _ = _unpickle(stream)
    if version != _STREAM_VERSION:
        raise _Problem(f"its stream does not have version {_STREAM_VERSION}", _RESAVE)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise _Problem("its numbers are not in little-endian order", _RESAVE)
    state, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise _Problem("its list of storages is not a list of names")
    if len(keys) != len(storages) or set(keys) != set(storages):
        raise _Problem("its list of storages does not fit its tensors")

    flat: dict[str, np.ndarray] = {}
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        (size,) = struct.unpack_from("<q", content, position)
        position += 8
        if size != storage.size:
            raise _Problem(f"storage {_show(key)} has {size} numbers instead of {storage.size}")
        if storage.nbytes > len(content) - position:
            raise _Problem(f"it ends inside storage {_show(key)}")
        flat[key] = _numbers(content, position, storage)
        position += storage.nbytes
    if position != len(content):
        raise _Problem(f"{len(content) - position} bytes follow its last storage")
    return _tensors(state, flat)


def _numbers(content: bytes, position: int, storage: _Storage) -> np.ndarray:
    """Copy one storage out of ``content``, so that the array is aligned and can be written to."""
    little = storage.dtype.newbyteorder("<")
    window = np.frombuffer(content, little, count=storage.size, offset=position)
    return window.astype(storage.dtype)


def _tensors(state: object, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Lay each tensor of the state dict over its storage."""
    if not isinstance(state, dict):
        raise _Problem(f"it holds an object {_kind(state)}, not a state dict", _RESAVE)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, _Tensor):
            raise _Problem(f"its entry {_show(name)} is {_kind(tensor)}, not a tensor", _RESAVE)
        numbers = flat[tensor.storage.key]
        if 0 in tensor.shape:
            tensors[name] = np.empty(tensor.shape, numbers.dtype)
            continue
        # A dimension of length 1 is never stepped along, and its stride may be anything.
        steps = zip(tensor.shape, tensor.strides, strict=True)
        strides = tuple(numbers.itemsize * stride if n > 1 else 0 for n, stride in steps)
        tensors[name] = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
    return tensors


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _is_counts(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _kind(value: object) -> str:
    return f"of type {type(value).__name__.lstrip('_').lower()}"


def _show(value: str | int | tuple[int, ...]) -> str:
    """A ``repr`` short enough for a message, whatever a hostile file puts there.

    Not for other objects: the ``repr`` of a dictionary that holds another one twice, sixty deep,
    never ends.
    """
    return _SHORT.repr(value)
