"""The plugin beside the LSA runtime and beside stock vLLM: a dense model, a hybrid one, and one with trained weights.

The engine's first token of an answer comes from full attention; the runtime is told it and compared from there.
"""

import pytest

from tests.eval.serving.vllm.conftest import CHUNKED

pytest.importorskip("vllm", reason="make test-vllm runs it")


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
    asked = {"a": prompts(model, 0, 300), "b": prompts(model, 1, 90)}
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
    lengths = {"one": 300, "two": 520, "three": 60, "four": 200}
    asked = {name: prompts(model, text, length) for text, (name, length) in enumerate(lengths.items())}
    answers = server.together(asked)
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    turns = {f"again-{name}": asked[name] + answers[name] + prompts(model, 5, 50) for name in ("one", "four")}
    second = server.together(turns)
    # With a sliding window, only a hit that ends where the window's blocks are still cached counts.
    assert server.metrics()["vllm:prefix_cache_hits_total"] - before > (0 if model == "gemma3" else 500)
    told = follow(model, [(asked[name], answers[name]) for name in asked])
    for name, runtime in zip(asked, told, strict=True):
        agree(server, name, asked[name], answers[name], runtime)
    assert all(len(server.windows(name)) >= 10 for name in turns)
    assert all(len(answer) == 90 for answer in second.values())


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
