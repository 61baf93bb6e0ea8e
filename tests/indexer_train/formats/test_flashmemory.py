"""Checkpoints in the release's formats, written here by hand, against what the bridge reads and writes."""

import collections
import math
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from cli import app
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.types import Manifest
from indexer_train.formats.bundle import load_bundle
from indexer_train.formats.convert import export_indexer, import_checkpoints, keep_layers
from indexer_train.formats.flashmemory import read_checkpoint
from indexer_train.load import check_traces, load_indexer
from indexer_train.selection import Budget, Coverage, Cut, Threshold

POSITIONS, HIDDEN = 600, 24
SERVED = ("10", "12", "20")
SMALL = Manifest(
    backbone=replace(V4_FLASH, hidden=HIDDEN, fingerprint="small"),
    trace=TraceConfig(chunking=Chunking(tokens=4), layers=[10]),
    documents={},
    plan={},
    versions={},
)


def keeps(share, score):
    """A threshold that was calibrated to keep a share of the chunks."""
    return Threshold(target="budget", value=share, cuts=[Cut(score=score)])


def read_back(paths, **settings):
    """An indexer for a V4-Flash of small hidden states."""
    return import_checkpoints(paths, manifest=SMALL, **settings)


def freqs_cis(positions=POSITIONS):
    """YaRN's table: pairs up to 15 turn at their own speed, from 25 on 16 times slower, a ramp between."""
    plain = 1.0 / 160000.0 ** (torch.arange(0, 64, 2).float() / 64)
    ramp = torch.tensor([min(max((pair - 15) / 10, 0), 1) for pair in range(32)])
    angles = torch.outer(torch.arange(positions).float(), plain * (1 - ramp) + plain / 16 * ramp)
    return torch.polar(torch.ones_like(angles), angles)


def single(seed, heads=3, rank=5, positions=POSITIONS):
    """One layer's state dictionary."""
    generator = torch.Generator().manual_seed(seed)
    state = collections.OrderedDict()
    state["q_norm_weight"] = torch.randn(rank, generator=generator)
    state["freqs_cis"] = freqs_cis(positions)
    state["wq_a.weight"] = torch.randn(rank, HIDDEN, generator=generator)
    state["wq_b.weight"] = torch.randn(heads * 128, rank, generator=generator)
    state["weights_proj.weight"] = torch.randn(heads, HIDDEN, generator=generator)
    return state


def joint(ordinals=SERVED, **sizes):
    state = collections.OrderedDict()
    for ordinal in ordinals:
        for name, value in single(int(ordinal), **sizes).items():
            state[f"retrievers.l{ordinal}.{name}"] = value
    return state


def epoch(state):
    args = {"lr": 1e-4, "joint_layers": "10,12,20", "bf16": True, "resume_from": None}
    return {"epoch": 3, "model_state": state, "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}},
            "avg_loss": 0.1, "best_ens_f1": 0.5, "args": args}  # fmt: skip


def save(path, content):
    torch.save(content, path)
    return path


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def weights_of(state, drop_table=True):
    return {name: value for name, value in state.items() if not (drop_table and name.endswith("freqs_cis"))}


def check_layer(indexer, ordinal, state):
    encoder = indexer.query_encoder.encoders[ordinal]
    assert torch.equal(encoder.wq_a.weight, state["wq_a.weight"])
    assert torch.equal(encoder.q_norm.weight, state["q_norm_weight"])
    assert torch.equal(encoder.wq_b.weight, state["wq_b.weight"])
    assert torch.equal(encoder.weights_proj.weight, state["weights_proj.weight"])


@pytest.mark.parametrize("wrap", [dict, epoch], ids=["joint", "epoch"])
@pytest.mark.parametrize(("heads", "rank"), [(3, 5), (2, 8)])
def test_joint_and_epoch_files(tmp_path, wrap, heads, rank):
    state = joint(heads=heads, rank=rank)
    indexer = read_back([save(tmp_path / "best.pt", wrap(state))])
    assert indexer.spec.layers == [10, 12, 20]
    assert (indexer.spec.shape.heads, indexer.spec.shape.rank, indexer.spec.shape.join) == (heads, rank, "max")
    assert indexer.spec.rope.positions == POSITIONS
    for ordinal in SERVED:
        check_layer(indexer, ordinal, single(int(ordinal), heads, rank))
    exported = export_indexer(indexer, tmp_path / "again.pt", "flashmemory-joint")
    assert exported.files == [tmp_path / "again.pt"]
    same(torch.load(tmp_path / "again.pt", weights_only=True), dict(state))


