"""Documents read at once under masks are what a host reads token by token, with its sets kept one after the other."""

import torch

from benchmarks.mla_keys import sees, serves
from benchmarks.models import ids, masked
from benchmarks.tiny_models import tiny
from eval.runtime.hosts.dense import DenseHost

SIZE = 4


@torch.no_grad()
def test_masks_are_what_a_host_serves():
    model, tokens = tiny("deepseek_v3"), ids(0, 90)
    positions = torch.cat([torch.arange(39, 60), torch.arange(79, 88)])  # two answers, of 21 and 9 query tokens
    windows = torch.tensor([[0, 8], [8, 16], [21, 29]])
    spans = serves(positions, windows)
    assert spans == [(40, 48), (48, 56), (80, 88)]
    resident = torch.rand(3, 22, generator=torch.Generator().manual_seed(1)) < 0.5
    host = DenseHost(model, SIZE, [0])
    expected, place = [], 0
    for (first, last), kept in zip(spans, resident, strict=True):
        resident[len(expected), first // SIZE :] = True  # what is made later is resident until the next set
        if first > place:  # what lies between two answers is read in full
            if place:
                host.keep([torch.arange(place // SIZE)])
            host.read(tokens[:, place:first])
        host.keep([kept[: first // SIZE].nonzero().flatten()])
        expected.append(torch.stack([host.read(tokens[:, at : at + 1])[0] for at in range(first, last)]))
        place = last
    with masked(model, sees(90, SIZE, spans, resident)):
        found = model(tokens).logits[0]
    for (first, last), logits in zip(spans, expected, strict=True):
        torch.testing.assert_close(found[first:last], logits, atol=1e-3, rtol=1e-3)
