"""A task that needs all of the history, on a model and an indexer built by hand so that full attention solves it."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_gen.backbones.load import adapter
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.runtime.runtime import LSARuntime
from eval.serving.select import Fallback, Limits
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Coverage, Cut, Threshold

COUNT, FIND, A, B, NOTE_A, NOTE_B = range(6)
"""COUNT asks whether A or B is more frequent, FIND which of the two the only note names."""
WIDTH, SIZE, CHUNKS, CAP, DOCUMENTS = 16, 4, 100, 12, 24
KEY = {A: 4, B: 5, NOTE_A: 6, NOTE_B: 7}  # key dimensions that RoPE hardly turns
SAYS_A, SAYS_B = 8, 9  # what attention writes into the residual stream


@pytest.fixture(scope="module")
def model():
    """One layer: COUNT attends to everything alike, FIND to the note; the answer is what weighs more."""
    config = LlamaConfig(
        vocab_size=WIDTH, hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=WIDTH, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
                       layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, model.lm_head):  # fmt: skip
            module.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(WIDTH))
        for token, place in KEY.items():
            layer.self_attn.k_proj.weight[place, token] = 1
            layer.self_attn.v_proj.weight[SAYS_A if token in (A, NOTE_A) else SAYS_B, token] = 1
        layer.self_attn.q_proj.weight[[KEY[NOTE_A], KEY[NOTE_B]], FIND] = 20
        layer.self_attn.o_proj.weight[[SAYS_A, SAYS_B], [SAYS_A, SAYS_B]] = 1
        model.lm_head.weight[[A, B], [SAYS_A, SAYS_B]] = 1
    return model


@pytest.fixture(
    scope="module", params=[Threshold(cuts=[Cut(score=0.1)]), Coverage(share=0.9)], ids=lambda rule: rule.by
)
def rule(request):
    """What counts the demand."""
    return request.param


@pytest.fixture(scope="module")
def alike(rule):
    """How many it asks for of the 97 unprotected chunks when they score alike."""
    return {"threshold": 97, "coverage": 88}[rule.by]  # 90 % of them


@pytest.fixture(scope="module")
def bundle(model, rule, tmp_path_factory):
    """COUNT asks for every chunk, FIND for that of the note."""
    info = adapter(model).info
    spec = IndexerSpec(
        shape=IndexerConfig(heads=1, rank=WIDTH, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=[0], hidden=WIDTH, key_width=info.key_width, window=4, key=info.key, backbone=info.fingerprint,
        chunking=Chunking(tokens=SIZE, sink=1, recent=2), selections=[rule],
    )  # fmt: skip
    indexer = MemoryIndexer.from_spec(spec)
    encoder = indexer.query_encoder.encoders["0"]
    with torch.no_grad():
        encoder.wq_a.weight.copy_(torch.eye(WIDTH))
        encoder.wq_b.weight.zero_()
        encoder.wq_b.weight[list(KEY.values()), COUNT] = 1
        encoder.wq_b.weight[[KEY[NOTE_A], KEY[NOTE_B]], FIND] = 1
        encoder.weights_proj.weight.zero_()
        encoder.weights_proj.weight[0, [COUNT, FIND]] = 1000
    folder = tmp_path_factory.mktemp("bundle")
    export_bundle(indexer, folder)
    return folder


def documents(question):
    """(prompts [D, S], answers [D]): close counts of A and B, one note that names the less frequent of them."""
    generator = torch.Generator().manual_seed(question)
    prompts, answers = [], []
    for _ in range(DOCUMENTS):
        most = torch.randint(0, 2, (1,), generator=generator).item()
        length = CHUNKS * SIZE
        text = torch.full((length,), A + most)
        text[torch.randperm(length, generator=generator)[: length // 2 - 8]] = A + 1 - most
        place = 5 * SIZE + int(torch.randint(0, 80 * SIZE, (1,), generator=generator))
        text[place] = NOTE_B if most == 0 else NOTE_A
        prompts.append(torch.cat([text, torch.tensor([question, question])]))
        answers.append(A + most if question == COUNT else A + 1 - most)
    return torch.stack(prompts), torch.tensor(answers)


@dataclass
class Outcome:
    accuracy: float
    bytes: float
    served: set[str]


def ask(bundle, model, question, fallback, cap=CAP):
    """Accuracy, and bytes resident a document while it is answered."""
    prompts, answers = documents(question)
    runtime = LSARuntime.from_bundle(bundle, model, limits=Limits(cap=cap), fallback=fallback)
    wrote = runtime.generate(prompts, max_new_tokens=1, do_sample=False, eos_token_id=None)
    (window,) = runtime.windows
    right = (wrote[:, prompts.shape[1]] == answers).float().mean()
    return Outcome(float(right), window.bytes / len(prompts), set(window.served))


@torch.no_grad()
def test_fallback_turns_failure_into_the_accuracy_of_full_attention(model, bundle, alike):
    for question in (COUNT, FIND):
        prompts, answers = documents(question)
        assert torch.equal(model(prompts, logits_to_keep=1).logits[:, -1].argmax(-1), answers)  # full attention: all
    everything = ask(bundle, model, COUNT, None, cap=200)  # that is asked for
    capped, saved = ask(bundle, model, COUNT, None), ask(bundle, model, COUNT, Fallback(full_above=2))
    assert everything.accuracy >= 0.9 and saved.accuracy == 1 and capped.accuracy < 0.8
    assert capped.served == {"cap"} and saved.served == {"full"}
    found = ask(bundle, model, FIND, Fallback(full_above=2))
    assert found.accuracy == 1 and found.served == {"demand"}  # who needs one chunk gets no more
    chunk = 2 * WIDTH * 4 * SIZE  # keys and values, one layer, fp32
    unfinished = chunk // SIZE
    assert saved.bytes == CHUNKS * chunk + unfinished and everything.bytes == (alike + 3) * chunk + unfinished
    assert capped.bytes == CAP * chunk + unfinished and found.bytes == 4 * chunk + unfinished
    for name, of in (("count, cap", capped), ("count, fallback", saved), ("find, fallback", found)):
        print(f"{name}: accuracy {of.accuracy:.3f}, {of.bytes:.0f} bytes resident a document")


@torch.no_grad()
def test_a_turn_that_needs_everything_pays_for_bringing_it_back(model, bundle):
    prompts, found = documents(FIND)
    counted = A + B - found  # notes name the less frequent
    runtime = LSARuntime.from_bundle(bundle, model, limits=Limits(cap=CAP), fallback=Fallback(full_above=2))
    first = runtime.generate(prompts, max_new_tokens=1, do_sample=False)
    second = runtime.generate(torch.cat([first, torch.full((DOCUMENTS, 2), COUNT)], dim=1), max_new_tokens=1)
    assert torch.equal(first[:, -1], found) and torch.equal(second[:, -1], counted)
    find, count = runtime.windows
    assert find.evicted == count.fetched == DOCUMENTS * (CHUNKS - 4) and find.fetched == count.evicted == 0
    assert count.fetched_bytes == count.fetched * 2 * WIDTH * 4 * SIZE
    assert count.served == ["full"] * DOCUMENTS and find.served == ["demand"] * DOCUMENTS


@torch.no_grad()
def test_sequences_of_a_batch_fall_back_alone(model, bundle, alike):
    counting, finding = documents(COUNT), documents(FIND)
    prompts = torch.cat([counting[0][:2], finding[0][:2]])
    runtime = LSARuntime.from_bundle(bundle, model, limits=Limits(cap=CAP), fallback=Fallback(full_above=2))
    wrote = runtime.generate(prompts, max_new_tokens=1, do_sample=False)
    window = runtime.windows[0]
    assert window.served == ["full", "full", "demand", "demand"] and window.demand == [alike, alike, 1, 1]
    assert window.resident == 2 * CHUNKS + 2 * 4
    assert wrote[:, -1].tolist() == [*counting[1][:2].tolist(), *finding[1][:2].tolist()]


def test_a_second_limit_below_the_cap_is_refused(bundle, model):
    with pytest.raises(ValueError, match="full_above"):
        Fallback(full_above=0.5)
    with pytest.raises(InputError, match="cap"):
        LSARuntime.from_bundle(bundle, model, limits=Limits(cap=2), fallback=Fallback())
