"""A TorchScript file as plain data: `encode` writes one, `decode` reads one without running anything in it.

The file is a zip archive: `code/` holds TorchScript source, `data.pkl` a pickled object whose tensors lie in `data/`
(torch/csrc/jit/serialization: export_module.cpp, import.cpp, pickler.h). We write all entries stored, in one order,
with one date and without debug records, so that the same model gives the same bytes. We read only what we write: stored
entries, a dozen pickle opcodes, a handful of global names; `torch.jit.load` would execute the file's code.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kquant.core.errors import ArtifactError

ROOT = "kquant"  # the archive's folder
MODULE, CLASS = "__torch__.kquant", "Artifact"  # the qualified name of the root object's class
CODE = "code/__torch__/kquant.py"
DATE = (1980, 1, 1, 0, 0, 0)
ALIGNMENT = 64  # bytes; tensors then load in place
LARGEST_CODE = 2**26  # bytes of source, and of the pickle
STORAGES = {
    "uint8": "ByteStorage", "int8": "CharStorage", "int16": "ShortStorage", "int32": "IntStorage",
    "int64": "LongStorage", "float32": "FloatStorage", "float64": "DoubleStorage", "bool": "BoolStorage",
}  # fmt: skip
OPCODES = frozenset(
    "PROTO GLOBAL EMPTY_TUPLE NEWOBJ EMPTY_DICT MARK SETITEMS BINUNICODE TUPLE TUPLE2 REDUCE BINPERSID BININT BININT1"
    " BININT2 LONG1 NEWFALSE NEWTRUE BUILD STOP".split()
)
DAMAGED = "The file is truncated or damaged: write or download it again"
FOREIGN = "Only files of kquant_torch.export_torchscript are read here"
READ_ERRORS = (
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, LookupError, ValueError, TypeError, AttributeError,
    ArithmeticError, MemoryError, RecursionError, EOFError, OSError, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """What is in a file.

    Args:
        code: the TorchScript source of the root class and of the functions that it calls.
        tensors: the root object's arrays by name.
        extra: further text records by name; `torch.jit.load` hands them out through `_extra_files`.
    """

    code: str
    tensors: Mapping[str, np.ndarray]
    extra: Mapping[str, str] = field(default_factory=dict)


# -- writing ----------------------------------------------------------------------------------------------------------


def encode(archive: Archive) -> bytes:
    """The bytes of a file."""
    records = {f"data/{i}": _raw(a) for i, a in enumerate(archive.tensors.values())}
    records["data.pkl"] = _pickled(archive.tensors)
    records[CODE] = archive.code.encode()
    records["constants.pkl"] = b"\x80\x02)."  # an empty tuple
    records |= {f"extra/{name}": text.encode() for name, text in archive.extra.items()}
    records |= {"version": b"3\n", "byteorder": b"little"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in records.items():
            info = zipfile.ZipInfo(f"{ROOT}/{name}", DATE)
            start = buffer.tell() + 30 + len(info.filename)  # of the data, behind the entry's header
            info.extra = _padding(-start % ALIGNMENT)
            file.writestr(info, data)
    return buffer.getvalue()


def _padding(size: int) -> bytes:
    """A zip header's extra field of `size` bytes, or of as many more as keep the alignment where 4 are too many."""
    if size == 0:
        return b""
    size += ALIGNMENT if size < 4 else 0
    return struct.pack("<HH", 0x4246, size - 4) + b"\0" * (size - 4)  # the id that torch's own writer gives its padding


