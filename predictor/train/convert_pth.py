"""Published AttentionPredictor weights (a torch pickle) to safetensors, which a server can read.

    python3 predictor/train/convert_pth.py IN.pth OUT.safetensors SOURCE_TEXT

Needs torch; runs once, offline. The output's metadata names the source and its sha256.
"""

import hashlib
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client" / "python"))
from foretoken.safetensors_writer import TensorPlan, write_safetensors  # noqa: E402

_SHAPES = {
    "conv1.weight": (16, 1, 3, 3),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3),
    "conv2.bias": (32,),
    "conv3.weight": (1, 32, 1),
    "conv3.bias": (1,),
}


def convert(pth_path, out_path, source):
    weights = torch.load(pth_path, map_location="cpu", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != _SHAPES:
        raise SystemExit(f"{pth_path} holds {shapes}, expected {_SHAPES}")
    digest = hashlib.sha256(pathlib.Path(pth_path).read_bytes()).hexdigest()
    plans = [
        TensorPlan(name, "F32", shape, lambda t=weights[name]: t.numpy().astype("<f4").copy())
        for name, shape in _SHAPES.items()
    ]
    write_safetensors(out_path, plans, {"source": source, "source_sha256": digest})
    return {name: np.asarray(tensor) for name, tensor in weights.items()}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    convert(*sys.argv[1:])
