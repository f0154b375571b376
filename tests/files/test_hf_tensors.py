"""Tensors of a Hugging Face folder under GGUF's names: what conversion changes, and configurations that contradict them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hf_folders import CONFIG, Tensors, bf16, llama_tensors, random, write_folder
from test_hf_config import GEMMA2, GPT_OSS, PHI3, QWEN3MOE

from vkllm.errors import ConfigError, FileFormatError, UnsupportedModelError, UnsupportedQuantError, VkllmError
from vkllm.files import HuggingFaceFolder

LAYER = "model.layers.0."


def opened(folder: Path, config: dict[str, Any], tensors: Tensors) -> HuggingFaceFolder:
    return HuggingFaceFolder.open(write_folder(folder, config, tensors))


def values(file: HuggingFaceFolder, name: str) -> np.ndarray:
    """A tensor as f32, in its shape."""
    info = file.tensors[name]
    return gguf.quants.dequantize(file.data(name), gguf.GGMLQuantizationType[info.type]).reshape(info.shape)


def in_bf16(folder: Path) -> None:
    """Rewrite the folder's weights, which were saved as uint16, as BF16: numpy has no such type."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def test_llama_rows_are_interleaved(tmp_path: Path) -> None:
    """Row 2i of a head in GGUF is row i, row 2i + 1 is row i + head_dim / 2; everything else is as it was, and not copied."""
    tensors = llama_tensors() | {
        LAYER + "self_attn.q_proj.bias": random((16,), 90),
        LAYER + "self_attn.k_proj.bias": random((8,), 91),
    }
    tensors |= {LAYER + "self_attn.v_proj.bias": random((8,), 92)}
    with opened(tmp_path / "f", CONFIG, tensors) as file:
        order = [head * 8 + half * 4 + i for head in range(2) for i in range(4) for half in range(2)]
        for kind in ("weight", "bias"):
            q, k = (tensors[f"{LAYER}self_attn.{m}_proj.{kind}"] for m in "qk")
            assert np.array_equal(values(file, f"blk.0.attn_q.{kind}"), q[order])
            assert np.array_equal(values(file, f"blk.0.attn_k.{kind}"), k[order[:8]])
        for ours, theirs in {
            "token_embd.weight": "model.embed_tokens.weight",
            "output.weight": "lm_head.weight",
            "output_norm.weight": "model.norm.weight",
            "blk.0.attn_norm.weight": LAYER + "input_layernorm.weight",
            "blk.0.ffn_norm.weight": LAYER + "post_attention_layernorm.weight",
            "blk.0.attn_v.weight": LAYER + "self_attn.v_proj.weight",
            "blk.0.attn_v.bias": LAYER + "self_attn.v_proj.bias",
            "blk.0.attn_output.weight": LAYER + "self_attn.o_proj.weight",
            "blk.0.ffn_gate.weight": LAYER + "mlp.gate_proj.weight",
            "blk.0.ffn_up.weight": LAYER + "mlp.up_proj.weight",
            "blk.0.ffn_down.weight": LAYER + "mlp.down_proj.weight",
        }.items():
            assert np.array_equal(values(file, ours), tensors[theirs]), ours
        assert len(file.tensors) == len(tensors)
        data = file.data("blk.0.ffn_up.weight")
        assert data.shape == (24, 64) and not data.flags.writeable and not data.flags.owndata
        assert not file.data("blk.0.attn_q.weight").flags.writeable
        file.release("blk.0.ffn_up.weight")
        assert np.array_equal(data, file.data("blk.0.ffn_up.weight"))
        with pytest.raises(FileFormatError, match=r"no tensor blk\.7"):
            file.data("blk.7.attn_q.weight")
    with pytest.raises(FileFormatError, match="closed"):
        file.data("blk.0.attn_q.weight")


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_small_tensors_are_widened(tmp_path: Path, kind: str) -> None:
    """Vectors are F32 in GGUF; matrices keep their type."""
    tensors = llama_tensors()
    narrow = {name: t.astype(np.float16) if kind == "F16" else bf16(t) for name, t in tensors.items()}
    folder = write_folder(tmp_path / "f", CONFIG, narrow)
    in_bf16(folder)
    with HuggingFaceFolder.open(folder) as file:
        assert {t.type for t in file.tensors.values() if len(t.shape) == 2} == {kind}
        assert {t.type for t in file.tensors.values() if len(t.shape) == 1} == {"F32"}
        assert file.metadata["general.file_type"] == {"F16": 1, "BF16": 32}[kind]
        norm = narrow["model.norm.weight"]
        exact = norm.astype(np.float32) if kind == "F16" else (norm.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(values(file, "output_norm.weight"), exact)
        assert file.data("output.weight").tobytes() == narrow["lm_head.weight"].tobytes()


def test_gemma_norms_are_shifted_and_the_head_is_tied(tmp_path: Path) -> None:
    config = CONFIG | GEMMA2 | {"num_hidden_layers": 1}
    tensors = llama_tensors() | {
        LAYER + f"{w}_feedforward_layernorm.weight": random((16,), n) for n, w in enumerate(("pre", "post"))
    }
    with opened(tmp_path / "f", config, tensors) as file:
        assert "output.weight" not in file.tensors
        for ours, theirs in {
            "output_norm.weight": "model.norm.weight",
            "blk.0.attn_norm.weight": LAYER + "input_layernorm.weight",
            "blk.0.post_attention_norm.weight": LAYER + "post_attention_layernorm.weight",
            "blk.0.ffn_norm.weight": LAYER + "pre_feedforward_layernorm.weight",
            "blk.0.post_ffw_norm.weight": LAYER + "post_feedforward_layernorm.weight",
        }.items():
            assert np.array_equal(values(file, ours), tensors[theirs] + np.float32(1)), ours
        assert np.array_equal(values(file, "blk.0.attn_q.weight"), tensors[LAYER + "self_attn.q_proj.weight"])


def test_gemma_with_pictures_gives_its_text_part(tmp_path: Path) -> None:
    config = CONFIG | GEMMA2 | {"architectures": ["Gemma3ForConditionalGeneration"], "num_hidden_layers": 1}
    tensors = llama_tensors() | {
        LAYER + f"{w}_feedforward_layernorm.weight": random((16,), n) for n, w in enumerate(("pre", "post"))
    }
    tensors |= {LAYER + f"self_attn.{w}_norm.weight": random((8,), n) for n, w in enumerate("qk")}
    pictures = {"vision_tower.vision_model.embeddings.patch_embedding.weight": random((4, 4), 1)}
    pictures |= {"multi_modal_projector.mm_soft_emb_norm.weight": random((4,), 1)}
    with opened(tmp_path / "f", config, {f"language_model.{name}": t for name, t in tensors.items()} | pictures) as file:
        assert np.array_equal(values(file, "blk.0.attn_q_norm.weight"), tensors[LAYER + "self_attn.q_norm.weight"] + 1)
        assert len(file.tensors) == len(tensors) - 1  # the head is tied


def phi3_tensors() -> Tensors:
    tensors = {
        name: t for name, t in llama_tensors().items() if not any(f".{m}_proj." in name for m in ("q", "k", "v", "gate", "up"))
    }
    return tensors | {
        LAYER + "self_attn.qkv_proj.weight": random((32, 16), 1),
        LAYER + "mlp.gate_up_proj.weight": random((48, 16), 2),
    }


def test_phi3_stays_fused(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0] * 4}}
    tensors = phi3_tensors()
    with opened(tmp_path / "f", CONFIG | PHI3 | rope, tensors) as file:
        assert np.array_equal(values(file, "blk.0.attn_qkv.weight"), tensors[LAYER + "self_attn.qkv_proj.weight"])
        assert np.array_equal(values(file, "blk.0.ffn_up.weight"), tensors[LAYER + "mlp.gate_up_proj.weight"])
        assert values(file, "rope_factors_long.weight").tolist() == [1.0, 2.0, 3.0, 4.0]
        file.release("rope_factors_long.weight")


