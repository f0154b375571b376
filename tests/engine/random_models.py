"""Small GGUF files with random weights, of any shape, made with the `gguf` package. A test may damage one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, tuple[np.ndarray, str]]
"""name → (f32 values, GGUF type)"""
Metadata = dict[str, Any]
Damage = Callable[[Metadata, Tensors], None]


@dataclass(frozen=True)
class Shape:
    """A model to make up. `types`: of the matrices whose names contain a key (else F32). `n_embd` 0: n_head * head_dim."""

    arch: str = "llama"
    n_layer: int = 1
    n_head: int = 2
    n_kv_head: int = 2
    head_dim: int = 8
    n_ff: int = 96
    n_embd: int = 0
    rope_dim: int = 0
    tied: bool = False
    bias: bool = False
    rope_factors: bool = False
    types: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.n_embd or self.n_head * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.n_head}x{self.head_dim} over {self.n_kv_head}"
        words = [word for word in ("tied", "bias", "rope_factors") if getattr(self, word)]
        return " ".join([self.arch, f"{self.n_layer} layers", heads, f"ff {self.n_ff}", *words, *self.types.values()])


def write_model(path: Path, shape: Shape = Shape(), damage: Damage | None = None, seed: int = 0) -> Path:
    """Write a model of this shape, `damage`d; returns its path."""
    metadata, tensors = vocabulary(shape.arch), random_tensors(shape, seed)
    metadata |= hyper_parameters(shape)
    if damage:
        damage(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        put(writer, key, value)
    for name, (values, kind) in tensors.items():
        put_tensor(writer, name, values, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One pair of metadata, its type from the value's."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I32": np.int32}


def put_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """One tensor; of types that `gguf` cannot quantize to, random blocks."""
    if kind.name in PLAIN:
        writer.add_tensor(name, values.astype(PLAIN[kind.name]))
        return
    if kind.name in ("Q4_K", "Q5_K", "Q6_K"):
        writer.add_tensor(name, k_blocks(values.shape, kind.name), raw_dtype=kind)
        return
    try:
        blocks = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        blocks = random_blocks(values.shape, kind.name)
    writer.add_tensor(name, blocks, raw_dtype=kind)


def k_blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random blocks of 256 weights: every bit of scales, minima and weights is drawn, the f16 factors keep them near 1/√n_col."""
    rng = np.random.default_rng(shape[0])
    n, size = shape[0] * shape[1] // 256, 1.0 / np.sqrt(shape[1])

    def bits(n_byte: int) -> np.ndarray:
        return rng.integers(0, 256, (n, n_byte), dtype=np.uint8)

    def halves(mean: float) -> np.ndarray:
        return (mean * rng.uniform(0.8, 1.2, (n, 1))).astype(np.float16).view(np.uint8)

    if kind == "Q6_K":
        blocks = [bits(128 + 64 + 16), halves(size / (64 * 18))]  # low bits, high bits, scales of ±128, d
    else:
        top, n_byte = (15, 128) if kind == "Q4_K" else (31, 128 + 32)
        d = size / (32 * top / 2)  # scales and minima have 6 bits
        blocks = [halves(d), halves(d * top / 2), bits(12 + n_byte)]
    return np.concatenate(blocks, axis=1).reshape(shape[0], -1)


def random_blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random bits with factors that make the weights about 1/√n_col, in any type with f16 factors: [n_row, row bytes]."""
    rng, number = np.random.default_rng(shape[0]), gguf.GGMLQuantizationType[kind]
    n_weight, n_byte = gguf.GGML_QUANT_SIZES[number]
    n_row = int(np.prod(shape[:-1]))
    bits = rng.integers(0, 256, (n_row, shape[-1] // n_weight, n_byte), dtype=np.uint8)
    plain = gguf.quants.dequantize(with_factors(bits, kind, np.ones(bits.shape[:2])).reshape(n_row, -1), number)
    size = 1.0 / np.sqrt(shape[-1]) / np.sqrt(np.mean(plain**2))
    return with_factors(bits, kind, size * rng.uniform(0.8, 1.2, bits.shape[:2])).reshape(n_row, -1)


FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
"""Where a block's f16 factors are; of other types with one factor it comes first."""


