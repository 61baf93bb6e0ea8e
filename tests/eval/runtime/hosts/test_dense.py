"""Dense hosts against the stock model: bitwise with everything resident, masked oracle with less."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import DynamicCache

from data_gen.backbones.layers import attention_modules
from data_gen.core.errors import InputError
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dense_cache import ROOM
from tests.conftest import tiny_model

SIZE, PROMPT = 4, 90  # 22 chunks, and two tokens of the next
IDS = torch.randint(0, 128, (3, 130), generator=torch.Generator().manual_seed(7))
DIFFERENT = [torch.tensor([0, 5, 9, 20, 21]), torch.tensor([0, 1, 21]), torch.arange(22)]


def open_host(model):
    return DenseHost(model, SIZE, sorted(attention_modules(model))[:1])


@contextmanager
def masked(model, visible):
    """The stock model, whose full-attention layers see `visible` [B, S, T] only."""
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    with ExitStack() as stack:
        for module in attention_modules(model).values():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": bias}), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield


def sees(resident, first, last):
    """What tokens first .. last - 1 of each sequence see when these chunks were kept before token PROMPT."""
    visible = torch.ones(len(resident), last, last, dtype=torch.bool).tril()[:, first:]
    for row, chunks in enumerate(resident):
        evicted = sorted(set(range(PROMPT // SIZE)) - set(chunks.tolist()))
        visible[row, :, (torch.tensor(evicted, dtype=torch.int64)[:, None] * SIZE + torch.arange(SIZE)).flatten()] = (
            False
        )
    return visible


def check_masked(model, host, stock, sets):
    """Read on after the prompt, of which the host keeps `sets`, beside the masked stock model; tokens read then."""
    place = PROMPT
    for new in (*[1] * 6, 9, 1):  # one by one, a second turn, one more
        piece = IDS[: len(sets), place : place + new]
        ours = host.read(piece)
        with masked(model, sees(sets, place, place + new)):
            expected = model(piece, past_key_values=stock).logits[:, -1]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        place += new
    return place


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_everything_resident_is_bitwise_stock(model, dtype, batch):
    model = model.to(dtype)
    host, stock = open_host(model), DynamicCache(config=model.config)
    everything = [torch.arange(PROMPT // SIZE)] * batch
    pieces = [64, 26, *[1] * 10, 20, 1, 1]  # chunked prefill, decoding, a second turn
    for first, last in zip(torch.tensor([0, *pieces]).cumsum(0), torch.tensor(pieces).cumsum(0), strict=False):
        piece = IDS[:batch, first:last]
        assert torch.equal(host.read(piece), model(piece, past_key_values=stock, logits_to_keep=1).logits[:, -1])
        if last == PROMPT:
            gone = host.keep([torch.arange(18, 22)] * batch)
            back = host.keep(everything)
            assert gone.evicted == back.fetched == 18 * batch


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sets", [DIFFERENT, [DIFFERENT[0]], [DIFFERENT[0], DIFFERENT[0] - DIFFERENT[0] % 2 // 2]])
def test_a_restricted_set_is_the_masked_stock_model(model, sets, attention):
    model.set_attn_implementation(attention)
    sets = [chunks.unique() for chunks in sets]
    host, stock, batch = open_host(model), DynamicCache(config=model.config), len(sets)
    host.read(IDS[:batch, :PROMPT])
    model(IDS[:batch, :PROMPT], past_key_values=stock)
    move = host.keep(sets)
    assert move.evicted == 22 * batch - sum(map(len, sets))
    assert [chunks.tolist() for chunks in host.cache.resident()] == [chunks.tolist() for chunks in sets]
    place = check_masked(model, host, stock, sets)
    used, chunk = host.resident_bytes(), len(host.cache.full) * 2 * 2 * SIZE * 16 * 4  # KV 2, d 16, fp32
    rest = batch * (place - PROMPT // SIZE * SIZE) * chunk // SIZE
    assert host.cold_bytes == chunk and used.served == sum(map(len, sets)) * chunk + rest
    assert used.tensors == max(map(len, sets)) * batch * chunk + rest
    assert used.keys == batch * (place // SIZE) * 32 * 2


@torch.no_grad()
def test_long_inputs_are_read_in_pieces(model, monkeypatch):
    monkeypatch.setattr("eval.runtime.hosts.dense.PIECE_TOKENS", 32)
    host, stock = open_host(model), DynamicCache(config=model.config)
    ours = host.read(IDS[:2, :PROMPT])
    for piece in (IDS[:2, :32], IDS[:2, 32:64], IDS[:2, 64:PROMPT]):
        expected = model(piece, past_key_values=stock, logits_to_keep=1).logits[:, -1]
    assert torch.equal(ours, expected) and host.position == PROMPT - 1
    monkeypatch.undo()
    whole = open_host(model)
    whole.read(IDS[:2, :PROMPT])
    torch.testing.assert_close(host.keys(), whole.keys(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(host.hidden(), whole.hidden(), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_set_after_set_is_the_masked_stock_model(model):
    """A random set every 5 tokens: old entries of the stock cache stay, ours leave and come back."""
    host, stock = open_host(model), DynamicCache(config=model.config)
    host.read(IDS[:2, :PROMPT])
    model(IDS[:2, :PROMPT], past_key_values=stock)
    generator = torch.Generator().manual_seed(1)
    for place in range(PROMPT, 130):
        if place % 5 == 0:
            total = place // SIZE
            sets = [(torch.rand(total, generator=generator) < share).nonzero().flatten() for share in (0.2, 0.5)]
            host.keep(sets)
        visible = torch.ones(2, 1, place + 1, dtype=torch.bool)
        for row, chunks in enumerate(sets):
            kept = torch.zeros(total, dtype=torch.bool)
            kept[chunks] = True
            visible[row, 0, : total * SIZE] = kept.repeat_interleave(SIZE)
        ours = host.read(IDS[:2, place : place + 1])
        with masked(model, visible):
            expected = model(IDS[:2, place : place + 1], past_key_values=stock).logits[:, -1]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_comes_back_is_exact_and_what_left_is_gone(model):
    hosts = [open_host(model) for _ in range(2)]
    for host in hosts:
        host.read(IDS[:2, :PROMPT])
    hot = [(layer.keys.clone(), layer.values.clone()) for layer in hosts[0].cache.full]
    some = [torch.tensor([0, 3, 21]), torch.tensor([2, 20, 21])]
    hosts[0].keep(some)
    for layer in hosts[0].cache.full:  # all that is hot but the unfinished chunk
        layer.keys[:, :, : 3 * SIZE], layer.values[:, :, : 3 * SIZE] = torch.nan, torch.nan
    hosts[0].keep([torch.arange(4, 20), torch.tensor([0, 1, *range(3, 20)])[:16]])  # nothing poisoned stays
    hosts[0].keep([torch.arange(22)] * 2)
    for layer, (keys, values) in zip(hosts[0].cache.full, hot, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)

    hosts[1].keep([torch.arange(22)] * 2)
    for row, chunks in enumerate(some):
        for chunk in set(range(22)) - set(chunks.tolist()):
            hosts[1].cache.cold.pools[row][chunk].fill_(torch.nan)
    hosts[1].keep(some)
    hosts[0].keep(some)
    assert torch.equal(hosts[0].read(IDS[:2, PROMPT:]), hosts[1].read(IDS[:2, PROMPT:]))


@torch.no_grad()
def test_what_left_takes_no_memory(model):
    """Neither at once nor after more tokens; the prompt's own rows would be more than all that is allowed here."""
    host = open_host(model)
    host.read(IDS[:2, :PROMPT])
    host.read(IDS[:2, PROMPT : PROMPT + 1])  # lays the layers out anew, with room behind
    host.keep([torch.tensor([0]), torch.tensor([21])])
    for rows in (SIZE + 3, SIZE + 4):  # a chunk and what is unfinished
        for layer in host.cache.full:
            assert layer.keys.shape[2] == rows
            held = [layer.keys, layer.values, *layer._roomy.values()]
            assert not [t.shape for t in held if t.untyped_storage().nbytes() > 2 * 2 * (rows + ROOM) * 16 * 4]
        host.read(IDS[:2, host.position + 1 : host.position + 2])