def test_single_layer_files(tmp_path):
    paths = [save(tmp_path / f"ckpt_l{ordinal}_best_f1.pt", single(int(ordinal))) for ordinal in SERVED]
    indexer = read_back(paths)
    assert indexer.spec.layers == [10, 12, 20]
    files = export_indexer(indexer, tmp_path / "out", "flashmemory-layers").files
    assert [path.name for path in files] == ["ckpt_l10.pt", "ckpt_l12.pt", "ckpt_l20.pt"]
    for path, ordinal in zip(files, SERVED, strict=True):
        same(torch.load(path, weights_only=True), dict(single(int(ordinal))))
    unnamed = save(tmp_path / "ckpt_epoch003.pt", epoch(single(6)))
    with pytest.raises(InputError, match="does not say which"):
        read_back([unnamed])
    check_layer(read_back([unnamed], layers=[6]), "6", single(6))


def test_the_published_safetensors(tmp_path):
    state = weights_of(joint())
    save_file(state, tmp_path / "flashmemory_ds_v4.safetensors")
    indexer = read_back([tmp_path / "flashmemory_ds_v4.safetensors"])
    assert indexer.spec.rope.positions == 1 << 20
    export_indexer(indexer, tmp_path / "again.safetensors", "flashmemory-safetensors")
    same(load_file(tmp_path / "again.safetensors"), state)


