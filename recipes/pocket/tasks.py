"""Long-context tasks over the pocket language: items made of scattered facts, a question and an answer.

    single, multi_key   note bako 417 .  ...  recall bako ? -> 417         (few or many other keys in the document)
    multi_value         note bako 417 .  ... note bako 233 . ...  list bako ? -> 233 bako 417       (any order)
    tracking            alias Rolu bako . ... note bako 417 . ...  trace Rolu ? -> bako 417
    copy                step first 417 . ... step second 233 . ...  repeat ? -> first 417 second 233

A question ends in a word of its own: whoever decides what to keep for the answer has read what is asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from recipes.pocket.words import Lexicon, filler

TASKS = ("single", "multi_key", "multi_value", "tracking", "copy")
GAP = (5, 8)  # filler words between events: no 8-token compression window may hold two facts
TOLD = 0.7
"""Share of a chat that tells facts; the rest asks for them."""
SPARSE = (0, 4, 12, 20)
"""Filler words of a chat beside the least, of each fact."""


@dataclass(frozen=True)
class Item:
    """Facts to scatter, the words that ask for them, and the words that answer."""

    task: str
    facts: list[list[str]]
    question: list[str]
    answer: list[str]


@dataclass(frozen=True)
class PocketDocument:
    """One task instance. length: tokens of prompt plus answer, <bos> included."""

    task: str
    prompt: str
    answer: str
    length: int


class Words:
    """Hands out words of a lexicon, each at most once per document."""

    def __init__(self, lexicon: Lexicon, rng: Random) -> None:
        self.rng = rng
        self.lexicon = lexicon
        self.keys = rng.sample(lexicon.keys, len(lexicon.keys))
        self.names = rng.sample(lexicon.names, len(lexicon.names))

    def values(self, count: int) -> list[str]:
        """`count` different values."""
        return self.rng.sample(self.lexicon.values, count)


def pair(words: Words, task: str = "multi_key") -> Item:
    """One key, one value."""
    key, (value,) = words.keys.pop(), words.values(1)
    return Item(task, [["note", key, value, "."]], ["recall", key, "?"], [value])


def multi_value(words: Words, count: int = 3) -> Item:
    """One key noted `count` times; the answer's order is random, so no order is learned."""
    key, values = words.keys.pop(), words.values(count)
    listed = words.rng.sample(values, count)
    answer = [listed[0]] + [word for value in listed[1:] for word in (key, value)]
    return Item("multi_value", [["note", key, v, "."] for v in values], ["list", key, "?"], answer)


def tracking(words: Words) -> Item:
    """A name stands for a key, which has a value: two hops."""
    key, name, (value,) = words.keys.pop(), words.names.pop(), words.values(1)
    return Item("tracking", [["alias", name, key, "."], ["note", key, value, "."]], ["trace", name, "?"], [key, value])


def copy(words: Words, count: int = 6) -> Item:
    """Numbered steps anywhere in the text, repeated in order."""
    steps = list(zip(words.lexicon.ordinals, words.values(count), strict=False))
    facts = [["step", ordinal, value, "."] for ordinal, value in steps]
    return Item("copy", facts, ["repeat", "?"], [word for step in steps for word in step])


MAKERS: dict[str, Callable[[Words], Item]] = {
    "single": lambda words: pair(words, "single"),
    "multi_key": pair,
    "multi_value": multi_value,
    "tracking": tracking,
    "copy": copy,
}


def test_documents(
    lexicon: Lexicon, tasks: Sequence[str], length: int, distractors: int, rng: Random
) -> list[PocketDocument]:
    """A document for each task, alike but for the question at its end: the text answers all of them.

    The longest has exactly `length` tokens. distractors: other keys in the text, none for `single`.
    """
    words = Words(lexicon, rng)
    items = [MAKERS[task](words) for task in tasks]
    others = 0 if "single" in tasks else distractors
    facts = [fact for item in items for fact in item.facts] + [pair(words).facts[0] for _ in range(others)]
    rng.shuffle(facts)
    tail = filler(rng, GAP[1])
    asked = max(len(item.question) + len(item.answer) for item in items)
    free = length - 1 - len(tail) - asked - sum(len(fact) + GAP[0] for fact in facts)
    if free < 0:
        raise ValueError(f"{length} tokens cannot hold {len(facts)} facts")
    cuts = sorted(rng.randint(0, free) for _ in facts)
    body: list[str] = []
    for fact, start, end in zip(facts, [0, *cuts], cuts, strict=False):
        body += [*filler(rng, end - start + GAP[0]), *fact]
    body += [*filler(rng, free - cuts[-1]), *tail]
    size = 1 + len(body)
    return [
        PocketDocument(
            item.task, " ".join(body + item.question), " ".join(item.answer), size + len(item.question + item.answer)
        )
        for item in items
    ]


