"""Both back ends on every sample: valid modules, reviewed text, and the interpreter's numbers on a device."""

from __future__ import annotations

import importlib.util
import pickle
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codegen_samples import SAMPLES, Sample, coop_gemm
from codegen_tools import compile_glsl, run_on_device, run_tool, validate

from vkllm_codegen import Block, Buffer, Value, f32, f32x4, kernel, texel, u32, u32x4, write
from vkllm_codegen.interpret import interpret
from vkllm_codegen.spirv.disassemble import disassemble

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"


def expected(sample: Sample) -> dict[str, np.ndarray]:
    """The buffers after a run of the interpreter."""
    buffers = {n: a.copy() for n, a in sample.buffers.items()}
    interpret(sample.kernel, buffers, sample.push, groups=sample.groups)
    return buffers


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    for name, array in wanted.items():
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            scale = float(np.abs(array.astype(np.float64)).max(initial=1.0))
            np.testing.assert_allclose(
                found[name].astype(np.float64), array.astype(np.float64), rtol=tolerance, atol=tolerance * scale, err_msg=name
            )


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_module_is_valid(name: str) -> None:
    validate(SAMPLES[name].kernel)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_glsl_compiles(name: str) -> None:
    assert compile_glsl(SAMPLES[name].kernel.glsl())[:4] == struct.pack("<I", 0x07230203)


@pytest.mark.parametrize("name", ["rmsnorm", "texel_dot", "control", "coop_gemm_8"])
def test_golden(name: str) -> None:
    """Reviewed disassembly. After a change that is meant: delete the file, run the tests twice, review the diff."""
    path = GOLDEN / f"{name}.spvasm"
    text = SAMPLES[name].kernel.spvasm()
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path.name} was missing and has been written: review it, then run again")
    assert text == path.read_text()


@pytest.mark.parametrize("name", sorted(SAMPLES))
@pytest.mark.parametrize("back_end", ["spirv", "glsl"])
def test_device_agrees_with_the_interpreter(name: str, back_end: str, device: Any) -> None:
    sample = SAMPLES[name]
    missing = sample.kernel.features - device.limits.features
    if missing:
        pytest.skip(f"{device.info.name} lacks {sorted(missing)}")
    if device.limits.subgroup_size != 8 and name in ("texel_dot", "subgroup", "coop_gemm_8"):
        pytest.skip("the sample is written for subgroups of 8")
    module = compile_glsl(sample.kernel.glsl()) if back_end == "glsl" else None
    found = run_on_device(device, sample.kernel, sample.buffers, sample.push, sample.groups, module)
    assert_close(found, expected(sample), sample.tolerance)


def instructions(text: str) -> list[str]:
    """The instruction names of a disassembly, in order."""
    return [word.removesuffix("KHR") for word in text.split() if word.startswith("Op")]


def test_disassembly_has_the_instructions_of_spirv_dis(tmp_path: Path) -> None:
    path = tmp_path / "k.spv"
    for name, sample in SAMPLES.items():
        if name.startswith("coop"):
            continue
        path.write_bytes(sample.kernel.spirv())
        theirs = run_tool("spirv-dis", "--no-header", "--raw-id", str(path))
        assert instructions(sample.kernel.spvasm()) == instructions(theirs)


def test_coop_words() -> None:
    """The encoding of what Debian 12's spirv-val does not know, word by word (SPV_KHR_cooperative_matrix)."""
    words = struct.unpack(f"<{len(k := coop_gemm(16).spirv()) // 4}I", k)
    found: dict[int, list[tuple[int, ...]]] = {}
    at = 5
    while at < len(words):
        found.setdefault(words[at] & 0xFFFF, []).append(words[at + 1 : at + (words[at] >> 16)])
        at += words[at] >> 16
    constants = {i[1]: i[2] for i in found[43]}
    types = [tuple(constants[w] for w in i[2:]) for i in found[4456]]
    assert sorted(types) == [(3, 16, 16, 0), (3, 16, 16, 1), (3, 16, 16, 2)]  # scope subgroup, rows, columns, use
    assert [len(i) for i in found[4457]] == [6, 6] and all(i[5] == 0x20 for i in found[4457])  # NonPrivatePointer
    assert [constants[i[3]] for i in found[4457]] == [0, 0]  # row major
    assert [len(i) for i in found[4458]] == [5]
    assert [len(i) for i in found[4459]] == [5]  # no operand mask for floats
    assert found[14] == [(0, 3)]  # Logical, Vulkan
    assert {(6022,), (5345,)} <= set(found[17])


def test_modules_are_deterministic() -> None:
    assert coop_gemm(8).spirv() == coop_gemm(8).spirv()


def test_types_are_themselves_in_another_process() -> None:
    """They are compared by identity."""
    assert all(pickle.loads(pickle.dumps(dtype)) is dtype for dtype in (u32, f32x4, u32x4))


def test_tables_are_those_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/usr/include/spirv/unified1/spirv.core.grammar.json").exists():
        pytest.skip("spirv-headers is not installed")
    spec = importlib.util.spec_from_file_location("gen_spirv_tables", ROOT / "tools" / "gen_spirv_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gen_spirv_tables", module)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, "run python tools/gen_spirv_tables.py"


def test_a_large_kernel_is_quick() -> None:
    """20,000 operations from Python to SPIR-V; the bound is wide because test machines are busy."""
    before = time.perf_counter()

    @kernel(w=texel(u32x4), x=texel(f32x4), y=write(f32), push={"n": u32}, local_size=8)
    def large(b: Block, w: Buffer, x: Buffer, y: Buffer, *, n: Value) -> None:
        lane, acc = b.subgroup_lane(), [b.var(f32, 0.0) for _ in range(8)]
        with b.range(0, n) as i:
            for j in range(60):
                bits, mine = w[(i * 60 + j) * 8 + lane], x[i * 60 + j]
                for c in range(32):
                    acc[c % 8].add((bits[c % 4] & (15 << (c // 8))).to(f32) * b.subgroup_shuffle(mine[c % 4], c % 8))
        for j, a in enumerate(acc):
            y[lane + j * 8] = a.get()

    large.spirv()
    assert time.perf_counter() - before < 6.0


def test_disassembler_refuses_other_data() -> None:
    with pytest.raises(ValueError, match="magic"):
        disassemble(b"\0" * 20)
