"""What documents hold, and that the two sides never meet."""

import copy
import json

import pytest

from data_gen.config import DocumentsConfig, TraceConfig
from data_gen.core.errors import InputError
from data_gen.text.documents import INSTRUCTION, draw_documents
from data_gen.text.needles import KEYS, WORDINGS
from data_gen.text.sources import read_source

TRACE = TraceConfig(layers=[0], window=64, text_rows=128)


def config(**changes):
    settings = {
        "tokens": (1500, 2500),
        "train": {"text": 6, "single": 6, "multi_key": 6, "multi_value": 6},
        "heldout": {"text": 3, "single": 4, "multi_key": 4, "multi_value": 4},
    }
    return DocumentsConfig(**(settings | changes))


def build(settings, tokenizer, split, context=4096):
    return list(draw_documents(settings, TRACE, tokenizer, context, split))


def shingles(text, size=120):
    text = " ".join(text.split())
    return {text[start : start + size] for start in range(len(text) - size)}


def test_training_and_heldout_share_neither_text_nor_needles(tokenizer):
    sides = {split: build(config(), tokenizer, split) for split in ("train", "heldout")}
    shared_frame = "<user>Read the text below"
    texts = {
        split: set().union(*(shingles(tokenizer.decode(d.tokens).removeprefix(shared_frame)) for d in documents))
        for split, documents in sides.items()
    }
    assert not texts["train"] & texts["heldout"]
    values = {split: {value for d in documents for value in d.values} for split, documents in sides.items()}
    assert values["train"] and values["heldout"] and not values["train"] & values["heldout"]
    assert not set(KEYS["train"]) & set(KEYS["heldout"])
    assert not {w.needle for w in WORDINGS["train"]} & {w.needle for w in WORDINGS["heldout"]}


def test_fresh_wordings_are_of_held_out_documents_alone(tokenizer):
    asked = {name: config(tokens=(800, 900), heldout={"single": 2}, wordings=name) for name in ("heldout", "fresh")}
    told = {
        name: [tokenizer.decode(each.tokens) for each in build(asked[name], tokenizer, "heldout")] for name in asked
    }
    for name, other in (("heldout", "fresh"), ("fresh", "heldout")):
        facts = {vocabulary: [w.needle.split("{key}")[0] for w in WORDINGS[vocabulary]] for vocabulary in asked}
        assert all(any(fact in text for fact in facts[name]) for text in told[name])
        assert not any(fact in text for fact in facts[other] for text in told[name])
    one, other = ([document.tokens for document in build(each, tokenizer, "train")] for each in asked.values())
    assert one == other


def test_no_two_documents_of_a_side_share_text(tokenizer):
    """So that those held back for validation are new to the indexer; the built-in text is long enough."""
    settings = config(tokens=(3000, 3000), train={"text": 90, "single": 90, "multi_key": 30}, heldout={"text": 10})
    instruction = INSTRUCTION.strip()
    owner = {}
    for document in build(settings, tokenizer, "train"):
        text = tokenizer.decode(document.tokens[: document.prompt]).replace(instruction, "")
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) > 200:  # not the questions, not a needle
                assert owner.setdefault(key, document.name) == document.name
    assert len(owner) > 500


def test_a_fixed_share_keeps_text_held_out_whatever_is_asked_for(tokenizer):
    trained = build(config(heldout_share=0.4), tokenizer, "train")
    other = build(config(heldout_share=0.4, tokens=(2600, 2600), heldout={"text": 9}), tokenizer, "heldout")
    texts = [tokenizer.decode(document.tokens) for document in trained if document.task == "text"]
    seen = set().union(*map(shingles, texts))
    assert len(other) == 9
    assert not any(seen & shingles(tokenizer.decode(document.tokens)) for document in other)


def test_the_standard_library_is_a_source_without_its_tests():
    texts = list(read_source("stdlib", "text"))
    assert sum(map(len, texts)) > 8_000_000
    assert any("class OrderedDict" in text for text in texts)
    assert not any("class TestCommandLineArgs" in text for text in texts)  # test/test_unittest


