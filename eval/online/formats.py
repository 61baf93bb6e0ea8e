"""Published benchmarks in their own formats: RULER, LongBench-v2, LongMemEval, OpenAI MRCR.

A format is a reader in `FORMATS`: a row -> an example. Rows come from a .json, .jsonl or .parquet file, or from a
`datasets` name.
Fields are those of the releases (NVIDIA/RULER `prepare.py`, THUDM/LongBench-v2, xiaowu0162/LongMemEval, openai/mrcr).
Answers are scored by eval/online/scorers.py; the words around LongBench-v2's and LongMemEval's questions are our own.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from eval.online.config import BenchmarkFile, Format
from eval.online.examples import Example, user

RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens that RULER lets each kind of task generate, by how the task's name starts."""


class FileRow:
    """One row and where it is. `text`, `items` and `number` give a field or raise InputError that names it."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def text(self, name: str) -> str:
        """The field, text."""
        return self._of(name, str, "text")

    def items(self, name: str) -> list[Any]:
        """The field, a list."""
        return self._of(name, list, "a list")

    def number(self, name: str) -> int:
        """The field, a whole number."""
        return self._of(name, int, "a whole number")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def _of(self, name: str, kind: type, words: str) -> Any:
        if not self.has(name):
            raise InputError(f"{self.where}: no field {name!r}; it has {', '.join(sorted(self.fields)) or 'none'}")
        if not isinstance(self.fields[name], kind):
            raise InputError(f"{self.where}: field {name!r} is not {words}")
        return self.fields[name]


Reader = Callable[[FileRow, str, BenchmarkFile, PreTrainedTokenizerBase], Example]
"""(row, the example's name, the file, tokenizer) -> the example. Raises InputError that names row and field."""


def read_benchmark(file: BenchmarkFile, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Every example of a file. Raises InputError for a file of another format, naming row and field."""
    name, read = "-".join(filter(None, [file.format, file.source, file.subset, file.split])), FORMATS[file.format]
    examples = [
        read(row, f"{name}-{_digest(row)}-{index:05d}", file, tokenizer) for index, row in enumerate(read_rows(file))
    ]
    if file.format == "mrcr":
        return examples  # each in the bin of its own length
    longest = max((example.length or 0 for example in examples), default=0)
    return [replace(example, length=longest or None) for example in examples]


def ruler(row: FileRow, name: str, file: BenchmarkFile, tokenizer: PreTrainedTokenizerBase) -> Example:
    """RULER as its `base` template writes it; the task is that of the path, TASK/validation.jsonl or TASK.jsonl."""
    path, text, outputs = Path(file.source), row.text("input"), row.items("outputs")
    if not outputs or not all(isinstance(output, str) for output in outputs):
        raise InputError(f"{row.where}: field 'outputs' is not a list of texts")
    task = path.parent.name if path.stem in ("validation", "test") else path.stem
    if not is_file(file.source):
        task = file.subset or file.split
    places = [text.find(output) for output in outputs]
    return Example(
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


def longbench(row: FileRow, name: str, file: BenchmarkFile, tokenizer: PreTrainedTokenizerBase) -> Example:
    """LongBench-v2 without chain of thought; its tasks are here its lengths: short, medium, long.

    Texts longer than the backbone's context are left out and counted, not cut in the middle.
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
    return Example(
        name=name,
        benchmark="longbench-v2",
        task=row.text("length"),
        length=None,
        messages=[user("\n\n".join(text))],
        references=[row.text("answer")],
        scorer="multiple_choice",
        answer_tokens=128,
    )


def longmemeval(row: FileRow, name: str, file: BenchmarkFile, tokenizer: PreTrainedTokenizerBase) -> Example:
    """LongMemEval with its whole history; its tasks are its question types, `abstention` for ids that end in _abs.

    Names end in `:` and the question's id, so that answers.jsonl gives the official judge its question_id, hypothesis.

    Questions about preferences are left out: their answers are rubrics, which only a judge can apply.
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
    return Example(
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


def mrcr(row: FileRow, name: str, file: BenchmarkFile, tokenizer: PreTrainedTokenizerBase) -> Example:
    """OpenAI MRCR as it is: the model itself must write the random string first. Its tasks: how many needles.

    Lengths are the release's bins of prompt and answer, up to 8,192 tokens and doubling, in the backbone's tokens.
    """
    try:
        messages = json.loads(row.text("prompt"))
    except json.JSONDecodeError as error:
        raise InputError(f"{row.where}: field 'prompt' is not JSON") from error
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise InputError(f"{row.where}: field 'prompt' is not a list of messages of role and content")
    answer = row.text("answer")
    return Example(
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


FORMATS: dict[Format, Reader] = {
    "ruler": ruler,
    "longbench-v2": longbench,
    "longmemeval": longmemeval,
    "mrcr": mrcr,
}


def _mrcr_bin(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """The upper end of the bin that the texts' tokens are in."""
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False).input_ids))
    return max(8192, 1 << (tokens - 1).bit_length())


def _digest(row: FileRow) -> str:
    """So that answers to a file that changed are not taken for answers to this one."""
    return hashlib.sha256(json.dumps(row.fields, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _turns(turns: Any, row: FileRow) -> str:
    if not isinstance(turns, list) or not all(_is_message(turn) for turn in turns):
        raise InputError(f"{row.where}: field 'haystack_sessions' is not a list of lists of role and content")
    return "\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in turns)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def is_file(source: str) -> bool:
    """Whether a source is a file's path, not the name of a data set."""
    return Path(source).suffix in (".json", ".jsonl", ".parquet")


def read_rows(file: BenchmarkFile) -> list[FileRow]:
    """The rows of `file`, its first `limit`. Raises InputError for a missing, empty or unreadable one."""
    path = Path(file.source).expanduser()
    if is_file(file.source):
        if not path.is_file():
            raise InputError(f"benchmark {path}: no such file")
        found: Iterable[Any] = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix](path)
    else:
        found = _datasets(file)
    rows = []
    for number, fields in enumerate(islice(found, file.limit), 1):
        where = f"benchmark {file.source} row {number} (as {file.format})"
        if not isinstance(fields, dict):
            raise InputError(f"{where}: not an object with fields")
        rows.append(FileRow(fields, where))
    if not rows:
        raise InputError(f"benchmark {file.source}: no rows")
    return rows


def _json(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise InputError(f"benchmark {path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise InputError(f"benchmark {path}: not a list of examples")
    return content


def _jsonl(path: Path) -> Iterator[Any]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8"))
                except ValueError as error:
                    raise InputError(f"benchmark {path} line {number}: not JSON in UTF-8") from error


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"benchmark {path}: not a Parquet file ({error})") from error


def _datasets(file: BenchmarkFile) -> Iterator[Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        yield from datasets.load_dataset(file.source, file.subset, split=file.split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"benchmark {file.source}: neither a .json, .jsonl or .parquet file nor a data set ({reason})"
        ) from error
