"""kvpress's files: RULER, LongBench, LongBench-v2, InfiniteBench, LooGLE and ZeroSCROLLS in one schema.

Fields as NVIDIA/kvpress writes them (`evaluation/benchmarks/*/create_huggingface_dataset.py`): `context`, `question`,
`answer_prefix`, one of `answer`, `answers`, `outputs`, `task`, `max_new_tokens`, and `all_classes` where there are
classes. Rules are those of its `calculate_metrics.py`, of which LooGLE has several: here its ROUGE-L recall. Rows keep
no trace of their suite: the task's name says it.
"""

import re

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.documents import user
from eval.online.examples import Example
from eval.online.formats.file_row import FileRow

RULES = {
    "word_f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique longbook_qa_eng",
    "line_f1": "triviaqa",
    "rouge_l": "gov_report qmsum multi_news",
    "line_rouge_l": "samsum",
    "line_class": "trec lsht",
    "number_share": "passage_count passage_retrieval_en passage_retrieval_zh",
    "code_line": "lcc repobench-p",
    "word_among": "kv_retrieval kv_retrieval_prefix kv_retrieval_both",
    "first_digits": "passkey number_string",
    "last_number": "code_run",
    "debug_choice": "code_debug",
    "last_choice": "longbook_choice_eng",
    "any_within": "longdialogue_qa_eng",
    "character_f1": "longbook_qa_chn",
    "first_number": "math_find",
    "running_values": "math_calc",
    "rouge_l_recall": "shortdep_qa longdep_qa longdep_summarization",
    "filled_masks": "shortdep_cloze",
}
"""Scorer -> the tasks of LongBench, InfiniteBench and LooGLE that it scores."""
SCORER_OF = {task: scorer for scorer, tasks in RULES.items() for task in tasks.split()}
WITHOUT = {
    "multifieldqa_zh": "its rule cuts Chinese into words with jieba",
    "dureader": "its rule cuts Chinese into words with jieba",
    "vcsum": "its rule cuts Chinese into words with jieba",
    "longbook_sum_eng": "kvpress has no rule for it",
}
"""Why a task has no score."""
_PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
_OPTIONS = re.compile(r"\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\Z")


def kvpress(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The context with the question after it; the answer begins with the prefix. Rows without a task: LongBench-v2.

    Rows without an answer (ZeroSCROLLS keeps its own) and those of `WITHOUT` are left out and counted.
    """
    context, question, answers = row.text("context"), row.text("question"), row.texts("answer", "answers", "outputs")
    task = row.text("task") if row.has("task") else "longbench-v2"
    bare, left_out = task.removesuffix("-e"), ""
    if not answers:
        left_out = "the file has no answer"
    elif bare in WITHOUT:
        left_out = WITHOUT[bare]
    scorer = _scorer(row, bare) if not left_out else "word_f1"
    example = Example(
        name=name,
        benchmark="kvpress",
        task=task,
        length=None,
        messages=[user(context + question)],
        references=[] if left_out else _references(row, scorer, answers),
        scorer=scorer,
        answer_tokens=row.number("max_new_tokens"),
        prefix=row.text("answer_prefix").strip(" ") if row.has("answer_prefix") else "",
        left_out=left_out,
    )
    return [example]


def _scorer(row: FileRow, task: str) -> str:
    """The scorer of a task, without LongBench-E's ending."""
    if task == "longbench-v2":
        if not row.has("choice_D"):
            raise InputError(f"{row.where}: no field 'task'; only rows of LongBench-v2 (with 'choice_D') may lack it")
        return "choice_sentence"
    if task.split("_")[0] in ("niah", "vt", "cwe", "fwe", "qa"):
        return "glued_match_part" if task.startswith("qa") else "glued_match_all"
    if task not in SCORER_OF:
        raise InputError(f"{row.where}: field 'task' is {task!r}, which is no task that kvpress scores")
    return SCORER_OF[task]


def _references(row: FileRow, scorer: str, answers: list[str]) -> list[str]:
    """What the scorer of a row compares with."""
    if scorer == "line_class":
        if len(answers) > 1:
            raise InputError(f"{row.where}: {len(answers)} answers where a class has one")
        return [*answers, *row.texts("all_classes")]
    if scorer == "number_share" and row.text("task").startswith("passage_retrieval"):
        found = [_PARAGRAPH.search(answer) for answer in answers]
        if not all(found):
            raise InputError(f"{row.where}: the answer names no paragraph by its number")
        return [match.group(1) for match in found if match]
    if scorer in ("debug_choice", "last_choice"):
        options = _OPTIONS.search(row.text("question") or row.text("context"))
        if options is None or answers[0] not in ("A", "B", "C", "D"):
            raise InputError(f"{row.where}: the question does not end in options A to D, or the answer is none of them")
        return [options.group("ABCD".index(answers[0]) + 1), answers[0]]
    if scorer in ("last_number", "first_number", "running_values") and not all(map(_is_number, answers)):
        raise InputError(f"{row.where}: the answer is not a number")
    return answers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
