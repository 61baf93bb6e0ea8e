"""Servers with the plugin, beside the truth: an LSA runtime in another environment.

`test_engine*.py` run in an environment with vLLM (make test-vllm), which has no training packages; the truth runs in
the training environment, whose Python TRUTH_PYTHON names.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
TRUTH = os.environ.get("TRUTH_PYTHON", str(ROOT / ".venv/bin/python"))
ENGINE = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_engine*.py"]


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

    TRUTH_MODELS names a folder in which they stay.
    """
    kept = os.environ.get("TRUTH_MODELS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("models")
    if not (folder / "prompts.json").exists():
        truth("models", folder)
    return folder


@pytest.fixture(scope="session")
def prompts(models):
    """prompts(model, text, length): token ids of Python source."""
    texts = json.loads((models / "prompts.json").read_text())
    return lambda name, text, length: texts[name][text][:length]


class Server:
    """The OpenAI server in processes of its own, and a client. folder: for its log and its trace."""

    def __init__(self, folder: Path, model: Path, bundle: Path | None, *arguments: str, **settings: object) -> None:
        self.model, self.trace, self.log = str(model), folder / "trace.jsonl", folder / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        lookahead = {"BUNDLE": bundle, "TRACE": self.trace, **settings} if bundle else {}
        environment = os.environ | ENGINE | {f"LOOKAHEAD_{name.upper()}": str(v) for name, v in lookahead.items()}
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
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 170, "ignore_eos": True}
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

    def windows(self, name: str) -> list[dict]:
        """The traced windows of a request, in order."""
        lines = [json.loads(line) for line in self.trace.read_text().splitlines()]
        return [line for line in lines if f"cmpl-{name}-" in line["request"]]

    def metrics(self) -> dict[str, float]:
        """vLLM's own page of figures, summed over labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            lines = [line for line in page.read().decode().splitlines() if line and not line.startswith("#")]
        found: dict[str, float] = {}
        for line in lines:
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0) + value
        return found

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
