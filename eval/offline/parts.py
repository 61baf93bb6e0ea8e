"""What evaluation measures of one document, on disk until every document's is there: workers share an evaluation.

OUT/parts/KEY/0000/doc_0000000.safetensors   one document's part, sealed, as its trace lies in the store; KEY: a hash
                                             of what is measured, and on what
Merged they are what one process measures, whoever made them; then the folder goes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from data_gen.core.files import broken_seal, save_tensors, whole, write_atomically
from data_gen.traces.types import DocumentMeta
from eval.offline.recall import Amount, DocumentRecall, Ranker
from eval.offline.refresh import Sums
from indexer_train.measure.metrics import Tally

PARTS = "parts"
REMEDY = "delete it and evaluate again"


@dataclass
class Part:
    """One document, measured.

    recall: under every ranker and amount; sums: by (policy, interval), see eval/offline/refresh.py; scores, truth: of
    sampled candidates, [M] fp32 and [M] bool.
    """

    meta: DocumentMeta
    recall: list[DocumentRecall]
    sums: dict[tuple[str, int], Sums]
    scores: torch.Tensor
    truth: torch.Tensor


def part_of(folder: Path, trace: Path) -> Path:
    """Where in `folder` the part of the document of that trace file lies."""
    return folder / trace.parent.name / trace.name


def save_part(part: Part, path: Path) -> None:
    """Write a part, whole or not at all; every number reads back to the last bit."""
    recall = [
        [each.ranker, each.amount, each.macro, {name: float(value) for name, value in vars(each.sums).items()}]
        for each in part.recall
    ]
    sums = [[*key, vars(each) | {"offsets": list(each.offsets.items())}] for key, each in part.sums.items()]
    metadata = {"meta": part.meta.model_dump_json(), "recall": json.dumps(recall), "sums": json.dumps(sums)}
    tensors = {"scores": part.scores, "truth": part.truth}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: save_tensors(tensors, file, metadata))


def load_part(path: Path) -> Part:
    """What `save_part` wrote. Raises InputError when it is damaged."""
    with whole(path, "part of an evaluation", REMEDY), safe_open(path, framework="pt") as file:
        if reason := broken_seal(path):
            raise ValueError(reason)
        metadata = file.metadata()
        meta = DocumentMeta.model_validate_json(metadata["meta"])
        recall = [
            DocumentRecall(meta, Ranker(*ranker), Amount(*amount), macro, Tally(**_doubles(tally)))
            for ranker, amount, macro, tally in json.loads(metadata["recall"])
        ]
        sums = {
            (policy, interval): Sums(**each | {"offsets": dict(each["offsets"])})
            for policy, interval, each in json.loads(metadata["sums"])
        }
        return Part(meta, recall, sums, file.get_tensor("scores"), file.get_tensor("truth"))


def _doubles(values: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
