"""Answers, fidelity and foresight against the stock model; nothing here knows how the runner works."""

import gc
import re

import pytest
import torch

from benchmarks.tiny_models import tiny
from data_gen.core.errors import InputError
from data_gen.text.documents import user
from eval.online.examples import Example, TextExample
from eval.online.online_policies import ONLINE_POLICIES, Foresight
from eval.online.runner import Runner
from eval.online.session import DenseSession, Session
from eval.runtime.correction import Correction
from eval.runtime.runtime import LSARuntime
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from tests.conftest import tiny_model
from tests.eval.runtime.indexers import untrained

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 3


@pytest.fixture(scope="module")
def run(indexer, tokenizer):
    def call(example, budgets=(0.1, 1.0), **settings):
        names = [policy.name for policy in ONLINE_POLICIES]
        runner = Runner(tiny_model("llama"), tokenizer, indexer, names, list(budgets), context=512, **settings)
        return runner.run(example)

    return call


def question(**changes):
    fields = {"name": "q", "benchmark": "needles", "task": "single", "length": 300, "messages": [user(TEXT)],
              "references": ["zzz"], "scorer": "string_match_all", "answer_tokens": 40, "prefix": "It is"}  # fmt: skip
    return Example(**fields | changes)


def stock(tokens):
    with torch.no_grad():
        return tiny_model("llama")(torch.tensor([tokens])).logits[0]


def calibrated(indexer, score):
    """The indexer with a threshold of its own beside a budget, and a coverage that asks for as many."""
    served = [Budget(budget=0.1), Threshold(target="recall", value=0.9, cuts=[Cut(score=score)])]
    served.append(Coverage(share=1.0 if score < 0 else 1e-9))
    twin = MemoryIndexer.from_spec(indexer.spec.model_copy(update={"selections": served}))
    twin.load_state_dict(indexer.state_dict())
    return twin.eval()


def test_what_is_over_is_freed_at_once(run):
    """Caches of every policy: the collector of cycles counts objects, not their gigabytes."""
    gc.collect()
    gc.disable()
    try:
        run(question())
        assert not [held for held in gc.get_objects() if issubclass(type(held), Session)]
    finally:
        gc.enable()


def test_full_attention_answers_as_generate_does(run, tokenizer):
    example = question()
    ids = example.prompt(tokenizer, False) + example.opening(tokenizer)
    with torch.no_grad():
        out = tiny_model("llama").generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=3)
    expected = "It is" + tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    record = run(example)
    runs = {(each.policy, each.budget): each for each in record.runs}
    assert runs["full", None].response == expected and runs["full", None].kept == 1
    assert record.tokens == len(ids) + 40 and not record.left_out
    names = ("indexer", "mean_pooled", "recency", "random", "oracle")
    ranked = [(name, budget) for budget in (0.1, 1.0) for name in names]
    assert list(runs) == [("full", None), *ranked, ("protected", None)]
    assert 0 < runs["protected", None].kept < min(runs[name, 0.1].kept for name in names)
    for name in names:  # all chunks kept: nothing is lost
        assert runs[name, 1.0].response == expected
        assert runs[name, 0.1].kept < 0.45 and runs[name, 0.1].kv_bytes < runs["full", None].kv_bytes
    assert runs["full", None].kv_bytes > 2 * 3 * 2 * 16 * 4 * len(ids)  # keys and values, layers, heads, width, fp32


