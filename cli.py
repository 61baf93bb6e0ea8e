"""The `lookahead` command: each verb is a few lines over one public function."""

import os
import sys

from data_gen.core.stop import heed_signals

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "lookahead":  # the program, before all else is imported
    heed_signals()

import logging
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from data_gen.core.errors import InputError, explained
from data_gen.core.shard import Shard
from data_gen.traces.failures import MOST, parse_most
from eval.online.formats import FORMATS

if TYPE_CHECKING:  # every verb imports what it needs itself: `lookahead --help` does not wait for torch
    from transformers import PreTrainedTokenizerBase

    from data_gen.backbones.load import Backbone
    from data_gen.config import BackboneConfig
    from data_gen.core.cluster import Cluster
    from data_gen.text.plan import Plan
    from recipes import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train memory indexers for long-context LLMs and prove that they work. "
    "Options of this page stand before the verb: `lookahead --quiet run ...`.",
)

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a .yaml file.")]
BackbonePath = Annotated[str | None, typer.Option(help="Instead of the recipe's: folder, hub id, .gguf file.")]
Source = Annotated[str | None, typer.Option(help="Instead of the recipe's: folder, .jsonl, .parquet, dataset name.")]
Out = Annotated[Path, typer.Option(help="Output folder.")]
ShardOption = Annotated[
    str | None, typer.Option("--shard", help="I/N, with I from 0; by default as torchrun or srun set it.")
]
OnRay = Annotated[bool, typer.Option("--ray", help="On a Ray cluster: a local one, or RAY_ADDRESS.")]
Workers = Annotated[int, typer.Option(min=1, help="Actors that Ray starts, each with a model of its own.")]
GpusPerWorker = Annotated[float | None, typer.Option(min=0, help="GPUs of each actor; by default one, if any.")]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a store that lacks documents.")]
Layers = Annotated[str | None, typer.Option(help="Keep these layers only: 10,12,20.")]
ServedBy = Literal["threshold", "budget", "coverage"]
ExportFormat = Literal["bundle", "flashmemory-joint", "flashmemory-layers", "flashmemory-safetensors"]
MAKE, TRAIN, LOOK, SERVE, EXCHANGE = "Make data", "Train", "Look", "Serve", "Exchange"
"""Groups of verbs in `lookahead --help`."""
logger = logging.getLogger("lookahead")


class _AboveBars(logging.Handler):
    """Writes each line to standard error, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        own = logging.getLogger(record.name.partition(".")[0]).handlers
        if all(isinstance(handler, logging.NullHandler) for handler in own):  # else its library writes it
            tqdm.write(self.format(record), file=sys.stderr)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lookahead {version('lookahead-indexer')}")
        raise typer.Exit


@app.callback()
def _before_any_verb(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show only results, warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show messages of libraries.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if quiet:
        # tqdm reads it when something first imports it, as torch does. What this process starts is quiet too.
        os.environ["TQDM_DISABLE"] = "1"
    if verbose:
        for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):  # which have levels of their own, read when imported
            os.environ[f"{library}_VERBOSITY"] = "info"
    from data_gen.core.cpu import ask_for_huge_pages

    ask_for_huge_pages()
    handlers = [_AboveBars()]
    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING, handlers=handlers)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def _verb(group: str, example: str, name: str | None = None) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Add a verb to a group of `--help`, with an example; what it returns, it says at its end: what to do next."""

    def add(verb: Callable[..., str]) -> Callable[..., str]:
        @wraps(verb)
        def command(**given: Any) -> None:
            logger.info("next: %s", verb(**given))

        app.command(name, rich_help_panel=group, epilog=f"Example: `lookahead {example}`")(command)
        return verb

    return add


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=what, unit="doc")


@_verb(MAKE, "generate smollm2-quickstart --out traces")
def generate(
    recipe: RecipeName,
    out: Out,
    backbone: BackbonePath = None,
    documents: Source = None,
    shard: ShardOption = None,
    max_failures: Annotated[str, typer.Option(help="Documents that may fail: a number, or a share such as 5%.")] = MOST,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write OUT/plan.parquet and stop.")] = False,
    ray: OnRay = False,
    workers: Workers = 1,
    gpus_per_worker: GpusPerWorker = None,
) -> str:
    """Trace documents: write OUT/plan.parquet, then OUT/train and OUT/heldout. A stopped run continues."""
    parse_most(max_failures, documents=0)  # before anything is drawn
    settings = _recipe(recipe, backbone, documents)
    own, cluster = _share(shard, ray, workers, gpus_per_worker)
    plan = _plan(settings, out, check=plan_only or own.count == 1)
    if plan_only:
        return _command(
            "generate", recipe, out=out, backbone=backbone, documents=documents, shard=shard, ray=ray,
            max_failures=None if max_failures == MOST else max_failures,
            workers=workers if ray else None, gpus_per_worker=gpus_per_worker,
        )  # fmt: skip
    if cluster is None:
        _trace(settings, plan, out, own, max_failures)
    else:
        _trace_on_ray(settings, plan, out, cluster, max_failures)
    return _after(own, _command("train", recipe, traces=out / "train", out="RUN"))


