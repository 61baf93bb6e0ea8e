"""How far the workers of a plan are, from files whose times and sizes are made."""

import json
import os
from datetime import datetime

import pytest

from data_gen.text.plan import Plan, open_plan
from data_gen.traces.failures import FAILED
from data_gen.traces.progress import LATEST, PLAN, progress_of
from data_gen.traces.store import file_of


@pytest.fixture(scope="module")
def planned(tiny_recipe, tokenizer, tmp_path_factory):
    """(folder, tokens of each training document) of a plan of 130 and 4."""
    out = tmp_path_factory.mktemp("planned")
    documents = tiny_recipe.documents.model_copy(update={"train": {"single": 130}})
    plan = open_plan(out, documents, tiny_recipe.trace, tokenizer, (512, 128))
    return out, [row["length"] for row in plan.brief["train"]]


def finish(out, number, when, size):
    path = out / "train" / file_of(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (when, when))


def test_rate_bytes_and_time_left_of_a_running_store(planned):
    out, lengths = planned
    brief = Plan(out / PLAN).brief
    tokens = sum(row["length"] for rows in brief.values() for row in rows)
    now = progress_of(out)
    assert (now.documents, now.tokens, now.done, now.latest, now.rate, now.left) == (134, tokens, 0, None, None, None)
    finish(out, 7, 1000, 10)
    assert progress_of(out).rate is None  # of one nobody knows when it began
    finish(out, 8, 1004, 30)
    now = progress_of(out)
    assert (now.done, now.bytes, now.done_tokens) == (2, 40, lengths[7] + lengths[8])
    assert now.rate == pytest.approx(lengths[8] / 4) and now.left == pytest.approx(
        (tokens - now.done_tokens) / now.rate
    )
    for number in range(20, 20 + LATEST):  # later on and faster: the pace is theirs alone
        finish(out, number, 2000 + number / 2, 20)
    now = progress_of(out)
    assert now.done == 2 + LATEST and now.bytes == 40 + 20 * LATEST
    assert now.rate == pytest.approx(sum(lengths[21 : 20 + LATEST]) / ((LATEST - 1) / 2))
    assert f"{2 + LATEST} of 134 documents, 0 failed" in str(now) and str(now).endswith(" minutes left")
    finish(out, 120, 9000, 20)  # the next day: nobody worked in between
    later = progress_of(out)
    assert later.rate == pytest.approx(sum(lengths[22 : 20 + LATEST]) / ((LATEST - 2) / 2))
    assert later.latest == 9000 and f"the latest at {datetime.fromtimestamp(9000):%Y-%m-%d %H:%M:%S}" in str(later)


@pytest.mark.parametrize("name", ["0000/doc_0000003-old", "0000/doc_0000003 (copy)", "0001/doc_0000003", "0000/doc_3"])
def test_a_file_that_is_not_where_a_document_lies_is_none(planned, name):
    out, _ = planned
    before, path = progress_of(out), out / "train" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a copy")
    assert progress_of(out) == before
    path.unlink()


def test_a_document_that_failed_and_is_there_now_has_not_failed(planned):
    out, _ = planned
    finish(out, 3, 3000, 1)
    rows = Plan(out / PLAN).brief["train"]
    lines = [json.dumps({"document": rows[number]["document"], "reason": "no room"}) for number in (3, 125, 125)]
    (out / FAILED).write_text("\n".join([*lines, lines[0][:15]]))  # a kill, or a full disk, cut the last one short
    assert progress_of(out).failed == 1
