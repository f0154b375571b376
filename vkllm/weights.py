"""The weights that a graph asks for, checked against the file before anything touches a device.

Matrices stay in the file's quantized blocks (mapped, not copied); vectors come as f32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError, UnsupportedModelError, UnsupportedQuantError
from vkllm.expand import EXPANDED, device_nbytes, device_type, warn
from vkllm.files.model_file import ModelFile, TensorInfo
from vkllm.plan import Graph, Part
from vkllm_shaders.formats import FORMATS


def _tensor(file: ModelFile, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor called `name`, which must have `shape`."""
    info = file.tensors.get(name)
    if info is None:
        raise FileFormatError(f"tensor {name} is missing", hint="the file is incomplete or of another architecture than it says")
    if info.shape != shape:
        raise FileFormatError(
            f"tensor {name} has shape {list(info.shape)}; expected {list(shape)}", hint="the metadata contradicts the tensors"
        )
    return info


def check_weights(graph: Graph, file: ModelFile) -> None:
    """Refuse a file whose tensors are missing, misshapen or of a type without a kernel; warn of those that are expanded.

    Tensors that the graph does not use are refused too: they would change the result where they are applied.
    Raises: FileFormatError, UnsupportedQuantError, UnsupportedModelError: naming the first offending tensor.
    """
    for part in graph.parts():
        info = _tensor(file, part.weight, part.shape)
        if device_type(info.type) not in FORMATS:
            raise UnsupportedQuantError(
                f"{part.weight} is {info.type}; expected one of {', '.join((*FORMATS, *EXPANDED))}", hint="re-quantize as Q4_K_M"
            )
    vectors = graph.vectors()
    for name, shape in vectors.items():
        info = _tensor(file, name, shape)
        if info.type not in ("F32", "F16", "BF16"):
            raise UnsupportedQuantError(
                f"{name} is {info.type}; expected F32, F16 or BF16", hint="vectors are never quantized: convert the model again"
            )
    unused = file.tensors.keys() - {part.weight for part in graph.parts()} - vectors.keys()
    if unused:
        raise UnsupportedModelError(
            f"tensor {min(unused)} has no place in the {graph.config.arch} architecture as it is implemented here",
            hint="the model is a variant of it that cannot be run",
        )
    warn({part.weight: file.tensors[part.weight] for part in graph.parts()}.values())


def vector(file: ModelFile, name: str) -> NDArray[np.float32]:
    """A vector as f32, shape [n]; the biases of several experts one behind the other."""
    if file.tensors[name].type == "F32":
        return np.ascontiguousarray(file.data(name)).view("<f4").reshape(-1).astype(np.float32)
    return dequantized(file, name).reshape(-1)


def dequantized(file: ModelFile, name: str) -> NDArray[np.float32]:
    """A tensor expanded to f32 in host memory, by the `gguf` library: for the reference executor and small vectors."""
    import gguf  # takes long, and most models load without it

    info = file.tensors[name]
    rows = gguf.quants.dequantize(file.data(name), gguf.GGMLQuantizationType[info.type])
    return np.ascontiguousarray(rows, dtype=np.float32).reshape(info.shape)


def weight_bytes(file: ModelFile, part: Part) -> int:
    """Bytes of a matrix in its blocks, expanded where it has to be: what one pass over it reads. Of experts: of one."""
    n_row = math.prod(part.shape[:-1])
    return device_nbytes(file.tensors[part.weight]) * part.n_row // n_row