@torch.no_grad()
def test_reset_reorder_and_forks_reach_all_that_the_host_holds(model):
    host = open_host(model)
    logits = host.read(IDS[:, :PROMPT])
    hidden, keys = host.hidden(), host.keys()
    host.keep(DIFFERENT)
    twin = host.fork()
    order = torch.tensor([2, 0, 0])
    host.cache.reorder_cache(order)
    assert torch.equal(host.hidden(), hidden[order]) and torch.equal(host.keys(), keys[order])
    other = open_host(model)
    other.read(IDS[order, :PROMPT])
    other.keep([DIFFERENT[row] for row in order])
    for sets in (None, [torch.tensor([1, 7]), torch.tensor([2]), torch.tensor([8, 9])]):  # from what is hot, then cold
        if sets:
            host.keep(sets)
            other.keep(sets)
        piece = IDS[:, host.position + 1 : host.position + 4]
        torch.testing.assert_close(host.read(piece), other.read(piece), atol=1e-5, rtol=1e-5)
    host, other = twin, open_host(model)  # the fork kept the old order
    other.read(IDS[:, :PROMPT])
    other.keep(DIFFERENT)
    piece = IDS[:, PROMPT : PROMPT + 6]
    assert torch.equal(host.read(piece), other.read(piece)) and torch.equal(host.keys(), other.keys())
    host.cache.reset()
    assert host.position == -1 and host.cache.total == 0 and host.cache.batch == 0
    assert torch.equal(host.read(IDS[:, :PROMPT]), logits) and torch.equal(host.keys(), keys)


def test_beams_follow_their_sequences(model):
    host = open_host(model)
    settings = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "attention_mask": torch.ones(1, 60)}
    with host.attached():
        ours = model.generate(IDS[:1, :60], past_key_values=host.cache, **settings)
    assert torch.equal(ours, model.generate(IDS[:1, :60], **settings))
    assert host.keys().shape[:2] == (2, host.cache.total)


def test_what_does_not_work_is_refused():
    model = tiny_model("gemma3")
    with pytest.raises(InputError, match=r"indexer reads layers \[0\].*\[1, 3\]"):
        DenseHost(model, SIZE, [0, 1])
    host = open_host(model)
    host.read(IDS[:2, :PROMPT])
    with pytest.raises(InputError, match=r"1 resident sets.* 2 sequences"):
        host.keep(DIFFERENT[:1])
    with pytest.raises(InputError, match="ascending"):
        host.keep([torch.tensor([3, 2])] * 2)
    with pytest.raises(InputError, match="context is 512"):
        host.read(torch.zeros(2, 500, dtype=torch.int64))
    padded = torch.ones(2, 60).index_fill(1, torch.arange(3), 0)
    with pytest.raises(InputError, match="a padded batch"), host.attached():
        host.cache.reset()
        model.generate(IDS[:2, :60], attention_mask=padded, past_key_values=host.cache, max_new_tokens=2)
    host.read(IDS[:2, :PROMPT])
    host.keep(DIFFERENT[:2])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="attn_implementation='sdpa'"), host.attached():
        host._hide_padding(host.modules[1], (), {"past_key_values": host.cache, "hidden_states": torch.ones(2, 1, 32)})
