"""Cold blocks leave the pool of a real server and come back: tokens stay those of the sets in force."""

POOL = ("--num-gpu-blocks-override", "130", "--max-model-len", "1024", "--max-num-batched-tokens", "512")


def forced(server, name):
    """Sets in force by the position behind which they hold: as chosen, and as they were when blocks came back."""
    return {str(line["position"]): line["resident"] for line in server.windows(name)}


def agree(server, follow, asked, answers):
    """The runtime with the same sets, told each token, would have written the same."""
    told = follow(
        "qwen3", [(asked[name], answers[name]) for name in asked], resident=[forced(server, name) for name in asked]
    )
    for name, runtime in zip(asked, told, strict=True):
        assert runtime["written"] == answers[name], name


def test_requests_that_do_not_fit_together_decode_together(serve, prompts, follow):
    """130 blocks of 16 tokens for four requests of 38 to 51: three at once, were it not for the blocks that leave."""
    server = serve("qwen3", *POOL, "--no-enable-prefix-caching", host_gib=0.5)
    asked = {f"r{text}": prompts("qwen3", text, 600 + 16 * text) for text in range(4)}
    answers = server.together(asked, max_tokens=170)
    figures = server.metrics()
    assert figures["lookahead:evicted_total"] > 100
    assert figures["lookahead:fetched_total"] > 20
    agree(server, follow, asked, answers)
    for name in asked:
        windows = [line for line in server.windows(name) if line["how"] != "arrived"]
        assert len(windows) >= 10
    assert server.metrics()["lookahead:host_bytes"] == server.metrics()["lookahead:sequences"] == 0


def test_preempted_and_aborted_requests_lose_nothing(serve, prompts, follow):
    """The same server: one request goes away in the middle, two long ones push each other out."""
    server = serve("qwen3", *POOL, "--no-enable-prefix-caching", host_gib=0.5)
    gone = server.open(prompts("qwen3", 7, 500), "gone", stream=True, max_tokens=400)
    for _ in range(40):
        gone.readline()
    gone.close()
    before = server.metrics()["vllm:num_preemptions_total"]
    asked = {f"long{text}": prompts("qwen3", text, 610) for text in range(3)}
    answers = server.together(asked, max_tokens=400)
    figures = server.metrics()
    assert all(len(answer) == 400 for answer in answers.values())
    if figures["vllm:num_preemptions_total"] == before:
        agree(server, follow, asked, answers)
    assert figures["lookahead:host_bytes"] == figures["lookahead:sequences"] == 0


def test_a_full_host_is_said_once_and_blocks_stay_visible(serve, prompts, follow):
    server = serve("qwen3", *POOL, host_gib=0.0003)
    asked = {"a": prompts("qwen3", 0, 600), "b": prompts("qwen3", 1, 500)}
    answers = server.together(asked)
    agree(server, follow, asked, answers)
    assert server.log.read_text().count("host memory of 0.000 GiB is full") == 1
    assert any(len(line["resident"]) > 0.5 * line["chunks"] for line in server.windows("a"))


def test_a_second_turn_finds_what_left_the_pool(serve, prompts, follow):
    """With prefix caching: blocks that were given back may be found again or not; the answer is the runtime's."""
    server = serve("qwen3", *POOL, host_gib=0.5)
    prompt = prompts("qwen3", 3, 500)
    answer = server.ask(prompt, "first")[0]["token_ids"]
    again = prompt + answer + prompts("qwen3", 6, 40)
    second = server.ask(again, "second")[0]["token_ids"]
    assert len(second) == 170
    windows = [line for line in server.windows("second") if line["how"] != "arrived"]
    assert len(windows) >= 10
    agree(server, follow, {"first": prompt}, {"first": answer})