def _raw(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The root object with the state `(tensors, training=False)`, which its `__setstate__` takes."""
    parts = [b"\x80\x02", _global(MODULE, CLASS), b")\x81", b"}("]
    for key, (name, array) in enumerate(tensors.items()):
        strides = [s // array.itemsize for s in np.empty(array.shape, array.dtype).strides]
        parts += [
            _text(name), _global("torch._utils", "_rebuild_tensor_v2"), b"(",
            b"(", _text("storage"), _global("torch", STORAGES[str(array.dtype)]), _text(str(key)), _text("cpu"),
            _integer(array.size), b"tQ", _integer(0), _integers(array.shape), _integers(strides),
            b"\x89", _global("collections", "OrderedDict"), b")R", b"tR",
        ]  # fmt: skip
    return b"".join([*parts, b"u\x89\x86b."])


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _integers(values: Any) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


# -- reading ----------------------------------------------------------------------------------------------------------


def decode(data: bytes, where: str = "artifact") -> Archive:
    """Read the bytes of a file.

    Raises:
        ArtifactError: not a zip archive, truncated, damaged, or not one that kquant wrote.
    """
    try:
        return _decoded(data, where)
    except ArtifactError:
        raise
    except READ_ERRORS as error:
        raise ArtifactError(
            where, "a whole TorchScript archive", f"{type(error).__name__}: {error}", DAMAGED
        ) from error


def _decoded(data: bytes, where: str) -> Archive:
    records = dict(_records(data, where))
    if CODE not in records or "data.pkl" not in records or f"extra/{ROOT}.json" not in records:
        raise ArtifactError(where, f"an archive that holds {CODE} and extra/{ROOT}.json", sorted(records)[:6], FOREIGN)
    if max(len(records[CODE]), len(records["data.pkl"])) > LARGEST_CODE:
        raise ArtifactError(
            where,
            f"code of at most {LARGEST_CODE} bytes",
            len(records[CODE]),
            "Only files of kquant_torch.export_torchscript are read here",
        )
    tensors = _unpickled(records, where)
    extra = {n.removeprefix("extra/"): v.decode() for n, v in records.items() if n.startswith("extra/")}
    return Archive(records[CODE].decode(), tensors, extra)


def _records(data: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """The archive's records; all are stored, so together they are no larger than the file."""
    left = len(data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for info in file.infolist():
            left -= info.file_size
            if info.compress_type != zipfile.ZIP_STORED or left < 0:
                raise ArtifactError(where, "stored records, no larger than the file", info.filename, FOREIGN)
            yield info.filename.partition("/")[2], file.read(info)


class _Root:
    """Stands for the root object."""

    def __setstate__(self, state: tuple) -> None:
        self.tensors, self.training = state


class _Unpickler(pickle.Unpickler):
    """Knows the names that `encode` writes and no other."""

    def __init__(self, records: Mapping[str, bytes]):
        super().__init__(io.BytesIO(records["data.pkl"]))
        self.records = records

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            (MODULE, CLASS): _Root,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("collections", "OrderedDict"): dict,
            **{("torch", storage): dtype for dtype, storage in STORAGES.items()},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the name {module}.{name} is not one that kquant writes")
        return known[module, name]

    def persistent_load(self, key: Any) -> np.ndarray:
        _, dtype, index, _, size = key
        array = np.frombuffer(self.records[f"data/{index}"], np.dtype(dtype).newbyteorder("<"))
        if array.size != size:
            raise pickle.UnpicklingError(f"data/{index} holds {array.size} values, not {size}")
        return array.astype(dtype, copy=False)


def _rebuilt(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *rest: Any) -> np.ndarray:
    if offset or math.prod(shape) != storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} over {storage.size} values")
    return storage.reshape(shape)


def _unpickled(records: Mapping[str, bytes], where: str) -> dict[str, np.ndarray]:
    for opcode, _, _ in pickletools.genops(records["data.pkl"]):
        if opcode.name not in OPCODES:
            raise ArtifactError(where, "a pickle of tensors", f"the opcode {opcode.name}", FOREIGN)
    root = _Unpickler(records).load()
    if not isinstance(root, _Root) or not all(isinstance(a, np.ndarray) for a in root.tensors.values()):
        raise ArtifactError(where, "a pickle of named tensors", type(root).__name__, FOREIGN)
    return root.tensors
