"""What of a run's results goes into an indexer's card, and whose results do not."""

import shutil

import pytest

from data_gen.core.errors import InputError
from data_gen.core.files import folder_damage
from eval.online.verbs import tell_card
from eval.report.outputs import outputs_of
from eval.report.rows import AccuracyRow, DecodeRow, FidelityRow
from eval.report.setting import setting_of
from eval.report.tables import write_results
from indexer_train.formats.convert import keep_layers
from indexer_train.load import load_indexer

USED = {"chunks": 9.0, "kv_mb": 2.5}


def decoded(policy, correct, kl):
    return DecodeRow(policy=policy, correct=correct, examples=12, low=0, high=1, agreement=0.9, kl=kl, texts=2,
                     kv_share=0.2, refreshes=1, **USED)  # fmt: skip


def answered(policy, budget, accuracy):
    return AccuracyRow(benchmark="needles", task="single", length=1024, policy=policy, budget=budget, tokens=1000.0,
                       beyond=None, kept=budget or 1.0, examples=20, left_out=0, accuracy=accuracy, low=None, high=None,
                       difference=0.0, difference_low=None, difference_high=None, **USED)  # fmt: skip


def followed(policy, budget, kl):
    return FidelityRow(benchmark="text", task="text", length=1024, policy=policy, budget=budget, tokens=1000.0,
                       beyond=None, kept=budget or 1.0, texts=4, agreement=0.9, agreement_interval=(None, None), kl=kl,
                       kl_interval=(None, None), perplexity=5.0, **USED)  # fmt: skip


DECODE = [decoded("full", 11, 0.0), decoded("indexer", 10, 0.08), decoded("recency", 3, 0.11)]
BENCHMARK = [answered("full", None, 0.9), answered("indexer", 0.1, 0.85), answered("recency", 0.1, 0.2),
             answered("indexer", 0.2, 0.875), answered("recency", 0.2, 0.3)]  # fmt: skip
TEXT = [followed("full", None, 0.0), followed("indexer", 0.1, 0.07), followed("oracle", 0.1, 0.02)]


@pytest.fixture
def saved(indexer, tmp_path):
    indexer.save_whole(tmp_path / "indexer")
    return load_indexer(tmp_path / "indexer")


def test_every_row_of_answers_and_text_is_carried_over(saved, tmp_path):
    measured = {verb: setting_of(saved, "mine.yaml", f"of {verb}") for verb in ("evaluate", "decode", "benchmark")}
    write_results(tmp_path / "run", decode=DECODE, benchmark=BENCHMARK, benchmark_text=TEXT, measured=measured)
    decode, benchmark = outputs_of(tmp_path / "run", saved.digest())
    assert (decode.verb, decode.documents, decode.recipe) == ("decode", "of decode", "mine.yaml")
    (row,) = decode.rows
    assert (row.questions, row.texts, row.kv_share, row.kv_mb) == (12, 2, 0.2, 2.5)
    assert row.right == {"full": 11, "indexer": 10, "recency": 3} and row.kl == {
        "full": 0,
        "indexer": 0.08,
        "recency": 0.11,
    }
    low, high, text = benchmark.rows
    assert low.task == "needles single, 1,000 tokens, budget 10.0%" and high.task.endswith("budget 20.0%")
    assert low.right == pytest.approx({"full": 18, "indexer": 17, "recency": 4}) and low.kv_share == 0.1
    assert high.right == pytest.approx({"full": 18, "indexer": 17.5, "recency": 6}) and high.kv_share == 0.2
    assert (
        text.task == "text, 1,000 tokens, budget 10.0%" and text.kl == {"full": 0, "indexer": 0.07} and text.texts == 4
    )


def test_the_card_verb_changes_the_card_and_no_score(saved, tmp_path):
    write_results(tmp_path / "run", decode=DECODE, measured={"decode": setting_of(saved, None, "of decode")})
    folder, said = tmp_path / "indexer", []
    for _ in range(2):  # the second time it says the same
        tell_card(folder, [tmp_path / "run"], said.append)
        after = load_indexer(folder)
        assert folder_damage(folder) is None and after.digest() == saved.digest() and len(after.spec.outputs) == 1
        assert (
            "| 10 of 12 | 11 of 12 | 3 of 12 | 2 | 0.080 | 0.110 | 20.0 % | 2.5 |" in (folder / "README.md").read_text()
        )
    assert said[0] == f"card: {folder / 'README.md'}"
    assert not keep_layers(after, after.spec.layers[:1]).spec.outputs, "of other layers"


def test_results_of_another_indexer_or_of_none_are_refused(saved, tmp_path):
    setting = setting_of(saved, None, "of decode")
    for whose in ("0" * 64, None):
        run = tmp_path / str(whose)
        write_results(run, decode=DECODE, measured={"decode": setting.model_copy(update={"indexer": whose})})
        with pytest.raises(InputError, match="its decode did not measure this indexer"):
            tell_card(tmp_path / "indexer", [run], print)
        shutil.rmtree(run)
        write_results(run, measured={"evaluate": setting})
        with pytest.raises(InputError, match="no answers or text of an indexer there"):
            tell_card(tmp_path / "indexer", [run], print)
    assert not load_indexer(tmp_path / "indexer").spec.outputs
