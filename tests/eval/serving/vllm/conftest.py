"""Servers with the plugin, beside the truth: an LSA runtime in another environment.

`test_engine*.py` run in an environment with vLLM (make test-vllm), which has no training packages; elsewhere each of
them is one skip. The truth runs in the training environment, whose Python TRUTH_PYTHON names.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from filelock import FileLock

CHUNKED = ("--max-num-batched-tokens", "256", "--max-num-seqs", "3")
WINDOW = 8
"""Of every bundle: ten refreshes in 81 tokens."""
ROOT = Path(__file__).parents[4]
TRUTH = os.environ.get("TRUTH_PYTHON", str(ROOT / ".venv/bin/python"))
ENGINE = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def truth(*arguments: object) -> str:
    """Run truth.py in the training environment."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [TRUTH, str(Path(__file__).with_name("truth.py")), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with a checkpoint NAME and a bundle NAME-bundle of smollm2, qwen3 and gemma3, and prompts.json.

    Made once, whichever of several test processes comes first. Skips where vLLM itself, without any plugin, does not
    start to serve.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "models"
    trouble = folder / "trouble.txt"
    with FileLock(f"{folder}.lock"):
        if not trouble.exists():
            folder.mkdir(exist_ok=True)
            truth("models", folder, WINDOW)
            trouble.write_text(trouble_without_plugins(folder))
    if said := trouble.read_text():
        pytest.skip(f"vLLM itself does not start to serve on this machine: {said}")
    return folder


def trouble_without_plugins(folder: Path) -> str:
    """The last line of the log of a stock server that does not answer within five minutes; "" of one that does."""
    server = Server(folder, folder / "smollm2", None, environment={"VLLM_PLUGINS": ""})
    try:
        server.wait(300)
    except AssertionError:
        return server.log.read_text().strip().rpartition("\n")[2] or "nothing was said"
    finally:
        server.close()
    return ""


@pytest.fixture(scope="session")
def prompts(models):
    """prompts(model, text, length): token ids of Python source."""
    texts = json.loads((models / "prompts.json").read_text())
    return lambda name, text, length: texts[name][text][:length]


@dataclass(frozen=True)
class Part:
    """Of an answer, what was written between two preemptions: `prompt` was read in full before it.

    sets: by the position behind which they came into force.
    """

    prompt: list[int]
    answer: list[int]
    sets: dict[str, list[int]]


class Server:
    """The OpenAI server in processes of its own, and a client. folder: for its log and its trace."""

    def __init__(
        self, folder: Path, model: Path, bundle: Path | None, *arguments: str,
        environment: dict[str, str] | None = None, **settings: object,
    ) -> None:  # fmt: skip
        self.model, self.trace, self.log = str(model), folder / "trace.jsonl", folder / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        lookahead = {"BUNDLE": bundle, "TRACE": self.trace, **settings} if bundle else {}
        told = {f"LOOKAHEAD_{name.upper()}": str(value) for name, value in lookahead.items()}
        environment = os.environ | ENGINE | (environment or {}) | told
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size",
            "16" if bundle else "32", *arguments,
        ]  # fmt: skip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def wait(self, seconds: float = 900) -> "Server":
        """Until it answers."""
        for _ in range(int(seconds / 0.25)):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.25)
        raise AssertionError(self.log.read_text()[-3000:])

    def open(self, prompt: list[int], name: str, **options: object) -> object:
        """Send a completion request, greedy unless told otherwise; the answer as it comes."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 90, "ignore_eos": True}
        body |= {"return_token_ids": True, **options}
        headers = {"Content-Type": "application/json", "X-Request-Id": name}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600)

    def ask(self, prompt: list[int], name: str, **options: object) -> list[dict]:
        """The choices of a completion."""
        with self.open(prompt, name, **options) as answer:
            return json.load(answer)["choices"]

    def together(self, asked: dict[str, list[int]], **options: object) -> dict[str, list[int]]:
        """Requests by name, all at once; returns the tokens of each."""
        with ThreadPoolExecutor(len(asked)) as pool:
            found = pool.map(lambda item: self.ask(item[1], item[0], **options)[0]["token_ids"], asked.items())
            return dict(zip(asked, found, strict=True))

    def busiest(self, asked: dict[str, list[int]], **options: object) -> tuple[dict[str, list[int]], int]:
        """`together`, and the most requests that vLLM said were running meanwhile."""
        most = 0
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(self.together, asked, **options)
            while not answers.done():
                most = max(most, int(self.metrics()["vllm:num_requests_running"]))
                time.sleep(0.02)
            return answers.result(), most

    def windows(self, name: str) -> list[dict]:
        """The traced windows of a request, in order."""
        lines = [json.loads(line) for line in self.trace.read_text().splitlines()]
        return [line for line in lines if f"cmpl-{name}-" in line["request"]]

    def parts(self, name: str, prompt: list[int], answer: list[int]) -> list[Part]:
        """A request's answer by preemptions: windows start anew behind one, and cut the last one before it short."""
        lines, parts = self.windows(name), []
        begun = [line["position"] for line in lines if line["first"]]
        for first, end in pairwise([*begun, len(prompt) + len(answer) - 1]):
            start = first + 1 - len(prompt)  # tokens of the answer that were read in full
            sets = {str(line["position"]): line["resident"] for line in lines if first <= line["position"] < end}
            parts.append(Part(prompt + answer[:start], answer[start : end + 1 - len(prompt)], sets))
        return parts

    def metrics(self) -> dict[str, float]:
        """vLLM's own page of figures, summed over labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            lines = [line for line in page.read().decode().splitlines() if line and not line.startswith("#")]
        found: dict[str, float] = {}
        for line in lines:
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0) + value
        return found

    def held(self) -> tuple[float, float]:
        """(sequences, bytes on the host) that the plugin holds once the engine has told it of the last answer's end."""
        for _ in range(60):  # which it does with its next step, after the answer has gone out
            figures = self.metrics()
            if figures["lookahead:sequences"] == 0:
                break
            time.sleep(0.5)
        return figures["lookahead:sequences"], figures["lookahead:host_bytes"]

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def serve(models, tmp_path_factory):
    """serve(model, *arguments, **settings): a running server, the same one when asked for again; stock=True: without
    the plugin. A module has one at a time: the next takes its place."""
    running: dict[object, Server] = {}

    def start(name: str, *arguments: str, stock: bool = False, **settings: object) -> Server:
        key = (name, arguments, stock, tuple(settings.items()))
        if key not in running:
            for server in running.values():
                server.close()
            running.clear()
            bundle = None if stock else models / f"{name}-bundle"
            server = Server(tmp_path_factory.mktemp(name), models / name, bundle, *arguments, **settings)
            running[key] = server
            server.wait()
        return running[key]

    yield start
    for server in running.values():
        server.close()


@pytest.fixture
def follow(models, tmp_path):
    """follow(model, [(prompt, answer)], **options): the runtime's sets and tokens in the last turn of each job, told
    each token; more turns follow in the same tuple; `resident`: by job, sets to keep instead of its own."""

    def run(name: str, jobs: list[tuple], resident: list[dict] | None = None, **options: object) -> list[dict]:
        told = [{"turns": list(zip(job[::2], job[1::2], strict=True))} for job in jobs]
        for job, sets in zip(told, resident or [None] * len(told), strict=True):
            job["resident"] = sets
        path = tmp_path / "jobs.json"
        bundle = str(models / f"{name}-bundle")
        path.write_text(json.dumps({"model": str(models / name), "bundle": bundle, "jobs": told, "options": options}))
        truth("check", path)
        return json.loads(path.with_suffix(".out.json").read_text())

    return run
