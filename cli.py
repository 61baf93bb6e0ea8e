"""The `lookahead` command: each verb is a few lines over one public function."""

import os
import sys

from data_gen.core.stop import heed_signals

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "lookahead":  # the program, before all else is imported
    heed_signals()

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm
from typer.exceptions import TyperException

from data_gen.core.errors import InputError

if TYPE_CHECKING:  # every verb imports what it needs itself: `lookahead --help` does not wait for torch
    from transformers import PreTrainedTokenizerBase

    from data_gen.backbones.load import Backbone
    from recipes import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train memory indexers for long-context LLMs and prove that they work.",
)
FILE_FORMATS = "ruler, longbench-v2, longmemeval, mrcr, kvpress, scbench, babilong, graphwalks, helmet-kv, helmet-rag"

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a .yaml file.")]
BackbonePath = Annotated[str | None, typer.Option(help="Instead of the recipe's: folder, hub id, .gguf file.")]
Source = Annotated[str | None, typer.Option(help="Instead of the recipe's: folder, .jsonl, .parquet, dataset name.")]
Out = Annotated[Path, typer.Option(help="Output folder.")]
Layers = Annotated[str | None, typer.Option(help="Keep these layers only: 10,12,20.")]
ExportFormat = Literal["bundle", "flashmemory-joint", "flashmemory-layers", "flashmemory-safetensors"]


@app.callback()
def _before_any_verb() -> None:
    from data_gen.core.cpu import ask_for_huge_pages

    ask_for_huge_pages()


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return tqdm(items, desc=what, unit="doc")


@app.command()
def generate(recipe: RecipeName, out: Out, backbone: BackbonePath = None, documents: Source = None) -> None:
    """Trace documents: writes OUT/train and OUT/heldout. A stopped run continues."""
    _generate(_recipe(recipe, backbone, documents), out)


@app.command("import")
def import_dumps(
    recipe: RecipeName,
    dumps: Annotated[Path, typer.Option(help="A folder of the FlashMemory release's dumps, doc_00000.pkl ...")],
    out: Out,
    strict: Annotated[bool, typer.Option(help="Exit with 1 when any file could not be read.")] = False,
) -> None:
    """Read dumps into a trace store at OUT, with the recipe's trace settings. A stopped run continues."""
    from data_gen.flashmemory.folder import import_dumps as read_dumps

    report = read_dumps(dumps, out, _recipe(recipe).trace, _progress)
    for line in report.failed:
        _complain(line)
    typer.echo(
        f"{out}: {report.written} documents imported, {report.present} were there, {len(report.failed)} files failed; "
        f"{report.dropped}"
    )
    if report.failed and (strict or not report.written + report.present):
        raise typer.Exit(1)


@app.command()
def train(
    recipe: RecipeName,
    traces: Annotated[list[Path], typer.Option(help="A trace store; repeatable, and their order counts.")],
    out: Out,
    weight: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=1000, help="How often an epoch reads each store, in order; else once."),
    ] = None,
) -> None:
    """Train an indexer on traces: writes OUT/indexer. A stopped run continues."""
    if weight and len(weight) != len(traces):
        raise InputError(f"--weight was given {len(weight)} times for {len(traces)} trace stores; give one for each")
    if twice := next((path for path in traces if traces.count(path) > 1), None):
        raise InputError(f"--traces {twice}: given twice")
    _train(_recipe(recipe), dict(zip(traces, weight or [1.0] * len(traces), strict=True)), out)


@app.command()
def calibrate(
    recipe: RecipeName,
    indexer: Annotated[Path, typer.Option(help="A trained indexer; what is found is stored in it.")],
    traces: Annotated[Path, typer.Option(help="A held-out trace store.")],
    budget: Annotated[float | None, typer.Option(min=0.001, max=1, help="Share of chunks; else the recipe's.")] = None,
    recall: Annotated[float | None, typer.Option(min=0, max=1, help="Mass recall to reach, instead.")] = None,
    longest: Annotated[list[int] | None, typer.Option(min=1, help="Context length with its own threshold.")] = None,
    by_budget: Annotated[bool, typer.Option(help="Serve the best of each window, not a threshold.")] = False,
) -> None:
    """Choose how chunks are selected when served: writes calibration.json and reliability.png into the indexer."""
    from eval.offline.verbs import calibrate_saved

    if recall is not None and (budget is not None or by_budget):
        raise InputError("--recall finds a threshold: leave --budget and --by-budget out")
    settings = _recipe(recipe).train
    share = settings.budget if budget is None else budget
    target = ("budget", share) if recall is None else ("recall", recall)
    calibrate_saved(indexer, traces, settings.golden, target, longest or [], by_budget, typer.echo)