def test_strict_loading_where_the_table_is_a_buffer(tmp_path, make_indexer):
    class Retriever(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq_a = nn.Linear(HIDDEN, 5, bias=False)
            self.wq_b = nn.Linear(5, 3 * 128, bias=False)
            self.weights_proj = nn.Linear(HIDDEN, 3, bias=False)
            self.q_norm_weight = nn.Parameter(torch.ones(5))
            self.register_buffer("freqs_cis", torch.zeros(POSITIONS, 32, dtype=torch.complex64))

    indexer = make_indexer()
    export_indexer(indexer, tmp_path / "joint.pt", "flashmemory-joint")
    module = nn.Module()
    module.retrievers = nn.ModuleDict({f"l{ordinal}": Retriever() for ordinal in SERVED})
    module.load_state_dict(torch.load(tmp_path / "joint.pt", weights_only=True))
    torch.testing.assert_close(module.retrievers["l12"].freqs_cis, freqs_cis(), atol=1e-5, rtol=0)
    export_indexer(indexer, tmp_path / "layers", "flashmemory-layers")
    Retriever().load_state_dict(torch.load(tmp_path / "layers" / "ckpt_l20.pt", weights_only=True))


def test_eight_trained_layers_to_three_served(tmp_path, make_indexer, arguments):
    indexer = make_indexer(layers=range(6, 22, 2), selections=[keeps(0.1, -1.0)])
    hidden, keys, positions = arguments
    wide = hidden[:, :1].repeat(1, 8, 1) + torch.arange(8)[None, :, None] / 8
    logits = indexer.layer_logits(
        indexer.query_encoder({"input_features": wide, "positions": positions})["sentence_embedding"].detach(),
        indexer[0].sub_modules["document"][0]({"input_values": keys[:, :1].repeat(1, 8, 1)})["sentence_embedding"],
    )
    served = keep_layers(indexer, [20, 10, 12])
    assert served.spec.layers == [10, 12, 20]
    which = [2, 3, 7]
    ours = served.joined_scores(wide[:, which], keys[:, :1].repeat(1, 3, 1), positions)
    joined = logits[which].amax(dim=0)
    torch.testing.assert_close(ours, joined, atol=1e-5, rtol=1e-5)  # another number of layers may round otherwise
    for format in ("flashmemory-joint", "bundle"):
        exported = export_indexer(indexer, tmp_path / format, format, [10, 12, 20])
        assert any("thresholds were calibrated on layers" in note for note in exported.notes)
    assert load_bundle(tmp_path / "bundle").spec.layers == [10, 12, 20]
    assert read_checkpoint(tmp_path / "flashmemory-joint").layers.keys() == {10, 12, 20}
    assert keep_layers(indexer, indexer.spec.layers).spec.selections == [keeps(0.1, -1.0)]
    for layers, message in (([10, 11], r"layers \[11\]"), ([10, 10], "named twice"), ([], r"layers \[\]: the indexer")):
        with pytest.raises(InputError, match=message):
            keep_layers(indexer, layers)


def test_bias_and_thresholds_become_offsets(tmp_path, make_indexer, arguments):
    indexer = make_indexer(shape={"bias": True}, selections=[keeps(0.1, 3.25)])
    nn.init.constant_(indexer.query_encoder.bias, 1.5)
    notes = export_indexer(indexer, tmp_path / "a.pt", "flashmemory-joint").notes
    assert any("SGLANG_RETRIEVER_LOGIT_OFFSET=1.5" in note for note in notes)
    assert any("keeps 10.0%" in note and "SGLANG_RETRIEVER_LOGIT_OFFSET=-1.75" in note for note in notes)
    raw = read_back([tmp_path / "a.pt"])
    back = read_back([tmp_path / "a.pt"], offset=1.5)
    torch.testing.assert_close(back.joined_scores(*arguments), indexer.joined_scores(*arguments), atol=0, rtol=0)
    served = torch.sigmoid(raw.joined_scores(*arguments).double() - 1.75) >= 0.5  # what serving does with the offset
    assert torch.equal(served, indexer.joined_scores(*arguments) >= 3.25)
    assert served.any() and not served.all()
    summed = export_indexer(make_indexer(shape={"join": "sum"}), tmp_path / "b.pt", "flashmemory-joint").notes
    assert any("joined by sum" in note for note in summed)


def test_what_else_the_files_do_not_say_is_said(tmp_path, make_indexer):
    indexer = make_indexer(window=8, chunking=Chunking(tokens=8, sink=1, recent=2), selections=[Budget(budget=0.1)])
    said = "\n".join(export_indexer(indexer, tmp_path / "a.pt", "flashmemory-joint").notes)
    settings = {"INLINE_LAYERS": "10,12,20", "INTERVAL": 8, "FIRST_KEEP": 1, "LAST_KEEP": 2, "LOGIT_OFFSET": 0}
    assert all(f"SGLANG_RETRIEVER_{name}={value}" in said for name, value in settings.items())
    assert "chunk tokens 8: the release's" in said and f"hidden width {HIDDEN}: the release's" in said
    assert "the best 10.0% of the chunks, but the release's serving knows a threshold only; `lookahead cal" in said
    assert "--positions" not in said
    given = make_indexer(selections=[Threshold(cuts=[Cut(longest=99, score=2.0), Cut(score=3.0)])])
    said = "\n".join(export_indexer(given, tmp_path / "b.safetensors", "flashmemory-safetensors").notes)
    assert "LOGIT_OFFSET=-2\n" in said and "LOGIT_OFFSET=-3\n" in said and "up to 99 tokens" in said
    assert f"convert it back with --positions {POSITIONS}" in said and "threshold only" not in said


def test_a_coverage_has_no_place(tmp_path, make_indexer):
    served = make_indexer(selections=[Coverage(share=0.9), keeps(0.1, 3.25)])
    for format in ("flashmemory-joint", "flashmemory-layers", "flashmemory-safetensors"):
        with pytest.raises(InputError, match=f"^{format}: the indexer is served by a coverage.*`lookahead calibrate`"):
            export_indexer(served, tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []
    export_indexer(served, tmp_path / "bundle", "bundle")
    assert load_bundle(tmp_path / "bundle").spec.selections == served.spec.selections
    notes = export_indexer(served, tmp_path / "fewer", "bundle", [10, 12]).notes
    assert notes == ["coverages and thresholds were calibrated on layers [10, 12, 20] together: left out"]
    beside = make_indexer(selections=[keeps(0.1, 3.25), Coverage(share=0.9)])
    notes = export_indexer(beside, tmp_path / "a.pt", "flashmemory-joint").notes
    assert any("predicted share of 0.9: left out, for the release's serving has no coverage" in note for note in notes)


def test_a_name_that_would_mislead_is_refused(tmp_path, make_indexer):
    with pytest.raises(InputError, match="is a folder"):
        export_indexer(make_indexer(), tmp_path, "flashmemory-joint")
    for name, format in (("a.pt", "flashmemory-safetensors"), ("a.safetensors", "flashmemory-joint")):
        with pytest.raises(InputError, match=f"{name}: only flashmemory-safetensors ends in .safetensors"):
            export_indexer(make_indexer(), tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [{"distance_bumps": 4}, {"scale": True}, {"slot": True}])
def test_terms_without_a_place_are_refused(tmp_path, make_indexer, shape):
    with pytest.raises(InputError, match=f"no place for {next(iter(shape))}"):
        export_indexer(make_indexer(shape=shape), tmp_path / "a.pt", "flashmemory-joint")
    assert list(tmp_path.iterdir()) == []


def test_other_backbones_are_refused(tmp_path, make_indexer, stores):
    with pytest.raises(InputError, match="mean_pre_rope"):
        export_indexer(make_indexer(key="mean_pre_rope"), tmp_path / "a.pt", "flashmemory-joint")
    with pytest.raises(InputError, match="mean_pre_rope"):
        import_checkpoints([save(tmp_path / "a.pt", joint())], manifest=stores[0].manifest)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickles_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = save(tmp_path / "attack.pt", joint() | {"x": Attack()})
    with pytest.raises(InputError, match=r"attack.pt: not loaded: it asks for \w*.mkdir"):
        read_back([attack])
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"x": Attack()}))
    with pytest.raises(InputError, match=r"plain.pt"):
        read_back([tmp_path / "plain.pt"])
    assert not (tmp_path / "pwned").exists()


