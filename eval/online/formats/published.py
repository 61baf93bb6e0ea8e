"""RULER, LongBench-v2, LongMemEval and OpenAI MRCR as their releases write them.

Fields are those of the releases (NVIDIA/RULER `prepare.py`, THUDM/LongBench-v2, xiaowu0162/LongMemEval, openai/mrcr).
The words around LongBench-v2's and LongMemEval's questions are our own.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.documents import user
from eval.online.examples import Example
from eval.online.formats.file_row import FileRow, is_file

RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens that RULER lets each kind of task generate, by how the task's name starts."""


def ruler(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """RULER as its `base` template writes it; the task is that of the path, TASK/validation.jsonl or TASK.jsonl.

    Raises InputError that names row and field.
    """
    path, text, outputs = Path(row.file.source), row.text("input"), row.items("outputs")
    if not outputs or not all(isinstance(output, str) for output in outputs):
        raise InputError(f"{row.where}: field 'outputs' is not a list of texts")
    task = path.parent.name if path.stem in ("validation", "test") else path.stem
    if not is_file(row.file.source):
        task = row.file.subset or row.file.split
    places = [text.find(output) for output in outputs]
    example = Example(
        name=name,
        benchmark="ruler",
        task=task,
        length=row.number("length") if row.has("length") else None,
        messages=[user(text)],
        references=outputs,
        scorer="string_match_part" if task.startswith("qa") else "string_match_all",
        answer_tokens=next((tokens for start, tokens in RULER_TOKENS.items() if task.startswith(start)), 128),
        prefix=row.text("answer_prefix").strip() if row.has("answer_prefix") else "",
        depth=None if min(places) < 0 else sum(places) / len(places) / len(text),
    )
    return [example]


def longbench(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """LongBench-v2 without chain of thought; its tasks are here its lengths: short, medium, long.

    Texts longer than the backbone's context are left out and counted, not cut in the middle. Raises InputError that
    names row and field.
    """
    if row.text("answer") not in ("A", "B", "C", "D"):
        raise InputError(f"{row.where}: field 'answer' is {row.text('answer')!r}, not A, B, C or D")
    choices = [f"({letter}) {row.text(f'choice_{letter}').strip()}" for letter in "ABCD"]
    text = [
        "Read this text, then choose the right answer to the question behind it.",
        row.text("context").strip(),
        "\n".join([f"Question: {row.text('question').strip()}", *choices]),
        'Answer in this form: "The correct answer is (X)", with the letter of your choice for X.',
    ]
    example = Example(
        name=name,
        benchmark="longbench-v2",
        task=row.text("length"),
        length=None,
        messages=[user("\n\n".join(text))],
        references=[row.text("answer")],
        scorer="multiple_choice",
        answer_tokens=128,
    )
    return [example]


def longmemeval(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """LongMemEval with its whole history; its tasks are its question types, `abstention` for ids that end in _abs.

    Names end in `:` and the question's id, so that answers.jsonl gives the official judge its question_id, hypothesis.

    Questions about preferences are left out: their answers are rubrics, which only a judge can apply. Raises InputError
    that names row and field.
    """
    kind, abstains = row.text("question_type"), row.text("question_id").endswith("_abs")
    sessions, dates, answer = row.items("haystack_sessions"), row.items("haystack_dates"), row.fields.get("answer")
    if len(sessions) != len(dates):
        raise InputError(f"{row.where}: {len(sessions)} in 'haystack_sessions', but {len(dates)} in 'haystack_dates'")
    if not isinstance(answer, str | int):
        raise InputError(f"{row.where}: field 'answer' is missing, or neither text nor a whole number")
    told = [f"Conversation of {date}:\n{_turns(turns, row)}" for turns, date in zip(sessions, dates, strict=True)]
    text = [
        "Below are earlier conversations between you and a user. Answer the question behind them.",
        *told,
        f"Today is {row.text('question_date')}.\nQuestion: {row.text('question')}",
    ]
    starts = [sum(map(len, text[: place + 1])) / sum(map(len, text)) for place in range(len(told))]
    evidence = [
        start for start, turns in zip(starts, sessions, strict=True) if any(turn.get("has_answer") for turn in turns)
    ]
    rubric = kind.endswith("preference") and not abstains
    example = Example(
        name=f"{name}:{row.text('question_id')}",
        benchmark="longmemeval",
        task="abstention" if abstains else kind,
        length=None,
        messages=[user("\n\n".join(text))],
        references=[str(answer)],
        scorer="refusal" if abstains else "answer_words",
        answer_tokens=64,
        depth=sum(evidence) / len(evidence) if evidence else None,
        left_out="its answer is a rubric for a judge" if rubric else "",
    )
    return [example]


def mrcr(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """OpenAI MRCR as it is: the model itself must write the random string first. Its tasks: how many needles.

    Lengths are the release's bins of prompt and answer, up to 8,192 tokens and doubling, in the backbone's tokens.
    Raises InputError that names row and field.
    """
    try:
        messages = json.loads(row.text("prompt"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{row.where}: field 'prompt' is not JSON") from error
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise InputError(f"{row.where}: field 'prompt' is not a list of messages of role and content")
    answer = row.text("answer")
    example = Example(
        name=name,
        benchmark="mrcr",
        task=f"{row.number('n_needles')} needles",
        length=_mrcr_bin([*(message["content"] for message in messages), answer], tokenizer),
        messages=messages,
        references=[answer, row.text("random_string_to_prepend")],
        scorer="sequence_ratio",
        answer_tokens=len(tokenizer(answer, add_special_tokens=False, verbose=False).input_ids) + 16,
        depth=row.number("desired_msg_index") / len(messages) if row.has("desired_msg_index") else None,
    )
    return [example]


def _mrcr_bin(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """The upper end of the bin that the texts' tokens are in."""
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False).input_ids))
    return max(8192, 1 << (tokens - 1).bit_length())


def _turns(turns: Any, row: FileRow) -> str:
    if not isinstance(turns, list) or not all(_is_message(turn) for turn in turns):
        raise InputError(f"{row.where}: field 'haystack_sessions' is not a list of lists of role and content")
    return "\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in turns)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
