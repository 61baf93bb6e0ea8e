"""BABILong, GraphWalks, and HELMET's key-value and RAG files: facts, nodes, values and passages to find.

Fields are those of the releases (booydar/babilong, openai/graphwalks, princeton-nlp/HELMET); the words around
BABILong's and HELMET's questions are our own.
"""

import re

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.documents import user
from eval.online.examples import Example
from eval.online.formats.file_row import FileRow

_PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
LABELS = dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES) | {
    "qa5": ["Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"],
    "qa6": ["no", "yes"],
    "qa7": ["none", "one", "two"],
    "qa9": ["no", "yes"],
    "qa10": ["maybe", "no", "yes"],
}
"""BABILong's tasks that its release scores -> their possible answers."""
REASONING = 512
"""Tokens that a walk through a graph may take before its list of nodes."""
SHOTS = 2
"""Demonstrations before HELMET's question for a key."""


def babilong(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """BABILong; the task is that of the file's name or split, qa1 and so on, the length in tokens its subset's, 4k.

    Labels that the question names are never counted, as in the release.
    """
    text, question, target = row.text("input"), row.text("question"), row.text("target")
    task = row.named(lambda named: re.fullmatch(r"qa\d+", named) is not None, "qa1.json")
    labels = [label for label in LABELS.get(task, []) if label.lower() not in question.lower()]
    asked = f"Answer in one word: {', '.join(LABELS[task])}." if task in LABELS else "Answer in one word."
    size = re.fullmatch(r"(\d+)k", row.file.subset or "")
    example = Example(
        name=name,
        benchmark="babilong",
        task=task,
        length=int(size.group(1)) * 1000 or None if size else None,
        messages=[user(f"Facts are hidden in this text.\n\n{text}\n\nQuestion: {question}\n{asked}")],
        references=[target, *labels],
        scorer="only_label",
        answer_tokens=20,
        left_out="" if task in LABELS else "its release has no rule for it",
    )
    return [example]


def graphwalks(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """GraphWalks as it is: the answer ends in a line `Final Answer: [nodes]`. Earlier files call the nodes `answer`.

    Raises InputError that names row and field.
    """
    prompt, nodes = row.text("prompt"), row.items("answer_nodes" if row.has("answer_nodes") else "answer")
    if not all(isinstance(node, str) for node in nodes):
        raise InputError(f"{row.where}: the answer is not a list of nodes")
    right = f"Final Answer: [{', '.join(nodes)}]"
    example = Example(
        name=name,
        benchmark="graphwalks",
        task=row.text("problem_type"),
        length=None,
        messages=[user(prompt)],
        references=nodes,
        scorer="node_f1",
        answer_tokens=len(tokenizer(right, add_special_tokens=False, verbose=False).input_ids) + REASONING,
    )
    return [example]


def helmet_kv(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """HELMET's json_kv: a JSON object, two demonstrations, a key. Raises InputError that names row and field."""
    demos = row.items("demos")[:SHOTS]
    if not all(isinstance(demo, list) and len(demo) == 2 for demo in demos):
        raise InputError(f"{row.where}: field 'demos' is not a list of keys and values")
    shown = "".join(f"Key: {key}\nValue: {value}\n\n" for key, value in demos)
    context = f"{row.text('context')}\n\nGive the value that belongs to a key of this JSON object."
    example = Example(
        name=name,
        benchmark="helmet-kv",
        task="json_kv",
        length=None,
        messages=[user(f"{context}\n\n{shown}Key: {row.text('question')}")],
        references=[row.text("answer")],
        scorer="normal_within",
        answer_tokens=100,
        prefix="Value:",
    )
    return [example]


def helmet_rag(row: FileRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """HELMET's RAG: retrieved passages of title and text, a question, several right answers.

    Without demonstrations, which HELMET takes from a second file. Raises InputError that names row and field.
    """
    passages, answers = row.items("ctxs"), row.items("answers")
    if not all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in passages):
        raise InputError(f"{row.where}: field 'ctxs' is not a list of passages with a text")
    flat = [text for answer in answers for text in (answer if isinstance(answer, list) else [answer])]
    if not flat or not all(isinstance(text, str) for text in flat):
        raise InputError(f"{row.where}: field 'answers' is not a list of texts")
    text = "\n\n".join(f"Passage ({each.get('title', '')}): {each['text']}" for each in passages)
    asked = f"Answer the question from these passages, in a few words.\n\nQuestion: {row.text('question')}"
    example = Example(
        name=name,
        benchmark="helmet-rag",
        task=row.named(bool, "nq.jsonl"),
        length=None,
        messages=[user(f"{text}\n\n{asked}")],
        references=flat,
        scorer="line_normal_within",
        answer_tokens=20,
        prefix="Answer:",
    )
    return [example]
