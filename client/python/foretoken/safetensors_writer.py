"""Writes safetensors files one tensor at a time, so that a model never lies in memory whole."""

import json
import struct
from collections.abc import Callable
from typing import NamedTuple

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1}


class TensorPlan(NamedTuple):
    """A tensor that is still to be made: `make()` returns its bytes, little endian, C order."""

    name: str
    dtype: str
    shape: tuple
    make: Callable[[], bytes]

    @property
    def num_bytes(self):
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BYTES[self.dtype]


def write_safetensors(path, plans, metadata=None, advance=lambda num_bytes: None):
    """Writes the tensors in the order given; `advance` hears of each tensor's bytes."""
    header = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for plan in plans:
        end = offset + plan.num_bytes
        header[plan.name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start 8-byte aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for plan in plans:
            data = memoryview(plan.make()).cast("B")
            if len(data) != plan.num_bytes:
                raise ValueError(f"{plan.name}: {len(data)} bytes, expected {plan.num_bytes}")
            file.write(data)
            advance(len(data))