@_verb(MAKE, "import deepseek-v4-flash --dumps DUMPS --out traces/train", name="import")
def import_dumps(
    recipe: RecipeName,
    dumps: Annotated[Path, typer.Option(help="A folder of the FlashMemory release's dumps, doc_00000.pkl ...")],
    out: Out,
    strict: Annotated[bool, typer.Option(help="Exit with 1 when any file could not be read.")] = False,
    shard: ShardOption = None,
) -> str:
    """Read dumps into a trace store at OUT, with the recipe's trace settings. A stopped run continues."""
    from data_gen.flashmemory.folder import import_dumps as read_dumps

    own = Shard.of(shard)
    report = read_dumps(dumps, out, _recipe(recipe).trace, _progress, own)
    for line in report.failed:
        _complain(line)
    typer.echo(
        f"{out}: {report.written} documents imported, {report.present} were there, {len(report.failed)} files failed; "
        f"{report.dropped}"
    )
    if report.failed and (strict or not report.written + report.present):
        raise typer.Exit(1)
    return _after(own, _command("train", recipe, traces=out, out="RUN"))


@_verb(TRAIN, "train smollm2-quickstart --traces traces/train --out run")
def train(
    recipe: RecipeName,
    traces: Annotated[list[Path], typer.Option(help="A trace store; repeatable; the order matters.")],
    out: Out,
    weight: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=1000, help="How often an epoch reads each store, in order; by default once."),
    ] = None,
    partial: Partial = False,
) -> str:
    """Train an indexer on traces: write OUT/indexer. A stopped run continues."""
    if weight and len(weight) != len(traces):
        raise InputError(f"--weight was given {len(weight)} times for {len(traces)} trace stores; give one for each")
    if twice := next((path for path in traces if traces.count(path) > 1), None):
        raise InputError(f"--traces {twice}: given twice; name each store once")
    _train(_recipe(recipe), dict(zip(traces, weight or [1.0] * len(traces), strict=True)), out, partial)
    return _command("evaluate", recipe, indexer=out / "indexer", traces="HELDOUT", out=out)


@_verb(TRAIN, "calibrate smollm2-quickstart --indexer run/indexer --traces traces/heldout")
def calibrate(
    recipe: RecipeName,
    indexer: Annotated[Path, typer.Option(help="A trained indexer; the result is stored in it.")],
    traces: Annotated[Path, typer.Option(help="A held-out trace store.")],
    budget: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of chunks; by default the recipe's.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="Mass recall to reach, instead of a budget.")
    ] = None,
    longest: Annotated[list[int] | None, typer.Option(min=1, help="Context length with its own threshold.")] = None,
    by: Annotated[ServedBy, typer.Option(help="The rule that is served; a threshold is kept beside it.")] = "threshold",
    partial: Partial = False,
) -> str:
    """Calibrate how chunks are selected when served: write calibration.json and reliability.png into the indexer."""
    from eval.offline.verbs import calibrate_saved

    if recall is not None and (budget is not None or by == "budget"):
        raise InputError("--recall sets the threshold or the coverage; leave out --budget and --by budget")
    settings = _recipe(recipe).train
    share = settings.budget if budget is None else budget
    target = ("budget", share) if recall is None else ("recall", recall)
    calibrate_saved(indexer, traces, settings.golden, target, longest or [], by, partial, typer.echo)
    return _command("export", indexer=indexer, out="BUNDLE")


