"""Stock vLLM beside the lookahead plugin, in one run: python -m benchmarks.serving_vllm MODEL BUNDLE --out serving.json

Runs in an environment for serving (docs/serving.md). Servers with the same pool of KV blocks are started one after the
other: stock, the plugin (decode rows read resident blocks), and the plugin with host memory (cold blocks leave the
pool). Each gets the same requests at once, then needle questions one by one. Printed a server: new tokens a second from
the first token to the last, time between tokens (median and 95th percentile), most requests running at once (vLLM's own
gauge), preemptions, blocks read of those held, blocks fetched a window, and how many needles were found.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.machine import origin
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
    most_running: int
    preemptions: int
    read: float | None
    fetched_per_window: float | None
    needles: int
    asked: int

    def row(self) -> str:
        """A line under HEADER."""
        read = "-" if self.read is None else f"{self.read:.1%}"
        fetched = "-" if self.fetched_per_window is None else f"{self.fetched_per_window:.2f}"
        return (
            f"{self.server:<11}{self.tokens_per_second:>9.1f}{self.gap_median_ms:>9.1f}{self.gap_p95_ms:>9.1f}"
            f"{self.most_running:>10}{self.preemptions:>11}{read:>11}{fetched:>15}"
            f"{f'{self.needles} of {self.asked}':>10}"
        )


HEADER = "server     tokens/s   p50 ms   p95 ms   running  preempted  read/held  fetches/window   needles"


class Client:
    """Of one server's OpenAI interface."""

    def __init__(self, port: int, model: str) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}", model

    def get(self, path: str) -> str:
        """The text of a page."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def stream(self, prompt: list[int], tokens: int) -> list[float]:
        """Send a greedy request; returns when each new token came."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        with self._post("/v1/completions", body | {"return_token_ids": True}) as lines:
            return arrivals(lines)

    def chat(self, text: str, tokens: int) -> str:
        """The greedy answer to one message, of at most so many tokens."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        with self._post("/v1/chat/completions", body) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        with self._post("/tokenize", {"prompt": text, "add_special_tokens": False}) as answer:
            return json.load(answer)["tokens"]

    def metrics(self) -> dict[str, float]:
        """Figures of the page /metrics, by name."""
        return figures(self.get("/metrics"))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body | {"model": self.model}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=3600)


def arrivals(lines: Iterable[bytes]) -> list[float]:
    """When each token of a streamed completion came, in seconds; an event may bring several, or text alone."""
    times: list[float] = []
    for line in lines:
        if line.startswith(b"data: {"):
            came = time.perf_counter()
            times += [came] * sum(len(choice["token_ids"] or ()) for choice in json.loads(line[6:])["choices"])
    return times


def figures(page: str) -> dict[str, float]:
    """Figures of a page in Prometheus' form by name, summed over labels."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return found


def speed(times: list[list[float]]) -> dict[str, float]:
    """Of the moments at which each request's tokens came: rate over all, median and 95th percentile between tokens."""
    gaps = [later - earlier for came in times for earlier, later in pairwise(came)]
    spent = max(came[-1] for came in times) - min(came[0] for came in times)
    return {
        "tokens_per_second": sum(map(len, times)) / spent,
        "gap_median_ms": 1000 * statistics.median(gaps),
        "gap_p95_ms": 1000 * statistics.quantiles(gaps, n=20)[-1],
    }


def cut(texts: list[list[int]], requests: int, longest: int) -> list[list[int]]:
    """Prompts of unequal length, the longest of `longest` tokens. Exits where a text is too short for its prompt."""
    prompts = []
    for k in range(requests):
        text, length = texts[k % len(texts)], longest - 100 * (k % 3)
        if len(text) < k + length:
            raise SystemExit(f"--prompt {longest}: {TEXTS[k % len(texts)]} has only {len(text)} tokens; ask for fewer")
        prompts.append(text[k : k + length])
    return prompts


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's, with the plugin's settings and no others: without any the plugin does nothing."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LOOKAHEAD_")}
    return plain | {f"LOOKAHEAD_{name}": value for name, value in settings.items()}


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
        *(shlex.split(args.ours_engine) if settings else ()),
    ]  # fmt: skip
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(settings))
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
    prompts = cut(texts, args.requests, args.prompt)
    client.stream(prompts[0][:50], 2)
    before, running = client.metrics(), 0
    with ThreadPoolExecutor(args.requests) as pool:
        streams = [pool.submit(client.stream, prompt, args.new) for prompt in prompts]
        while not all(stream.done() for stream in streams):
            running = max(running, int(client.metrics()["vllm:num_requests_running"]))
            time.sleep(0.2)
    after = client.metrics()
    counted = {key: value - before.get(key, 0) for key, value in after.items()}
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
        **speed([stream.result() for stream in streams]),
        most_running=running,
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
    parser.add_argument("--engine", default="", help="more options of every server, in one string")
    parser.add_argument("--ours-engine", default="", help="of the plugin's servers alone: --attention-backend CUSTOM")
    args = parser.parse_args()
    ours = {"BUNDLE": args.bundle}
    results = []
    print(HEADER, flush=True)
    for name, settings in (("stock", {}), ("visibility", ours), ("memory", ours | {"HOST_GIB": args.host_gib})):
        with server(args, settings, args.out.with_suffix(f".{name}.log")) as client:
            results.append(measure(name, client, args))
            engine = json.loads(client.get("/version"))["version"]
        print(results[-1].row(), flush=True)
    found = {"origin": origin() | {"vllm": engine}, "rows": [asdict(each) for each in results]}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
