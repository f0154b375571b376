"""The weights that a graph asks for, checked against the file before anything touches a device.

Matrices stay in the file's quantized blocks (mapped, not copied); vectors come as f32.
"""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError, UnsupportedModelError, UnsupportedQuantError
from vkllm.files.gguf import GGUFFile, TensorInfo
from vkllm.plan import Graph, Part
from vkllm_shaders.formats import FORMATS


def _tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor called `name`, which must have `shape`."""
    info = file.tensors.get(name)
    if info is None:
        raise FileFormatError(f"tensor {name} is missing", hint="the file is incomplete or of another architecture than it says")
    if info.shape != shape:
        raise FileFormatError(
            f"tensor {name} has shape {list(info.shape)}; expected {list(shape)}", hint="the metadata contradicts the tensors"
        )
    return info


def vector_lengths(graph: Graph) -> dict[str, int]:
    """Every f32 vector of the graph and its length."""
    lengths = {part.bias: part.n_row for part in graph.parts() if part.bias}
    for op in graph.ops:
        norm = getattr(op, "norm", None)
        if norm:
            lengths[norm] = op.parts[0].n_col  # type: ignore[union-attr]
    if graph.rope_factors:
        lengths[graph.rope_factors] = graph.config.head_dim // 2
    return lengths


def check_weights(graph: Graph, file: GGUFFile) -> None:
    """Refuse a file whose tensors are missing, misshapen or of a type without a kernel.

    Tensors that the graph does not use are refused too: they would change the result where they are applied.
    Raises: FileFormatError, UnsupportedQuantError, UnsupportedModelError: naming the first offending tensor.
    """
    for part in graph.parts():
        info = _tensor(file, part.weight, (part.n_row, part.n_col))
        if info.type not in FORMATS:
            raise UnsupportedQuantError(
                f"{part.weight} is {info.type}; expected one of {', '.join(FORMATS)}", hint="re-quantize as Q4_K_M"
            )
    for name, length in vector_lengths(graph).items():
        info = _tensor(file, name, (length,))
        if info.type not in ("F32", "F16", "BF16"):
            raise UnsupportedQuantError(
                f"{name} is {info.type}; expected F32, F16 or BF16", hint="vectors are never quantized: convert the model again"
            )
    unused = file.tensors.keys() - {part.weight for part in graph.parts()} - vector_lengths(graph).keys()
    if unused:
        raise UnsupportedModelError(
            f"tensor {min(unused)} has no place in the {graph.config.arch} architecture as it is implemented here",
            hint="the model is a variant of it that cannot be run",
        )


def vector(file: GGUFFile, name: str) -> NDArray[np.float32]:
    """A vector as f32, shape [n]."""
    return dequantized(file, name).reshape(-1)


def dequantized(file: GGUFFile, name: str) -> NDArray[np.float32]:
    """A tensor expanded to f32 in host memory, by the `gguf` library: for the reference executor and small vectors."""
    info = file.tensors[name]
    rows = gguf.quants.dequantize(file.data(name), gguf.GGMLQuantizationType[info.type])
    return np.ascontiguousarray(rows, dtype=np.float32).reshape(info.shape)


def weight_bytes(file: GGUFFile, part: Part) -> int:
    """Bytes of a matrix as the file stores it: what one pass over it reads."""
    return file.tensors[part.weight].nbytes
