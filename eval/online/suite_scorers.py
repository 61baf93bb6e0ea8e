"""The published rules of kvpress's suites, SCBench, BABILong, GraphWalks and HELMET, (response, references) -> 0 to 1.

Each says whose rule it is. Where several references are right, the best one counts. What looks odd is the rule's own:
figures are to be compared with published ones.
"""

import ast
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_LISTED = re.compile(r"Final Answer: ?\[(.*)\]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE = str.maketrans("", "", string.punctuation + (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
))  # fmt: skip


def normal(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def glued_match_all(response: str, references: list[str]) -> float:
    """RULER in kvpress: share of the references in the response, case aside, control characters deleted first."""
    text = _CONTROL.sub("", response.strip()).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def glued_match_part(response: str, references: list[str]) -> float:
    """RULER's questions in kvpress: the same, one reference is enough."""
    return float(glued_match_all(response, references) > 0)


def choice_sentence(response: str, references: list[str]) -> float:
    """LongBench-v2 in kvpress: the asked sentence with the right letter is in the response, asterisks aside."""
    said = response.replace("*", "")
    return float(any(f"The correct answer is {letter}" in said for letter in (f"({references[0]})", references[0])))


def word_f1(response: str, references: list[str]) -> float:
    """LongBench, InfiniteBench: F1 of the words in SQuAD's normal form, each as often as it occurs."""
    return max(_f1(normal(response).split(), normal(reference).split()) for reference in references)


def character_f1(response: str, references: list[str]) -> float:
    """InfiniteBench and SCBench in Chinese: F1 of the characters, without punctuation and spaces."""
    said, *right = ("".join(text.lower().translate(_CHINESE).split()) for text in (response, *references))
    return max(_f1(said, each) for each in right)


def line_f1(response: str, references: list[str]) -> float:
    """LongBench's triviaqa: `word_f1` of the first line."""
    return word_f1(_first_line(response), references)


def rouge_l(response: str, references: list[str]) -> float:
    """LongBench: ROUGE-L's F as PyPI's `rouge` has it."""
    return max(_rouge(response, reference)[0] for reference in references)


def line_rouge_l(response: str, references: list[str]) -> float:
    """LongBench's samsum: `rouge_l` of the first line."""
    return rouge_l(_first_line(response), references)


def rouge_l_recall(response: str, references: list[str]) -> float:
    """LooGLE: ROUGE-L's recall as PyPI's `rouge` has it."""
    return max(_rouge(response, reference)[1] for reference in references)


def line_class(response: str, references: list[str]) -> float:
    """LongBench's trec and lsht: 1 / classes that the first line names, if the right one is among them.

    A class that is part of the right one's name is not counted; the one after it in the list always is, as the
    published loop removes from the list that it goes through. references: the right class, then all classes.
    """
    answer, *classes = references
    line, found, passed = _first_line(response), [], False
    for name in (name for name in classes if name in line):
        passed = not passed and name in answer and name != answer
        if not passed:
            found.append(name)
    return 1 / len(found) if answer in found else 0.0


def number_share(response: str, references: list[str]) -> float:
    """LongBench's counts and paragraphs: share of the response's numbers that are the right one."""
    numbers = re.findall(r"\d+", response)
    return max(numbers.count(reference) for reference in references) / len(numbers) if numbers else 0.0


def code_line(response: str, references: list[str]) -> float:
    """LongBench's code: difflib's ratio, in whole percent, of the first line without comment signs or backticks."""
    lines = response.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")
    return max(round(100 * SequenceMatcher(None, line, reference).ratio()) / 100 for reference in references)


def word_among(response: str, references: list[str]) -> float:
    """InfiniteBench's kv_retrieval: the value is one of the words, quotes and punctuation aside."""
    return float(references[0] in _spaced(response, "\n:\"'.,?!{}").split())


def first_digits(response: str, references: list[str]) -> float:
    """InfiniteBench and SCBench, passkey and number_string: the first digits in a row are the right ones, as text."""
    found = _DIGITS.search(response)
    return float(found is not None and found.group() == references[0])


def last_number(response: str, references: list[str]) -> float:
    """InfiniteBench's code_run: the last word, a whole number."""
    words = _spaced(response, "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == float(references[0]))
    except ValueError:
        return 0.0


def first_number(response: str, references: list[str]) -> float:
    """InfiniteBench's math_find, SCBench's mf: the first number; whole where the right one is written as whole."""
    found = _NUMBER.search(response)
    if found is None:
        return 0.0
    number, right = float(found.group()), references[0]
    return float(int(number) == int(right) if re.fullmatch(r"[+-]?\d+", right) else number == float(right))


def running_values(response: str, references: list[str]) -> float:
    """InfiniteBench's math_calc: share of the values that are right before the first wrong one; signs are not read."""
    said = [int(digits) for digits in _DIGITS.findall(response)]
    wrong = (place for place, (a, b) in enumerate(zip(said, references, strict=False)) if a != float(b))
    return next(wrong, min(len(said), len(references))) / len(references)


def debug_choice(response: str, references: list[str]) -> float:
    """InfiniteBench's code_debug: the letter, or the function's name where an answer is announced or begins.

    references: the right option, its letter.
    """
    option, letter = references
    said = response.strip()
    found = re.search(r"\b[A-J]\b(?!.*\b[A-J]\b)", said)
    if found is not None and found.group() == letter:
        return 1.0
    for sign in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        said = said.replace(sign, " ")
    said = re.sub(" +", " ", said)
    announced = _announced(said, ("answer is:", "is:", "answer:", "correct option is:"), (letter, option))
    return float(said.startswith((letter, option)) or bool(announced))


def choice(response: str, references: list[str]) -> float:
    """SCBench's choice_eng: the first letter, else the option, else what is announced, else the first word of A to D.

    references: the right option, its letter.
    """
    said = response.strip()
    if not said or said[0] in "ABCD":
        return float(said[:1] in references)
    if said in references:
        return 1.0
    said = re.sub(" +", " ", _spaced(said, "\n\"'.,?!{}"))
    announced = _announced(said, ("answer is:", "answer:", "answer is", "option is"), references)
    if announced is not None:
        return float(announced)
    return float(next((word in references for word in said.split() if word in "ABCD"), False))


def last_choice(response: str, references: list[str]) -> float:
    """InfiniteBench's longbook_choice_eng: the last letter of the first line with one, else as `choice`."""
    found = re.search(r"\b[A-D]\b(?!.*\b[A-D]\b)", response.strip())
    return 1.0 if found is not None and found.group() in references else choice(response, references)


def any_within(response: str, references: list[str]) -> float:
    """InfiniteBench's longdialogue_qa_eng, SCBench's qa_eng and many_shot: a reference in the response, case aside."""
    return float(any(reference.upper() in response.strip().upper() for reference in references))


def within(response: str, references: list[str]) -> float:
    """SCBench's kv, hashhop and prefix_suffix: the value is in the response as it is written."""
    return float(references[0] in response)


def share_within(response: str, references: list[str]) -> float:
    """SCBench's vt: share of the references in the response, case aside, rounded to hundredths."""
    return round(sum(reference.lower() in response.lower() for reference in references) / len(references), 2)


def rouge_l_sum(response: str, references: list[str]) -> float:
    """SCBench's summary: ROUGE-Lsum's F as PyPI's `rouge_score` has it, without stems; lines are sentences."""
    return max(_rouge_sum(response, reference) for reference in references)


def filled_masks(response: str, references: list[str]) -> float:
    """LooGLE's cloze: share of the masks that are filled right; the response is a dictionary in Python's notation.

    kvpress pools the masks of all questions, a mean over questions weighs each alike.
    """
    try:
        right, said = ast.literal_eval(references[0]), ast.literal_eval(response)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return 0.0
    if not (isinstance(right, dict) and isinstance(said, dict) and right):
        return 0.0
    return sum(said.get(mask) == value for mask, value in right.items()) / len(right)


def only_label(response: str, references: list[str]) -> float:
    """BABILong: the first sentence names the right label and no other one.

    references: the right label, then those of the task that the question does not name.
    """
    target, *labels = (reference.lower() for reference in references)
    said = re.split(r"\.|<context>|<example>", response.lower(), maxsplit=1)[0]
    return float({label for label in labels if label in said} == {target})


def node_f1(response: str, references: list[str]) -> float:
    """GraphWalks: F1 of the nodes listed in the last line after `Final Answer:`; an empty list where none is right.

    The release's own listing would keep `Final Answer: [` on the first node; here it is read off.
    """
    found = _LISTED.search(response.split("\n")[-1])
    if found is None:
        return 0.0
    said = {node.strip() for node in found.group(1).split(",") if node.strip()}
    if not references:
        return float(not said)
    right = set(references)
    return 2 * len(said & right) / (len(said) + len(right))


def normal_within(response: str, references: list[str]) -> float:
    """HELMET: a reference in the response, both in SQuAD's normal form."""
    return float(any(normal(reference) in normal(response) for reference in references))


def line_normal_within(response: str, references: list[str]) -> float:
    """HELMET's RAG, whose answers end with the line."""
    return normal_within(response.split("\n")[0], references)


SUITE_SCORERS = (
    glued_match_all, glued_match_part, choice_sentence, word_f1, character_f1, line_f1, rouge_l, line_rouge_l,
    rouge_l_recall, line_class, number_share, code_line, word_among, first_digits, last_number, first_number,
    running_values, debug_choice, choice, last_choice, any_within, within, share_within, rouge_l_sum, filled_masks,
    only_label, node_f1, normal_within, line_normal_within,
)  # fmt: skip


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two bags."""
    same = (Counter(said) & Counter(right)).total()
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(right)
    return 2 * precision * recall / (precision + recall)


def _first_line(response: str) -> str:
    return response.lstrip().split("\n")[0]


def _spaced(text: str, signs: str) -> str:
    """The text with spaces for signs."""
    return text.translate(str.maketrans(signs, " " * len(signs)))


def _announced(said: str, phrases: Sequence[str], right: Sequence[str]) -> bool | None:
    """Whether what follows the first of the phrases that occurs is right, a space aside; None where none occurs."""
    for phrase in phrases:
        _, found, rest = said.partition(phrase)
        if found:
            return bool(rest) and rest[1:].startswith(tuple(right))
    return None


def _common(right: list[str], said: list[str], keep_right: bool) -> list[int]:
    """Places in `right` of a longest common subsequence. keep_right: which side steps back where both are as good."""
    table = [[0] * (len(said) + 1) for _ in range(len(right) + 1)]
    for i, a in enumerate(right):
        for j, b in enumerate(said):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    i, j, places = len(right), len(said), []
    while i and j:
        up, left = table[i - 1][j], table[i][j - 1]
        if right[i - 1] == said[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif up > left or (up == left and not keep_right):
            i -= 1
        else:
            j -= 1
    return places[::-1]


def _rouge(response: str, reference: str) -> tuple[float, float]:
    """(F, recall) of ROUGE-L over sets of words; sentences end at full stops. 0 where one side has none."""
    said, right = ([" ".join(part.split()).split(" ") for part in text.split(".") if part]
                   for text in (response, reference))  # fmt: skip
    if not said or not right:
        return 0.0, 0.0
    shared = {sentence[place] for sentence in right for each in said for place in _common(sentence, each, True)}
    recall = len(shared) / len({word for sentence in right for word in sentence})
    precision = len(shared) / len({word for sentence in said for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8)), recall


def _rouge_sum(response: str, reference: str) -> float:
    """F of ROUGE-Lsum: each word counts as often as both sides have it."""
    said, right = ([re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n") if line]
                   for text in (response, reference))  # fmt: skip
    left = Counter(word for line in said for word in line) & Counter(word for line in right for word in line)
    total, hits = sum(map(len, said)) + sum(map(len, right)), 0
    for line in right:
        for place in sorted({place for each in said for place in _common(line, each, False)}):
            if left[line[place]] > 0:
                hits, left[line[place]] = hits + 1, left[line[place]] - 1
    return 2 * hits / total if total else 0.0