@app.command()
def mine(
    recipe: RecipeName,
    indexer: Annotated[Path, typer.Option(help="A trained indexer.")],
    traces: Annotated[Path, typer.Option(help="The trace store to train on next.")],
    count: Annotated[int, typer.Option(min=1, help="Hard negatives kept for each query token.")] = 256,
) -> None:
    """Find hard negatives for `candidates: {source: hard}`: writes TRACES/hard_negatives. A stopped run continues."""
    from indexer_train.data.hard_negatives import FOLDER
    from indexer_train.data.hard_negatives import mine as mine_hard_negatives
    from indexer_train.load import load_indexer, open_traces

    loaded = load_indexer(indexer)
    mine_hard_negatives(loaded, open_traces(traces, [loaded]), _recipe(recipe).train.golden, count, _progress)
    typer.echo(f"hard negatives: {traces / FOLDER}")


@app.command()
def evaluate(
    recipe: RecipeName,
    traces: Annotated[Path, typer.Option(help="A held-out trace store.")],
    out: Out,
    indexer: Annotated[Path | None, typer.Option(help="A trained indexer.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Two indexers side by side.")] = None,
    every_token: Annotated[bool, typer.Option(help="A window from every token, not one a refresh.")] = False,
) -> None:
    """Recall on held-out traces beside baselines and oracle: adds to OUT/results.json, writes report.html and .md."""
    from eval.verbs import evaluate_traces

    if indexer is not None and compare is None:
        indexers = {"indexer": indexer}
    elif compare is not None and indexer is None:
        indexers = dict(zip("AB", compare, strict=True))
    else:
        raise InputError("evaluate needs one indexer (--indexer A) or two (--compare A B)")
    evaluate_traces(_recipe(recipe).train, indexers, traces, out, recipe, every_token, typer.echo)


@app.command()
def export(
    indexer: Annotated[Path, typer.Option(help="A trained indexer.")],
    out: Annotated[Path, typer.Option(help="Output folder; of flashmemory-joint and -safetensors, the file.")],
    format: Annotated[ExportFormat, typer.Option(help="A bundle, or what FlashMemory's serving reads.")] = "bundle",
    layers: Layers = None,
) -> None:
    """Write an indexer for serving, and say what the format does not carry."""
    from indexer_train.formats.convert import export_indexer
    from indexer_train.load import load_indexer

    exported = export_indexer(load_indexer(indexer), out, format, _numbers(layers))
    for line in [*(f"{format}: {path}" for path in exported.files), *exported.notes]:
        typer.echo(line)


@app.command()
def convert(
    checkpoints: Annotated[list[Path], typer.Argument(help="FlashMemory checkpoints: .pt or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Save the indexer in this new folder.")],
    traces: Annotated[
        Path | None, typer.Option(help="The trace store that it is for; else V4-Flash as served.")
    ] = None,
    layers: Layers = None,
    offset: Annotated[float, typer.Option(help="Logit offset it was served with; becomes the bias.")] = 0.0,
    positions: Annotated[int | None, typer.Option(min=1, help="Context, if longer than the file's RoPE table.")] = None,
) -> None:
    """Turn checkpoints of the FlashMemory release into an indexer that every other verb reads."""
    from data_gen.traces.store import TraceStore
    from indexer_train.formats.convert import import_checkpoints

    _must_be_new(out)
    manifest = None if traces is None else TraceStore.open(traces).manifest
    indexer = import_checkpoints(checkpoints, _numbers(layers), manifest, offset, positions)
    indexer.save_whole(out)
    spec = indexer.spec
    assert spec.rope is not None  # the release is DeepSeek-V4's, whose queries turn
    typer.echo(
        f"indexer: {out} (layers {spec.layers}, {spec.shape.heads} heads, rank {spec.shape.rank}, "
        f"positions below {spec.rope.positions})"
    )


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Traces, indexer, bundle, run, any checkpoint.")]) -> None:
    """Say what lies at a path and read all of it; exit code 1 when something is damaged."""
    from indexer_train.artefacts import inspect as inspect_artefact

    found = inspect_artefact(path, _progress)
    typer.echo(str(found))
    for line in found.damage:
        typer.echo(f"DAMAGED {line}")
    if found.damage:
        raise typer.Exit(1)


