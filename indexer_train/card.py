"""The model card of a saved indexer: card.md.j2 filled with its spec."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from indexer_train.spec import IndexerSpec, OutputRow, Source

TEMPLATE = Path(__file__).with_name("card.md.j2")
TOLD = ("loss", "epochs", "learning_rate", "golden", "budget", "select")
"""Settings of training that the card names."""


def model_card(spec: IndexerSpec) -> str:
    """The README.md of a saved indexer, Markdown with the hub's YAML header."""
    made = spec.provenance
    card = ModelCard.from_template(
        ModelCardData(
            library_name="sentence-transformers", tags=["memory-indexer", "lookahead-sparse-attention", "kv-cache"]
        ),
        template_path=str(TEMPLATE),
        spec=spec,
        made=made,
        told=_told,
        right=_right,
        options=", ".join(f"{name} {made.train[name]}" for name in TOLD) if made else "",
        names=list(made.metrics[0].values) if made and made.metrics else [],
    )
    return f"{card.content}\n"


def _right(row: OutputRow, policy: str) -> str:
    """How many questions were right under a policy: a whole number, unless answers can be right in part."""
    found = row.right.get(policy)
    return "-" if found is None else f"{round(found, 1):g} of {row.questions}"


def _told(source: Source) -> str:
    """What a trace store's documents were made of."""
    asked, told = source.documents, "source not known"
    if "source" in asked:
        low, high = asked["tokens"]
        tasks = ", ".join(f"{task} {count}" for task, count in asked.get("train", {}).items() if count)
        told = f"source `{asked['source']}`, {low} to {high} tokens; asked for {tasks}"
    return told + ("" if source.weight == 1 else f"; read {source.weight:g} times an epoch")
