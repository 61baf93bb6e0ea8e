"""The examples of `lookahead benchmark` as token ids, in the readings of `benchmarks.peers`, and the weights for both
environments."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from data_gen.text.documents import assistant, conversation, user
from data_gen.text.needles import KEYS, WORDINGS, make_task
from eval.online.benchmark import open_runner, trained_documents, unseen_text
from eval.online.config import BenchmarkConfig, GeneratedTask
from eval.online.examples import Example, TextExample, common
from eval.online.generated import generate_examples
from indexer_train.formats.bundle import load_bundle
from recipes import Recipe

TASKS: list[GeneratedTask] = ["single", "multi_key", "multi_value", "text"]
SPEED_STEPS = 64
"""Tokens that are read one by one to see how long each takes."""


def weights(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone from `folder`, where it is written as safetensors on the first call."""
    if not (folder / "config.json").exists():
        model: Any
        model, tokenizer = load_backbone(recipe.backbone)
        if hasattr(model, "hf_quantizer"):  # a GGUF file's weights are plain ones by now, but not known as such
            del model.hf_quantizer
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # The configuration names the folder's weights; it is what a whole folder is known by, so it is written last.
        text = (folder / "config.json").read_text()
        (folder / "config.json").unlink()
        write_atomically(folder / "config.json", lambda path: path.write_text(text))
    return load_backbone(BackboneConfig(path=str(folder), dtype=recipe.backbone.dtype))


def asked(
    recipe: Recipe,
    bundle: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    config: BenchmarkConfig,
    seconds: int | None = None,
) -> list[dict[str, Any]]:
    """Every example of every length in every reading; a text of the longest also for speed.

    seconds: second questions of each length, as many as `config.examples` where None. Texts, which take longest, come
    first, then the first question of every task, and so on: shares of every N-th take equally long, and a run that is
    stopped has some of each reading. Raises InputError for lengths beyond the context, and where there is too little
    unseen text.
    """
    indexer = load_bundle(bundle)
    few, seconds = config.examples, config.examples if seconds is None else seconds
    config = config.model_copy(update={"tasks": TASKS, "examples": max(few, seconds)})
    runner = open_runner(adapter(model), tokenizer, indexer, config)
    if runner.context is not None and max(lengths) > runner.context:
        raise InputError(f"--length {max(lengths)}: the backbone's context is {runner.context} tokens")
    haystack = unseen_text(config, trained_documents(indexer), tokenizer, max(lengths))
    built = generate_examples(config, lengths, haystack, tokenizer, runner.thinking)
    found: list[dict[str, Any]] = []
    counts = {"known": few, "unknown": few, "second": seconds}
    for name in sorted(built, key=lambda name: (not name.startswith("text"), number(name))):
        wanted = [reading for reading, count in counts.items() if number(name) < count]
        if name.startswith("mrcr") or (wanted == ["second"] and not name.startswith(("text", "multi_key"))):
            continue
        example = built[name]()
        if isinstance(example, TextExample):
            followed = {"text": len(example.tokens) - example.follow - 1}
            if name == f"text-{max(lengths)}-0000":
                followed["speed"] = len(example.tokens) - SPEED_STEPS - 1
            read = [
                {"reading": reading, "prompt": example.tokens[:place], "given": example.tokens[place:-1],
                 "targets": example.tokens[place + 1 :], "again": [], "most": 0, "question": 0, "references": []}
                for reading, place in followed.items()
            ]  # fmt: skip
        else:
            every = readings(example, config, tokenizer, runner.thinking)
            read = [each for each in every if each["reading"] in wanted]
        told = {"task": example.task, "length": example.length, "stop": sorted(runner.stop)}
        for each in read:
            share = kept_share(indexer.spec.chunking, recipe.decode.budget, len(each["prompt"]))
            found.append({"name": f"{name} {each['reading']}", "share": share, **told, **each})
    return found


def number(name: str) -> int:
    """Of an example among those of its task and length."""
    return int(name.rpartition("-")[2])


def readings(
    example: Example, config: BenchmarkConfig, tokenizer: PreTrainedTokenizerBase, thinking: bool
) -> Iterator[dict[str, Any]]:
    """One question in its readings: prompt, what is given after it up to where the answer begins, and `again`, the
    places in that where a later question ends; question: tokens of it in the prompt."""
    ids, opening = example.prompt(tokenizer, thinking), example.opening(tokenizer)
    head, _, _ = example.messages[-1]["content"].rpartition("\n\n")
    another = conversation(tokenizer, [*example.messages[:-1], user(f"{head}\n\n#")], thinking, prompt=True)
    document = common(ids, another)
    told = {"most": example.answer_tokens, "references": example.references, "question": 0, "again": []}
    asks = len(ids) - 1 - document
    yield told | {"reading": "known", "prompt": ids[:-1], "given": [ids[-1], *opening], "question": asks}
    again = {"given": [*ids[document - 1 :], *opening], "again": [len(ids) - document]}
    yield told | {"reading": "unknown", "prompt": ids[: document - 1], **again}
    if example.task == "multi_key":
        more = second(example, config)
        (turn,) = more.turns(tokenizer, thinking)
        told |= {"references": more.references, "again": [len(turn)], "question": asks}
        yield told | {"reading": "second", "prompt": ids[:-1], "given": [ids[-1], *turn, *more.opening(tokenizer)]}


def second(example: Example, config: BenchmarkConfig) -> Example:
    """A multi-key example, answered, then asked for another of its keys."""
    drawn = make_task(
        "multi_key", "heldout", random.Random(f"{config.seed} {example.name}"), config.keys, config.values
    )
    sentence, _ = drawn.needles[drawn.asked]
    worded = [
        (wording.needle.partition("{value}"), wording, key)
        for wording in WORDINGS["heldout"]
        for key in KEYS["heldout"]
    ]
    (before, _, after), wording, key = next(
        each for each in worded if sentence.startswith(each[0][0].format(key=each[2]))
    )
    later = [assistant(drawn.answer), user(wording.question.format(key=key))]
    opening = before.format(key=key)
    value = sentence.removeprefix(opening).removesuffix(after)
    return replace(example, later=later, prefix=opening.rstrip(), references=[value])


def kept_share(chunking: Chunking, budget: float, tokens: int) -> float:
    """Of a prompt's keys and values that the resident set holds: protected chunks, those of the budget, and the tokens
    of none yet."""
    chunks = chunking.visible(tokens - 1)
    first, last = chunking.candidates(tokens - 1)
    candidates = last - first
    kept = chunks - candidates + min(candidates, chunking.kept(budget, tokens - 1))
    return (kept * chunking.tokens + tokens - chunks * chunking.tokens) / tokens