def training_items(words: Words, facts: int, even: bool) -> list[Item]:
    """Random items with about `facts` facts in all, at most one `copy`; mostly pairs, or every task as `even`."""
    items: list[Item] = []
    rng = words.rng
    if facts >= 6 and (even or rng.random() < 0.3):
        items.append(copy(words, rng.randint(2, min(6, facts))))
    while sum(len(item.facts) for item in items) < facts and len(words.keys) > 1 and words.names:
        kind = rng.random()
        if kind < (0.3 if even else 0.1):
            items.append(multi_value(words, rng.randint(2, 3)))
        elif kind < (0.6 if even else 0.25):
            items.append(tracking(words))
        else:
            items.append(pair(words))
    return items


def training_document(lexicon: Lexicon, length: int, far: int, rng: Random) -> tuple[list[str], list[int]]:
    """`length` words with many facts and questions, and per word the index of the task it answers (-1: none).

    far: least number of words between the last mention of an item and its next question, so that no sliding window
    answers it. The item asked is drawn from all that are due: were the newest one asked, distance would give it away.
    Most questions are of the kind that is learned last, `multi_key`.
    """
    words = Words(lexicon, rng)
    spread = rng.choice((1, 1, 1, 1 + length // 512))
    most = 0.5 * length / (spread * sum(GAP) / 2 + 4)
    items = training_items(words, max(1, round(most ** rng.random() ** 0.25)), even=False)
    untold = {id(item): len(item.facts) for item in items}
    facts = [(item, fact) for item in items for fact in item.facts]
    rng.shuffle(facts)
    telling = rng.choice((0.5, 1.0, 1.0, 1.0))
    told: list[tuple[int, Item]] = []  # with the first word at which the item may be asked
    text: list[str] = []
    tasks: list[int] = []
    while len(text) < length:
        due = [i for i, (word, _) in enumerate(told) if word <= len(text)]
        if facts and (not due or rng.random() < telling):
            item, fact = facts.pop()
            text += [*filler(rng, spread * rng.randint(*GAP)), *fact]
            untold[id(item)] -= 1
            if not untold[id(item)]:
                told.append((len(text) + far, item))
        elif due:
            chosen = rng.choice(due)
            item = told[chosen][1]
            text += [*filler(rng, rng.randint(0, rng.choice((2, GAP[1])))), *item.question]
            tasks += [-1] * (len(text) - len(tasks)) + [TASKS.index(item.task)] * len(item.answer)
            text += [*item.answer, "."]
            told[chosen] = (len(text) + int(far * (length / far) ** rng.random()), item)
        else:
            text += filler(rng, rng.randint(*GAP))
        tasks += [-1] * (len(text) - len(tasks))
    return text[:length], tasks[:length]


def asked_once(lexicon: Lexicon, length: int, far: int, rng: Random) -> tuple[list[str], list[int]]:
    """`length` words at most: scattered facts, then every item asked once; per word the task it answers (-1: none).

    An answer in the text is where the next question on its item would look: asked twice, nothing of two hops or of
    scattered steps is left to learn. far: as in `training_document`. Every task is asked about as often.
    """
    words = Words(lexicon, rng)
    told_in = round(length * TOLD)
    items = training_items(words, max(6, round(told_in / (GAP[0] + 4 + rng.choice(SPARSE)))), even=True)
    facts = [(item, fact) for item in items for fact in item.facts]
    rng.shuffle(facts)
    free = max(0, told_in - sum(len(fact) + GAP[0] for _, fact in facts))
    cuts = sorted(rng.randint(0, free) for _ in facts)
    text: list[str] = []
    told: dict[int, int] = {}  # the word after an item's last fact
    for (item, fact), start, end in zip(facts, [0, *cuts], cuts, strict=False):
        text += [*filler(rng, end - start + GAP[0]), *fact]
        told[id(item)] = len(text)
    text += filler(rng, free - cuts[-1] + GAP[1])
    tasks = [-1] * len(text)
    while items and len(text) < length:
        if due := [item for item in items if told[id(item)] + far <= len(text)]:
            task = rng.choice(sorted({item.task for item in due}))
            asked = rng.choice([item for item in due if item.task == task])
            items.remove(asked)
            text += [*filler(rng, rng.randint(0, rng.choice((2, GAP[1])))), *asked.question]
            tasks += [-1] * (len(text) - len(tasks)) + [TASKS.index(asked.task)] * len(asked.answer)
            text += [*asked.answer, "."]
        else:
            text += filler(rng, GAP[0])
        tasks += [-1] * (len(text) - len(tasks))
    return text[:length], tasks[:length]


def solved(document: PocketDocument, completion: str) -> bool:
    """Whether a greedy completion, cut to the answer's length, answers the question; values may come in any order."""
    want = document.answer.split()
    got = completion.split()[: len(want)]
    if document.task == "multi_value":
        return sorted(got[::2]) == sorted(want[::2])
    return got == want
