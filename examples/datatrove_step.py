"""A datatrove step that traces a recipe's documents, for whoever runs its executors (local, Slurm, Ray).

    LocalPipelineExecutor([TraceDocuments("smollm2-quickstart", "traces")], tasks=8, workers=2).run()

Each task traces its share of the plan, `rank` of `world_size`. What is finished is known by the trace files themselves,
so the executor's own notes of completed tasks may be thrown away, and the number of tasks may change.
"""

from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep


class TraceDocuments(PipelineStep):
    """The step holds text alone: executors pickle it."""

    name = "Trace documents"
    type = "lookahead"

    def __init__(self, recipe: str, out: str) -> None:
        super().__init__()
        self.recipe, self.out = recipe, out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Plan, or wait for whoever plans, then trace this task's documents."""
        from data_gen.core.shard import Shard
        from data_gen.generate import open_backbone, plan_documents, trace_plan
        from data_gen.traces.failures import MOST
        from recipes import load_recipe

        recipe, out, shard = load_recipe(self.recipe), Path(self.out), Shard(rank, world_size)
        plan = plan_documents(recipe.backbone, recipe.documents, recipe.trace, out, check=world_size == 1)
        backbone, _ = open_backbone(recipe.backbone, shard)
        if not trace_plan(backbone, plan, recipe.trace, out, shard, MOST, lambda items, _: items, print):
            raise RuntimeError(f"too many documents failed, see {out / 'failed.jsonl'}")
        return data