def test_the_code_of_an_installed_package_is_a_source(tmp_path, monkeypatch):
    for name, text in {"a.py": "x = 1\n", "sub/b.py": "# -*- coding: latin-1 -*-\ny = '\xe9'\n", "c.txt": "no code",
                       "sub/tests/test_b.py": "z = 3\n", "empty.py": "\n"}.items():  # fmt: skip
        (tmp_path / "lib_of_mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib_of_mine" / name).write_bytes(text.encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    assert list(read_source("package:lib_of_mine", "text")) == ["x = 1\n", "# -*- coding: latin-1 -*-\ny = '\xe9'\n"]
    (tmp_path / "lib_of_mine" / "d.py").write_bytes(b"x = '\xe9'\n")
    with pytest.raises(InputError, match=r"d\.py: not Python source in the encoding"):
        list(read_source("package:lib_of_mine", "text"))
    with pytest.raises(InputError, match="documents package:nothing_here: the package nothing_here is not installed"):
        list(read_source("package:nothing_here", "text"))


def test_thinking_is_up_to_the_recipe(tokenizer, tmp_path):
    """A template like Qwen3's: answers carry an empty thought, and prompts too when thinking is off."""
    thinker = copy.deepcopy(tokenizer)
    thinker.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}\x03{% endfor %}"
        "{% if add_generation_prompt %}<assistant>"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
    )
    for thinking, ending in ((False, "<assistant><think></think>"), (True, "<assistant>")):
        settings = config(train={"single": 1}, heldout={}, thinking=thinking)
        (document,) = build(settings, thinker, "train")
        assert tokenizer.decode(document.tokens[: document.prompt]).endswith(ending)
        answer = tokenizer.decode(document.tokens[document.prompt :])
        assert answer.removeprefix("<think></think>").startswith(("The ", "A")) and thinking == ("<think>" in answer)


def test_documents_are_the_same_on_every_call_and_distinct(tokenizer):
    first, second = (build(config(), tokenizer, "train") for _ in range(2))
    assert first == second
    assert len({tuple(d.tokens) for d in first}) == len(first) == 24
    assert build(config(seed=1), tokenizer, "train") != first


@pytest.mark.parametrize("task", ["single", "multi_key", "multi_value"])
def test_needles_lie_in_the_prompt_and_the_answer_behind_it(tokenizer, task):
    for document in build(config(), tokenizer, "heldout"):
        if document.task != task:
            continue
        prompt = tokenizer.decode(document.tokens[: document.prompt])
        answer = tokenizer.decode(document.tokens[document.prompt :])
        assert prompt.endswith("<assistant>")
        assert all(value in prompt and value in answer for value in document.values)
        assert len(document.values) == (2 if task == "multi_value" else 1)
        assert 1300 < len(document.tokens) <= 2500
        span = document.spans[0]
        assert document.positions[span.serve] == document.prompt - 2
        assert document.positions[-1] == len(document.tokens) - 2


def test_lengths_of_text_are_drawn_between_the_limits(tokenizer):
    lengths = [len(d.tokens) for d in build(config(), tokenizer, "train") if d.task == "text"]
    assert len(set(lengths)) > 1 and all(1500 <= length <= 2500 for length in lengths)


