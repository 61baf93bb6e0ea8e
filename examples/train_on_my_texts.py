"""Train and judge an indexer on a folder of your own texts.

    python examples/train_on_my_texts.py my_texts/ --backbone Qwen/Qwen3-0.6B --out runs/mine

Cuts the texts into OUT/texts.jsonl, a piece a row: which side of training and test a row belongs to is a matter of its
hash, and a few whole files could all fall on one side. Writes a recipe, OUT/recipe.yaml, that suits the model and the
texts, and runs it: traces, indexer, bundle, report. The same command continues a run that was stopped. To go on from
there, copy the recipe, edit the copy, and call `lookahead run COPY.yaml --out OTHER`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from data_gen.backbones.load import resolve
from data_gen.core.errors import InputError
from data_gen.core.files import one_line, write_atomically

CHARACTERS = 4
"""Of a token, roughly, in English."""
PIECE = 2000
"""Characters of a row, at least, but for the last of a file."""
SHORTEST = 512
"""Tokens of the longest document, at least."""
PARTS = 16
"""Longest documents that the texts would fill: ten to train on, four held out, of shares that hashes meet roughly."""


def pieces(texts: Path) -> Iterator[str]:
    """Every text or Markdown file of a folder, cut between paragraphs. Raises InputError where there is no text."""
    files = sorted(path for path in texts.rglob("*") if path.suffix in {".txt", ".md"})
    if not files:
        raise InputError(f"{texts}: no .txt or .md file there; name the folder that holds your texts")
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text; convert it, or take it out of the folder") from error
        piece = ""
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PIECE:
                yield piece
                piece = ""
        if piece.strip():
            yield piece


def full_layers(backbone: str) -> list[int]:
    """Layers of a model on the hub or in a folder that see the whole history. Raises InputError without its config."""
    if backbone == "tiny" or backbone.endswith(".gguf"):
        raise InputError(f"--backbone {backbone}: only a hub id or a folder tells its layers; name them with --layers")
    try:
        config = AutoConfig.from_pretrained(resolve(backbone)).get_text_config()
    except (OSError, ValueError) as error:
        raise InputError(f"--backbone {backbone}: no model that transformers reads ({one_line(error)})") from error
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        raise InputError(f"--backbone {backbone}: its config calls no layer full_attention; name some with --layers")
    return full


def recipe_for(rows: Path, size: int, backbone: str, layers: list[int] | None, longest: int) -> dict[str, Any]:
    """Settings for a file of texts of `size` characters. layers: that the indexer reads; None: three of the model's.

    Raises InputError for too little text.
    """
    if layers is None:
        full = full_layers(backbone)
        layers = sorted({full[len(full) * part // 12] for part in (4, 6, 9)})
    if (tokens := size // CHARACTERS) < PARTS * SHORTEST:
        raise InputError(f"{size} characters of text are too few; {PARTS * SHORTEST * CHARACTERS} are the least")
    long = max(SHORTEST, min(longest, tokens // PARTS))
    documents = tokens // long
    return {
        "backbone": {"path": backbone},
        "documents": {
            "source": str(rows),
            "tokens": [long // 2, long],
            "train": {"text": documents * 3 // 8, "single": documents // 4},
            "heldout": {"text": 1, "single": 3},
            "heldout_share": 0.35,
        },
        "trace": {"layers": layers, "text_rows": min(320, long // 4)},
        "indexer": {"heads": 16, "rank": 64, "distance_bumps": 8},
        "train": {"loss": "listwise_peak", "choose": "peak_entropy", "epochs": 10},
        "decode": {"budget": 0.1, "text_documents": 1, "text_tokens": min(128, long // 4)},
    }


def main() -> None:
    """Write the recipe and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder of text or Markdown files")
    parser.add_argument("--backbone", required=True, help="hub id, folder, .gguf file or `tiny`")
    parser.add_argument("--layers", type=int, nargs="+", help="that the indexer reads; else three (.gguf: name them)")
    parser.add_argument("--longest", type=int, default=8000, help="tokens of the longest document")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, path = args.out / "texts.jsonl", args.out / "recipe.yaml"
    try:
        texts = list(pieces(args.texts))
        settings = recipe_for(rows, sum(map(len, texts)), args.backbone, args.layers, args.longest)
    except InputError as error:
        parser.error(str(error))
    files = {
        rows: "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode(),
        path: yaml.safe_dump(settings, sort_keys=False).encode(),
    }
    for file, content in files.items():
        if file.exists() and file.read_bytes() != content:
            parser.error(f"{file}: not what this call would write; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_atomically(file, partial(Path.write_bytes, data=content))
    sys.exit(subprocess.run([sys.executable, "-m", "cli", "run", path, "--out", args.out]).returncode)


if __name__ == "__main__":
    main()
