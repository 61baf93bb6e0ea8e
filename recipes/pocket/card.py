"""Writes the model card (README.md) of a model folder.

Every figure comes from the folder's own files: config.json, model.safetensors, training.json (recipe, hardware and
what else the run is to say of itself), training.jsonl (the log) and, once measured, evaluation.json (with notes on its
figures, if they need any, which go when it is measured again).
"""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from textwrap import fill

from safetensors import safe_open

from recipes.pocket.config import PocketConfig
from recipes.pocket.family import PocketFamily
from recipes.pocket.tasks import TASKS
from recipes.pocket.words import build_lexicon

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
tags: [MODEL_TYPE, sparse-attention, long-context, toy-model]
---

# TITLE
"""
USE = """## Use

```python
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import documents_of

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")  # in bf16 a CPU takes many times as long
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
(document,) = documents_of(load_config(Path("RECIPE/config.yaml")), "multi_key", length=1024, count=1)
prompt = tokenizer(document.prompt, return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
print(tokenizer.decode(made), document.answer)
```

Words outside the vocabulary (tokenizer.json) become `<unk>`. A fact of the last FAR words may be missed: training never
asked for one.

Intended use: tests and teaching: sparse attention, lightning indexers, lookahead memory indexers on a laptop. Limits:
it knows an artificial language of a few hundred words and the five tasks below, nothing else; it holds no knowledge,
speaks no natural language and was not made safe for anything; how it behaves says little about large models, because
its attention is far easier to predict.
"""
TASK_LIST = """## Data

Documents are generated: plain filler sentences with facts scattered in them, then a question on them. Training asks
many questions a document, each at least FAR words after its facts; a test document asks one, at its end.

| task | facts | question | answer |
|---|---|---|---|
| single, multi_key | `note bako 117 .` (alone, or among other keys) | `recall bako ?` | `117` |
| multi_value | `note bako 117 .` `note bako 133 .` ... | `list bako ?` | `133 bako 117 ...` in any order |
| tracking | `alias Rolu bako .` `note bako 117 .` | `trace Rolu ?` | `bako 117` |
| copy | `step first 117 .` `step second 133 .` ... | `repeat ?` | `first 117 second 133 ...` |

A copy has at most six steps: ordinals beyond `sixth` are in the vocabulary, but are never told or asked.
"""


SOLVED = 0.9
"""Share of right answers below which the card warns."""


def _paragraph(text: str) -> str:
    return fill(" ".join(text.split()), 120) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def architecture(family: PocketFamily, folder: Path) -> str:
    """Shape of the model as its config and weights tell it."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        count = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    size = (folder / "model.safetensors").stat().st_size / 1e6
    text = f"""The stock `{family.causal_lm.__name__}` of transformers, trained from scratch: {count / 1e6:.1f} M
    parameters, {size:.1f} MB in bf16. {family.shape(config)}"""
    return _paragraph(text)


def limits(folder: Path) -> str:
    """Which tasks it often fails at which length, with its own top-k; nothing where none or nothing was measured."""
    path, found = folder / "evaluation.json", {}
    report = json.loads(path.read_text()) if path.exists() else {"lengths": {}}
    for length, row in report["lengths"].items():
        for task, share in row["topk"].items():
            if share < SOLVED:
                found.setdefault(task, []).append(f"{100 * share:.0f} % at {length}")
    weak = "; ".join(f"{task} {', '.join(cells)}" for task, cells in found.items())
    said = [f"Fewer than {100 * SOLVED:.0f} % of its answers are right at: {weak}."] if weak else []
    said += report.get("notes", [])
    return _paragraph(" ".join(said)) if said else ""


def training(family: PocketFamily, folder: Path) -> str:
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
    indexers learn by KL to the attention mass of the entries (summed over heads, {family.target}),
    first with sparse attention open, then with their own top-k. Seconds and losses are those of the last report of a
    stage. `python -m recipes.pockets train {family.name}` makes the model again."""
    notes = "".join(f"\n{_paragraph(note)}" for note in run.get("notes", []))
    return f"## Training\n\n{_paragraph(text)}\n{_table(head, rows)}{notes}"


def evaluation(family: PocketFamily, folder: Path) -> str:
    """Accuracy by setting and length, if it was measured."""
    path = folder / "evaluation.json"
    if not path.exists():
        return f"## Accuracy\n\nNot measured yet: `python -m recipes.pockets evaluate {family.name} FOLDER`.\n"
    report = json.loads(path.read_text())
    settings = ("topk", "open") if family.closed is None else ("topk", "open", "closed")
    names = {"topk": "its own top-k", "open": "every entry", "closed": "no sparse attention"}
    rows = [
        [names[setting], length, *(f"{100 * row[setting][task]:.0f}" for task in TASKS)]
        for setting in settings
        for length, row in report["lengths"].items()
    ]
    found = [[length, f"{row['recall']:.3f}", row["seconds"]] for length, row in report["lengths"].items()]
    left = f' "No sparse attention" leaves {family.closed}: what it fails needs far history.' if family.closed else ""
    notes = " ".join(report.get("notes", []))
    text = f"""Percent of test documents whose whole answer is right, on {report["hardware"]}: {report["documents"]}
    documents a cell with the model's own top-k, {report["comparisons"]} otherwise.{left} {notes}"""
    planned = json.loads((folder / "training.json").read_text())["config"]["evaluation"]["lengths"]
    missing = ", ".join(str(length) for length in planned if str(length) not in report["lengths"])
    absent = f"Of the recipe's lengths not measured: {missing}.\n\n" if missing else ""
    share = "Share of the answers' attention mass, every entry open, that lies on the indexers' top-k entries:"
    table, recalls = _table(("attends to", "tokens", *TASKS), rows), _table(("tokens", "recall", "seconds"), found)
    return f"## Accuracy\n\n{_paragraph(text)}\n{table}\n{absent}{share}\n\n{recalls}"


def write_card(family: PocketFamily, folder: Path) -> None:
    """Write README.md into a model folder."""
    config = PocketConfig.model_validate(json.loads((folder / "training.json").read_text())["config"])
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    lexicon = build_lexicon(config.vocabulary)
    parts = [FRONT, architecture(family, folder), USE, limits(folder), TASK_LIST]
    text = "\n".join(part for part in parts if part)
    named = {"TITLE": family.title, "MODEL_TYPE": kind, "RECIPE": f"recipes/{family.name}", "FAR": str(config.far)}
    for word, value in (named | {"bako": lexicon.keys[0], "Rolu": lexicon.names[0]}).items():
        text = text.replace(word, value)
    (folder / "README.md").write_text("\n".join([text, training(family, folder), evaluation(family, folder)]))
