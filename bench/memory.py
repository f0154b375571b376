"""Memory of a model: on the device, and of the process at its highest while loading and generating. Ends in one JSON line.

    python bench/memory.py [MODEL] [--n-ctx 4096]

Without MODEL: a file of Llama-3.2-3B's shape in Q4_K_M's types, 2 GB of random blocks, in a temporary folder. `anonymous` counts
what is no mapped file: where device memory is host memory it holds the packed weights, once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import gguf
import numpy as np

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.memory import Fit

N_LAYER, N_EMBD, N_FF, N_HEAD, N_KV_HEAD, HEAD_DIM, N_VOCAB = 28, 3072, 8192, 24, 8, 128, 128256


class Peak:
    """The highest resident memory of this process, read twenty times a second."""

    def __init__(self) -> None:
        self.resident = self.anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
            kib = {words[0]: int(words[1]) for words in lines if words and words[0].startswith(("VmRSS", "Rss"))}
            self.resident = max(self.resident, kib["VmRSS:"] << 10)
            self.anonymous = max(self.anonymous, kib["RssAnon:"] + kib["RssShmem:"] << 10)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def random_blocks(n_row: int, n_col: int, kind: str) -> np.ndarray:
    """Blocks of 256 weights with small scales and every other bit drawn."""
    rng, n = np.random.default_rng(n_row), n_row * n_col // 256
    small = np.full((n, 1), 1e-3 / np.sqrt(n_col), np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks = [rng.integers(0, 256, (n, 208), dtype=np.uint8), small]
    else:
        blocks = [small, small, rng.integers(0, 256, (n, 140), dtype=np.uint8)]
    return np.concatenate(blocks, axis=1).reshape(n_row, -1)


def write_3b(path: Path) -> None:
    """Llama-3.2-3B's shape; matrices of one shape and type share their numbers."""
    writer, made = gguf.GGUFWriter(path, "llama"), dict[tuple[int, int, str], np.ndarray]()
    for key, value in {
        "block_count": N_LAYER, "embedding_length": N_EMBD, "feed_forward_length": N_FF, "context_length": 131072,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_KV_HEAD, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM, "vocab_size": N_VOCAB,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5e5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(str, range(N_VOCAB - 259))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (N_VOCAB - 259)])
    writer.add_token_scores([0.0] * N_VOCAB)

    def matrix(name: str, n_row: int, n_col: int, kind: str) -> None:
        if (n_row, n_col, kind) not in made:
            made[n_row, n_col, kind] = random_blocks(n_row, n_col, kind)
        writer.add_tensor(f"{name}.weight", made[n_row, n_col, kind], raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))

    matrix("token_embd", N_VOCAB, N_EMBD, "Q6_K")
    vector("output_norm")
    for i in range(N_LAYER):
        b, kv = f"blk.{i}", N_KV_HEAD * HEAD_DIM
        more = "Q6_K" if i < N_LAYER // 8 or i >= 7 * N_LAYER // 8 or (i - N_LAYER // 8) % 3 == 2 else "Q4_K"
        vector(f"{b}.attn_norm")
        vector(f"{b}.ffn_norm")
        matrix(f"{b}.attn_q", N_EMBD, N_EMBD, "Q4_K")
        matrix(f"{b}.attn_k", kv, N_EMBD, "Q4_K")
        matrix(f"{b}.attn_v", kv, N_EMBD, more)
        matrix(f"{b}.attn_output", N_EMBD, N_EMBD, "Q4_K")
        matrix(f"{b}.ffn_gate", N_FF, N_EMBD, "Q4_K")
        matrix(f"{b}.ffn_up", N_FF, N_EMBD, "Q4_K")
        matrix(f"{b}.ffn_down", N_EMBD, N_FF, more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(model: Path, n_ctx: int) -> dict[str, object]:
    """Load the model, generate four tokens, and tell what that took."""
    peak, started = Peak(), time.perf_counter()
    with LLMEngine.init_model(model, RuntimeConfig(n_ctx=n_ctx, progress=True)) as engine:
        load_s = time.perf_counter() - started
        engine.generate([1, 2, 3, 4], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        device = Fit(engine.chain._lower, engine.chain.n_block).needed
    peak.stop()
    return {
        "model": model.name,
        "file_gib": model.stat().st_size / 2**30,
        "device_gib": device / 2**30,
        "peak_resident_gib": peak.resident / 2**30,
        "peak_anonymous_gib": peak.anonymous / 2**30,
        "load_s": load_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("-c", "--n-ctx", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "llama-3.2-3b-Q4_K_M.gguf")
        if args.model is None:
            write_3b(model)
        found = measure(model, args.n_ctx)
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}))


if __name__ == "__main__":
    main()