@app.command()
def verify(
    traces: Annotated[Path, typer.Option(help="A trace store.")],
    native: Annotated[Path | None, typer.Option(help="The backbone's checkpoint, or its layer_NN files.")] = None,
    indexer: Annotated[Path | None, typer.Option(help="A trained indexer or a bundle.")] = None,
) -> None:
    """Recompute native logits, and an indexer's scores, in float64; exit code 1 when they differ."""
    from eval.offline.verbs import verify_traces

    if not verify_traces(traces, native, indexer, typer.echo):
        raise typer.Exit(1)


@app.command()
def decode(
    recipe: RecipeName,
    bundle: Annotated[Path, typer.Option(help="An exported bundle.")],
    out: Out,
    backbone: BackbonePath = None,
    documents: Source = None,
    prompt: Annotated[Path | None, typer.Option(help="Continue this text instead: prints it, OUT/trace.json.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write behind the prompt.")] = 128,
    cap: Annotated[int | None, typer.Option(min=1, help="Most resident chunks behind the prompt; else any.")] = None,
    fallback: Annotated[bool, typer.Option(help="Full attention for windows that ask for more than --cap.")] = False,
    budget: Annotated[float | None, typer.Option(min=0.001, max=1, help="Share kept; else the bundle's rule.")] = None,
) -> None:
    """Decode held-out documents with full attention and under every policy: adds to OUT/results.json."""
    from eval.verbs import continue_text, decode_documents

    if prompt is None and (cap is not None or fallback or budget is not None):
        raise InputError("--cap, --fallback and --budget say how a --prompt is continued; add one or leave them out")
    if prompt is not None and documents is not None:
        raise InputError("--documents and --prompt: decode documents, or continue one text; leave one of them out")
    if fallback and cap is None:
        raise InputError("--fallback needs --cap: without one no window asks for too much")
    if prompt is None:
        settings = _recipe(recipe, backbone, documents)
        given = settings.backbone, settings.documents, settings.trace, settings.decode
        decode_documents(bundle, *given, out, recipe, typer.echo, _progress)
    else:
        model = _recipe(recipe, backbone).backbone
        continue_text(model, bundle, prompt, new_tokens, out, cap, fallback, budget, typer.echo)


