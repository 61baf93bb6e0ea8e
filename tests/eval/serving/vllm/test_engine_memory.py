"""Cold blocks leave the pool of a real server and come back: tokens stay those of the sets in force."""

import re

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs it")

SHAPE = ("--max-model-len", "1024", "--max-num-batched-tokens", "512")
POOL = ("--num-gpu-blocks-override", "130", *SHAPE)
STOCK_POOL = ("--num-gpu-blocks-override", "65", *SHAPE)
"""As many tokens: the stock CPU backend has blocks of 32."""


def agree(server, follow, asked, answers):
    """The runtime with the same sets, as chosen and as they were when blocks came back, would have written the same."""
    parts = [part for name in asked for part in server.parts(name, asked[name], answers[name])]
    told = follow("qwen3", [(part.prompt, part.answer) for part in parts], resident=[part.sets for part in parts])
    assert [runtime["written"] for runtime in told] == [part.answer for part in parts]
    return len(parts)


def test_requests_that_do_not_fit_together_decode_together(serve, prompts, follow):
    """130 blocks of 16 tokens for four requests of 38 to 51: three at once, were it not for the blocks that leave.

    Scheduler and worker are processes of their own, so that what they tell each other travels in vLLM's messages.
    """
    asked = {f"r{text}": prompts("qwen3", text, 600 + 16 * text) for text in range(4)}
    stock = serve("qwen3", *STOCK_POOL, "--no-enable-prefix-caching", stock=True)
    assert stock.busiest(asked, max_tokens=170)[1] < 4
    server = serve("qwen3", *POOL, "--no-enable-prefix-caching", "--distributed-executor-backend", "mp", host_gib=0.5)
    says = dict(re.findall(r"\((EngineCore|Worker) pid=(\d+)\)", server.log.read_text()))
    assert len(says) == len(set(says.values())) == 2
    answers, most = server.busiest(asked, max_tokens=170)
    assert most == 4
    figures = server.metrics()
    assert figures["lookahead:evicted_total"] > 100
    assert figures["lookahead:fetched_total"] > 20
    agree(server, follow, asked, answers)
    for name in asked:
        windows = [line for line in server.windows(name) if line["how"] != "arrived"]
        assert len(windows) >= 10
    assert server.held() == (0, 0)


def test_preempted_and_aborted_requests_lose_nothing(serve, prompts, follow):
    """One request goes away in the middle, then twelve grow, of which each must keep six blocks, in a pool of 65.

    With prefix caching: what resumes takes over those of its blocks that nobody took.
    """
    server = serve("qwen3", "--num-gpu-blocks-override", "66", *SHAPE, host_gib=0.5)
    gone = server.open(prompts("qwen3", 7, 500), "gone", stream=True, max_tokens=400)
    for _ in range(40):
        gone.readline()
    gone.close()
    before = server.metrics()["vllm:num_preemptions_total"]
    asked = {f"long{number}x": prompts("qwen3", number % 8, 100)[number : number + 48] for number in range(12)}
    answers = server.together(asked, max_tokens=150)
    figures = server.metrics()
    assert all(len(answer) == 150 for answer in answers.values())
    assert figures["vllm:num_preemptions_total"] > before
    assert figures["lookahead:evicted_total"] > 20
    assert agree(server, follow, asked, answers) > len(asked)
    assert server.held() == (0, 0)


def test_a_full_host_is_said_once_and_blocks_stay_visible(serve, prompts, follow):
    server = serve("qwen3", *POOL, host_gib=0.0003)
    asked = {"a": prompts("qwen3", 0, 600), "b": prompts("qwen3", 1, 500)}
    answers = server.together(asked)
    agree(server, follow, asked, answers)
    assert server.log.read_text().count("host memory of 0.000 GiB is full") == 1
    assert any(len(line["resident"]) > 0.5 * line["chunks"] for line in server.windows("a"))


def test_a_second_turn_finds_what_left_the_pool(serve, prompts, follow):
    """With prefix caching: blocks that were given back are found again as far as nobody has taken them."""
    server = serve("qwen3", *POOL, host_gib=0.5)
    prompt, more = prompts("qwen3", 3, 500), prompts("qwen3", 6, 40)
    answer = server.ask(prompt, "first")[0]["token_ids"]
    before = server.metrics()
    second = server.ask(prompt + answer + more, "second")[0]["token_ids"]
    after = server.metrics()
    assert before["lookahead:evicted_total"] > 10
    cut = int(after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"]) - len(prompt)
    assert cut > 0
    (first,), (again,) = server.parts("first", prompt, answer), server.parts("second", prompt + answer + more, second)
    job = (prompt, answer[: cut + 1], answer[cut:] + more, second)
    (told,) = follow("qwen3", [job], resident=[first.sets | again.sets])
    assert len(again.sets) >= 10
    assert told["written"] == second