def qwen3moe_tensors() -> Tensors:
    """Experts one by one."""
    config = CONFIG | QWEN3MOE
    tensors = {name: t for name, t in llama_tensors(config).items() if ".mlp." not in name}
    tensors |= {LAYER + f"self_attn.{w}_norm.weight": random((32,), n) for n, w in enumerate("qk")}
    tensors[LAYER + "mlp.gate.weight"] = random((8, 16), 3)
    for i in range(8):
        shapes = {"gate": (12, 16), "up": (12, 16), "down": (16, 12)}
        tensors |= {f"{LAYER}mlp.experts.{i}.{m}_proj.weight": random(shape, i + len(m)) for m, shape in shapes.items()}
    return tensors


def test_experts_are_stacked(tmp_path: Path) -> None:
    """The same experts one by one, and all in one tensor as transformers 5 may keep them."""
    tensors = qwen3moe_tensors()
    stacked = {
        m: np.stack([tensors[f"{LAYER}mlp.experts.{i}.{m}_proj.weight"] for i in range(8)]) for m in ("gate", "up", "down")
    }
    fused = {name: t for name, t in tensors.items() if ".experts." not in name}
    fused |= {LAYER + "mlp.experts.gate_up_proj": np.concatenate([stacked["gate"], stacked["up"]], axis=1)}
    fused |= {LAYER + "mlp.experts.down_proj": stacked["down"]}
    for name, source in {"single": tensors, "fused": fused}.items():
        with opened(tmp_path / name, CONFIG | QWEN3MOE, source) as file:
            for matrix, expected in stacked.items():
                assert np.array_equal(values(file, f"blk.0.ffn_{matrix}_exps.weight"), expected), (name, matrix)
            assert file.data("blk.0.ffn_gate_exps.weight").shape == (8 * 12, 16 * 4)
            assert np.array_equal(values(file, "blk.0.ffn_gate_inp.weight"), tensors[LAYER + "mlp.gate.weight"])
            file.release("blk.0.ffn_down_exps.weight")