@_verb(MAKE, "mine smollm2-quickstart --indexer run/indexer --traces traces/train")
def mine(
    recipe: RecipeName,
    indexer: Annotated[Path, typer.Option(help="A trained indexer.")],
    traces: Annotated[Path, typer.Option(help="The trace store to train on next.")],
    count: Annotated[int, typer.Option(min=1, help="Hard negatives kept for each query token.")] = 256,
    partial: Partial = False,
    shard: ShardOption = None,
) -> str:
    """Find hard negatives for `candidates: {source: hard}`: write TRACES/hard_negatives. A stopped run continues."""
    from indexer_train.data.hard_negatives import FOLDER
    from indexer_train.data.hard_negatives import mine as mine_hard_negatives
    from indexer_train.load import load_indexer, open_traces

    own = Shard.of(shard)
    own.use_own_gpu()
    loaded = load_indexer(indexer)
    store = open_traces(traces, [loaded], partial, own).shard(own)
    mine_hard_negatives(loaded, store, _recipe(recipe).train.golden, count, _progress)
    typer.echo(f"hard negatives: {traces / FOLDER}")
    return _after(own, _command("train", recipe, traces=traces, out="RUN"))


@_verb(LOOK, "evaluate smollm2-quickstart --indexer run/indexer --traces traces/heldout --out run")
def evaluate(
    recipe: RecipeName,
    traces: Annotated[Path, typer.Option(help="A held-out trace store.")],
    out: Out,
    indexer: Annotated[Path | None, typer.Option(help="A trained indexer.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Two indexers side by side.")] = None,
    every_token: Annotated[bool, typer.Option(help="A window from every token, not one per refresh.")] = False,
    partial: Partial = False,
    shard: ShardOption = None,
    ray: OnRay = False,
    workers: Workers = 1,
    gpus_per_worker: GpusPerWorker = None,
) -> str:
    """Measure recall on held-out traces with baselines and oracle: add to OUT/results.json, write the report."""
    from eval.offline.verbs import EvaluateOptions, evaluate_traces

    if indexer is not None and compare is None:
        indexers = {"indexer": indexer}
    elif compare is not None and indexer is None:
        indexers = dict(zip("AB", compare, strict=True))
    else:
        raise InputError("evaluate needs one indexer (--indexer A) or two (--compare A B)")
    asked = EvaluateOptions(every_token, partial, *_share(shard, ray, workers, gpus_per_worker))
    evaluate_traces(_recipe(recipe).train, indexers, traces, out, recipe, asked, typer.echo, _progress)
    return _after(asked.shard, _command("export", indexer=indexer or "INDEXER", out="BUNDLE"))


@_verb(SERVE, "export --indexer run/indexer --out run/bundle")
def export(
    indexer: Annotated[Path, typer.Option(help="A trained indexer.")],
    out: Annotated[Path, typer.Option(help="Output folder; for flashmemory-joint and -safetensors, a file.")],
    format: Annotated[ExportFormat, typer.Option(help="A bundle, or what FlashMemory's serving reads.")] = "bundle",
    layers: Layers = None,
) -> str:
    """Write an indexer for serving, and say what the format cannot hold."""
    from indexer_train.formats.convert import export_indexer
    from indexer_train.load import load_indexer

    exported = export_indexer(load_indexer(indexer), out, format, _numbers(layers))
    for line in [*(f"{format}: {path}" for path in exported.files), *exported.notes]:
        typer.echo(line)
    if format == "bundle":
        return _command("decode", "RECIPE", bundle=out, out="RUN")
    return f"{_command('inspect', out)}, then serve it as told above"


@_verb(EXCHANGE, "convert top3_joint.pt --out theirs")
def convert(
    checkpoints: Annotated[list[Path], typer.Argument(help="FlashMemory checkpoints: .pt or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Save the indexer in this new folder.")],
    traces: Annotated[
        Path | None, typer.Option(help="The trace store that it is for; by default V4-Flash as served.")
    ] = None,
    layers: Layers = None,
    offset: Annotated[float, typer.Option(help="Logit offset it was served with; becomes the bias.")] = 0.0,
    positions: Annotated[int | None, typer.Option(min=1, help="Context, if longer than the file's RoPE table.")] = None,
) -> str:
    """Turn checkpoints of the FlashMemory release into an indexer for the other verbs."""
    from data_gen.traces.store import TraceStore
    from indexer_train.formats.convert import import_checkpoints

    _must_be_new(out)
    manifest = None if traces is None else TraceStore.open(traces, partial=True).manifest
    indexer = import_checkpoints(checkpoints, _numbers(layers), manifest, offset, positions)
    indexer.save_whole(out)
    spec = indexer.spec
    assert spec.rope is not None  # the release is DeepSeek-V4's, whose queries turn
    typer.echo(
        f"indexer: {out} (layers {spec.layers}, {spec.shape.heads} heads, rank {spec.shape.rank}, "
        f"positions below {spec.rope.positions})"
    )
    return _command("export", indexer=out, out="BUNDLE")


