"""`lookahead benchmark`: what a model answers under every policy, on generated tasks and on published files."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from data_gen.backbones.load import Backbone
from data_gen.config import BadRows, DocumentsConfig
from data_gen.core.errors import InputError
from data_gen.core.tell import Progress
from data_gen.text.documents import heldout_share
from eval.online.config import BenchmarkConfig
from eval.online.examples import Example, TextExample, in_order
from eval.online.formats.rows import read_benchmark
from eval.online.generated import Haystack, generate_examples
from eval.online.online_policies import ONLINE_POLICIES
from eval.online.records import Journal
from eval.online.runner import Runner, check_backbone
from eval.online.summary import accuracy_rows, depth_rows, fidelity_rows, left_out_lines
from eval.report.rows import Row
from indexer_train.model import MemoryIndexer

JOURNAL = "answers.jsonl"
"""The finished examples of a folder."""


def benchmark(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    indexer: MemoryIndexer,
    config: BenchmarkConfig,
    out: Path,
    progress: Progress,
    bad_rows: BadRows | None = None,
) -> tuple[dict[str, list[Row]], list[str]]:
    """Ask every example; OUT/answers.jsonl keeps the finished ones, and the same call continues after them.

    bad_rows: of the text that examples are made of; None: as in training.
    Returns (sections for results.json, lines on what is not in them). Raises InputError for a bundle of another
    backbone, lengths beyond the backbone's context, too little held-out text, files of other formats, and a folder with
    answers of other settings.
    """
    runner = open_runner(backbone, tokenizer, indexer, config)
    documents = trained_documents(indexer)
    trained = None if documents is None else documents.tokens[1]
    generated: dict[str, Callable[[], Example | TextExample]] = {}
    haystack, notes = None, []
    if config.tasks or not config.files:
        try:
            lengths, notes = _lengths(config, trained, backbone.info.context)
            haystack = unseen_text(config, documents, tokenizer, max(lengths), bad_rows)
            notes += [f"haystack: {haystack.skipped}"] * bool(haystack.skipped.count)
            generated |= generate_examples(config, lengths, haystack, tokenizer, runner.thinking)
        except InputError as error:  # files are asked all the same where nothing was said of what to generate
            if not config.files or config.tasks != ["mrcr"] or config.lengths or config.haystack:
                raise
            haystack, notes = None, [f"mrcr not asked: {error}"]
    else:
        notes = ["mrcr not asked: files only (tasks: [])"]
    read = [example for file in config.files for example in read_benchmark(file, tokenizer)]
    asked: dict[str, Callable[[], tuple[Example | TextExample, Example | None]]] = {
        name: lambda build=build: (build(), None) for name, build in generated.items()
    }
    asked |= {example.name: lambda pair=(example, after): pair for example, after in in_order(read)}
    journal = Journal(out / JOURNAL, answer_settings(runner, config, haystack))
    for name in progress([name for name in asked if name not in journal.records], "asking"):
        journal.add(runner.run(*asked[name]()))
    records = [journal.records[name] for name in [*generated, *(example.name for example in read)]]
    notes += left_out_lines(records)
    available = [policy.name for policy in runner.available]
    if missing := [name for name in runner.policies if name not in available]:
        notes.append(f"not run: {', '.join(missing)} (this backbone or bundle has none)")
    sections: dict[str, list[Row]] = {
        "benchmark": [*accuracy_rows(records, trained)],
        "benchmark_text": [*fidelity_rows(records, trained)],
        "benchmark_depth": [*depth_rows(records)],
    }
    return sections, notes


def open_runner(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, indexer: MemoryIndexer, config: BenchmarkConfig
) -> Runner:
    """What asks examples as `config` says. Raises InputError for a bundle of another backbone."""
    check_backbone(indexer, backbone)
    documents = trained_documents(indexer)
    every = [policy.name for policy in ONLINE_POLICIES if config.correction or not policy.corrects]
    policies = every if config.policies is None else config.policies
    thinking = documents is not None and documents.thinking
    return Runner(
        backbone.model, tokenizer, indexer, policies, config.budgets, config.cap, thinking, backbone.info.context,
        correction=config.correction, first_window=config.first_window,
    )  # fmt: skip


def answer_settings(runner: Runner, config: BenchmarkConfig, haystack: Haystack | None) -> dict[str, Any]:
    """What the answer to an example depends on; how many are asked, and which, is not part of it."""
    weights = hashlib.sha256()
    for name, value in sorted(runner.indexer.query_encoder.state_dict().items()):
        weights.update(name.encode() + value.float().cpu().numpy().tobytes())
    settings = config.model_dump(mode="json", exclude={"lengths", "tasks", "examples", "texts", "files"})
    return settings | {
        "policies": runner.policies,
        "backbone": runner.indexer.spec.backbone,
        "precision": str(runner.model.dtype),
        "indexer": runner.indexer.spec.model_dump(mode="json", exclude={"provenance", "outputs"}),
        "weights": weights.hexdigest(),
        "text": None if haystack is None else haystack.digest,
        "thinking": runner.thinking,
    }


def trained_documents(indexer: MemoryIndexer) -> DocumentsConfig | None:
    """The settings of the documents that trained the indexer (the first store's), None where it does not say them."""
    made = indexer.spec.provenance
    if made is None:
        return None
    known = {name: value for name, value in made.sources[0].documents.items() if name in DocumentsConfig.model_fields}
    try:
        return DocumentsConfig.model_validate(known)
    except ValidationError:  # dumps and hand-made stores describe themselves otherwise
        return None


def _lengths(config: BenchmarkConfig, trained: int | None, context: int) -> tuple[list[int], list[str]]:
    """Lengths to ask, one beyond training among them where there is room, and a line where there is none or less."""
    if too_long := [length for length in config.lengths or [] if length > context]:
        raise InputError(f"benchmark.lengths: {too_long[0]}, but the backbone's context is {context} tokens")
    if trained is None:
        if config.lengths is None:
            raise InputError("the bundle does not say which lengths it was trained on; give lengths with --length")
        return sorted(set(config.lengths)), ["the bundle does not say which lengths it was trained on: none is beyond"]
    lengths = set(config.lengths or [trained])
    if max(lengths) > trained:
        return sorted(lengths), []
    beyond = min(2 * trained, context)
    if beyond <= trained:
        return sorted(lengths), [f"no length beyond training: the backbone's context is {context} tokens"]
    short = f"beyond training only {beyond} tokens, the backbone's context, not twice the {trained} of training"
    return sorted({*lengths, beyond}), [] if beyond == 2 * trained else [short]


def unseen_text(
    config: BenchmarkConfig,
    documents: DocumentsConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    bad_rows: BadRows | None = None,
) -> Haystack:
    """What examples of up to `longest` tokens are made of.

    bad_rows: None: as in training, which stops where nothing is said of it. Raises InputError where the bundle does not
    say what training held out, and no other text is named.
    """
    if bad_rows is None:
        bad_rows = "stop" if documents is None else documents.bad_rows
    if config.haystack is not None:
        return Haystack(config.haystack, "text", 1.0, tokenizer, longest, bad_rows)
    if documents is None or not (share := heldout_share(documents)):
        raise InputError("the bundle does not say which text its training held out; give unseen text with --documents")
    return Haystack(documents.source, documents.text_field, share, tokenizer, longest, bad_rows)
