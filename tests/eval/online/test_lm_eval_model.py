"""A task made on the spot, asked by lm-evaluation-harness, against the stock model."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance

from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.online.lm_eval_model import LookaheadLM
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.model import IndexerSpec, MemoryIndexer

CONTEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 2 + "Why?"


@pytest.fixture(scope="module")
def tiny():
    return load_backbone(BackboneConfig(path="tiny"))


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    """An untrained indexer of the tiny model."""
    torch.manual_seed(0)
    info = adapter(tiny[0]).info
    spec = IndexerSpec(
        shape=IndexerConfig(heads=4, rank=8),
        layers=[info.full_layers[0]], hidden=info.hidden, key_width=info.key_width,
        chunking=Chunking(tokens=4, sink=1, recent=2), window=8, backbone=info.fingerprint,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    export_bundle(MemoryIndexer.from_spec(spec, device="cpu"), folder)
    return str(folder)


@pytest.fixture(scope="module")
def opened(bundle):
    def call(**settings):
        return LookaheadLM(bundle=bundle, pretrained="tiny", **settings)

    return call


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=n) for n, each in enumerate(arguments)]


ENDS = [(CONTEXT, " It sleeps."), (CONTEXT, " It was red and old."), ("", "A fox."), ("AB", "c")]


@pytest.mark.parametrize("settings", [{"policy": "full"}, {"budget": 1.0}, {"budget": 1.0, "policy": "recency"}])
def test_with_all_chunks_kept_likelihoods_are_the_stock_models(opened, tiny, settings):
    model, tokenizer = tiny
    found = opened(**settings).loglikelihood(requests("loglikelihood", *ENDS))
    for (context, continuation), (total, greedy) in zip(ENDS, found, strict=True):
        before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
        whole = [*before, *tokenizer(context + continuation).input_ids[len(before) if context else 0 :]]
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)[len(before) - 1 : -1]
        right = torch.tensor(whole[len(before) :])
        assert total == pytest.approx(float(log_p.gather(1, right[:, None]).sum()), rel=1e-4)
        assert greedy == bool((log_p.argmax(-1) == right).all())
    (rolling,) = opened(**settings).loglikelihood_rolling(requests("loglikelihood_rolling", ("A fox.",)))
    assert rolling == pytest.approx(found[2][0])


def test_fewer_chunks_change_what_is_likely_and_each_continuation_stands_alone(opened):
    both = opened(budget=0.1).loglikelihood(requests("loglikelihood", *ENDS))
    full = opened(policy="full").loglikelihood(requests("loglikelihood", *ENDS))
    assert abs(both[0][0] - full[0][0]) > 1e-3
    again = opened(budget=0.1, first_window=1).loglikelihood(requests("loglikelihood", *ENDS))
    assert again[0][0] != pytest.approx(both[0][0], rel=1e-6)
    (alone,) = opened(budget=0.1).loglikelihood(requests("loglikelihood", ENDS[1]))
    assert both[1] == (pytest.approx(alone[0], rel=1e-5), alone[1])


def test_answers_end_at_the_first_stop(opened, tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer(CONTEXT).input_ids])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    lm = opened(budget=1.0)
    stop = expected[5:7]
    cut, whole = lm.generate_until(
        requests(
            "generate_until",
            (CONTEXT, {"until": [stop], "max_gen_toks": 24}),
            (CONTEXT, {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 0}),
        )
    )
    assert whole == expected and cut == expected[: expected.find(stop)]
    with pytest.raises(InputError, match="the task samples"):
        lm.generate_until(requests("generate_until", (CONTEXT, {"do_sample": True})))
    with pytest.raises(InputError, match=r"backbone's context is .* tokens; choose shorter"):
        lm.generate_until(requests("generate_until", (CONTEXT * 100, {})))


def test_what_does_not_fit_is_refused(opened):
    with pytest.raises(InputError, match="policy 'oracle': not one of full, indexer"):
        opened(policy="oracle")
    with pytest.raises(InputError, match="first_window: 0; a window has"):
        opened(first_window=0)
    with pytest.raises(InputError, match="budgets"):
        opened(budget=2.0)


def tasks(folder):
    path = folder / "tiny.jsonl"
    rows = [{"text": CONTEXT, "ends": [" dog", " cat"], "label": n % 2, "answer": "dog"} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    choose = {"task": "tiny_choose", "output_type": "multiple_choice", "doc_to_text": "{{text}}"}
    choose |= {"doc_to_choice": "ends", "doc_to_target": "label"}
    write = {
        "task": "tiny_write",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "answer",
    }
    write |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}}
    return [data | choose, data | write]


def test_the_harness_asks_a_task(opened, tmp_path):
    found = simple_evaluate(model=opened(), tasks=tasks(tmp_path), bootstrap_iters=0)["results"]
    assert found["tiny_choose"]["acc,none"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))  # one end for all
    assert 0 <= found["tiny_write"]["exact_match,none"] <= 1


def test_the_command_knows_the_model(bundle, tmp_path):
    import yaml

    choose, _ = tasks(tmp_path)
    (tmp_path / "choose.yaml").write_text(yaml.safe_dump(choose))
    command = [sys.executable, "-m", "eval.online.lm_eval_model", "--model", "lookahead", "--tasks", "tiny_choose"]
    command += ["--model_args", f"bundle={bundle},pretrained=tiny", "--include_path", str(tmp_path), "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choose" in done.stdout and "acc" in done.stdout
