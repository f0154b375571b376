"""Small models for the quantizer, the same on every machine: weights are sums of drawn bytes, scaled by powers of two.

They have the tensors that decide which type goes where, not all that a model needs to run; `llama-quantize` takes them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Made:
    """A model to make: its layers, its metadata and the tensors of one layer and of none (shape, slowest dimension first)."""

    arch: str
    n_layer: int
    n_head: int
    n_kv_head: int
    layer: Shapes
    outer: Shapes
    n_expert: int = 0


def _dense(cols: int = 256, down: int = 256, rows: int = 2) -> Shapes:
    return {
        "attn_norm.weight": (cols,),
        **{f"attn_{part}.weight": (rows, cols) for part in ("q", "k", "v", "output")},
        **{f"ffn_{part}.weight": (rows, cols) for part in ("gate", "up")},
        "ffn_down.weight": (rows, down),
        "ffn_norm.weight": (cols,),
    }


def _experts(n: int, *, shared: bool = False) -> Shapes:
    attn = {name: shape for name, shape in _dense().items() if not name.startswith("ffn_") or "norm" in name}
    routed: Shapes = {f"ffn_{part}_exps.weight": (n, 2, 256) for part in ("gate", "up", "down")}
    alone: Shapes = {f"ffn_{part}_shexp.weight": (2, 256) for part in ("gate", "up", "down")} if shared else {}
    return attn | routed | alone | {"ffn_gate_inp.weight": (n, 256)}


def _outer(*, tied: bool, cols: int = 256) -> Shapes:
    head: Shapes = {} if tied else {"output.weight": (4, cols)}
    return {"token_embd.weight": (4, cols), "output_norm.weight": (cols,)} | head


EXTREMES = {"edges.weight": (12, 256), "token_embd.weight": (4, 256), "experts.weight": (2, 12, 256)}

MODELS = {
    "tied": Made("llama", 10, 4, 2, _dense(), _outer(tied=True)),
    "grouped heads": Made("llama", 17, 8, 2, _dense(), _outer(tied=False)),
    "odd rows": Made(
        "qwen2", 3, 4, 4, _dense(96, 40) | {"attn_q.bias": (96,), "flat.weight": (1, 256)}, _outer(tied=True, cols=96)
    ),
    "odd rows, untied": Made("qwen2", 9, 4, 4, _dense(96, 512), _outer(tied=False, cols=96)),
    "8 experts": Made("llama", 9, 8, 2, _experts(8), _outer(tied=False), n_expert=8),
    "4 experts": Made("qwen2moe", 9, 4, 4, _experts(4, shared=True), _outer(tied=True), n_expert=4),
    "fused": Made("phi3", 9, 4, 4, {"attn_qkv.weight": (2, 256), "ffn_up.weight": (4, 256)} | _dense(), _outer(tied=False)),
    "70B": Made("llama", 80, 8, 1, {"attn_v.weight": (2, 256), "ffn_down.weight": (2, 256)}, _outer(tied=False)),
    "edges": Made("llama", 2, 4, 2, _dense(512, 768, rows=8), EXTREMES),
}


def weights(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """f16 values around 0 with a bell's shape; some rows are larger than others."""
    n = int(np.prod(shape))
    drawn = np.random.PCG64(seed).random_raw(n).view(np.int8).reshape(n, 8)[:, :5]
    scale = 2.0 ** -(13 + np.arange(n // shape[-1]) % 3)
    values = drawn.sum(axis=1, dtype=np.int32).reshape(-1, shape[-1]) * scale[:, None]
    return values.astype(np.float16).reshape(shape)


def edges() -> np.ndarray:
    """Rows where a search could stumble: f16 [12, 256]."""
    rows = np.zeros((12, 256), np.float32)
    noise = weights((12, 256), 7).astype(np.float32)
    rows[1] = 0.25
    rows[2] = -0.25
    rows[3, 100] = 3.5  # alone
    rows[4] = noise[4] * 2.0**-14  # subnormal in f16
    rows[5] = np.abs(noise[5])
    rows[6] = -np.abs(noise[6]) - 0.5
    rows[7] = np.where(np.arange(256) // 16 % 2, noise[7], 0)  # every second group of zeros
    rows[8] = np.where(np.arange(256) % 2, 1.0, -1.0)
    rows[9] = np.arange(256) * 2.0**-8
    rows[10] = noise[10] * 2.0**17  # large: up to 20 000
    rows[11, :16] = noise[11, :16] * 2.0**10
    rows[11, 16:] = noise[11, 16:] * 2.0**-6  # groups whose scale vanishes beside the first one's
    return rows.astype(np.float16)


def write_model(path: Path, made: Made, damage: dict[str, float] | None = None) -> Path:
    """Write it; `damage` puts a value into the middle of a tensor. Returns the path."""
    writer = gguf.GGUFWriter(path, made.arch)
    writer.add_name("made")
    writer.add_float64("made.double", 1.5)
    writer.add_array("made.list", [1, 2, 3])
    writer.add_block_count(made.n_layer)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(made.n_head)
    writer.add_head_count_kv(made.n_kv_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    if made.n_expert:
        writer.add_expert_count(made.n_expert)
        writer.add_expert_used_count(2)
    for seed, (name, shape) in enumerate(_all_tensors(made).items()):
        values = weights(shape, seed)
        if name in ("edges.weight", "experts.weight"):
            values[...] = edges()
        if len(shape) == 1 or "gate_inp" in name:
            values = values.astype(np.float32)
        if damage and name in damage:
            values.reshape(-1)[values.size // 2] = damage[name]
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _all_tensors(made: Made) -> Shapes:
    layers = {f"blk.{i}.{name}": shape for i in range(made.n_layer) for name, shape in made.layer.items()}
    return made.outer | layers
