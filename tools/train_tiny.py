"""Make the model `tiny`: tokenizer, training on the text of tiny_text.py, GGUF export, evaluation.

    python tools/train_tiny.py --minutes 40 --out vkllm/data/tiny.gguf --f16 /tmp/tiny-f16.gguf

Needs the development extra `train` (torch, tokenizers, gguf). One CPU core is enough. The run is deterministic for a given
`--steps` on one machine: step s always sees the text drawn from seed (SEED, s). Sources: Qwen2 (arXiv 2407.10671), RoPE
(arXiv 2104.09864), SwiGLU (arXiv 2002.05202), Muon's orthogonalized momentum (kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tiny_text import ANIMALS, BOYS, END, GIRLS, START, chat_text, checks, document
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SEED = 20261121
TEXT_END = "<|endoftext|>"
SPECIALS = (TEXT_END, START, END)
IGNORED = -100
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model, all rows of weights multiples of 256 (a K-quant block)."""

    n_layer: int = 4
    n_embd: int = 256
    n_head: int = 4
    n_kv_head: int = 2
    head_dim: int = 64
    n_ff: int = 768
    n_vocab: int = 2048
    n_ctx: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-6


# --- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(n_vocab: int, n_document: int = 12000) -> Tokenizer:
    """Byte-level BPE with Qwen2's pre-tokenizer; the control tokens have the last ids."""
    rng = random.Random(SEED)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - len(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    texts = (document(rng).replace(START, "").replace(END, "") for _ in range(n_document))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if tokenizer.get_vocab_size() != n_vocab:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, expected {n_vocab}; draw more documents")
    return tokenizer


def labels(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a document with IGNORED for what users and systems say: the model need not guess their next question."""
    start_id, end_id, assistant_id = (tokenizer.token_to_id(token) for token in (START, END, "assistant"))
    hidden, shown = False, []
    for i, token_id in enumerate(ids):
        hidden = ids[i + 1] != assistant_id if token_id == start_id else hidden
        shown.append(IGNORED if hidden else token_id)
        hidden = hidden and token_id != end_id
    return shown


def batch(tokenizer: Tokenizer, step: int, n_row: int, n_col: int, power: float) -> tuple[Tensor, Tensor]:
    """Token ids and labels, each [n_row, n_col], of one step: a row starts with a document and is filled with further ones."""
    rng = random.Random(SEED * 1_000_003 + step)
    inputs, targets = [], []
    for _ in range(n_row):
        row, shown = list[int](), list[int]()
        while len(row) <= n_col:
            ids = tokenizer.encode(document(rng, power) + TEXT_END).ids
            row, shown = row + ids, shown + labels(tokenizer, ids)
        inputs.append(row[:n_col])
        targets.append(shown[1 : n_col + 1])
    return torch.tensor(inputs), torch.tensor(targets)


def token_weights(tokenizer: Tokenizer) -> Tensor:
    """Weights of the loss [n_vocab]: who a story is about shows in few tokens, so those count more."""
    weights = torch.ones(tokenizer.get_vocab_size())
    for words, weight in (
        ((*GIRLS, *BOYS), 6.0),
        (ANIMALS, 2.0),
        (("he", "she", "him", "her", "his", "He", "She", "His"), 2.0),
    ):
        for word in words:
            weights[tokenizer.encode(f" {word}").ids[0]] = weight
    return weights


# --- model -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32."""
    y = x.float()
    scaled: Tensor = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    return scaled


def rope_table(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each [n_ctx, head_dim / 2]."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.outer(torch.arange(shape.n_ctx), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [batch, head, position, head_dim]; element i pairs with i + head_dim / 2."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Layer(nn.Module):
    """One decoder layer; parameters have the names of GGUF."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        n_q, n_kv = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
        self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(s.n_embd)), nn.Parameter(torch.ones(s.n_embd))
        self.attn_q, self.attn_k, self.attn_v = nn.Linear(s.n_embd, n_q), nn.Linear(s.n_embd, n_kv), nn.Linear(s.n_embd, n_kv)
        self.attn_output = nn.Linear(n_q, s.n_embd, bias=False)
        self.ffn_gate, self.ffn_up = nn.Linear(s.n_embd, s.n_ff, bias=False), nn.Linear(s.n_embd, s.n_ff, bias=False)
        self.ffn_down = nn.Linear(s.n_ff, s.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Residual attention and residual SwiGLU on x [batch, position, n_embd]."""
        s, (n_batch, n_pos, _) = self.shape, x.shape
        h = rms_norm(x, self.attn_norm, s.eps)
        q, k, v = (f(h).view(n_batch, n_pos, -1, s.head_dim).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(s.n_head // s.n_kv_head, 1) for t in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(heads.transpose(1, 2).reshape(n_batch, n_pos, -1))
        h = rms_norm(x, self.ffn_norm, s.eps)
        x = x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return x


class Model(nn.Module):
    """Qwen2: tied embeddings, biases on q, k and v."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.randn(shape.n_vocab, shape.n_embd) * 0.02)
        self.blk = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.cos, self.sin = rope_table(shape)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2 and name != "token_embd":
                nn.init.normal_(p, std=0.02 if "output" in name or "down" in name else p.shape[1] ** -0.5 * 0.7)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, position, n_vocab] of ids [batch, position]."""
        x = self.token_embd[ids]
        for layer in self.blk:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return F.linear(rms_norm(x, self.output_norm, self.shape.eps), self.token_embd)


# --- optimizer -------------------------------------------------------------------------------------------------------


def orthogonalize(g: Tensor, n_iteration: int = 5) -> Tensor:
    """A matrix near U V^T of the singular value decomposition of g, by a quintic Newton-Schulz iteration."""
    x: Tensor = g.bfloat16() / (g.norm() + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(n_iteration):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if g.shape[0] > g.shape[1] else x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the weight matrices of the layers."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def optimizers(model: Model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for embeddings, norms and biases."""
    matrices = [p for p in model.blk.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, muon_lr), torch.optim.Adam(rest, adam_lr, betas=(0.9, 0.98), eps=1e-10)]


def rate(progress: float) -> float:
    """Factor of the learning rate: short warm-up, plateau, then down to zero over the second half."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, 1 - progress) / 0.55)


# --- training --------------------------------------------------------------------------------------------------------


def save(path: Path, model: Model, optims: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    """Write a checkpoint from which --resume goes on."""
    state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step, "seconds": seconds}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(model: Model, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Train until --steps or --minutes; the schedule follows whichever is nearer to its end."""
    checkpoint, log = args.work / "checkpoint.pt", args.work / "loss.jsonl"
    optims = optimizers(model, args.muon_lr, args.adam_lr)
    base = [group["lr"] for o in optims for group in o.param_groups]
    step, spent, weights = 0, 0.0, token_weights(tokenizer)
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for o, saved in zip(optims, state["optims"], strict=True):
            o.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]
    started, shown, losses, n_token = time.monotonic() - spent, time.monotonic(), [], 0
    while True:
        seconds = time.monotonic() - started
        progress = max(seconds / (60 * args.minutes), step / args.steps)
        if progress >= 1:
            break
        # Short rows first (many documents start at position 0), long ones at the end (all positions of the context).
        n_col = 256 if progress < 0.85 else 512 if progress < 0.96 else model.shape.n_ctx
        power = 0.6 if progress < 0.3 else 0.9  # small topics first, then every fact almost alike
        ids, targets = batch(tokenizer, step, args.tokens // n_col, n_col, power)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), weights, ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        for group, lr in zip((g for o in optims for g in o.param_groups), base, strict=True):
            group["lr"] = lr * rate(progress)
        for o in optims:
            o.step()
            o.zero_grad()
        step, n_token = step + 1, n_token + ids.numel()
        losses.append(loss.item())
        if step % 20 == 0:
            speed = n_token / (time.monotonic() - shown)
            record = {"step": step, "loss": round(sum(losses) / len(losses), 4), "tokens_s": round(speed), "s": round(seconds)}
            print(f"step {step:5d}  loss {record['loss']:.4f}  {speed:6.0f} tokens/s  {progress:6.1%}", flush=True)
            with log.open("a") as f:
                f.write(json.dumps(record) + "\n")
            shown, losses, n_token = time.monotonic(), [], 0
        if step % 100 == 0:
            save(checkpoint, model, optims, step, time.monotonic() - started)
    save(checkpoint, model, optims, step, time.monotonic() - started)


# --- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def complete(model: Model, tokenizer: Tokenizer, prompt: str, n: int) -> str:
    """Greedy continuation, up to n tokens or a control token."""
    ids = tokenizer.encode(prompt).ids
    stop, n_prompt = {tokenizer.token_to_id(token) for token in SPECIALS}, len(ids)
    while len(ids) < n_prompt + n:
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
        if best in stop:
            break
        ids.append(best)
    return tokenizer.decode(ids[n_prompt:], skip_special_tokens=False)


def evaluate(model: Model, tokenizer: Tokenizer, n_check: int) -> None:
    """Ask wordings that the training text left out (n_check of them, 0: all); print the score of each kind and failures."""
    todo = checks()
    if n_check:
        todo = random.Random(SEED).sample(todo, min(n_check, len(todo)))
    right, total, wrong = Counter[str](), Counter[str](), defaultdict(list)
    for check in todo:
        out = complete(model, tokenizer, check.prompt, 24).split("\n")[0].strip()
        parts = (check.kind, check.kind[:4], "all")
        total.update(parts)
        if out.startswith(check.expected):
            right.update(parts)
        else:
            asked = check.prompt.removeprefix(f"{START}user\n").split(END)[0]
            wrong[check.kind].append(f"    {asked!r}: expected {check.expected!r}, got {out!r}")
    print("wordings that the training text leaves out:")
    for kind in sorted(total):
        print(f"{kind:20s} {right[kind]:3d} / {total[kind]:3d}", *wrong[kind][:4], sep="\n")


def ask(*turns: str) -> str:
    """The ChatML prompt of alternating user and assistant texts."""
    roles = ("user", "assistant") * len(turns)
    return chat_text(list(zip(roles, turns, strict=False))) + f"{START}assistant\n"


SAMPLES = (
    *("Once upon a time", "The capital of France is", "Lily the fox", "2 + 3 =", "One day, Tom and Anna wanted to build a boat."),
    ask("What is the capital of France?"),
    ask("Tell me a story about a bear named Max."),
    ask("Hello!", "Hello! How can I help you?", "Who are you?"),
    ask("How many legs does a spider have?", "A spider has eight legs.", "And what is 7 plus 8?"),
)


# --- export ----------------------------------------------------------------------------------------------------------


def export(path: Path, model: Model, tokenizer: Tokenizer, file_type: gguf.LlamaFileType) -> None:
    """Write a GGUF file: matrices as Q8_0 or F16, norms and biases as F32."""
    s, w = model.shape, gguf.GGUFWriter(path, "qwen2")
    w.add_type(gguf.GGUFType.MODEL)
    w.add_name("tiny")
    w.add_description("A small model of English stories, facts and chats, trained from scratch by tools/train_tiny.py of vkllm")
    w.add_license("apache-2.0")
    w.add_languages(["en"])
    w.add_file_type(file_type)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_block_count(s.n_layer)
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_kv_head)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_rope_freq_base(s.rope_theta)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_vocab_size(s.n_vocab)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokens])
    w.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    w.add_bos_token_id(tokens.index(TEXT_END))
    w.add_eos_token_id(tokens.index(END))
    w.add_eot_token_id(tokens.index(END))
    w.add_pad_token_id(tokens.index(TEXT_END))
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)
    matrix_type = gguf.GGMLQuantizationType.Q8_0 if file_type == gguf.LlamaFileType.MOSTLY_Q8_0 else gguf.GGMLQuantizationType.F16
    for name, p in model.named_parameters():
        gguf_name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        data = p.detach().float().numpy()
        kind = matrix_type if p.ndim == 2 else gguf.GGMLQuantizationType.F32
        w.add_tensor(gguf_name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(f"wrote {path}, {path.stat().st_size} bytes")


def load_gguf(path: Path) -> Model:
    """The model with the weights that a GGUF file holds (dequantized), to evaluate what is shipped."""
    model = Model(Shape())
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.array(tensors[name if name in tensors else f"{name}.weight"])))
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--steps", type=int, default=4000, help="stop after this number of steps")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder of checkpoint, tokenizer and loss log")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of --work")
    parser.add_argument("--out", type=Path, default=Path("build/tiny/tiny.gguf"), help="the Q8_0 file")
    parser.add_argument("--f16", type=Path, help="also write an F16 file")
    parser.add_argument("--checks", type=int, default=0, help="number of held-out wordings to ask (0: all)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.work.mkdir(parents=True, exist_ok=True)
    vocabulary = args.work / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(vocabulary)) if args.resume and vocabulary.exists() else train_tokenizer(Shape.n_vocab)
    tokenizer.save(str(vocabulary))
    model = Model(Shape())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, args)
    if args.f16:
        export(args.f16, model, tokenizer, gguf.LlamaFileType.MOSTLY_F16)
    export(args.out, model, tokenizer, gguf.LlamaFileType.MOSTLY_Q8_0)
    shipped = load_gguf(args.out)
    for prompt in SAMPLES:
        print(f"> {prompt!r}\n{complete(shipped, tokenizer, prompt, 160)!r}")
    evaluate(shipped, tokenizer, args.checks)


if __name__ == "__main__":
    main()
