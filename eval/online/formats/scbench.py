"""SCBench (microsoft/SCBench): several questions one after the other about one context.

A row is `context` (or `input`) and `multi_turns` of `input` and `answer`, with `options` for choices and `task` in the
two mixed sets. Rules and lengths of answers are those of microsoft/MInference (`scbench/compute_scores.py`); as there,
a later turn sees the right answers to the earlier ones. The words around questions are our own.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.documents import assistant, user
from eval.online.examples import Example
from eval.online.formats.file_row import FileRow

TASKS = {
    "scbench_choice_eng": ("choice", 40),
    "scbench_qa_eng": ("any_within", 40),
    "scbench_qa_chn": ("character_f1", 40),
    "scbench_kv": ("within", 150),
    "scbench_kv_hard": ("within", 150),
    "scbench_kv_compressible": ("within", 150),
    "scbench_hashhop": ("within", 150),
    "scbench_prefix_suffix": ("within", 150),
    "scbench_mf": ("first_number", 5),
    "scbench_passkey": ("first_digits", 15),
    "scbench_vt": ("share_within", 30),
    "scbench_many_shot": ("any_within", 10),
    "scbench_summary": ("rouge_l_sum", 200),
    "scbench_repoqa": ("", 1024),
}
"""Task -> (scorer, most tokens of an answer). RepoQA's rule parses the answer as code, which is not done here."""
MIXED = {
    "scbench_summary_with_needles": {"scbench_summary": 800, "scbench_passkey": 15},
    "scbench_repoqa_and_kv": {"scbench_repoqa": 1024, "scbench_kv": 80},
}
"""Sets whose turns name their own tasks -> most tokens of their answers."""


def scbench(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """An example per turn; each reads context and first question with full attention, what follows under its policy.

    The set is that of the file's or its folder's name. Turns are tasks of their own, as they are published. Raises
    InputError that names row, turn and field.
    """
    turns = row.items("multi_turns")
    context = row.text("context" if row.has("context") else "input")
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("input"), str) for turn in turns):
        raise InputError(f"{row.where}: field 'multi_turns' is not a list of turns with an input")
    made = row.named(lambda named: named in TASKS or named in MIXED, "scbench_kv.jsonl")
    messages: list[dict[str, str]] = []
    examples = []
    for number, turn in enumerate(turns, 1):
        where = f"{row.where} turn {number}"
        task = turn.get("task") if made in MIXED else made
        if task not in MIXED.get(made, TASKS):
            raise InputError(f"{where}: field 'task' is {task!r}, not one of {', '.join(MIXED[made])}")
        answers, question = _answers(turn, where), turn["input"]
        scorer, tokens = TASKS[task]
        if scorer == "choice":
            letter = _letter(turn, answers[0], where)
            listed = "\n".join(f"{each}. {option}" for each, option in zip("ABCD", turn["options"], strict=True))
            question, references = f"{question}\n{listed}\nAnswer with a letter.", [answers[0], letter]
        else:
            references = answers
        messages.append(user(f"Read this, then answer.\n\n{context}\n\n{question}" if number == 1 else question))
        examples.append(
            Example(
                name=f"{name}-turn{number}",
                benchmark="scbench",
                task=f"{made if made == task else f'{made} {task}'}, turn {number}",
                length=None,
                messages=messages[:1],
                later=messages[1:],
                references=references,
                scorer=scorer or "within",
                answer_tokens=MIXED[made][task] if made in MIXED else tokens,
                left_out="" if scorer else "its rule parses code, which is not done here",
            )
        )
        messages.append(assistant(", ".join(answers)))
    return examples


def _answers(turn: dict[str, Any], where: str) -> list[str]:
    """The right answers of a turn, at least one."""
    answer = turn.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(each, str | int | float) for each in answers):
        raise InputError(f"{where}: field 'answer' is missing, or neither text, a number nor a list of them")
    return [str(each) for each in answers]


def _letter(turn: dict[str, Any], answer: str, where: str) -> str:
    """The letter of the right option."""
    options = turn.get("options")
    if not isinstance(options, list) or len(options) != 4 or answer not in options:
        raise InputError(f"{where}: field 'options' is not four texts with the answer among them")
    return "ABCD"[options.index(answer)]