@app.command()
def benchmark(
    bundle: Annotated[Path, typer.Argument(help="An exported bundle.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="Output folder.")],
    backbone: Annotated[str | None, typer.Option("--backbone", "--model", help="The bundle's model.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Whose backbone and `benchmark:` section; else defaults.")] = None,
    documents: Annotated[str | None, typer.Option(help="Text never trained on; else what was held out.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; else as long as trained, and twice that.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A generated task; else all. mrcr is always asked.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Of each generated task and length.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Share of chunks kept; repeatable.")] = None,
    file: Annotated[list[str] | None, typer.Option(help=f"FORMAT=FILE, FORMAT one of {FILE_FORMATS}.")] = None,
) -> None:
    """Long-context tasks under every policy: adds to OUT/results.json and the report. A stopped run continues."""
    from data_gen.config import BackboneConfig
    from eval.online.config import BenchmarkConfig
    from eval.verbs import benchmark_bundle

    if recipe is not None:
        settings = _recipe(recipe, backbone)
        model, config = settings.backbone, settings.benchmark
    elif backbone is not None:
        model, config = BackboneConfig(path=backbone), BenchmarkConfig()
    else:
        raise InputError("benchmark needs the bundle's model: --backbone PATH, or --recipe NAME that says it")
    config = config.changed(
        file or [], lengths=length, tasks=task, examples=examples, budgets=budget, haystack=documents
    )
    benchmark_bundle(bundle, model, config, out, recipe, typer.echo, _progress)


@app.command()
def run(recipe: RecipeName, out: Out, backbone: BackbonePath = None, documents: Source = None) -> None:
    """All verbs in a row: generate, train, evaluate, export, decode. A stopped run continues."""
    from eval.report.tables import read_results
    from eval.verbs import decode_documents, evaluate_traces

    read_results(out)
    settings = _recipe(recipe, backbone, documents)
    loaded = _generate(settings, out / "traces")
    _train(settings, {out / "traces" / "train": 1.0}, out)
    indexers, heldout = {"indexer": out / "indexer"}, out / "traces" / "heldout"
    evaluate_traces(settings.train, indexers, heldout, out, recipe, False, typer.echo)
    export(out / "indexer", out / "bundle")
    given = loaded, settings.documents, settings.trace, settings.decode
    decode_documents(out / "bundle", *given, out, recipe, typer.echo, _progress)


@app.command("select-layers")
def select_layers(
    indexer: Annotated[Path, typer.Option(help="A trained indexer.")],
    traces: Annotated[Path, typer.Option(help="A held-out trace store.")],
    count: Annotated[int, typer.Option(min=1, help="Layers to serve.")],
    out: Annotated[Path | None, typer.Option(help="Save the indexer with the best choice in this new folder.")] = None,
    budget: Annotated[float, typer.Option(min=0.001, max=1, help="Share of chunks kept.")] = 0.1,
) -> None:
    """Find the layers to serve and the rule that joins them, by mass recall on held-out traces."""
    from eval.offline.verbs import select_served_layers

    if out is not None:
        _must_be_new(out)
    select_served_layers(indexer, traces, count, budget, out, typer.echo)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="deepseek-v4-flash, deepseek-v4-pro, or a folder with a config.json.")],
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens, repeatable; else 32K to 1M.")] = None,
    kept: Annotated[float | None, typer.Option(min=0, max=1, help="Share of chunks resident; else .094.")] = None,
    churn: Annotated[float | None, typer.Option(min=0, max=1, help="Share that a refresh replaces; else .3.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0, help="GiB of one GPU: how many requests fit?")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the weights.")] = 1,
    recipe: Annotated[str | None, typer.Option(help="Whose indexer, window and chunks; else the paper's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write plan.json, plan.md and plan.png here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """What lookahead sparse attention saves: memory, operations and traffic of a model, computed from its config."""
    from eval.plan import PlanSettings, make_plan
    from eval.plan.plan import CONTEXTS
    from eval.plan.report import plan_json, plan_text, write_plan

    given = {"kept": kept, "churn": churn, "gpu_memory": gpu_memory, "gpus": gpus}
    settings = PlanSettings()
    if recipe is not None:
        read = _recipe(recipe)
        settings = PlanSettings.of(read.trace, read.indexer)
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    found = make_plan(model, context or CONTEXTS, settings)
    if out is not None:
        write_plan(found, out)
    typer.echo(plan_json(found) if as_json else plan_text(found))


def _numbers(layers: str | None) -> list[int] | None:
    try:
        return None if layers is None else [int(number) for number in layers.split(",")]
    except ValueError as error:
        raise InputError(f"--layers {layers}: not numbers with commas between them") from error


def _recipe(name: str, backbone: str | None = None, documents: str | None = None) -> "Recipe":
    from recipes import load_recipe

    recipe = load_recipe(name)
    if backbone is not None:
        recipe.backbone.path = backbone
    if documents is not None:
        recipe.documents.source = documents
    return recipe


def _must_be_new(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something already; choose another folder")


def _generate(recipe: "Recipe", out: Path) -> "tuple[Backbone, PreTrainedTokenizerBase]":
    """Trace both sides; returns the backbone and its tokenizer."""
    from data_gen.backbones.load import adapter, load_backbone, public_name
    from data_gen.generate import generate_sides

    out.mkdir(parents=True, exist_ok=True)  # an unwritable folder is found before the model is loaded
    model, tokenizer = load_backbone(recipe.backbone)
    backbone = adapter(model, public_name(recipe.backbone.path))
    for line in generate_sides(backbone, tokenizer, recipe.documents, recipe.trace, out, _progress):
        typer.echo(line)
    return backbone, tokenizer


def _train(recipe: "Recipe", traces: dict[Path, float], out: Path) -> None:
    from indexer_train.data.mixture import mix
    from indexer_train.training.trainer import train as train_indexer

    store = mix(traces)
    store.check_settings(recipe.trace)
    train_indexer(store, recipe.indexer, recipe.train, out, traces)
    typer.echo(f"indexer: {out / 'indexer'}")


def main() -> None:
    """Run the command; bad input ends in one line and exit code 2, Ctrl-C in 130, SIGTERM in 143."""
    heed_signals()
    try:
        code = app(standalone_mode=False)
        if code == 130:  # Ctrl-C, as the parser reports it
            _complain("stopped; the same command continues")
        sys.exit(code)
    except InputError as error:
        sys.exit(_complain(str(error)))
    except TyperException as error:  # a mistake on the command line, in the words of its parser
        sys.exit(_complain(f"{error.format_message().rstrip('.')}; see `lookahead --help`"))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_complain(f"{where}{error.strerror or error}"))


def _complain(message: str) -> int:
    typer.echo(f"lookahead: {message}", err=True)
    return 2


if __name__ == "__main__":
    main()
