"""Sets by masks against sets by eviction: the same next-token distributions as the sessions that serve."""

import torch

from benchmarks.masked import MaskedModel, Policy
from benchmarks.masked_scores import mean_pooled, recency, trained
from data_gen.backbones.tiny import tiny_backbone
from data_gen.core.chunks import Chunking
from eval.online import online_policies
from eval.online.cycle import Course, go_on
from eval.online.session import DenseSession
from eval.runtime.correction import Correction
from indexer_train.config import IndexerConfig
from indexer_train.model import MemoryIndexer
from indexer_train.spec import IndexerSpec


def test_a_window_read_at_once_under_masks_is_decoding_under_evictions():
    model, _ = tiny_backbone()
    model = model.cpu()
    chunking, budget = Chunking(tokens=4, sink=1, recent=8), 0.2
    session = DenseSession(model, chunking)
    info = session.host.info
    torch.manual_seed(0)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=2, rank=8), layers=info.full_layers[:2], hidden=info.hidden, key_width=info.key_width,
        chunking=chunking, window=8, backbone=info.fingerprint,
    )  # fmt: skip
    indexer = MemoryIndexer.from_spec(spec, device="cpu")
    tokens = torch.randint(5, 100, (150,)).tolist()
    prompt, rest = tokens[:131], tokens[131:147]
    session.read(prompt)
    rankings = {"full": None, "recency": online_policies.recency, "mean-pooled": online_policies.mean_pooled,
                "indexer": online_policies.indexer_policy(indexer)}  # fmt: skip
    corrections = {query: Correction(chunks=2, query=query) for query in ("same", "previous")}
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in [*rankings, *corrections]}
    courses = []
    for name, ranking in rankings.items():
        keep = None if ranking is None else lambda each, ranking=ranking: each.best(ranking(each), budget)
        seen = [lambda _, logits, name=name: expected[name].append(logits)]
        courses.append(Course(session.fork(), keep, rest, watchers=seen))
    corrects = next(policy for policy in online_policies.ONLINE_POLICIES if policy.corrects)
    for query, correction in corrections.items():
        given = online_policies.Circumstances(indexer, online_policies.Foresight(8), budget, correction)
        seen = [lambda _, logits, name=query: expected[name].append(logits)]
        courses.append(Course(session.fork(), corrects.keep(given), rest, watchers=seen))
    go_on(courses, 8)
    masked = MaskedModel(model, chunking)
    rows = [("full", None), ("recency", recency), ("mean-pooled", mean_pooled), ("indexer", trained(indexer))]
    policies = [Policy(name, score, budget) for name, score in rows]
    policies += [
        Policy(query, trained(indexer), budget, correction=correction) for query, correction in corrections.items()
    ]
    going = masked.begin(masked.prompt(prompt), policies)
    found = []
    for piece in torch.tensor(rest).split(8):
        masked.refresh(going, 8)
        found.append(masked.read(going, piece.expand(6, -1)))
    for row, name in enumerate(expected):
        torch.testing.assert_close(torch.cat(found, dim=1)[row], torch.stack(expected[name]), atol=2e-4, rtol=1e-3)
    kept = torch.stack(going.kept)
    assert bool((kept[:, 0] == 1).all()) and bool((kept[:, 1:] < 0.6).all())
    assert not torch.equal(expected["recency"][-1], expected["indexer"][-1])
    assert not torch.equal(expected["same"][-1], expected["indexer"][-1])
    assert not torch.equal(expected["mean-pooled"][-1], expected["indexer"][-1])
    torch.testing.assert_close(kept[:, 4:], kept[:, 3:4].expand(-1, 2))
    torch.testing.assert_close(going.fetched, torch.tensor([course.usage.fetched for course in courses]))
    assert going.fetched[4] > going.fetched[3]


def test_a_row_that_is_refreshed_more_often_and_one_with_more_bytes():
    model, _ = tiny_backbone()
    masked = MaskedModel(model.cpu(), Chunking(tokens=4, sink=1, recent=8))
    tokens = torch.randint(5, 100, (147,), generator=torch.Generator().manual_seed(0))
    prompt, rest = masked.prompt(tokens[:131].tolist()), tokens[131:]

    def read(policies, window, piece):
        going, found = masked.begin(prompt, policies), []
        for each in rest.split(piece):
            masked.refresh(going, window)
            found.append(masked.read(going, each.expand(len(policies), -1)))
        return torch.cat(found, dim=1), going

    both, going = read([Policy("slow", mean_pooled, 0.2), Policy("fast", mean_pooled, 0.2, every=4)], 8, 4)
    (slow, _), (fast, _) = (read([Policy("alone", mean_pooled, 0.2)], window, window) for window in (8, 4))
    torch.testing.assert_close(both, torch.cat([slow, fast]), atol=2e-4, rtol=1e-3)
    assert going.refreshes == [2, 4] and not torch.allclose(slow, fast, atol=1e-3)
    (more, few), (same, _) = (
        read(policies, 8, 8)[1].kept[0].tolist()
        for policies in ([Policy("more", recency, 0.1, extra=0.1), Policy("few", recency, 0.1)],
                         [Policy("same", recency, 0.2)] * 2)
    )  # fmt: skip
    assert more == same > few