def test_every_answer_of_a_chat_is_traced_on_request(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    chat = [
        {"role": "user", "content": "question " * 40},
        {"role": "assistant", "content": "a first answer of some length"},
        {"role": "user", "content": "and now"},
        {"role": "assistant", "content": "another answer, the last one"},
    ]
    path.write_text(json.dumps({"messages": chat}))
    settings = config(source=str(path), train={"chat": 1}, heldout={})
    (last,) = build(settings, tokenizer, "train")
    (both,) = build(settings.model_copy(update={"turns": "all"}), tokenizer, "train")
    assert both.tokens == last.tokens and both.prompt == last.prompt and len(both.spans) == 2
    assert both.positions == sorted(set(both.positions)) and both.positions[-1] == last.positions[-1]
    for span, turn in zip(both.spans, (1, 3), strict=True):
        traced = both.positions[span.first : span.last]
        assert traced == list(range(traced[0], traced[-1] + 1))
        served = both.tokens[both.positions[span.serve] + 2 :]  # what follows the last token of the prompt
        assert tokenizer.decode(served).lstrip().startswith(chat[turn]["content"])


def test_whole_documents_chats_and_fields(tokenizer, tmp_path):
    rows = [{"body": f"abcdefgh {number} " * 60} for number in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    settings = config(source=str(path), text_field="body", train={"document": 1}, heldout={"document": 1})
    (train,), (heldout,) = (build(settings, tokenizer, split) for split in ("train", "heldout"))
    texts = [row["body"] for row in rows]
    assert {texts.index(tokenizer.decode(document.tokens)) for document in (train, heldout)} < set(range(20))
    assert train.tokens != heldout.tokens

    chat = [{"role": "user", "content": "question " * 40}, {"role": "assistant", "content": "a rather long answer"}]
    path.write_text(json.dumps({"messages": chat}))
    (document,) = build(config(source=str(path), train={"chat": 1}, heldout={}), tokenizer, "train")
    assert tokenizer.decode(document.tokens[document.prompt :]) == "a rather long answer\x03"


def test_folder_and_parquet(tokenizer, tmp_path):
    from datasets import Dataset

    texts = [f"Paragraph {n} {'of some text that goes on ' * 20}\n\nAnother {n}." for n in range(40)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.md").write_text(text)
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "rows.parquet")
    settings = {"train": {"text": 3}, "heldout": {"text": 2}}
    from_folder = build(config(source=str(folder), **settings), tokenizer, "train")
    from_parquet = build(config(source=str(tmp_path / "rows.parquet"), **settings), tokenizer, "train")
    assert from_folder == from_parquet


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, "no such file"),
        ("", {}, "no document there"),
        ('{"text": ""}', {}, "empty document"),
        ("{broken", {}, "line 1: not JSON"),
        ('{"other": "x"}', {}, "text field 'text'"),
        ('{"text": "too short"}', {"train": {"document": 1}, "heldout": {}}, "protected chunks and one window need"),
        (json.dumps({"text": "long " * 2000}), {"train": {"document": 1}, "heldout": {}}, "context is 4096"),
        (json.dumps({"text": "some text"}), {"train": {"text": 9}, "heldout": {}}, "ask for fewer"),
        (json.dumps({"text": "some text"}), {"train": {"nonsense": 1}}, "unknown task 'nonsense'"),
        (json.dumps({"text": "some text"}), {"train": {"chat": 1}, "heldout": {}}, "needs messages"),
    ],
)
def test_bad_input_gets_one_clear_line(tokenizer, tmp_path, content, settings, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        build(config(source=str(path), **settings), tokenizer, "train")
    assert "\n" not in str(caught.value)


def test_a_broken_parquet_file_is_named_by_its_path(tokenizer, tmp_path):
    from datasets import Dataset

    whole, path = tmp_path / "whole.parquet", tmp_path / "rows.parquet"
    Dataset.from_dict({"text": ["some text"] * 50}).to_parquet(whole)
    for content in (b"", b"no parquet at all" * 9, whole.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"^documents {path}: cannot be read after row 0 \(.*Parquet") as caught:
            build(config(source=str(path)), tokenizer, "train")
        assert "\n" not in str(caught.value)
    Dataset.from_dict({"other": ["x"]}).to_parquet(path)
    with pytest.raises(InputError, match=rf"{path} row 1: needs a text field 'text'"):
        build(config(source=str(path)), tokenizer, "train")


@pytest.mark.parametrize(
    "source", ["my_texts", "my/texts", "owner/name-1.5", "./texts", "~/no-such-texts", "notes.txt"]
)
def test_a_missing_source_is_no_file_or_folder_first_of_all(tokenizer, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^documents \S+: no such file or folder"):
        build(config(source=source), tokenizer, "train")


def test_a_template_that_refuses_the_messages_is_said_to(tokenizer, tmp_path):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": "x" * 200} for role in ("user", "assistant")]}))
    complaint = r"train-chat-0000000: the model's chat template refuses the messages \(roles must alternate\)"
    with pytest.raises(InputError, match=complaint):
        build(config(source=str(path), train={"chat": 1}, heldout={}), strict, "train")