@_verb(EXCHANGE, "card --indexer run/indexer --results run")
def card(
    indexer: Annotated[Path, typer.Option(help="A trained indexer; the result is stored in it.")],
    results: Annotated[list[Path], typer.Option(help="A folder of decode or benchmark; repeatable.")],
) -> str:
    """Put the answers and the text KL that decode and benchmark measured into an indexer's card."""
    from eval.online.verbs import tell_card

    tell_card(indexer, results, typer.echo)
    return _command("export", indexer=indexer, out="BUNDLE")


@_verb(LOOK, "inspect run/bundle")
def inspect(
    path: Annotated[Path, typer.Argument(help="Traces, indexer, bundle, run, any checkpoint.")],
    shard: ShardOption = None,
) -> str:
    """Describe what is at a path and check all of it, or a shard; exit code 1 when something is damaged."""
    from indexer_train.artefacts import inspect as inspect_artefact

    found = inspect_artefact(path, _progress, Shard.of(shard))
    typer.echo(str(found))
    for line in found.damage:
        typer.echo(f"DAMAGED {_one_line(line)}")
    if found.damage:
        raise typer.Exit(1)
    place = path if path.is_dir() else path.parent
    then = {
        "trace store": _command("train", "RECIPE", traces=place, out="RUN"),
        "indexer": _command("export", indexer=place, out="BUNDLE"),
        "bundle": _command("decode", "RECIPE", bundle=place, out="RUN"),
    }
    return then.get(found.kind, "lookahead --help, for the verbs that read it")


@_verb(EXCHANGE, "verify --traces traces/train --native CHECKPOINT")
def verify(
    traces: Annotated[Path, typer.Option(help="A trace store.")],
    native: Annotated[Path | None, typer.Option(help="The backbone's checkpoint, or its layer_NN files.")] = None,
    indexer: Annotated[Path | None, typer.Option(help="A trained indexer or a bundle.")] = None,
    partial: Partial = False,
) -> str:
    """Recompute native logits, and an indexer's scores, in float64; exit code 1 when they differ."""
    from eval.offline.verbs import verify_traces

    if not verify_traces(traces, native, indexer, partial, typer.echo):
        raise typer.Exit(1)
    return _command("train", "RECIPE", traces=traces, out="RUN")


@_verb(LOOK, "decode smollm2-quickstart --bundle run/bundle --out run")
def decode(
    recipe: RecipeName,
    bundle: Annotated[Path, typer.Option(help="An exported bundle.")],
    out: Out,
    backbone: BackbonePath = None,
    documents: Source = None,
    prompt: Annotated[Path | None, typer.Option(help="Continue this text instead: prints it, OUT/trace.json.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write after the prompt.")] = 128,
    cap: Annotated[int | None, typer.Option(min=1, help="Most resident chunks; by default any number.")] = None,
    fallback: Annotated[bool, typer.Option(help="Full attention for windows that ask for more than --cap.")] = False,
    budget: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share kept; by default the bundle's rule.")
    ] = None,
) -> str:
    """Decode held-out documents with full attention and under every policy: add to OUT/results.json."""
    from eval.online.verbs import continue_text

    if prompt is None and (cap is not None or fallback or budget is not None):
        raise InputError("--cap, --fallback and --budget apply only to a --prompt; add one or leave them out")
    if prompt is not None and documents is not None:
        raise InputError("--documents and --prompt cannot be used together; leave one of them out")
    if fallback and cap is None:
        raise InputError("--fallback needs --cap: without a cap no window exceeds it")
    if prompt is None:
        settings = _recipe(recipe, backbone, documents)
        _decode(settings, settings.backbone, bundle, out, recipe)
    else:
        settings = _recipe(recipe, backbone)
        first = settings.decode.first_window
        continue_text(settings.backbone, bundle, prompt, new_tokens, out, cap, fallback, budget, first, typer.echo)
    return _command("benchmark", bundle, recipe=recipe, out=out, backbone=backbone)