@pytest.mark.parametrize("policy", ONLINE_POLICIES, ids=lambda policy: policy.name)
def test_every_policy_of_the_list(policy, tokenizer, indexer, pocket, pocket_indexer):
    """On a model that has it: all that may be kept is full attention, less than that is less."""
    (document,) = pocket.documents("multi_key", 300, 1)
    dense = (tiny_model("llama"), tokenizer, calibrated(indexer, -1e9), question().prompt(tokenizer, False))
    sparse = (pocket.backbone.model, pocket.tokenizer, pocket_indexer, pocket.tokens(document))
    having = [who for who in (dense, sparse) if policy.has(who[2])]
    assert having
    for model, words, who, ids in having:
        example = question(messages=[], ids=ids, prefix="", answer_tokens=4)
        correction = Correction(chunks=2) if policy.corrects else None
        full, everything = Runner(model, words, who, [policy.name], [1.0], correction=correction).run(example).runs
        assert everything.policy == policy.name and everything.refreshes == 1
        if policy.under != "nothing":
            assert everything.budget == 1 and everything.kept == 1 and everything.response == full.response
        few = calibrated(who, 1e9) if policy.under == "cap" else who
        runner = Runner(model, words, few, [policy.name], [0.1], 0.1, correction=correction)
        assert 0 < runner.run(example).runs[1].kept < 0.5


