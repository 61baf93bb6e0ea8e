"""Where an indexer comes from, and the model card that tells it."""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from indexer_train.spec import IndexerSpec


class Metric(BaseModel):
    """One measured row. data: documents it was measured on; values: means over windows, documents, tasks."""

    model_config = ConfigDict(extra="forbid")

    data: str
    task: str
    selection: str
    values: dict[str, float]


class Source(BaseModel):
    """A trace store that an indexer learned from.

    documents: settings of its documents; training: how many of them it learned from; weight: how often an epoch read
    them.
    """

    model_config = ConfigDict(extra="forbid")

    documents: dict[str, Any]
    training: int
    weight: float = 1.0


class Provenance(BaseModel):
    """What an indexer was made of and what it then measured.

    backbone: model type; model: its public name (`BackboneInfo`); oracle: who labelled; sources: the
    trace stores; validation: documents held back from all of them; train: the recipe's section; metrics: see Metric.
    """

    model_config = ConfigDict(extra="forbid")

    backbone: str
    model: str | None = None
    oracle: str
    sources: list[Source] = Field(min_length=1)
    validation: int
    train: dict[str, Any]
    metrics: list[Metric] = []

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, values: Any) -> Any:
        """Earlier files say `documents` and `training`, of the only store or of the first."""
        of_source = ("documents", "training")
        if isinstance(values, dict) and not values.keys().isdisjoint(of_source):
            source = {name: value for name, value in values.items() if name in of_source}
            return {name: value for name, value in values.items() if name not in of_source} | {"sources": [source]}
        return values

    @property
    def training(self) -> int:
        """Documents it learned from."""
        return sum(source.training for source in self.sources)

    @property
    def traced_from(self) -> str:
        """The backbone by name, where the traces know it, and type."""
        return self.backbone if self.model is None else f"{self.model} ({self.backbone})"


LIMITS = """\
- It serves the backbone with the fingerprint above and no other: keys and hidden states are that model's own.
- It foresees the next {window} tokens. What a later user message asks for, no hidden state can tell.
- Tasks that need the whole history at once (MRCR, for one) lose accuracy under any small resident set.
- Contexts much longer than those it was trained on are to be measured first; a threshold holds for the lengths it was
  calibrated on, a budget for any.
- Recall is measured against the backbone's own attention or votes. It bounds nothing about the quality of answers:
  decode with the chunks it selects before relying on it.
"""


def model_card(spec: "IndexerSpec") -> str:
    """The README.md of a saved indexer, Markdown with the hub's YAML header."""
    made = spec.provenance
    tags = ["memory-indexer", "lookahead-sparse-attention", "kv-cache"]
    header = ["---", "library_name: sentence-transformers", "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    shape, chunking = spec.shape, spec.chunking
    text = [
        "# Memory indexer",
        "",
        f"Predicts which {chunking.tokens}-token chunks of a long history the next {spec.window} tokens will attend "
        f"to, from the hidden states that enter the attention of layers {spec.layers}.",
        "",
        "## Model",
        "",
        f"- backbone: {made.traced_from if made else 'unknown model type'}, fingerprint `{spec.backbone}`, "
        f"hidden {spec.hidden}",
        f"- {len(spec.layers)} layers joined by {shape.join}; {shape.heads} heads, rank {shape.rank}, "
        f"key width {spec.key_width} ({spec.key})",
        f"- always resident: the first {chunking.sink} and the newest {chunking.recent} chunks",
        f"- served: {spec.selection}",
        "",
        "Loading it needs the Lookahead Indexer toolkit: `pip install .` in a clone of it installs `indexer_train`.",
        "",
        "```python",
        "from indexer_train.model import MemoryIndexer",
        "",
        'indexer = MemoryIndexer("FOLDER")',
        f"queries = indexer.encode_query([(hidden, position)])  # hidden: [{len(spec.layers)}, {spec.hidden}]",
        "chunks = indexer.encode_document([(keys,) for keys in history])  # one entry per chunk",
        "scores = indexer.similarity(queries, chunks)  # [1, chunks]",
        "```",
        "",
    ]
    if made is not None:
        text += ["## Data", "", *_data(made), "", "## Metrics", "", *_metrics(made.metrics), ""]
    text += [
        "## Intended use",
        "",
        "Choosing which part of the KV cache stays on the GPU while the backbone decodes (lookahead sparse attention), "
        "and research on it.",
        "",
        "## Limits",
        "",
    ]
    return "\n".join([*header, *text]) + LIMITS.format(window=spec.window)


def _data(made: Provenance) -> list[str]:
    lines = [
        f"- traces of {made.training} documents; {made.validation} others chose the checkpoint",
        f"- labels: the backbone's own {made.oracle}",
        *map(_source, made.sources),
    ]
    options = {name: made.train[name] for name in ("loss", "epochs", "learning_rate", "golden", "budget", "select")}
    lines.append("- training: " + ", ".join(f"{name} {value}" for name, value in options.items()))
    return lines


def _source(source: Source) -> str:
    asked, told = source.documents, "source not known"
    if "source" in asked:
        low, high = asked["tokens"]
        tasks = ", ".join(f"{task} {count}" for task, count in asked.get("train", {}).items() if count)
        told = f"source `{asked['source']}`, {low} to {high} tokens; asked for {tasks}"
    often = "" if source.weight == 1 else f"; read {source.weight:g} times an epoch"
    return f"- {source.training} documents: {told}{often}"


def _metrics(metrics: list[Metric]) -> list[str]:
    if not metrics:
        return ["None were measured."]
    names = list(metrics[0].values)
    lines = [f"| data | task | selection | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for row in metrics:
        values = " | ".join(f"{row.values[name]:.3f}" if name in row.values else "-" for name in names)
        lines.append(f"| {row.data} | {row.task} | {row.selection} | {values} |")
    return lines