def with_factors(bits: np.ndarray, kind: str, factors: np.ndarray) -> np.ndarray:
    """Blocks […, block bytes] with their f16 factors replaced by `factors` […]."""
    blocks, halves = bits.copy(), factors.astype(np.float16)
    if kind == "IQ1_M":  # four bits on top of each of the last four words
        words, number = blocks.view(np.uint16), halves.view(np.uint16)
        for i in range(4):
            words[..., 24 + i] = words[..., 24 + i] & 0x0FFF | (number >> (4 * i) & 15) << 12
    else:
        for at in FACTORS.get(kind, (0,)):
            blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks


def hyper_parameters(s: Shape) -> Metadata:
    pairs = {
        "block_count": s.n_layer,
        "embedding_length": s.width,
        "feed_forward_length": s.n_ff,
        "context_length": 1024,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_kv_head,
        "attention.key_length": s.head_dim,
        "attention.value_length": s.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": s.rope_dim or s.head_dim,
        "rope.freq_base": 10000.0,
    }
    return {"general.architecture": s.arch} | {f"{s.arch}.{key}": value for key, value in pairs.items()}


def vocabulary(arch: str) -> Metadata:
    """All bytes, the control tokens, and one merged word."""
    if arch == "qwen2":
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        tokens = [*map(chr, printable), *(chr(0x100 + i) for i in range(256 - len(printable))), "an", "<|endoftext|>"]
        pairs: Metadata = {"model": "gpt2", "pre": "qwen2", "merges": ["a n"], "eos_token_id": 257}
        kinds = [1] * 257 + [3]
    else:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "n", "an"]
        pairs = {"model": "llama", "scores": [0.0] * 262 + [-1.0], "bos_token_id": 1, "eos_token_id": 2}
        kinds = [2, 3, 3] + [6] * 256 + [1] * 4
    return {f"tokenizer.ggml.{key}": value for key, value in (pairs | {"tokens": tokens, "token_type": kinds}).items()}


def random_tensors(s: Shape, seed: int) -> Tensors:
    """Weights of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    n_q, n_kv, n_vocab = s.n_head * s.head_dim, s.n_kv_head * s.head_dim, len(vocabulary(s.arch)["tokenizer.ggml.tokens"])
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, s.width), "output_norm.weight": (s.width,)}
    if not s.tied:
        shapes["output.weight"] = (n_vocab, s.width)
    for i in range(s.n_layer):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (s.width,), "attn_q": (n_q, s.width), "attn_k": (n_kv, s.width), "attn_v": (n_kv, s.width),
            "attn_output": (s.width, n_q), "ffn_norm": (s.width,), "ffn_gate": (s.n_ff, s.width), "ffn_up": (s.n_ff, s.width),
            "ffn_down": (s.width, s.n_ff),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in parts.items()}
        if s.bias:
            shapes |= {f"blk.{i}.attn_{x}.bias": (n_q if x == "q" else n_kv,) for x in "qkv"}
    if s.rope_factors:
        shapes["rope_freqs.weight"] = (s.head_dim // 2,)
    return {name: (values(name, shape, rng), type_of(name, s)) for name, shape in shapes.items()}


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) == 2:
        return (rng.standard_normal(shape) * (2.0 if "attn_q" in name else 1.0) / np.sqrt(shape[1])).astype(np.float32)
    around = 0.0 if "bias" in name else 1.0
    return (around + rng.uniform(0.0 if "freqs" in name else -0.5, 4.0 if "freqs" in name else 0.5, shape)).astype(np.float32)


def type_of(name: str, s: Shape) -> str:
    """Vectors stay F32."""
    matrix = name.endswith(".weight") and "norm" not in name and "rope" not in name
    return next((kind for part, kind in s.types.items() if part in name), "F32") if matrix else "F32"