GPT = CONFIG | GPT_OSS | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32, "head_dim": 8}


def gpt_oss_tensors() -> Tensors:
    """Experts as transformers keeps them when they are not quantized: [n_expert, n_in, n_out], gate and up interleaved."""
    tensors = {name: t for name, t in llama_tensors(GPT).items() if ".mlp." not in name}
    tensors |= {LAYER + f"self_attn.{m}_proj.bias": random((n,), n) for m, n in (("q", 16), ("k", 8), ("v", 8), ("o", 64))}
    tensors[LAYER + "self_attn.sinks"] = random((2,), 1)
    tensors |= {LAYER + "mlp.router.weight": random((4, 64), 2), LAYER + "mlp.router.bias": random((4,), 3)}
    tensors |= {
        LAYER + "mlp.experts.gate_up_proj": random((4, 64, 64), 4),
        LAYER + "mlp.experts.gate_up_proj_bias": random((4, 64), 5),
    }
    return tensors | {
        LAYER + "mlp.experts.down_proj": random((4, 32, 64), 6),
        LAYER + "mlp.experts.down_proj_bias": random((4, 64), 7),
    }


def test_gpt_oss(tmp_path: Path) -> None:
    tensors = gpt_oss_tensors()
    with opened(tmp_path / "f", GPT, tensors) as file:
        gate_up, bias = tensors[LAYER + "mlp.experts.gate_up_proj"], tensors[LAYER + "mlp.experts.gate_up_proj_bias"]
        for first, name in enumerate(("gate", "up")):
            assert np.array_equal(values(file, f"blk.0.ffn_{name}_exps.weight"), gate_up[:, :, first::2].swapaxes(1, 2))
            assert np.array_equal(values(file, f"blk.0.ffn_{name}_exps.bias"), bias[:, first::2])
        down = tensors[LAYER + "mlp.experts.down_proj"]
        assert np.array_equal(values(file, "blk.0.ffn_down_exps.weight"), down.swapaxes(1, 2))
        assert np.array_equal(values(file, "blk.0.attn_sinks.weight"), tensors[LAYER + "self_attn.sinks"])
        assert np.array_equal(values(file, "blk.0.ffn_gate_inp.bias"), tensors[LAYER + "mlp.router.bias"])
        assert np.array_equal(values(file, "blk.0.attn_output.bias"), tensors[LAYER + "self_attn.o_proj.bias"])
        assert "blk.0.post_attention_norm.weight" in file.tensors and "blk.0.ffn_norm.weight" not in file.tensors


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4_tensors() -> Tensors:
    rng = np.random.default_rng(8)
    tensors = {name: t for name, t in gpt_oss_tensors().items() if not name.endswith(("gate_up_proj", "down_proj"))}
    for name, n_row, n_block in (("gate_up_proj", 64, 2), ("down_proj", 64, 1)):
        tensors[f"{LAYER}mlp.experts.{name}_blocks"] = rng.integers(0, 256, (4, n_row, n_block, 16), np.uint8)
        tensors[f"{LAYER}mlp.experts.{name}_scales"] = rng.integers(118, 132, (4, n_row, n_block), np.uint8)
    return tensors


