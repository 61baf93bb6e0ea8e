"""The documents of a held-out store measured by a pool of actors on a Ray cluster, to the rows of one process."""

import json
import time
from pathlib import Path
from typing import Any

from data_gen.core.cluster import Cluster, on_ray
from data_gen.core.tell import Progress
from data_gen.traces.validate import check_document
from eval.offline.evaluation import Evaluation
from eval.offline.parts import part_of, save_part
from indexer_train.config import TrainConfig
from indexer_train.load import load_indexer, open_traces


class Measurer:
    """One actor: opens indexers and store once, writes parts into `folder`, returns {document, bytes, seconds}.

    It checks every byte of a document before it measures it.
    """

    def __init__(self, indexers: str, traces: str, train: str, every_token: str, partial: str, folder: str) -> None:
        settings = TrainConfig.model_validate_json(train)
        opened = {name: load_indexer(Path(path)) for name, path in json.loads(indexers).items()}
        store = open_traces(Path(traces), opened.values(), partial == "True", shard=None)
        self.evaluation = Evaluation(opened, store, settings.golden, settings.budget, every_token == "True")
        self.folder = Path(folder)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        began, store = time.perf_counter(), self.evaluation.store
        part = part_of(self.folder, Path(item["path"]))
        if not part.exists():
            document = store.document(store.root / item["path"])
            check_document(document, store.manifest)
            save_part(self.evaluation.part(document), part)
        return {"document": item["path"], "bytes": part.stat().st_size, "seconds": time.perf_counter() - began}


def measure_on_ray(
    evaluation: Evaluation,
    folder: Path,
    told: dict[str, str],
    cluster: Cluster,
    progress: Progress,
) -> None:
    """Write the parts that `folder` lacks. told: what each `Measurer` is made of."""
    store = evaluation.store
    missing = [path for path in store.files if not part_of(folder, path).exists()]
    items = [{"path": str(path.relative_to(store.root))} for path in missing]
    if items:
        for _ in zip(progress(items, "evaluating"), on_ray(Measurer, told, items, cluster), strict=True):
            pass
