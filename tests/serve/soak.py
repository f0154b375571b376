"""Many clients over and over, and the memory of the server after each round: `python tests/serve/soak.py --rounds 8`.

Starts `vkllm serve tiny`, lets clients ask for whole replies and streams at random times, with stops and disconnects, and prints
one JSON object a line: round, seconds, resident MB, replies. Ends with status 1 where memory has grown by more than --allow-mb
since round --warm-up, or a block is taken.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SYSTEM = "There was a small dog who lived in a house near the river with a cat, a bird and an old fish. "
STARTS = ("Once upon", "The cat", "One day the bird", "A")
STOPS = (".", " the", "zebra")


def job(client: Any, seed: int) -> tuple[dict[str, Any], str | None]:
    """One request of a random kind. Returns its body, and the text; None where the client left before the end."""
    dice = random.Random(seed)
    prompt = SYSTEM * dice.randint(0, 2) + dice.choice(STARTS) + " saw" * dice.randint(0, 1)
    body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": dice.randint(1, 40), "temperature": 0}
    leaves = dice.random() < 0.15
    body["stream"] = leaves or dice.random() < 0.5
    if dice.random() < 0.2:
        body["stop"] = [dice.choice(STOPS)]
    time.sleep(dice.random() * 0.02)
    if not body["stream"]:
        reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        return body, reply.json()["choices"][0]["text"]
    text = ""
    with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        for i, line in enumerate(reply.iter_lines()):
            if leaves and i > 4:
                return body, None
            if line.startswith("data: {"):
                text += "".join(c["text"] for c in json.loads(line[6:])["choices"])
    return body, text


def resident_mb(pid: int) -> float:
    """Memory of a process that is in RAM, in MB; Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1000


def one_round(url: str, n_client: int, n_request: int, seed: int) -> int:
    """Runs the requests; returns how many were answered to the end."""
    import httpx

    limits = httpx.Limits(max_connections=n_client, max_keepalive_connections=n_client)
    with httpx.Client(base_url=url, timeout=300, limits=limits) as client, ThreadPoolExecutor(n_client) as clients:
        found = list(clients.map(lambda i: job(client, i), range(seed, seed + n_request)))
    return sum(text is not None for _, text in found)


def main() -> int:
    """Serve, ask, measure."""
    import httpx

    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rounds", 8), ("clients", 32), ("requests", 500), ("warm-up", 3), ("allow-mb", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    command = [sys.executable, "-m", "vkllm", "serve", "tiny", "--port", "0", "--n-ctx", "512", "--log-level", "info"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        drain = ThreadPoolExecutor(1)
        drain.submit(server.stderr.read)
        sizes = []
        for i in range(options.rounds):
            started = time.perf_counter()
            n = one_round(url, options.clients, options.requests, i * options.requests)
            time.sleep(0.5)
            sizes.append(resident_mb(server.pid))
            line = {"round": i, "seconds": round(time.perf_counter() - started, 1), "resident_mb": sizes[-1], "replies": n}
            print(json.dumps(line), flush=True)
        leaked = "vkllm_kv_blocks_used 0.0" not in httpx.get(f"{url}/metrics").text
    finally:
        server.terminate()
        server.wait()
    grown = sizes[-1] - sizes[min(options.warm_up, len(sizes) - 1)]
    print(json.dumps({"grown_mb": round(grown, 1), "leaked": leaked}))
    return int(leaked or grown > options.allow_mb)


if __name__ == "__main__":
    sys.exit(main())
