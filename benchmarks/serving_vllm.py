"""Stock vLLM beside the lookahead plugin, in one run: python -m benchmarks.serving_vllm MODEL BUNDLE --out serving.json

Runs in an environment for serving (docs/serving.md). Servers with the same pool of KV blocks are started one after the
other: stock, the plugin (decode rows read resident blocks), and the plugin with host memory (cold blocks leave the
pool). Each gets the same requests at once, then needle questions one by one. Printed a server: new tokens a second from
the first token to the last, time between tokens (median and 95th percentile), blocks read of those held, most requests
decoding at once, blocks fetched a window, preemptions, and how many needles were found.
"""

import argparse
import inspect
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_gen.text.needles import make_task

TEXTS = ["argparse", "tarfile", "typing", "zipfile", "subprocess", "logging", "dataclasses", "asyncio.base_events"]
CHUNK = 16
QUESTION = "Read the text below, then answer the question at its end.\n\n{text}\n\n{question}"


@dataclass(frozen=True)
class Result:
    """One server's figures; blocks and fetches are missing of the stock one."""

    server: str
    tokens_per_second: float
    gap_median_ms: float
    gap_p95_ms: float
    most_decoding: int
    preemptions: int
    read: float | None
    fetched_per_window: float | None
    needles: int
    asked: int


class Client:
    """Of one server's OpenAI interface."""

    def __init__(self, port: int, model: str) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}", model

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def stream(self, prompt: list[int], tokens: int) -> list[float]:
        """Send a greedy request; returns when each new token came."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        with self._post("/v1/completions", body) as lines:
            return [time.perf_counter() for line in lines if line.startswith(b"data: {")]

    def chat(self, text: str, tokens: int) -> str:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        with self._post("/v1/chat/completions", body) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    def tokens(self, text: str) -> list[int]:
        with self._post("/tokenize", {"prompt": text, "add_special_tokens": False}) as answer:
            return json.load(answer)["tokens"]

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.get("/metrics").splitlines() if line and not line.startswith("#")]
        return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body | {"model": self.model}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=3600)


@contextmanager
def server(args: argparse.Namespace, settings: dict[str, str], log: Path) -> Any:
    """A running server, stock without settings. Pools are equal: the stock CPU backend has blocks of 32 tokens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    block = CHUNK if settings else args.stock_block
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model, "--port", str(port),
        "--block-size", str(block), "--num-gpu-blocks-override", str(args.pool // block), "--max-num-seqs",
        str(args.requests), "--no-enable-prefix-caching", *shlex.split(args.engine),
    ]  # fmt: skip
    environment = os.environ | {f"LOOKAHEAD_{name}": value for name, value in settings.items()}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        client = Client(port, args.model)
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server stopped: {log.read_text()[-2000:]}")
            try:
                client.get("/health")
                break
            except OSError:
                time.sleep(0.5)
        yield client
    finally:
        process.terminate()
        process.wait()


def measure(name: str, client: Client, args: argparse.Namespace) -> Result:
    """All figures of one server."""
    texts = [client.tokens(inspect.getsource(import_module(module))) for module in TEXTS]
    prompts = [texts[k % len(texts)][k : k + args.prompt - 100 * (k % 3)] for k in range(args.requests)]
    client.stream(prompts[0][:50], 2)
    before = client.metrics()
    with ThreadPoolExecutor(args.requests) as pool:
        times = list(pool.map(lambda prompt: client.stream(prompt, args.new), prompts))
    after = client.metrics()
    counted = {key: value - before.get(key, 0) for key, value in after.items()}
    gaps = [later - earlier for came in times for earlier, later in pairwise(came)]
    edges = sorted([(came[0], 1) for came in times] + [(came[-1], -1) for came in times])
    decoding = [sum(step for _, step in edges[: k + 1]) for k in range(len(edges))]
    spent = max(came[-1] for came in times) - min(came[0] for came in times)
    rng, found = random.Random(0), 0
    for _ in range(args.needles):
        task = make_task("single", "heldout", rng, 0, 1)
        (sentence, depth), paragraphs = task.needles[0], TEXT.split("\n\n")
        first = rng.randrange(len(paragraphs) // 2)
        words = "\n\n".join(paragraphs[first:])[: args.needle_letters]
        place = words.rfind("\n", 0, int(depth * len(words))) + 1
        text = f"{words[:place]}{sentence}\n{words[place:]}"
        found += task.values[0] in client.chat(QUESTION.format(text=text, question=task.question), 40)
    windows = counted.get("lookahead:refreshes_total")
    return Result(
        server=name,
        tokens_per_second=sum(map(len, times)) / spent,
        gap_median_ms=1000 * statistics.median(gaps),
        gap_p95_ms=1000 * statistics.quantiles(gaps, n=20)[-1],
        most_decoding=max(decoding),
        preemptions=int(counted["vllm:num_preemptions_total"]),
        read=counted["lookahead:read_total"] / counted["lookahead:made_total"] if windows else None,
        fetched_per_window=counted.get("lookahead:fetched_total", 0) / windows if windows else None,
        needles=found,
        asked=args.needles,
    )


TEXT = inspect.getsource(import_module("argparse")) + inspect.getsource(import_module("tarfile"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("bundle")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=3520, help="tokens in the pool of KV blocks")
    parser.add_argument("--requests", type=int, default=4, help="requests at once")
    parser.add_argument("--prompt", type=int, default=1400, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--needles", type=int, default=10, help="needle questions, one by one")
    parser.add_argument("--needle-letters", type=int, default=4500)
    parser.add_argument("--host-gib", default="2")
    parser.add_argument("--stock-block", type=int, default=32, help="16 on a GPU")
    parser.add_argument("--engine", default="", help="more options of the engine, in one string")
    args = parser.parse_args()
    ours = {"BUNDLE": args.bundle}
    results = []
    for name, settings in (("stock", {}), ("visibility", ours), ("memory", ours | {"HOST_GIB": args.host_gib})):
        with server(args, settings, args.out.with_suffix(f".{name}.log")) as client:
            results.append(measure(name, client, args))
        print(json.dumps(asdict(results[-1])), flush=True)
    arguments = {key: str(value) for key, value in vars(args).items()}
    args.out.write_text(json.dumps({"arguments": arguments, "results": [asdict(each) for each in results]}, indent=1))


if __name__ == "__main__":
    main()
