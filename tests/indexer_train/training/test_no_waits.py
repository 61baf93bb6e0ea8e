"""A GPU must not wait for the host within a step: run on a device without data, where asking for a value raises."""

import pytest
import torch
from sentence_transformers.util import batch_to_device
from transformers import TrainerCallback

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys
from data_gen.core.rope import Rope
from data_gen.core.tensors import require
from indexer_train.config import CandidatesConfig, IndexerConfig
from indexer_train.losses import LOSSES
from indexer_train.model import IndexerSpec, MemoryIndexer
from tests.indexer_train.training.trainers import make_trainer

BATCH, CHUNKS, CANDIDATES, LAYERS, HIDDEN, WIDTH = 5, 40, 12, 2, 24, 16


@pytest.fixture
def indexer():
    """Every part of the score, DeepSeek-V4's keys and positions."""
    spec = IndexerSpec(
        shape=IndexerConfig(heads=4, rank=8, bias=True),
        layers=[0, 1],
        hidden=HIDDEN,
        key_width=WIDTH,
        chunking=Chunking(tokens=4),
        window=16,
        backbone="none",
        key="fp8_rope_hadamard",
        rope=Rope(dims=8, theta=1e4, positions=1000),
    )
    return MemoryIndexer.from_spec(spec, device="cpu").to("meta")


def batch(sampled):
    columns = CANDIDATES if sampled else CHUNKS
    query = {
        "input_features": torch.empty(BATCH, LAYERS, HIDDEN, device="meta"),
        "positions": torch.empty(BATCH, dtype=torch.int64, device="meta"),
        "most_golden": 3,
        "task": "query",
    }
    document = {
        "input_values": torch.empty(CHUNKS, LAYERS, WIDTH + 4, dtype=torch.uint8, device="meta"),
        "task": "document",
    }
    if sampled:
        query["candidates"] = torch.empty(BATCH, CANDIDATES, dtype=torch.int64, device="meta")
        document["chunks"] = torch.empty(CHUNKS, dtype=torch.int64, device="meta")
    return [query, document], torch.empty(BATCH, 5, columns, device="meta")


def test_what_is_wrong_is_named_before_it_reaches_the_device(indexer):
    hidden, keys = torch.zeros(2, LAYERS, HIDDEN), encode_keys(torch.ones(CHUNKS, LAYERS, WIDTH))
    queries, documents = (indexer[0].sub_modules[route][0] for route in ("query", "document"))
    assert indexer.joined_scores(hidden, keys, torch.tensor([0, 999])).is_meta
    for position in (1000, -1):
        with pytest.raises(InputError, match=r"outside 0\.\.999"):
            indexer.joined_scores(hidden, keys, torch.tensor([0, position]))
        with pytest.raises(InputError, match=r"outside 0\.\.999"):
            queries.preprocess([(hidden[0], 0), (hidden[1], position)])
    keys[3, 1, 2] = 0x7F
    with pytest.raises(InputError, match="NaN code"):
        indexer.joined_scores(hidden, keys, torch.tensor([0, 999]))
    with pytest.raises(InputError, match="NaN code"):
        documents.preprocess([(row,) for row in keys])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_loss_asks_the_device_for_a_value(indexer, name, precision, sampled):
    loss = LOSSES[name](indexer, 0.05).to("meta")
    loss.scoring = precision
    loss(*batch(sampled)).backward()
    assert all(parameter.grad.device.type == "meta" for parameter in loss.parameters())


@pytest.mark.parametrize("kind", ["all", "sampled"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_collated_batch_is_moved_and_its_gradient_clipped_without_a_value(planted, tiny_recipe, tmp_path, name, kind):
    settings = tiny_recipe.train.model_copy(update={"loss": name, "candidates": CandidatesConfig(kind=kind)})
    trainer = make_trainer(planted[0], IndexerConfig(heads=4, rank=8), settings, tmp_path)
    loss, batch = trainer.loss.to("meta"), next(iter(trainer.get_train_dataloader()))
    features, label = trainer.collect_features(batch_to_device(batch, torch.device("meta")))
    loss(features, label).backward()
    torch.nn.utils.clip_grad_norm_(loss.parameters(), settings.clip)


class Watch(TrainerCallback):
    """Behind the first steps whatever waits for the GPU raises; the last step logs, evaluates and saves."""

    watched = 0

    def __init__(self, first):
        self.first = first

    def on_step_end(self, args, state, control, **kwargs):
        watch = self.first <= state.global_step < state.max_steps - 1
        self.watched += watch
        torch.cuda.set_sync_debug_mode("error" if watch else "default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["all", "sampled"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("batches", ["host", "device"])
def test_no_step_of_the_trainer_waits_for_the_gpu(planted, tiny_recipe, tmp_path, name, precision, kind, batches):
    changes = {"loss": name, "precision": precision, "candidates": CandidatesConfig(kind=kind), "batches": batches}
    settings = tiny_recipe.train.model_copy(update=changes | {"epochs": 2, "eval_epochs": 2})
    trainer = make_trainer(planted[0], IndexerConfig(heads=4, rank=8), settings, tmp_path)
    # documents come to the device in the first epoch
    callback = Watch(1 if batches == "host" else len(trainer.get_train_dataloader()) + 1)
    trainer.add_callback(callback)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert callback.watched == trainer.state.max_steps - 1 - callback.first > 20


def test_this_device_would_notice():
    with pytest.raises(RuntimeError, match="meta"):
        int(torch.empty(3, device="meta").max())


def test_checks_are_made_on_the_device():
    require(torch.tensor([True, True]), lambda: "never asked for")
    with pytest.raises(InputError, match="one is wrong"):
        require(torch.tensor([True, False]), lambda: "one is wrong")
    require(torch.empty(3, dtype=torch.bool, device="meta"), lambda: "unknown")
