"""The plugin in real engine processes: sets and tokens of the LSA runtime, and stock tokens where all is resident.

The engine's first token of an answer comes from full attention; the runtime is told it and compared from there.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

CHUNKED = ("--max-num-batched-tokens", "256", "--max-num-seqs", "3")


def agree(server, name, prompt, answer, told, fewest=10):
    """Sets at every refresh, and the most likely token after every one of the answer's. told: the runtime's side."""
    windows = server.windows(name)
    found = {str(line["position"]): line["resident"] for line in windows}
    assert len(found) == len(windows) >= fewest
    assert found == told["sets"]
    assert any(len(line["resident"]) < line["chunks"] for line in windows)
    assert answer == told["written"]


@pytest.mark.parametrize("model", ["qwen3", "gemma3", "smollm2"])
def test_everything_resident_is_stock(serve, prompts, model):
    asked = {"a": prompts(model, 0, 700), "b": prompts(model, 1, 90)}
    ours = serve(model, *CHUNKED, budget=1.0)
    answers = ours.together(asked)
    assert len(ours.windows("a")) >= 10
    assert all(len(line["resident"]) == line["chunks"] for line in ours.windows("a"))
    assert ours.metrics()["lookahead:read_total"] == ours.metrics()["lookahead:made_total"] > 0
    assert serve(model, *CHUNKED, stock=True).together(asked) == answers


@pytest.mark.parametrize("model", ["gemma3", "smollm2", "qwen3"])
def test_unequal_requests_and_a_second_turn(serve, prompts, follow, model):
    """Four requests in three slots, prompts in pieces of 256, then two that go on from cached blocks."""
    server = serve(model, *CHUNKED)
    lengths = {"one": 700, "two": 1100, "three": 36, "four": 480}
    asked = {name: prompts(model, text, length) for text, (name, length) in enumerate(lengths.items())}
    answers = server.together(asked)
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    turns = {f"again-{name}": asked[name] + answers[name] + prompts(model, 5, 50) for name in ("one", "four")}
    second = server.together(turns)
    # With a sliding window, only a hit that ends where the window's blocks are still cached counts.
    assert server.metrics()["vllm:prefix_cache_hits_total"] - before > (0 if model == "gemma3" else 1000)
    told = follow(model, [(asked[name], answers[name]) for name in asked])
    for name, runtime in zip(asked, told, strict=True):
        agree(server, name, asked[name], answers[name], runtime)
    assert all(len(server.windows(name)) >= 10 for name in turns)
    assert all(len(answer) == 170 for answer in second.values())


def test_a_second_turn_reads_what_the_first_wrote(serve, prompts, follow):
    """Cached blocks keep the keys and values of an answer as they were written sparsely; the rest is read in full."""
    server = serve("qwen3", *CHUNKED)
    prompt = prompts("qwen3", 4, 640)
    answer = server.ask(prompt, "first")[0]["token_ids"]
    more = prompts("qwen3", 6, 40)
    again = server.ask(prompt + answer + more, "second")[0]["token_ids"]
    cut = (len(prompt) + len(answer) - 1) // 16 * 16 - len(prompt)  # the answer's last token was never read
    (told,) = follow("qwen3", [(prompt, answer[: cut + 1], answer[cut:] + more, again)])
    agree(server, "second", None, again, told)


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
    stop = whole["text"][100:104]
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
    figures = server.metrics()
    assert figures["lookahead:sequences"] == figures["lookahead:resident_blocks"] == 0
    assert figures["lookahead:refreshes_total"] > 200


def test_preempted_requests_go_on(serve, prompts, follow):
    """A pool too small for both: one is read again in full, and from there it is the runtime told what it had said."""
    server = serve("qwen3", "--num-gpu-blocks-override", "70", "--max-model-len", "1024", "--no-enable-prefix-caching")
    asked = {"p": prompts("qwen3", 0, 420), "q": prompts("qwen3", 1, 400)}
    answers = server.together(asked, max_tokens=330)
    assert server.metrics()["vllm:num_preemptions_total"] > 0
    parts = []
    for name, prompt in asked.items():
        answer, positions = answers[name], [line["position"] for line in server.windows(name)]
        # Windows are 16 tokens long, but for the one that a preemption cut short.
        cuts = [0, *(i for i in range(1, len(positions)) if positions[i] - positions[i - 1] != 16), len(positions)]
        for first, last in pairwise(cuts):
            start = positions[first] + 1 - len(prompt)  # tokens of the answer that were read in full
            end = positions[last] + 1 - len(prompt) if last < len(positions) else len(answer)
            parts.append((name, prompt + answer[:start], answer[start:end], positions[first:last]))
    assert len(parts) > 2
    told = follow("qwen3", [(prompt, answer) for _, prompt, answer, _ in parts])
    for (name, _, answer, positions), runtime in zip(parts, told, strict=True):
        found = {
            str(line["position"]): line["resident"] for line in server.windows(name) if line["position"] in positions
        }
        assert found == {place: chunks for place, chunks in runtime["sets"].items() if int(place) in positions}
        assert runtime["written"] == answer


def test_lag_and_fallback(serve, prompts, follow):
    """One token with the old set; windows that ask for more than the cap read everything, or the best it allows."""
    options = {"threshold": 0.0, "cap": 12, "full_above": 2.0, "lag": 1}
    server = serve("qwen3", *CHUNKED, **options)
    asked = {"r": prompts("qwen3", 0, 500), "s": prompts("qwen3", 2, 300)}
    answers = server.together(asked)
    told = follow("qwen3", [(asked[name], answers[name]) for name in asked], **options)
    hows = set()
    for name, runtime in zip(asked, told, strict=True):
        found = {str(line["position"]): line["resident"] for line in server.windows(name)}
        hows |= {line["how"] for line in server.windows(name)}
        assert len(found) >= 10
        assert found == runtime["sets"]
        assert answers[name] == runtime["written"]
    assert len(hows) > 1
