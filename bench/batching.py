"""Decode throughput of many streams over that of one: `python bench/batching.py MODEL [-s 8] [-n 32]`. Ends in one JSON line.

The ceiling: on a device bound by the bandwidth of weights, n streams give n times the tokens of one.
"""

from __future__ import annotations

import argparse
import json
import statistics

from vkllm import LLMEngine, RuntimeConfig, SamplingParams
from vkllm.batching import BatchEngine


def tokens_per_second(batch: BatchEngine, n_stream: int, n_token: int) -> float:
    """Of all streams together, each from its first token to its last."""
    params = SamplingParams(temperature=0.0, max_tokens=n_token, ignore_eos=True)
    handles = [batch.submit([7 + i, 11, 13, 17], params) for i in range(n_stream)]
    return sum(handle.result().timings.decode_tok_s for handle in handles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-s", "--streams", type=int, default=8)
    parser.add_argument("-n", "--tokens", type=int, default=32)
    parser.add_argument("-r", "--repeat", type=int, default=3)
    args = parser.parse_args()
    found: dict[int, list[float]] = {1: [], args.streams: []}
    runtime = RuntimeConfig(n_ctx=256, n_seq=args.streams, speculate="off")
    with LLMEngine.init_model(args.model, runtime) as engine, BatchEngine(engine) as batch:
        for n in found:
            tokens_per_second(batch, n, 4)  # records the buckets
        for _ in range(args.repeat):
            for n, values in found.items():
                values.append(tokens_per_second(batch, n, args.tokens))
        device = engine.device.info.name
    one, many = (statistics.median(values) for values in found.values())
    figures = {"model": args.model, "device": device, "streams": args.streams, "one_tok_s": one, "many_tok_s": many}
    print(json.dumps(figures | {"gain": many / one}))


if __name__ == "__main__":
    main()
