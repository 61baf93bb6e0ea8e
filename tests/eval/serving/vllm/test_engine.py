"""What requests do to a server with the plugin: samples, stops, aborts, preemption, many in a row."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.eval.serving.vllm.conftest import CHUNKED

pytest.importorskip("vllm", reason="make test-vllm runs it")


def test_two_samples(serve, prompts, follow):
    """Each sample has sets of its own, those of its own tokens."""
    server = serve("qwen3", *CHUNKED)
    prompt = prompts("qwen3", 2, 500)
    choices = server.ask(prompt, "sampled", n=2, temperature=1.5)
    answers = [choice["token_ids"] for choice in choices]
    assert answers[0] != answers[1]
    told = follow("qwen3", [(prompt, answer) for answer in answers])
    lines = server.windows("sampled")
    names = sorted({line["request"] for line in lines})
    assert len(names) == 2
    found = [{str(line["position"]): line["resident"] for line in lines if line["request"] == name} for name in names]
    assert sorted(found, key=str) == sorted((runtime["sets"] for runtime in told), key=str)
    assert all(len(sets) >= 10 for sets in found)


def test_stop_strings_and_streaming(serve, prompts):
    server = serve("qwen3", *CHUNKED)
    prompt = prompts("qwen3", 3, 400)
    (whole,) = server.ask(prompt, "whole")
    stop = whole["text"][50:54]
    (stopped,) = server.ask(prompt, "stopped", stop=[stop])
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    with server.open(prompt, "streamed", stream=True) as lines:
        parts = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["text"]
    assert len(parts) > 20


def test_abort_in_the_middle(serve, prompts):
    """A client that goes away takes nothing from the others."""
    server = serve("qwen3", *CHUNKED)
    prompt = prompts("qwen3", 1, 600)
    alone = server.ask(prompt, "alone")[0]["token_ids"]
    gone = server.open(prompts("qwen3", 2, 600), "gone", stream=True, max_tokens=1200)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.ask, prompt, "beside")
        for _ in range(30):
            gone.readline()
        gone.close()
        assert other.result()[0]["token_ids"] == alone
    assert 0 < len(server.windows("gone")) < 70


def test_200_requests_leave_nothing_behind(serve, prompts):
    server = serve("qwen3", *CHUNKED)
    slots = threading.Semaphore(8)

    def ask(number: int) -> int:
        with slots:
            prompt = prompts("qwen3", number % 8, 20 + 7 * (number % 20))
            return len(server.ask(prompt, f"many{number}", max_tokens=5 + number % 40)[0]["token_ids"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(200))) == [5 + number % 40 for number in range(200)]
    assert server.held() == (0, 0)
    figures = server.metrics()
    assert figures["lookahead:resident_blocks"] == 0
    assert figures["lookahead:refreshes_total"] > 200


def test_preempted_requests_go_on(serve, prompts, follow):
    """A pool too small for both: one is read again in full, and from there it is the runtime told what it had said."""
    server = serve("qwen3", "--num-gpu-blocks-override", "70", "--max-model-len", "1024", "--no-enable-prefix-caching")
    asked = {"p": prompts("qwen3", 0, 420), "q": prompts("qwen3", 1, 400)}
    answers = server.together(asked, max_tokens=330)
    assert server.metrics()["vllm:num_preemptions_total"] > 0
    parts = [(name, part) for name, prompt in asked.items() for part in server.parts(name, prompt, answers[name])]
    assert len(parts) > 2
    told = follow("qwen3", [(part.prompt, part.answer) for _, part in parts])
    for (_, part), runtime in zip(parts, told, strict=True):
        assert part.sets == {place: chunks for place, chunks in runtime["sets"].items() if place in part.sets}
        assert part.answer == runtime["written"]


@pytest.mark.parametrize("rule", [{"threshold": 0.0}, {"coverage": 0.95}])
def test_lag_and_fallback(serve, prompts, follow, rule):
    """One token with the old set; windows that ask for more than the cap read everything, or the best it allows."""
    options = rule | {"cap": 12, "full_above": 2.0, "lag": 1}
    server = serve("qwen3", *CHUNKED, **options)
    asked = {"r": prompts("qwen3", 0, 500), "s": prompts("qwen3", 2, 300)}
    answers = server.together(asked)
    told = follow("qwen3", [(asked[name], answers[name]) for name in asked], **options)
    hows = Counter()
    for name, runtime in zip(asked, told, strict=True):
        found = {str(line["position"]): line["resident"] for line in server.windows(name)}
        hows.update(line["how"] for line in server.windows(name))
        assert len(found) >= 10
        assert found == runtime["sets"]
        assert answers[name] == runtime["written"]
    assert len(hows) > 1
    figures = server.metrics()
    for how, figure in (("cap", "lookahead:capped_total"), ("full", "lookahead:full_total")):
        assert figures.get(figure, 0) == hows[how]
