"""Every kernel family of the package at representative specs: what `vkllm shaders OUT` exports and the tests sweep over.

The engine makes kernels for the model and the device at hand; this list, for people and for tests, holds each code path once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from vkllm_codegen import Kernel
from vkllm_shaders import attention, embed, experts, matmul, rmsnorm, rope, sample, softmax
from vkllm_shaders.attention import AttentionSpec
from vkllm_shaders.experts import RouteSpec, TileSpec
from vkllm_shaders.formats import CODED, FORMATS, Layout
from vkllm_shaders.gemm import GemmSpec, gemm
from vkllm_shaders.heads import HeadSpec, heads
from vkllm_shaders.matmul import MatmulSpec
from vkllm_shaders.records import LANES
from vkllm_shaders.sample import SampleSpec
from vkllm_shaders.to_records import to_records

Entry = tuple[str, Callable[[], Kernel]]


def all_kernels(row_lanes: int = 8, chunk_lanes: int = 32) -> list[Kernel]:
    """The kernels of `entries`, traced now (about 0.1 s each); their names are unique."""
    return [make() for _, make in entries(row_lanes, chunk_lanes)]


def export(out: Path, progress: Callable[[str], object] = lambda label: None) -> int:
    """Write each kernel to the folder `out` as .spv, .spvasm and .comp, and manifest.json with all their interfaces.

    `progress(label)` is called before each kernel. Returns: how many were written. Raises: OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = []
    for label, make in entries():
        progress(label)
        kernel = make()
        (out / f"{kernel.name}.spv").write_bytes(kernel.spirv())
        (out / f"{kernel.name}.spvasm").write_text(kernel.spvasm())
        (out / f"{kernel.name}.comp").write_text(kernel.glsl())
        manifest.append(interface(kernel))
    (out / "manifest.json").write_text(json.dumps({"kernels": manifest}, indent=1) + "\n")
    return len(manifest)


def interface(kernel: Kernel) -> dict[str, object]:
    """What a host program needs to dispatch a kernel's .spv, in JSON's types. Bindings are numbered from 0 in this order."""
    bindings = [{"name": b.name, "kind": b.kind, "type": str(b.dtype), "access": b.access} for b in kernel.bindings]
    return {
        "name": kernel.name,
        "spirv_bytes": len(kernel.spirv()),
        "local_size": list(kernel.local_size),
        "bindings": bindings,
        "push": [{"name": name, "type": str(dtype), "offset": offset} for name, dtype, offset in kernel.push],
        "spec": [{"name": name, "id": number, "default": default} for name, (number, default) in kernel.spec.items()],
        "features": sorted(kernel.features),
    }


def entries(row_lanes: int = 8, chunk_lanes: int = 32) -> list[Entry]:
    """(label, function that makes the kernel). The lanes are the subgroup sizes of the two schedules."""
    matmuls = [(spec.name, partial(matmul.matmul, spec)) for spec in _matmul_specs(row_lanes, chunk_lanes)]
    embeds = [
        (f"embed_{fmt.lower()}_{layout.kind}", partial(embed.embed, fmt, layout))
        for layout in _layouts(row_lanes)
        for fmt in FORMATS
    ]
    lanes = (row_lanes, chunk_lanes)
    gemms = [(spec.name, partial(gemm, spec)) for spec in _gemm_specs(chunk_lanes)]
    integers = list(_integers()) if row_lanes == LANES else []
    rest = [*_attention(*lanes), *_heads(*lanes), *_experts(*lanes), *_plain(), *_sample(*lanes)]
    return [*matmuls, *gemms, *integers, *embeds, *rest]


def _layouts(row_lanes: int) -> tuple[Layout, Layout]:
    return Layout("lane_row", row_lanes, 4), Layout("lane_chunk", 1, 2)


def _matmul_specs(row_lanes: int, chunk_lanes: int) -> Iterator[MatmulSpec]:
    for layout in _layouts(row_lanes):
        spec = partial(MatmulSpec, layout=layout, subgroup=chunk_lanes)
        yield from (spec(fmt) for fmt in FORMATS)
        yield spec("Q5_0", tile=4, norm=True, bias=True, epilogue="qkv", head_dim=64, rope_pairing="half")
        yield spec("Q8_0", tile=4, norm=True, epilogue="pairs" if layout.kind == "lane_row" else "qkv", head_dim=64)
        yield spec("Q4_K", norm=True, epilogue="swiglu")
        yield spec("Q6_K", tile=8, epilogue="residual")
        yield spec("Q8_0", norm=True, gather=True)
        yield spec("MXFP4", norm=True, bias=True, epilogue="swiglu_oai", experts=True)
    yield from (MatmulSpec(fmt, _layouts(row_lanes)[1], activations="int8", subgroup=chunk_lanes) for fmt in ("Q8_0", "Q4_K"))


def _integers() -> Iterator[Entry]:
    """Integer products on lavapipe, with what the chain fuses into them, and who else makes or reads their operands."""
    yield from ((spec.name, partial(matmul.matmul, spec)) for spec in _pair_specs())
    first, second = (_pair_spec(fmt, norm=True, bias=True, side_by_side=4) for fmt in ("Q4_K", "Q6_K"))
    yield f"{first.name}_and_{second.fmt.lower()}", partial(matmul.matmul_pair, first, second)
    yield from ((f"embed_{fmt.lower()}_lane_pair", partial(embed.embed_codes, fmt)) for fmt in CODED)
    for fmt in ("Q5_0", "Q6_K"):
        yield f"embed_{fmt.lower()}_lane_pair_records", partial(embed.embed_codes, fmt, 12.5, records=True)
    for norm in (False, True):
        for gather in (False, True):
            yield "to_records" + "_norm" * norm + "_gather" * gather, partial(to_records, norm, gather)
    for attends in (
        AttentionSpec(64, 7, records=True),
        AttentionSpec(128, 4, records=True),
        AttentionSpec(32, 2, tile=16, cache="q8_0", scale=0.1, softcap=50.0, windowed=True, sinks=True, records=True),
    ):
        yield f"attention_direct_{attends.name}", partial(attention.direct, attends)