def with_weight(name, change):
    return joint(["10"]) | {f"retrievers.l10.{name}": change(single(10)[name])}


def drop(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: drop(joint(), "retrievers.l12.wq_a.weight"), "layer 12 lacks wq_a.weight"),
        (lambda: joint() | {"retrievers.l12.bias": torch.zeros(1)}, "layer 12 has bias"),
        (lambda: joint() | {"something": torch.zeros(1)}, "'something' belongs to no format"),
        (lambda: joint(["10"]) | joint(["12"], heads=4), "differ in heads"),
        (lambda: joint() | {"retrievers.l10.q_norm_weight": torch.ones(6)}, "do not belong together"),
        (lambda: joint() | {"retrievers.l10.wq_a.weight": torch.full((5, HIDDEN), math.nan)}, "NaN"),
        (lambda: joint() | {"retrievers.l10.freqs_cis": freqs_cis(50)}, "different freqs_cis"),
        (lambda: joint(["10"]) | {"retrievers.l10.freqs_cis": freqs_cis().conj()}, "not the RoPE of this backbone"),
        (lambda: joint(["10"]) | {"retrievers.l10.freqs_cis": freqs_cis()[:, :16]}, "not a table for 64 dims"),
        (lambda: joint(["10"]) | {"retrievers.l10.freqs_cis": freqs_cis(0)}, r"freqs_cis is torch.complex64 \[0, 32\]"),
        (lambda: joint(["10"]) | {"retrievers.l10.freqs_cis": torch.zeros(())}, "freqs_cis is torch.float32"),
        (lambda: joint() | {7: torch.zeros(1)}, "no dictionary of named weights"),
        (lambda: with_weight("wq_b.weight", lambda x: x.double()), "layer 10: wq_b is torch.float64"),
        (lambda: with_weight("wq_a.weight", lambda x: x.to_sparse()), "layer 10: wq_a is torch.sparse_coo"),
        (lambda: with_weight("wq_a.weight", lambda x: x.to(torch.float8_e5m2)), "layer 10: wq_a is torch.float8_e5m2"),
        (lambda: with_weight("wq_a.weight", lambda x: x.int()), "layer 10: wq_a is torch.int32"),
        (lambda: with_weight("q_norm_weight", lambda x: x[:0]), r"layer 10: q_norm is torch.float32 \[0\]"),
        (lambda: with_weight("weights_proj.weight", lambda x: x[:0]), r"layer 10: weights_proj is .*\[0, 24\]"),
        (lambda: {"epoch": 1}, "no dictionary of named weights"),
        (lambda: {}, "holds no weights"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, message):
    path = save(tmp_path / "bad.pt", content())
    with pytest.raises(InputError, match=message) as caught:
        read_back([path])
    assert "\n" not in str(caught.value)


def test_checkpoints_of_another_width_are_not_v4_flash(tmp_path):
    for positions in (None, 1 << 20):
        with pytest.raises(InputError, match=r"key width are 24 and 128, but the backbone has 4096 .*--traces"):
            import_checkpoints([save(tmp_path / "a.pt", joint())], positions=positions)
    with pytest.raises(InputError, match=r"key width are 24 and 64, but the backbone has 24 and 128"):
        read_back([save(tmp_path / "b.pt", with_weight("wq_b.weight", lambda x: x[:192]))])