def test_a_correction_keeps_as_many_bytes_and_says_what_it_fetched(tokenizer, indexer):
    example = TextExample("t", None, question().prompt(tokenizer, False), 30, "text", "text", scorer="at_once")
    for query in ("same", "previous"):
        runner = Runner(tiny_model("llama"), tokenizer, indexer, ["indexer", "indexer+correction"], [0.1],
                        correction=Correction(chunks=3, query=query))  # fmt: skip
        full, plain, corrected = runner.run(example).runs
        assert full.fetched == full.mean_key_bytes == plain.mean_key_bytes == 0
        assert corrected.policy == "indexer+correction" and corrected.fetched > plain.fetched
        assert corrected.kept == pytest.approx(plain.kept) and corrected.chunks == pytest.approx(plain.chunks)
        assert corrected.kv_bytes == pytest.approx(plain.kv_bytes) and corrected.kl != plain.kl
        at = len(example.tokens) - 31  # the newest token read at the last refresh but for whole windows
        at += (29 // indexer.spec.window) * indexer.spec.window
        assert corrected.mean_key_bytes == at // indexer.spec.chunking.tokens * 3 * 2 * 16 * 2  # layers, KV, d, fp16
    assert Runner(tiny_model("llama"), tokenizer, indexer, ["indexer"], [0.1]).run(example).runs[1].fetched is None


def test_a_correction_is_refused_where_it_cannot_be(tokenizer, indexer, pocket, pocket_indexer):
    latent = tiny("deepseek_v3")
    for model, words, who in ((pocket.backbone.model, pocket.tokenizer, pocket_indexer),
                              (latent, tokenizer, untrained(latent))):  # fmt: skip
        with pytest.raises(InputError, match="no keys of single heads"):
            Runner(model, words, who, [], [0.1], correction=Correction(chunks=2))
    runner = Runner(tiny_model("llama"), tokenizer, indexer, ["indexer+correction"], [0.01],
                    correction=Correction(chunks=8))  # fmt: skip
    with pytest.raises(InputError, match=r"a budget of 0\.01 keeps only 1 of"):
        runner.run(question())


@pytest.mark.parametrize("policy", ["indexer+fallback", "indexer+coverage"])
def test_fallback_reads_windows_that_ask_for_more_than_the_cap_in_full(policy, tokenizer, indexer):
    def runs(score, cap, example):
        names = ["recency", policy]
        record = Runner(tiny_model("llama"), tokenizer, calibrated(indexer, score), names, [0.3], cap, context=512).run(
            example
        )
        assert [(each.policy, each.budget) for each in record.runs] == [
            ("full", None), ("recency", 0.3), (policy, cap)
        ]  # fmt: skip
        return record.runs

    full, recency, fallen = runs(-1e9, 0.3, question())
    assert fallen.fallbacks == fallen.windows == fallen.refreshes and recency.windows is None
    assert fallen.response == full.response and fallen.kept == 1 and recency.kept < 0.6
    _, _, wide = runs(-1e9, 1.0, question())
    assert (wide.fallbacks, wide.kept) == (0, 1)
    tokens = tokenizer(TEXT).input_ids
    _, _, little = runs(1e9, 0.3, TextExample("t", len(tokens), tokens, 50))
    assert (little.fallbacks, little.windows) == (0, 4) and little.kept < 0.4 and little.kl > 1e-4


def test_answers_are_scored(run):
    runs = run(question(references=["it is", "no such thing"])).runs
    assert all(each.score == 0 for each in runs), "what the model was given earns nothing"
    assert all(each.response.startswith("It is") for each in runs)
    (said,) = re.findall(r"[!-~]", runs[0].response.removeprefix("It is"))[:1]
    assert run(question(references=[said, "no such thing"])).runs[0].score == 0.5


def test_text_fidelity_is_that_of_the_stock_model(run, tokenizer):
    tokens = tokenizer(TEXT).input_ids
    record = run(TextExample("t", len(tokens), tokens, 50))
    full, *others, protected = record.runs
    assert protected.kl > 1e-4
    log_p = stock(tokens).log_softmax(-1)[-51:-1]
    loss = -log_p[torch.arange(50), torch.tensor(tokens[-50:])].mean()
    assert full.loss == pytest.approx(float(loss), rel=1e-4)
    assert full.agreement == 1 and full.kl == 0 and full.refreshes == 0
    for each in others:
        assert each.refreshes == 4  # 50 tokens, windows of 16
        if each.budget == 1:
            assert each.agreement == 1 and each.kl == pytest.approx(0, abs=1e-6)
        else:
            assert each.kl > 1e-4 and each.loss != full.loss
    assert len({each.kept for each in others}) == 2, "the same for everybody under the same budget"


def test_what_does_not_fit_is_left_out_and_says_why(run):
    assert "context (512 tokens)" in run(question(messages=[user(TEXT * 4)])).left_out
    record = run(question(left_out="for a judge"))
    assert record.left_out == "for a judge" and record.runs == []


def test_foresight_is_the_attention_of_the_coming_window(tokenizer, indexer):
    chunking = indexer.spec.chunking
    tokens = tokenizer(TEXT).input_ids[:150]
    session = DenseSession(tiny_model("llama"), chunking)
    session.read(tokens[:100])
    foresight = Foresight(16)
    reader = session.fork()
    for token in tokens[100:]:
        reader.read([token])
        foresight.watch(reader)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(torch.tensor([tokens]), output_attentions=True).attentions
    mean = torch.stack(attention)[:, 0].mean(dim=(0, 1))  # [150, 150] over layers and heads
    chunks = mean[:, :100].unflatten(1, (-1, chunking.tokens)).sum(dim=-1)
    torch.testing.assert_close(foresight(session), chunks[100:116].mean(dim=0), atol=1e-5, rtol=1e-4)
    session.read(tokens[100:140])
    assert foresight(session).shape == (35,)
    torch.testing.assert_close(foresight(session)[:25], chunks[140:150].mean(dim=0), atol=1e-5, rtol=1e-4)
    sparse = session.fork()
    sparse.host.keep(sparse.best(torch.zeros(35), 0.1).resident)
    sparse.read([5])
    with pytest.raises(ValueError, match="full attention only"):
        foresight.watch(sparse)


def test_a_first_window_of_one_token_is_what_the_runtime_decodes(run, indexer, tokenizer):
    """Answers and refreshes; a window longer than the indexer's is refused before anything is read."""
    example = question(prefix="")
    ids = torch.tensor([example.prompt(tokenizer, False)])
    for first in (None, 1):
        runtime = LSARuntime(indexer, tiny_model("llama"), selection=Budget(budget=0.1), first_window=first)
        written = runtime.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=3)[0, ids.shape[1] :]
        runs = {(each.policy, each.budget): each for each in run(example, first_window=first).runs}
        assert runs["indexer", 0.1].response == tokenizer.decode(written, skip_special_tokens=True)
        assert runs["indexer", 0.1].refreshes == len(runtime.windows)
    last = ids.shape[1] - 1
    assert [window.position for window in runtime.windows[:3]] == [last - 1, last, last + indexer.spec.window]
    with pytest.raises(InputError, match="first_window: 17; a window has 16 tokens"):
        run(example, first_window=17)
