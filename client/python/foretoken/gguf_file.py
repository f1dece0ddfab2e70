"""A strict GGUF reader: every length is checked against the file before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
Dequantization is the `gguf` package's; its reader trusts the lengths it finds, so it is not used.
"""

import mmap
import os
import struct
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_MAX_TENSORS = 100_000
_MAX_FIELDS = 100_000
_MAX_ARRAY = 10_000_000
_MAX_ELEMENTS = 1 << 40
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


class GgufError(Exception):
    """The file is not a GGUF file this reader accepts; the text names the place."""


class GgufTensor(NamedTuple):
    name: str
    shape: tuple  # row-major: the reverse of the order in the file
    kind: GGMLQuantizationType
    offset: int  # in the file
    num_bytes: int


class GgufFile:
    """Maps the file, and holds `fields` (name to value) and `tensors` (name to GgufTensor)."""

    def __init__(self, path):
        self._path = path
        with open(path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < 24:
                raise GgufError(f"{path}: {self._size} bytes is too short for a GGUF file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._bytes(4, "magic") != b"GGUF":
            raise GgufError(f"{path}: not a GGUF file (it doesn't start with 'GGUF')")
        version = self._scalar("<I", "version")
        if version not in (2, 3):
            raise GgufError(
                f"{path}: GGUF version {version} at offset 4; versions 2 and 3 are read"
            )
        num_tensors = self._count(_MAX_TENSORS, "tensor count")
        num_fields = self._count(_MAX_FIELDS, "field count")
        self.fields = {}
        for _ in range(num_fields):
            name = self._string("field name")
            if name in self.fields:
                raise self._error(f"field {name!r} stands twice")
            self.fields[name] = self._value(self._scalar("<I", name), name)
        self.tensors = self._read_tensors(num_tensors)

    @property
    def num_bytes(self):
        return self._size

    def read_float32(self, name):
        """The tensor, dequantized: float32, C order."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        if tensor.kind == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(tensor.shape)
        if tensor.kind == GGMLQuantizationType.F16:
            return raw.view("<f2").astype(np.float32).reshape(tensor.shape)
        rows = raw.reshape(-1, tensor.num_bytes * tensor.shape[-1] // int(np.prod(tensor.shape)))
        try:
            return dequantize(rows, tensor.kind).reshape(tensor.shape)
        except NotImplementedError:
            raise GgufError(
                f"{self._path}: tensor {name!r} is {tensor.kind.name}, which can't be dequantized"
            ) from None

    def _read_tensors(self, num_tensors):
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment}, not a power of two")
        start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset, num_bytes in infos:
            if name in tensors:
                raise self._error(f"tensor {name!r} stands twice")
            if start + offset + num_bytes > self._size:
                raise self._error(
                    f"tensor {name!r} ends at {start + offset + num_bytes},"
                    f" beyond the file's {self._size} bytes: the file is truncated or corrupt"
                )
            tensors[name] = GgufTensor(name, shape, kind, start + offset, num_bytes)
        return tensors

    def _tensor_info(self):
        name = self._string("tensor name")
        num_dims = self._scalar("<I", name)
        if not 1 <= num_dims <= 4:
            raise self._error(f"tensor {name!r} has {num_dims} dimensions")
        shape = tuple(self._scalar("<Q", name) for _ in range(num_dims))[::-1]
        num_elements = 1
        for size in shape:
            num_elements *= size
            if not 1 <= size or num_elements > _MAX_ELEMENTS:
                raise self._error(f"tensor {name!r} has shape {list(shape)}")
        code = self._scalar("<I", name)
        if code not in GGMLQuantizationType._value2member_map_:
            raise self._error(f"tensor {name!r} has the unknown type {code}")
        kind = GGMLQuantizationType(code)
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_elements:
            raise self._error(
                f"tensor {name!r}: rows of {shape[-1]} don't hold whole {kind.name} blocks"
            )
        offset = self._scalar("<Q", name)
        return name, shape, kind, offset, num_elements // block_elements * block_bytes

    def _value(self, code, name):
        if code in _SCALARS:
            return self._scalar(_SCALARS[code], name)
        if code == _STRING:
            return self._string(name)
        if code != _ARRAY:
            raise self._error(f"field {name!r} has the unknown type {code}")
        item_code = self._scalar("<I", name)
        count = self._count(_MAX_ARRAY, name)
        if item_code in _SCALARS:
            item = np.dtype(_SCALARS[item_code])
            return np.frombuffer(self._bytes(count * item.itemsize, name), item).tolist()
        if item_code == _STRING:
            return [self._string(name) for _ in range(count)]
        raise self._error(f"field {name!r} is an array of type {item_code}")

    def _count(self, limit, what):
        count = self._scalar("<Q", what)
        if count > limit:
            raise self._error(f"{what} says {count}; {limit} is the most that is read")
        return count

    def _scalar(self, form, what):
        return struct.unpack(form, self._bytes(struct.calcsize(form), what))[0]

    def _string(self, what):
        data = self._bytes(self._scalar("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} isn't UTF-8") from None

    def _bytes(self, count, what):
        if count > self._size - self._at:
            raise self._error(
                f"{what} takes {count} bytes, {self._size - self._at} are left in the file"
            )
        data = self._map[self._at : self._at + count]
        self._at += count
        return data

    def _error(self, text):
        return GgufError(f"{self._path}: at offset {self._at}: {text}")