def test_mxfp4_keeps_every_weight(tmp_path: Path) -> None:
    """gguf's dequantization of ours is OCP's of theirs: neighbours in a byte, low nibble first, times 2^(scale - 127)."""
    tensors = mxfp4_tensors()
    with opened(tmp_path / "f", GPT | {"quantization_config": {"quant_method": "mxfp4"}}, tensors) as file:
        assert file.metadata["general.file_type"] == 38

        def expected(name: str) -> np.ndarray:
            blocks, scales = (tensors[f"{LAYER}mlp.experts.{name}_{part}"] for part in ("blocks", "scales"))
            weights = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:3], 32)
            return (weights * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(4, 64, -1)

        for first, name in enumerate(("gate", "up")):
            assert file.tensors[f"blk.0.ffn_{name}_exps.weight"].type == "MXFP4"
            assert np.array_equal(values(file, f"blk.0.ffn_{name}_exps.weight"), expected("gate_up_proj")[:, first::2])
        assert np.array_equal(values(file, "blk.0.ffn_down_exps.weight"), expected("down_proj"))


def without(tensors: Tensors, name: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n != name}


Q, UP, NORM = LAYER + "self_attn.q_proj.weight", LAYER + "mlp.up_proj.weight", LAYER + "input_layernorm.weight"
REFUSED: dict[str, tuple[dict[str, Any], Callable[[], Tensors], type[VkllmError], str]] = {
    "other width": (CONFIG | {"hidden_size": 32}, llama_tensors, ConfigError, r"lm_head.*\[24, 16\].*makes it \[24, 32\]"),
    "other vocabulary": (
        CONFIG | {"vocab_size": 32},
        llama_tensors,
        ConfigError,
        r"output.weight.*\[24, 16\]; config.json .*\[32",
    ),
    "other heads": (CONFIG | {"num_key_value_heads": 2}, llama_tensors, ConfigError, r"k_proj.weight .*\[8, 16\]"),
    "other feed-forward": (CONFIG | {"intermediate_size": 25}, llama_tensors, ConfigError, r"mlp.*config.json makes it \["),
    "three dimensions": (CONFIG, lambda: llama_tensors() | {UP: random((24, 4, 4), 1)}, ConfigError, r"up_proj.*\[24, 4, 4\]"),
    "a scalar": (CONFIG, lambda: llama_tensors() | {NORM: np.array(1, np.float32)}, ConfigError, r"input_layernorm.*\[\]"),
    "fewer layers in config": (
        CONFIG,
        lambda: llama_tensors(CONFIG | {"num_hidden_layers": 2}),
        UnsupportedModelError,
        r"layers\.1\..* with 1 layers",
    ),
    "more layers in config": (CONFIG | {"num_hidden_layers": 2}, llama_tensors, FileFormatError, r"lack blk\.1\.attn_norm"),
    "missing tensor": (CONFIG, lambda: without(llama_tensors(), Q), FileFormatError, r"lack blk\.0\.attn_q\.weight"),
    "missing head": (CONFIG, lambda: without(llama_tensors(), "lm_head.weight"), FileFormatError, r"lack output\.weight"),
    "unknown tensor": (
        CONFIG,
        lambda: llama_tensors() | {"model.extra": random((2,), 1)},
        UnsupportedModelError,
        "model.extra has no",
    ),
    "foreign tensor": (
        CONFIG,
        lambda: llama_tensors() | {LAYER + "self_attn.q_norm.weight": random((8,), 1)},
        UnsupportedModelError,
        "q_norm",
    ),
    "one name, two tensors": (
        CONFIG,
        lambda: llama_tensors() | {"transformer.wte.weight": random((24, 16), 1)},
        FileFormatError,
        "are both token_embd.weight",
    ),
    "integers": (
        CONFIG,
        lambda: llama_tensors() | {UP: np.ones((24, 16), np.int8)},
        UnsupportedQuantError,
        "up_proj.weight is I8",
    ),
    "doubles": (CONFIG, lambda: llama_tensors() | {UP: np.ones((24, 16))}, UnsupportedQuantError, "up_proj.weight is F64"),
    "expert missing": (
        CONFIG | QWEN3MOE,
        lambda: without(qwen3moe_tensors(), LAYER + "mlp.experts.3.up_proj.weight"),
        ConfigError,
        "7 experts up to number 7; config.json says 8",
    ),
    "expert too many": (
        CONFIG | QWEN3MOE | {"num_experts": 7},
        qwen3moe_tensors,
        ConfigError,
        "8 experts up to number 7; config.json says 7",
    ),
    "experts differ": (
        CONFIG | QWEN3MOE,
        lambda: qwen3moe_tensors() | {LAYER + "mlp.experts.3.up_proj.weight": random((12, 8), 1)},
        FileFormatError,
        "experts differ",
    ),
    "mxfp4 without scales": (
        GPT,
        lambda: without(mxfp4_tensors(), LAYER + "mlp.experts.down_proj_scales"),
        FileFormatError,
        "lack .*down_proj_scales",
    ),
    "mxfp4 misshapen": (
        GPT,
        lambda: mxfp4_tensors() | {LAYER + "mlp.experts.down_proj_scales": np.ones((4, 64, 2), np.uint8)},
        FileFormatError,
        "are no MXFP4",
    ),
    "experts without their dimension": (
        GPT,
        lambda: gpt_oss_tensors() | {LAYER + "mlp.experts.down_proj": random((32, 64), 1)},
        ConfigError,
        r"\[32, 64\]; expected that of experts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_by_name(tmp_path: Path, name: str) -> None:
    config, tensors, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as error:
        opened(tmp_path / "f", config, tensors())
    assert error.value.hint


def test_sizes_are_what_data_gives(tmp_path: Path) -> None:
    with opened(tmp_path / "f", GPT, mxfp4_tensors()) as file:
        for t in file.tensors.values():
            data = file.data(t.name)
            assert data.nbytes == t.nbytes and len(data) == math.prod(t.shape[:-1]), t.name