_pair_spec = partial(MatmulSpec, layout=Layout("lane_pair"), activations="int8")


def _pair_specs() -> Iterator[MatmulSpec]:
    spec = _pair_spec
    for fmt in CODED:
        yield from (spec(fmt), spec(fmt, tile=8), spec(fmt, side_by_side=2), spec(fmt, side_by_side=4))
        if CODED[fmt].bits in (4, 5):
            yield spec(fmt, tile=8, side_by_side=2)
        if CODED[fmt].fits_wide:
            yield spec(fmt, tile=8, side_by_side=2, wide=True)
    yield spec("Q4_0", tile=2)
    yield spec("Q5_K", tile=16)
    heads = partial(spec, norm=True, head_dim=64)
    yield heads("Q5_0", side_by_side=4, bias=True, epilogue="qkv", rope_pairing="half")
    yield heads("Q5_0", tile=8, side_by_side=2, bias=True, epilogue="pairs", rope_pairing="half")
    yield heads("Q8_0", tile=8, epilogue="pairs")
    yield from (spec("Q4_K", side_by_side=n, norm=True, epilogue="swiglu", records=True) for n in (2, 4))
    yield spec("Q4_K", tile=8, norm=True, epilogue="swiglu")
    yield spec("Q2_K", side_by_side=4, norm=True, epilogue="geglu")
    yield from (spec("Q6_K", side_by_side=n, epilogue="residual", records=True) for n in (1, 4))
    yield spec("Q6_K", tile=8, bias=True, epilogue="residual")
    yield spec("Q8_0", side_by_side=4, norm=True, gather=True, scale=0.25, softcap=30.0)
    yield spec("Q8_0", tile=8, norm=True)
    yield from (spec("Q4_K", tile=tile, norm=True, bias=True, epilogue="swiglu_oai", experts=True) for tile in (1, 8))


def _gemm_specs(chunk_lanes: int) -> Iterator[GemmSpec]:
    """Without cooperative matrices, which not every tool and driver knows."""
    spec = partial(MatmulSpec, layout=_layouts(8)[1], subgroup=chunk_lanes, subgroups=1)
    for fmt, fused in (("Q8_0", {}), ("Q4_K", {"norm": True, "bias": True, "epilogue": "residual"})):
        yield GemmSpec(spec(fmt, **fused), 16, 16, 16)  # type: ignore[arg-type]


def _attention(row_lanes: int, chunk_lanes: int) -> Iterator[Entry]:
    for head_dim, group in ((64, 7), (128, 4), (8, 2)):
        for spec in (
            AttentionSpec(head_dim, group, lanes=row_lanes),
            AttentionSpec(head_dim, group, lanes=chunk_lanes, schedule="lane_chunk"),
        ):
            yield f"attention_direct_{spec.name}", partial(attention.direct, spec)
            if head_dim == 64:
                yield f"attention_partial_{spec.name}", partial(attention.partial, spec)
                yield f"attention_combine_{spec.name}", partial(attention.combine, spec)
    everything = AttentionSpec(
        64, 2, lanes=row_lanes, subgroups=2, cache="q8_0", scale=0.1, softcap=50.0, windowed=True, sinks=True
    )
    for spec in (everything, replace(everything, lanes=chunk_lanes, schedule="lane_chunk")):
        for make in (attention.direct, attention.partial, attention.combine):
            yield f"attention_{make.__name__}_{spec.name}", partial(make, spec)


def _heads(row_lanes: int, chunk_lanes: int) -> Iterator[Entry]:
    for spec in (
        HeadSpec(128, 96, "half", True, "f16", row_lanes),
        HeadSpec(64, 64, "half", False, "q8_0", row_lanes),
        HeadSpec(64, 32, "interleaved", True, "q8_0", chunk_lanes),
    ):
        yield spec.name, partial(heads, spec)


def _experts(row_lanes: int, chunk_lanes: int) -> Iterator[Entry]:
    for spec in (RouteSpec(128, 8, "used", row_lanes), RouteSpec(60, 4, "all", chunk_lanes)):
        yield f"route_{spec.n_used}_of_{spec.n_expert}", partial(experts.route, spec)
    yield "tiles_of_experts", partial(experts.tiles, TileSpec(128, lanes=row_lanes))
    yield from ((f"combine_{kind}", partial(experts.combine, 8, kind)) for kind in ("lane_row", "lane_chunk"))


def _plain() -> Iterator[Entry]:
    yield from (("softmax", softmax.softmax), ("rmsnorm", rmsnorm.rmsnorm), ("rmsnorm_add", rmsnorm.rmsnorm_add))
    yield from ((f"rope_{pairing}", partial(rope.rope, 64, pairing)) for pairing in ("interleaved", "half"))


def _sample(row_lanes: int, chunk_lanes: int) -> Iterator[Entry]:
    for spec in dict.fromkeys((SampleSpec(lanes=row_lanes), SampleSpec(k=40, lanes=row_lanes), SampleSpec(lanes=chunk_lanes))):
        yield f"top_k_{spec.k}_s{spec.lanes}", partial(sample.top_k, spec)
        yield f"argmax_{spec.k}_s{spec.lanes}", partial(sample.argmax, spec)
    yield "argmax_follow", partial(sample.argmax, SampleSpec(lanes=row_lanes), follow=True)
