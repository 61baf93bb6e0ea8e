"""Writes the model card (README.md) of a model folder: `python -m recipes.pocket_v4.card FOLDER`.

Every figure comes from the folder's own files: config.json, model.safetensors, training.json (recipe, hardware and
what else the run is to say of itself), training.jsonl (the log) and, once measured, evaluation.json.
"""

import argparse
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from textwrap import fill

from safetensors import safe_open

from recipes.pocket_v4.config import PocketConfig, VocabularyConfig
from recipes.pocket_v4.tasks import TASKS
from recipes.pocket_v4.words import build_lexicon

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
tags: [deepseek_v4, sparse-attention, long-context, toy-model]
---

# Pocket DeepSeek-V4
"""
USE = """## Use

```python
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from recipes.pocket_v4.config import load_config
from recipes.pocket_v4.evaluate import documents_of

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")  # in bf16 a CPU takes many times as long
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
(document,) = documents_of(load_config(Path("recipes/pocket_v4/config.yaml")), "multi_key", length=1024, count=1)
prompt = tokenizer(document.prompt, return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
print(tokenizer.decode(made), document.answer)
```

Words outside the vocabulary (tokenizer.json) become `<unk>`. A fact that the sliding window still holds may be missed:
training never asked for one.

Intended use: tests and teaching: compressed sparse attention, lightning indexers, lookahead memory indexers on a
laptop. Limits: it knows an artificial language of a few hundred words and the five tasks below, nothing else; it holds
no knowledge, speaks no natural language and was not made safe for anything; how it behaves says little about large
models, because its attention is far easier to predict.
"""
TASK_LIST = """## Data

Documents are generated: plain filler sentences with facts scattered in them, then a question on them. Training asks
many questions a document, each at least a sliding window after its facts; a test document asks one, at its end.

| task | facts | question | answer |
|---|---|---|---|
| single, multi_key | `note bako 117 .` (alone, or among other keys) | `recall bako ?` | `117` |
| multi_value | `note bako 117 .` `note bako 133 .` ... | `list bako ?` | `133 bako 117 ...` in any order |
| tracking | `alias Rolu bako .` `note bako 117 .` | `trace Rolu ?` | `bako 117` |
| copy | `step first 117 .` `step second 133 .` ... | `repeat ?` | `first 117 second 133 ...` |

A copy has at most six steps: ordinals beyond `sixth` are in the vocabulary, but are never told or asked.
"""


def _paragraph(text: str) -> str:
    return fill(" ".join(text.split()), 120) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def architecture(folder: Path) -> str:
    """Shape of the model as its config and weights tell it."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        count = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    size = (folder / "model.safetensors").stat().st_size / 1e6
    kinds = {kind: config["layer_types"].count(kind) for kind in dict.fromkeys(config["layer_types"])}
    layers = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in kinds.items())
    rates = config["compress_rates"]
    text = f"""The stock `DeepseekV4ForCausalLM` of transformers, trained from scratch: {count / 1e6:.1f} M parameters,
    {size:.1f} MB in bf16. {config["num_hidden_layers"]} layers ({layers}) of width {config["hidden_size"]};
    {config["num_attention_heads"]} heads of width {config["head_dim"]}; sliding window {config["sliding_window"]}; an
    entry every {rates["compressed_sparse_attention"]} tokens in sparse and every
    {rates["heavily_compressed_attention"]} in heavily compressed layers; lightning indexers with
    {config["index_n_heads"]} heads of width {config["index_head_dim"]} that pick {config["index_topk"]} entries;
    {config["n_routed_experts"]} experts, {config["num_experts_per_tok"]} a token."""
    return _paragraph(text)


def training(folder: Path) -> str:
    """Stages, steps, seconds, seed and hardware."""
    run = json.loads((folder / "training.json").read_text())
    config = PocketConfig.model_validate(run["config"])
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    rows, tokens = [], 0
    for number, stage in enumerate(config.stages):
        reports = [record for record in log if record["stage"] == number and "step" in record]
        if not reports:
            continue
        # a stage that cannot end early took all of its steps, the last few after the last report
        steps = stage.steps if stage.advance_at is None else reports[-1]["step"]
        tokens += steps * stage.batch * stage.length
        attention = "top-k" if stage.sparse else "open"
        last = reports[-1]
        rows.append([number, stage.length, stage.batch, attention, steps, last["seconds"], last["answer"], last["kl"]])
    head = ("stage", "length", "batch", "sparse attention", "steps", "seconds so far", "answer loss", "indexer KL")
    cost = f", {run['seconds']:.0f} s, {run['peak_bytes'] / 1e9:.1f} GB at most" if "seconds" in run else ""
    where = f"Seed {config.seed}, {run['hardware']}{cost}, {tokens / 1e6:.0f} M tokens."
    text = f"""{where} Loss: cross-entropy of the answers, plus {config.loss.text} times that of the other words. The
    indexers learn by KL to the attention mass of the entries (summed over heads, from the joint softmax with window and
    sink), first with sparse attention open, then with their own top-k. Seconds and losses are those of the last report
    of a stage. `python -m recipes.pocket_v4.train` makes the model again."""
    notes = "".join(f"\n{_paragraph(note)}" for note in run.get("notes", []))
    return f"## Training\n\n{_paragraph(text)}\n{_table(head, rows)}{notes}"


def evaluation(folder: Path) -> str:
    """Accuracy by setting and length, if it was measured."""
    path = folder / "evaluation.json"
    if not path.exists():
        return "## Accuracy\n\nNot measured yet: `python -m recipes.pocket_v4.evaluate FOLDER`.\n"
    report = json.loads(path.read_text())
    settings = ("topk", "open", "closed")
    names = {"topk": "its own top-k", "open": "every entry", "closed": "no sparse attention"}
    rows = [
        [names[setting], length, *(f"{100 * row[setting][task]:.0f}" for task in TASKS)]
        for setting in settings
        for length, row in report["lengths"].items()
    ]
    found = [[length, f"{row['recall']:.3f}", row["seconds"]] for length, row in report["lengths"].items()]
    text = f"""Percent of test documents whose whole answer is right, on {report["hardware"]}: {report["documents"]}
    documents a cell with the model's own top-k, {report["comparisons"]} in the other settings. "No sparse attention"
    leaves sliding window and heavily compressed attention: what it fails needs far history."""
    planned = json.loads((folder / "training.json").read_text())["config"]["evaluation"]["lengths"]
    missing = ", ".join(str(length) for length in planned if str(length) not in report["lengths"])
    absent = f"Of the recipe's lengths not measured: {missing}.\n\n" if missing else ""
    share = "Share of the answers' attention mass, every entry open, that lies on the indexers' top-k entries:"
    table, recalls = _table(("attends to", "tokens", *TASKS), rows), _table(("tokens", "recall", "seconds"), found)
    return f"## Accuracy\n\n{_paragraph(text)}\n{table}\n{absent}{share}\n\n{recalls}"


def write_card(folder: Path) -> None:
    """Write README.md into a model folder."""
    vocabulary = json.loads((folder / "training.json").read_text())["config"]["vocabulary"]
    lexicon = build_lexicon(VocabularyConfig.model_validate(vocabulary))
    words = "\n".join([USE, TASK_LIST]).replace("bako", lexicon.keys[0]).replace("Rolu", lexicon.names[0])
    parts = [FRONT, architecture(folder), words, training(folder), evaluation(folder)]
    (folder / "README.md").write_text("\n".join(parts))


def main() -> None:
    """Write the card of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