def test_an_indexer_made_from_dumps_is_tied_to_the_weights_that_made_other_traces(
    tmp_path, make_indexer, v4_store, arguments
):
    """export as safetensors, convert --traces GENERATED --offset: the same scores and choice, now for that backbone."""
    chosen = [Threshold(cuts=[Cut(score=2.0)])]
    indexer = make_indexer(
        layers=(10, 12), backbone=V4_FLASH.fingerprint, shape={"bias": True}, selections=chosen,
        rope=V4_FLASH.rope.model_copy(update={"positions": POSITIONS}),
    )  # fmt: skip
    with pytest.raises(InputError, match="another backbone"):
        check_traces(indexer, v4_store)
    (note,) = export_indexer(indexer, tmp_path / "bundle", "bundle").notes
    assert "no model will take this bundle" in note and "convert" in note
    notes = export_indexer(indexer, tmp_path / "a.safetensors", "flashmemory-safetensors").notes
    (offset,) = {note.split("LOGIT_OFFSET=")[1] for note in notes if "is the threshold set" in note}
    command = ["convert", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "tied"), "--offset", offset]
    assert CliRunner().invoke(app, [*command, "--traces", str(v4_store.root)]).exit_code == 0
    tied = load_indexer(tmp_path / "tied")
    check_traces(tied, v4_store)
    assert tied.spec.backbone == v4_store.manifest.backbone.fingerprint
    assert export_indexer(tied, tmp_path / "tied-bundle", "bundle").notes == []
    hidden, keys, positions = arguments
    given = hidden[:, :2], keys[:, :2], positions
    torch.testing.assert_close(tied.joined_scores(*given), indexer.joined_scores(*given) - 2.0, atol=1e-5, rtol=1e-5)
    assert tied.spec.selection == Threshold(cuts=[Cut(score=0.0)])


def test_a_layer_is_not_relabelled_by_accident(tmp_path):
    path = save(tmp_path / "ckpt_l10.pt", single(10))
    check_layer(read_back([path], layers=[10]), "10", single(10))
    with pytest.raises(InputError, match=r"ckpt_l10.pt: layer 10 by its name, but --layers 12"):
        read_back([path], layers=[12])


def test_a_folder_of_other_layers_is_left_alone(tmp_path, make_indexer):
    indexer = make_indexer()
    export_indexer(indexer, tmp_path, "flashmemory-layers")
    export_indexer(indexer, tmp_path, "flashmemory-layers")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"holds ckpt_l20.pt, which is not of this export"):
        export_indexer(indexer, tmp_path, "flashmemory-layers", [10, 12])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_damaged_and_missing_files(tmp_path):
    whole = save(tmp_path / "whole.pt", joint()).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    for name in ("cut.pt", "cut.safetensors", "none.pt"):
        with pytest.raises(InputError, match=name):
            read_back([tmp_path / name])
    one, two = save(tmp_path / "a_l10.pt", single(10)), save(tmp_path / "b_l10.pt", single(10))
    with pytest.raises(InputError, match="in another file as well"):
        read_back([one, two])
    with pytest.raises(InputError, match=r"layers \[11\] are not in the files"):
        read_back([tmp_path / "whole.pt"], layers=[10, 11])


def test_the_table_bounds_positions_until_told_otherwise(tmp_path, arguments):
    path = save(tmp_path / "a.pt", joint())
    hidden, keys, _ = arguments
    beyond = torch.full((4,), POSITIONS)
    with pytest.raises(InputError, match=r"outside 0\.\.599"):
        read_back([path]).joined_scores(hidden, keys, beyond)
    read_back([path], positions=1 << 20).joined_scores(hidden, keys, beyond)


def test_the_command_line_both_ways(tmp_path, v4_store):
    run = CliRunner().invoke
    path = save(tmp_path / "joint.pt", joint())
    command = ["convert", str(path), "--out", str(tmp_path / "indexer"), "--layers", "10,12", "--traces"]
    result = run(app, [*command, str(v4_store.root), "--offset", "0.5"])
    assert result.exit_code == 0, result.output
    again = run(app, [*command, str(v4_store.root), "--offset", "0.7"])
    assert isinstance(again.exception, InputError) and "not empty" in str(again.exception)
    indexer = load_indexer(tmp_path / "indexer")
    assert indexer.spec.layers == [10, 12] and indexer.spec.backbone == "small-v4"
    assert indexer.spec.chunking == Chunking(tokens=4, sink=0, recent=2) and indexer.spec.window == 8
    command = ["export", "--indexer", str(tmp_path / "indexer"), "--out", str(tmp_path / "back.pt")]
    result = run(app, [*command, "--format", "flashmemory-joint"])
    assert result.exit_code == 0, result.output
    assert "SGLANG_RETRIEVER_LOGIT_OFFSET=0.5" in result.output
    same(torch.load(tmp_path / "back.pt", weights_only=True), dict(joint(["10", "12"])))
    assert run(app, [*command, "--format", "other"]).exit_code == 2
    result = run(app, [*command, "--layers", "10,x"])
    assert isinstance(result.exception, InputError) and "--layers 10,x: not a comma-separated list" in str(
        result.exception
    )
    result = run(app, ["convert", str(path), "--out", str(tmp_path / "other"), "--offset", "nan"])
    assert isinstance(result.exception, InputError) and not (tmp_path / "other").exists()