@_verb(LOOK, "benchmark run/bundle --recipe smollm2-quickstart --out run")
def benchmark(
    bundle: Annotated[Path, typer.Argument(help="An exported bundle.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="Output folder.")],
    backbone: Annotated[str | None, typer.Option("--backbone", "--model", help="The bundle's model.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Gives the backbone and the `benchmark:` section.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="Text that training has not seen; by default what was held out.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens; by default the training length and twice that.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A generated task; by default all. mrcr is always included.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Examples of each generated task and length.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Share of chunks kept; repeatable.")] = None,
    file: Annotated[list[str] | None, typer.Option(help=f"FORMAT=FILE, FORMAT one of {', '.join(FORMATS)}.")] = None,
) -> str:
    """Ask long-context tasks under every policy: add to OUT/results.json and the report. A stopped run continues."""
    from data_gen.config import BackboneConfig
    from eval.online.config import BenchmarkConfig
    from eval.online.verbs import benchmark_bundle

    if recipe is not None:
        settings = _recipe(recipe, backbone)
        model, config, bad_rows = settings.backbone, settings.benchmark, settings.documents.bad_rows
    elif backbone is not None:
        model, config, bad_rows = BackboneConfig(path=backbone), BenchmarkConfig(), None
    else:
        raise InputError("benchmark needs the bundle's model; give --backbone PATH, or a --recipe that names it")
    config = config.changed(
        file or [], lengths=length, tasks=task, examples=examples, budgets=budget, haystack=documents
    )
    benchmark_bundle(bundle, model, config, out, recipe, typer.echo, _progress, bad_rows)
    return f"{out}/report.html, in a browser"


@_verb(TRAIN, "run debug --out runs/debug")
def run(recipe: RecipeName, out: Out, backbone: BackbonePath = None, documents: Source = None) -> str:
    """Run generate, train, evaluate, export, decode and card. A stopped run continues."""
    from eval.online.verbs import tell_card
    from eval.report.tables import read_results
    from recipes.stages import Stages

    read_results(out)
    settings = _recipe(recipe, backbone, documents)
    plan = _plan(settings, out / "traces")
    stages = Stages(settings.took, len(plan.brief["train"]) + len(plan.brief["heldout"]), logger.info)
    loaded = stages.do("generate", lambda: _trace(settings, plan, out / "traces", Shard(), MOST, stages.paced))
    stages.do("train", lambda: _train(settings, {out / "traces" / "train": 1.0}, out))
    stages.do("evaluate", lambda: evaluate(recipe, out / "traces" / "heldout", out, out / "indexer"))
    stages.do("export", lambda: export(out / "indexer", out / "bundle"))
    stages.do("decode", lambda: _decode(settings, loaded, out / "bundle", out, recipe, plan))
    tell_card(out / "indexer", [out], logger.info)
    stages.end()
    return _command("benchmark", out / "bundle", recipe=recipe, out=out, backbone=backbone)


@_verb(
    TRAIN, "select-layers --indexer run/indexer --traces traces/heldout --count 3 --out served", name="select-layers"
)
def select_layers(
    indexer: Annotated[Path, typer.Option(help="A trained indexer.")],
    traces: Annotated[Path, typer.Option(help="A held-out trace store.")],
    count: Annotated[int, typer.Option(min=1, help="Layers to serve.")],
    out: Annotated[Path | None, typer.Option(help="Save the indexer with the best choice in this new folder.")] = None,
    budget: Annotated[float, typer.Option(min=0.001, max=1, help="Share of chunks kept.")] = 0.1,
    partial: Partial = False,
) -> str:
    """Find the layers to serve and the rule that joins them, by the criterion of training, on held-out traces. Whether
    the model still answers is for `lookahead benchmark` to confirm.
    """
    from eval.offline.verbs import select_served_layers

    if out is not None:
        _must_be_new(out)
    select_served_layers(indexer, traces, count, budget, out, partial, typer.echo)
    saved = "" if out is not None else "the same with --out SERVED, then "
    return f"{saved}{_command('export', indexer=out or 'SERVED', out='BUNDLE')}"


@_verb(LOOK, "plan deepseek-v4-flash --context 131072")
def plan(
    model: Annotated[
        str, typer.Argument(help="deepseek-v3.2, deepseek-v4-flash, deepseek-v4-pro, glm-5, or a config.json's folder.")
    ],
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens, repeatable; by default 32K to 1M.")] = None,
    kept: Annotated[float | None, typer.Option(min=0, max=1, help="Share of chunks resident; by default .094.")] = None,
    churn: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share that a refresh replaces; by default .3.")
    ] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0, help="GiB of one GPU: how many requests fit?")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the weights.")] = 1,
    recipe: Annotated[
        str | None, typer.Option(help="Gives indexer, window and chunks; by default the paper's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write plan.json, plan.md and plan.png here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> str:
    """Compute from a model's config what lookahead sparse attention saves: memory, operations and traffic."""
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
    return _command("generate", recipe or "RECIPE", out="TRACES")


def _command(verb: str, *arguments: object, **options: object) -> str:
    """A command as a shell reads it, without the options that are None or False."""
    words = ["lookahead", verb, *(quote(str(argument)) for argument in arguments)]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [quote(str(value))])
    return " ".join(words)


def _after(own: Shard, command: str) -> str:
    """What comes when this shard is done and, if there are others, they are too."""
    return command if own.count == 1 else f"when all {own.count} shards are done, {command}"


def _numbers(layers: str | None) -> list[int] | None:
    try:
        return None if layers is None else [int(number) for number in layers.split(",")]
    except ValueError as error:
        raise InputError(f"--layers {layers}: not a comma-separated list of numbers") from error


def _recipe(name: str, backbone: str | None = None, documents: str | None = None) -> "Recipe":
    from recipes import load_recipe

    recipe = load_recipe(name)
    if backbone is not None:
        recipe.backbone.path, recipe.took = backbone, None
    if documents is not None:
        recipe.documents.source, recipe.took = documents, None
    return recipe


def _must_be_new(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose another folder")


def _plan(recipe: "Recipe", out: Path, check: bool = True) -> "Plan":
    """The documents of both sides, drawn without the model; check: compare their source with a plan that is there."""
    from data_gen.generate import plan_documents

    plan = plan_documents(recipe.backbone, recipe.documents, recipe.trace, out, check)
    for line in (*plan.notes, f"plan: {plan.path}"):
        typer.echo(line)
    return plan


def _trace(
    recipe: "Recipe",
    plan: "Plan",
    out: Path,
    shard: Shard,
    max_failures: str,
    paced: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> "tuple[Backbone, PreTrainedTokenizerBase]":
    """Trace the shard's documents, which `paced` watches; returns the backbone and its tokenizer."""
    from data_gen.generate import open_backbone, trace_plan

    backbone, tokenizer = open_backbone(recipe.backbone, shard)

    def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
        return paced(_progress(items, what))

    if not trace_plan(backbone, plan, recipe.trace, out, shard, max_failures, progress, typer.echo):
        raise typer.Exit(1)
    return backbone, tokenizer


def _share(shard: str | None, ray: bool, workers: int, gpus: float | None) -> "tuple[Shard, Cluster | None]":
    """This process's part of the work, and the workers that --ray asks for: with them, it hands out all of it."""
    from data_gen.core.cluster import Cluster

    if ray and shard is not None:
        raise InputError("--ray and --shard: Ray distributes the documents itself; leave one of them out")
    if not ray and (workers != 1 or gpus is not None):
        raise InputError("--workers and --gpus-per-worker apply only to --ray; add it or leave them out")
    return (Shard(), Cluster(workers, gpus)) if ray else (Shard.of(shard), None)


def _trace_on_ray(recipe: "Recipe", plan: "Plan", out: Path, cluster: "Cluster", max_failures: str) -> None:
    from data_gen.generate_on_ray import trace_on_ray

    given = recipe.backbone, plan, recipe.trace, out, cluster, max_failures
    if not trace_on_ray(*given, _progress, typer.echo):
        raise typer.Exit(1)


def _decode(
    recipe: "Recipe",
    model: "BackboneConfig | tuple[Backbone, PreTrainedTokenizerBase]",
    bundle: Path,
    out: Path,
    name: str,
    plan: "Plan | None" = None,
) -> None:
    """Decode the held-out documents, of a plan if there is one. name: what the report calls the recipe."""
    from eval.online.verbs import decode_documents

    given = recipe.documents, recipe.trace, recipe.decode
    decode_documents(bundle, model, *given, out, name, typer.echo, _progress, plan)


def _train(recipe: "Recipe", traces: dict[Path, float], out: Path, partial: bool = False) -> None:
    from indexer_train.data.mixture import mix
    from indexer_train.training.trainer import train as train_indexer

    store = mix(traces, partial)
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
    except (InputError, OSError) as error:
        sys.exit(_complain(explained(error)))
    except TyperException as error:  # a mistake on the command line, in the words of its parser
        sys.exit(_complain(f"{error.format_message().rstrip('.')}; see `lookahead --help`"))


def _complain(message: str) -> int:
    typer.echo(f"lookahead: {_one_line(message)}", err=True)
    return 2


def _one_line(message: str) -> str:
    """A file's name may hold several."""
    return " ".join(message.splitlines())


if __name__ == "__main__":
    main()
