"""Golden data of the predictor (.npz) to the safetensors that the C++ tests read.

    python3 tests/oracles/convert_golden.py IN.npz tests/predictor/data/golden.safetensors

Synthetic attention, published Llama-3.1 weights, evaluated in float64 with the reference's
semantics (200 decode steps, context 2,995 to 3,195 tokens, budget 1,024 tokens, an exact row
every step). Arrays, for map m and step t:
  history0 [maps, 64, 188] F32   rows of the last 64 prefill queries, oldest first
  scores   [200, maps, 200] F32  made from the history before step t, on columns [4, columns - 4)
  top      [200, maps, 56]  I32  the 56 best columns, sorted by index
  rows     [200, maps, 200] F32  the row that step t appends, zeros beyond its columns
  length   [200]            I32  tokens attended at step t
The first 4 of the 6 maps are kept: maps are independent, and 4 keep the file below 2 MB.
"""

import hashlib
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client" / "python"))
from foretoken.safetensors_writer import TensorPlan, write_safetensors  # noqa: E402

_MAPS = 4


def convert(npz_path, out_path):
    golden = np.load(npz_path)
    arrays = {
        "history0": golden["history0"][:_MAPS],
        "scores": golden["scores"][:, :_MAPS],
        "top": golden["top"][:, :_MAPS],
        "rows": golden["rows"][:, :_MAPS],
        "length": golden["length"],
    }
    plans = []
    for name, array in arrays.items():
        dtype = {"float32": "F32", "int32": "I32"}[str(array.dtype)]
        plans.append(TensorPlan(name, dtype, array.shape, lambda a=array: np.ascontiguousarray(a)))
    digest = hashlib.sha256(pathlib.Path(npz_path).read_bytes()).hexdigest()
    write_safetensors(out_path, plans, {"source_sha256": digest})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(*sys.argv[1:])
