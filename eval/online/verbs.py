"""What `lookahead decode`, `benchmark` and `card` do: open, measure, write results, say what was found."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_gen.backbones.load import Backbone, adapter, load_backbone
from data_gen.config import BackboneConfig, BadRows, DocumentsConfig, TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import RESULTS
from data_gen.core.tell import Progress, Say
from data_gen.text.documents import draw_documents
from data_gen.text.plan import Plan
from eval.online.benchmark import benchmark
from eval.online.config import BenchmarkConfig, DecodeConfig
from eval.online.decode import decode_check
from eval.online.runner import check_backbone
from eval.report.outputs import outputs_of
from eval.report.page import write_report
from eval.report.rows import Results
from eval.report.setting import documents_line, examples_line, setting_of
from eval.report.tables import decode_summary, decode_table, read_results, write_results
from eval.report.tasks import benchmark_table, difference_table, fidelity_table
from eval.runtime.runtime import LSARuntime
from eval.serving.select import Fallback, Limits
from indexer_train.formats.bundle import load_bundle
from indexer_train.load import load_indexer
from indexer_train.selection import Budget


def decode_documents(
    bundle: Path,
    model: BackboneConfig | tuple[Backbone, PreTrainedTokenizerBase],
    documents: DocumentsConfig,
    trace: TraceConfig,
    config: DecodeConfig,
    out: Path,
    recipe: str,
    say: Say,
    progress: Progress,
    plan: Plan | None = None,
) -> None:
    """Held-out documents under every policy: adds to `out`/results.json and the report.

    recipe: what the report calls it, here and below; model: the bundle's backbone, or where to load it from; plan:
    where the documents are, drawn already.
    """
    read_results(out)
    indexer = load_bundle(bundle)
    if isinstance(model, BackboneConfig):
        stock, tokenizer = load_backbone(model)
        backbone = adapter(stock)
    else:
        backbone, tokenizer = model
    check_backbone(indexer, backbone)
    if plan is not None:
        heldout = list(plan.documents("heldout"))
    else:
        heldout = list(draw_documents(documents, trace, tokenizer, backbone.info.context, "heldout"))
    out.mkdir(parents=True, exist_ok=True)  # where it cannot be made, that is found before the work
    rows, answers = decode_check(backbone.model, tokenizer, indexer, heldout, config, progress)
    told = documents_line([(document.task, len(document.tokens)) for document in heldout], documents.source)
    setting = setting_of(indexer, recipe, told, config.first_window)
    results = write_results(out, decode=rows, answers=answers, measured={"decode": setting})
    found = results.decode or []
    page, _ = write_report(out)
    plot = f"plot: {out / 'recall.png'}\n" if (out / "recall.png").exists() else ""
    say(f"{decode_table(found)}\nresults: {out / RESULTS}\n{plot}report: {page}\n{decode_summary(found)}")


def continue_text(
    config: BackboneConfig,
    bundle: Path,
    prompt: Path,
    new_tokens: int,
    out: Path,
    cap: int | None,
    fallback: bool,
    budget: float | None,
    first_window: int | None,
    say: Say,
) -> None:
    """Write on from a text file, greedily, as the bundle or `budget` says; every window goes to `out`/trace.json.

    Raises InputError for a prompt that cannot be read, or of fewer than two tokens.
    """
    try:
        text = prompt.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt {prompt}: not a text file that can be read ({error})") from error
    indexer = load_bundle(bundle)
    model, tokenizer = load_backbone(config)
    runtime = LSARuntime(
        indexer,
        model,
        limits=None if cap is None else Limits(cap=cap),
        selection=None if budget is None else Budget(budget=budget),
        fallback=Fallback() if fallback else None,
        first_window=first_window,
    )
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids.to(model.device)
    if ids.shape[1] < 2:
        raise InputError(f"--prompt {prompt}: a text of fewer than two tokens; write more")
    out.mkdir(parents=True, exist_ok=True)
    answer = runtime.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :]
    runtime.save_trace(out / "trace.json")
    say(f"{tokenizer.decode(answer, skip_special_tokens=True)}\n\n{runtime.summary()}\ntrace: {out / 'trace.json'}")


def benchmark_bundle(
    bundle: Path,
    backbone: BackboneConfig,
    config: BenchmarkConfig,
    out: Path,
    recipe: str | None,
    say: Say,
    progress: Progress,
    bad_rows: BadRows | None,
) -> None:
    """Long-context tasks under every policy: adds to `out`/results.json and the report."""
    read_results(out)
    indexer = load_bundle(bundle)
    model, tokenizer = load_backbone(backbone)
    sections, notes = benchmark(adapter(model), tokenizer, indexer, config, out, progress, bad_rows)
    setting = setting_of(indexer, recipe, examples_line(Results.model_validate(sections)), config.first_window)
    results = write_results(out, **sections, measured={"benchmark": setting})
    rows = results.benchmark or []
    page, _ = write_report(out)
    say(f"{benchmark_table(rows)}\n\n{difference_table(rows)}\n")
    if results.benchmark_text:
        say(f"{fidelity_table(results.benchmark_text)}\n")
    say("\n".join([*notes, f"results: {out / RESULTS}", f"report: {page}"]))


def tell_card(folder: Path, results: Sequence[Path], say: Say) -> None:
    """Put what decode and benchmark measured, in the folders `results`, into the card of the indexer in `folder`.

    What the card said before goes. Raises InputError where nothing of this indexer was measured.
    """
    indexer, found = load_indexer(folder), []
    for each in results:
        found += outputs_of(each, indexer.digest())
    indexer.spec.outputs = found
    indexer.save_spec(folder)
    say(f"card: {folder / 'README.md'}")
