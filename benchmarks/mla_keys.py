"""Which key should stand for a chunk under MLA: the mean latent, or the mean content keys of all heads?

    python -m recipes.pocket.documents recipes/pocket_dsa --out runs/mla-keys --chats 90 --words 768 1536
    python -m benchmarks.mla_keys --chats runs/mla-keys/chats.jsonl --out runs/mla-keys

The pocket DeepSeek-V3.2 with its sparse attention open, which is plain MLA. Documents are traced once, with latents;
content keys follow from them by each layer's own up-projection. Both indexers are trained alike, for several seeds, and
choose on documents that no training read, whose answers are then read once more with what is not resident masked. Of
their next-token distributions beside full attention's, `kl` is the divergence in nats and `same` the share whose
likeliest token stays. Refreshes are every 64 tokens of an answer, asked by full attention's hidden states; --out gets
rows.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.machine import origin
from benchmarks.models import masked
from data_gen.backbones.dense import DenseBackbone, content_keys
from data_gen.backbones.load import load_backbone
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.generate import generate
from data_gen.text.plan import Plan
from data_gen.traces.progress import PLAN
from data_gen.traces.store import TraceStore, number_of
from data_gen.traces.types import RawTrace
from eval.offline.recall import by_task, measure, recall_rows
from eval.report.rows import RecallRow
from indexer_train.measure.metrics import DocumentScorer, ServedWindows
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import select
from indexer_train.training.trainer import train
from recipes import load_recipe
from recipes.pocket.family import OPEN
from recipes.pocket_dsa.model import FAMILY

Row = dict[str, float]
BUDGETS = (0.1, 0.2)
"""Shares of the chunks that an indexer may choose."""


class OfHeads(DenseBackbone):
    """The same backbone, whose chunk keys are content keys of all heads."""

    @property
    def widths(self) -> tuple[list[int], int, int]:
        layers, _, stored = super().widths
        module: Any = self.modules[layers[0]]
        return layers, module.num_heads * module.qk_nope_head_dim, stored

    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        raw = super().trace(tokens, positions, config)
        keys = {}
        for layer, latents in raw.keys.items():
            module: Any = self.modules[layer]
            heads = content_keys(module, latents[None].float().to(self.model.device))  # [H, N, d]
            keys[layer] = heads[..., : module.qk_nope_head_dim].transpose(0, 1).flatten(1).half().cpu()
        return replace(raw, keys=keys)


@torch.no_grad()
def divergence(model: PreTrainedModel, indexer: MemoryIndexer, store: TraceStore, plan: Plan) -> dict[float, Row]:
    """By budget, `kl` and `same` of the tokens that its resident sets serve: means over documents."""
    found: dict[float, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for path in store.paths():
        document = store.document(path)
        windows = document.windows(serving=True)
        served = ServedWindows.of(document, windows)
        scores, candidate = DocumentScorer(indexer, document).joined_scores(served), served.labels.candidate
        tokens = torch.tensor([plan.document("heldout", number_of(path)).tokens], device=model.device)
        full = model(tokens, use_cache=False).logits[0].log_softmax(-1)
        spans = serves(document.positions, windows)
        rows = torch.cat([torch.arange(first, last) for first, last in spans])
        for budget, means in found.items():
            resident = ~candidate | select(scores, candidate, served.kept(budget))
            visible = sees(tokens.shape[1], document.trace.chunking.tokens, spans, resident)
            with masked(model, visible):
                less = model(tokens, use_cache=False).logits[0].log_softmax(-1)
            apart = (full[rows].exp() * (full[rows] - less[rows])).sum(-1)
            same = full[rows].argmax(-1) == less[rows].argmax(-1)
            means.append((float(apart.mean()), float(same.float().mean())))
    return {
        budget: dict(zip(("kl", "same"), torch.tensor(means).mean(dim=0).tolist(), strict=True))
        for budget, means in found.items()
    }


def serves(positions: torch.Tensor, windows: torch.Tensor) -> list[tuple[int, int]]:
    """Tokens (first, one past the last) that a set chosen at the first token of each window serves: those behind it.

    positions: [T], of query tokens; windows: [W, 2] rows of them.
    """
    return [(int(positions[first]) + 1, int(positions[last - 1]) + 2) for first, last in windows.tolist()]


def sees(length: int, size: int, spans: list[tuple[int, int]], resident: torch.Tensor) -> torch.Tensor:
    """[S, S] bool: which tokens each one sees where `resident` [W, N] are the chunks of `size` tokens in each span."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for (first, last), kept in zip(spans, resident, strict=True):
        visible[first:last, : len(kept) * size] &= kept.repeat_interleave(size)
    return visible


def main() -> None:
    """Trace, train and measure; print and write a row for each key and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, nargs=2, default=[40, 8], help="trained on, held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    made, recipe = origin(), load_recipe("pocket-dsa")
    model, tokenizer = load_backbone(BackboneConfig(path=recipe.backbone.path))
    FAMILY.set_topk(model, OPEN)
    counts = dict(zip(("train", "heldout"), ({"chat": count} for count in options.documents), strict=True))
    documents = recipe.documents.model_copy(update=counts | {"source": str(options.chats)})
    rows = []
    for name, kind in {"latent": DenseBackbone, "heads": OfHeads}.items():
        backbone = kind(model)
        stores = generate(backbone, tokenizer, documents, recipe.trace, options.out / name)
        for seed in options.seeds:
            config = recipe.train.model_copy(update={"seed": seed})
            indexer = train(stores[0], recipe.indexer, config, options.out / name / f"seed-{seed}")
            asked = measure({"indexer": indexer}, stores[1], config.golden, {}, budgets=BUDGETS, baselines=False)
            every = recall_rows(list(asked), RecallRow, by_task)
            found = [each for each in every if each.policy == "indexer" and not each.top]
            decoded = divergence(model, indexer, stores[1], Plan(options.out / name / PLAN))
            for row in found:
                assert row.mass_recall is not None and row.golden_recall is not None  # every document has golden chunks
                rows.append(
                    {"key": name, "width": backbone.info.key_width, "seed": seed}
                    | {"budget": row.budget, "n": row.documents}
                    | {"mass_recall": round(row.mass_recall, 4), "golden_recall": round(row.golden_recall, 4)}
                    | {part: round(value, 4) for part, value in decoded[float(row.budget)].items()}
                )
            print(json.dumps(rows[-len(found) :]), flush=True)
    (options.out / "rows.json").write_text(json.dumps({"origin": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
