"""Share what was trained: an indexer and, beside it, its bundle as models, a trace store as a data set.

    python examples/push_to_hub.py indexer run/indexer you/my-indexer --bundle run/bundle
    python examples/push_to_hub.py traces traces/train you/my-traces

`hf auth login` first. The indexer's card was written when it was trained, and by `lookahead card` when its answers were
measured; those of the bundle and of the data set are written here. No class of this toolkit has a `from_pretrained`:
`MemoryIndexer("you/my-indexer")` loads the indexer, and
`LSARuntime.from_bundle(snapshot_download("you/my-indexer-bundle"), model)` decodes with the bundle.
"""

import argparse
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from data_gen.traces.store import TraceStore
from indexer_train.formats.bundle import load_bundle
from indexer_train.load import load_indexer
from indexer_train.model import MemoryIndexer

TRACES_CARD, BUNDLE_CARD = (Path(__file__).with_name(f"{name}_card.md.j2") for name in ("trace", "bundle"))
SIZES = {
    10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M", 10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}  # fmt: skip
"""The hub's words for a number of rows below each of these."""


def push_indexer(folder: Path, bundle: Path, name: str) -> None:
    """Push a trained indexer, and its bundle as NAME-bundle. Raises InputError for damaged or unlike ones."""
    indexer, exported = _pair(folder, bundle)
    indexer.push_to_hub(name, local_model_path=str(folder))
    api, card = HfApi(), bundle_card(exported, name)
    api.create_repo(f"{name}-bundle", exist_ok=True)
    api.upload_folder(repo_id=f"{name}-bundle", folder_path=bundle)
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=f"{name}-bundle")


def pull_indexer(name: str) -> MemoryIndexer:
    """The indexer of a hub id. Raises InputError when it or its bundle did not arrive whole."""
    return _pair(Path(snapshot_download(name)), Path(snapshot_download(f"{name}-bundle")))[0]


def _pair(folder: Path, bundle: Path) -> tuple[MemoryIndexer, MemoryIndexer]:
    """The indexer in `folder`, and the same as it is in `bundle`, which may select chunks by another rule."""
    indexer, exported = load_indexer(folder), load_bundle(bundle)
    if exported.digest() != indexer.digest():
        raise InputError(
            f"{bundle}: not exported from {folder} with all its layers; run `lookahead export --indexer {folder}` again"
        )
    return indexer, exported


def bundle_card(exported: MemoryIndexer, name: str) -> ModelCard:
    """The README.md of the bundle of `name`. exported: what the bundle holds."""
    data = ModelCardData(tags=["memory-indexer", "lookahead-sparse-attention", "kv-cache", "bundle"])
    return ModelCard.from_template(data, str(BUNDLE_CARD), spec=exported.spec, name=name)


def trace_card(store: TraceStore) -> DatasetCard:
    """The README.md of a trace store."""
    data = DatasetCardData(
        tags=["memory-indexer", "lookahead-sparse-attention", "kv-cache", "traces"],
        task_categories=["text-generation"],
        size_categories=size_category(len(store.paths())),
    )
    return DatasetCard.from_template(data, str(TRACES_CARD), manifest=store.manifest, count=len(store.paths()))


def size_category(rows: int) -> str:
    """The hub's word for so many rows."""
    return next((word for most, word in SIZES.items() if rows < most), "n>1B")


def push_traces(folder: Path, name: str) -> None:
    """Push a trace store with a card."""
    card = trace_card(TraceStore.open(folder))
    api = HfApi()
    api.create_repo(name, repo_type="dataset", exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, repo_type="dataset")
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=name, repo_type="dataset")


def main() -> None:
    """Push one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    indexer, traces = kinds.add_parser("indexer"), kinds.add_parser("traces")
    for kind in (indexer, traces):
        kind.add_argument("folder", type=Path)
        kind.add_argument("name", help="hub id: OWNER/NAME")
    indexer.add_argument("--bundle", type=Path, required=True)
    args = parser.parse_args()
    try:
        if args.kind == "indexer":
            push_indexer(args.folder, args.bundle, args.name)
            print(f"{args.name}: pushed and read back, layers {pull_indexer(args.name).spec.layers}")
        else:
            push_traces(args.folder, args.name)
            print(f"{args.name}: pushed; read it with `hf download {args.name} --repo-type dataset`")
    except InputError as error:
        parser.error(str(error))
    except (OSError, HFValidationError, HTTPError) as error:
        parser.error(f"{args.name}: {one_line(error)}; check the name, the network and `hf auth whoami`")


if __name__ == "__main__":
    main()
