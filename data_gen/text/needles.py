"""Generated long-context tasks: needles with known answers, worded differently for training and held-out documents, and
once more for questions on which nothing was chosen."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data_gen.core.errors import InputError

Split = Literal["train", "heldout"]
Vocabulary = Literal["train", "heldout", "fresh"]
"""Whose wordings, key words and values; `fresh` is no side of a recipe: held-out documents may be asked with it."""


@dataclass(frozen=True)
class Wording:
    """How one kind of needle is hidden, asked for and answered; {key} and {value} are filled in."""

    needle: str
    question: str
    answer: str
    question_all: str
    answer_all: str


def _wording(fact: str, verb: str, fact_all: str) -> Wording:
    return Wording(
        needle=f"{fact} {verb} {{value}}.",
        question=f"What is {fact[0].lower()}{fact[1:]}?",
        answer=f"{fact} {verb} {{value}}.",
        question_all=f"What are {fact_all[0].lower()}{fact_all[1:]}? Name all of them.",
        answer_all=f"{fact_all} are {{value}}.",
    )


WORDINGS: dict[Vocabulary, list[Wording]] = {
    "train": [
        _wording("The access code of the {key}", "is", "The access codes of the {key}"),
        _wording("The serial number printed on the {key}", "reads", "The serial numbers printed on the {key}"),
        _wording("The phone extension for the {key}", "is", "The phone extensions for the {key}"),
        _wording("The weight of one {key} in grams", "equals", "The weights of the {key} in grams"),
        _wording("The page that mentions the {key}", "is", "The pages that mention the {key}"),
        _wording("The year in which the {key} was made", "was", "The years in which the {key} was made"),
        _wording("The number of days until the {key} arrives", "is", "The numbers of days until the {key} arrives"),
        _wording("The temperature at which the {key} melts", "was", "The temperatures at which the {key} melts"),
        _wording("The distance from the station to the {key}", "is", "The distances from the station to the {key}"),
        _wording("The invoice that covers the {key}", "carries number", "The invoices that cover the {key}"),
        _wording("The depth of water above the {key}", "is", "The depths of water above the {key}"),
        _wording("The port where the {key} listens", "is", "The ports where the {key} listens"),
        _wording("The capacity of the {key}", "amounts to", "The capacities of the {key}"),
        _wording("The ticket about a broken {key}", "is", "The tickets about a broken {key}"),
        _wording("The final bid on the {key}", "reached", "The final bids on the {key}"),
        _wording("The catalogue entry under {key}", "is", "The catalogue entries under {key}"),
        _wording("The room behind the {key}", "has number", "The rooms behind the {key}"),
        _wording("The combination that opens the {key}", "is", "The combinations that open the {key}"),
        _wording("The count of visitors to the {key}", "stood at", "The counts of visitors to the {key}"),
        _wording("The tracking number of Anna's {key}", "is", "The tracking numbers of Anna's {key}"),
    ],
    "heldout": [
        _wording("The special magic number for the {key}", "is", "The special magic numbers for the {key}"),
        _wording("The price that Maria paid for the {key}", "was", "The prices that Maria paid for the {key}"),
        _wording("The locker which holds the {key}", "is", "The lockers which hold the {key}"),
    ],
    "fresh": [
        _wording("The stock code of the {key}", "is", "The stock codes of the {key}"),
        _wording("The sum that Peter offered for the {key}", "was", "The sums that Peter offered for the {key}"),
        _wording("The crate which came with the {key}", "is", "The crates which came with the {key}"),
    ],
}

KEYS: dict[Vocabulary, list[str]] = {
    "train": [
        "lantern", "anchor", "violin", "teapot", "compass", "ladder", "helmet", "blanket", "wagon", "mirror", "kettle",
        "saddle", "trumpet", "basket", "hammer", "candle", "pillow", "rocket", "bucket", "drum", "sweater", "ribbon",
        "shovel", "whistle", "carpet", "feather", "puzzle", "bottle", "wallet", "bicycle", "balloon", "barrel",
        "battery", "bench", "boiler", "broom", "cabinet", "calendar", "cannon", "chimney", "clock", "coat", "cradle",
        "crane", "crown", "curtain", "dagger", "desk", "diary", "doorbell", "engine", "envelope", "fence", "flute",
        "freezer", "glove", "goblet", "harp", "hinge", "jacket", "jar", "kayak", "keyboard", "kite", "knife", "lamp",
        "locket", "magnet", "map", "marble", "mattress", "medal", "mill", "motor", "napkin", "needle", "notebook",
        "oven", "paddle", "painting", "parcel", "passport", "pencil", "pipe", "plough", "pulley", "pump", "quilt",
        "radio", "rake", "raft", "razor", "refrigerator", "ring", "robe", "rope", "sail", "scooter", "shelf", "sled",
        "sofa", "spoon", "stove", "submarine", "sword", "table", "tent", "thermometer", "throne", "toaster", "tower",
        "tram", "tunnel", "turbine", "valve", "wheel", "windmill", "yacht",
    ],
    "heldout": [
        "telescope", "umbrella", "guitar", "suitcase", "statue", "microscope", "camera", "necklace", "piano",
        "sculpture", "tractor", "hammock", "vase", "typewriter", "canoe", "bracelet", "fountain", "accordion",
        "scarf", "chandelier",
    ],
    "fresh": [
        "lighthouse", "backpack", "bathtub", "parachute", "pendulum", "aquarium", "tapestry", "harmonica",
        "wheelbarrow", "stapler", "trophy", "saxophone", "bookcase", "projector", "sundial", "hourglass", "tambourine",
        "lawnmower", "doormat", "pitchfork",
    ],
}  # fmt: skip

PARITY: dict[Vocabulary, int] = {"train": 0, "heldout": 1, "fresh": 1}
"""Values are even numbers in training and odd ones in held-out documents, so the two never share one."""


DEEPEST = 0.85
"""Needles keep out of the end of the text, where protection would hold them for every policy."""


@dataclass(frozen=True)
class NeedleTask:
    """One question over one haystack. needles: (sentence, depth 0..1), the asked ones first; answers: the values."""

    name: str
    needles: list[tuple[str, float]]
    asked: int
    question: str
    answer: str
    values: list[str]

    @property
    def depth(self) -> float:
        """Mean depth of the asked needles."""
        return sum(depth for _, depth in self.needles[: self.asked]) / self.asked


@dataclass(frozen=True)
class NeedleCounts:
    """How many needles a task hides: `asked` values of the asked key, and one of each of `others` more keys."""

    asked: int
    others: int


NEEDLE_TASKS: dict[str, Callable[[int, int], NeedleCounts]] = {
    "single": lambda keys, values: NeedleCounts(asked=1, others=0),
    "multi_key": lambda keys, values: NeedleCounts(asked=1, others=keys),
    "multi_value": lambda keys, values: NeedleCounts(asked=values, others=0),
}
"""Every needle task by name: what it hides, of the recipe's `keys` and `values`. Documents are drawn in this order."""


def make_task(name: str, words: Vocabulary, rng: random.Random, keys: int, values: int) -> NeedleTask:
    """Draw a needle task, one of NEEDLE_TASKS; all its needles are worded alike.

    Raises InputError when it needs more keys than there are.
    """
    wording = rng.choice(WORDINGS[words])
    counts = NEEDLE_TASKS[name](keys, values)
    asked, others = counts.asked, counts.others
    if others >= len(KEYS[words]):
        raise InputError(
            f"documents.keys: {keys} needles with other keys, but there are only {len(KEYS[words])} key words"
        )
    key, *other_keys = rng.sample(KEYS[words], 1 + others)
    numbers = [str(2 * n + PARITY[words]) for n in rng.sample(range(5_000, 50_000), asked + others)]
    sentences = [wording.needle.format(key=key, value=number) for number in numbers[:asked]]
    sentences += [
        wording.needle.format(key=other, value=number)
        for other, number in zip(other_keys, numbers[asked:], strict=True)
    ]
    needles = [(sentence, rng.uniform(0, DEEPEST)) for sentence in sentences]
    listed = " and ".join(filter(None, [", ".join(numbers[: asked - 1]), numbers[asked - 1]]))
    plural = asked > 1
    return NeedleTask(
        name=name,
        needles=needles,
        asked=asked,
        question=(wording.question_all if plural else wording.question).format(key=key),
        answer=(wording.answer_all if plural else wording.answer).format(key=key, value=listed),
        values=numbers[:asked],
    )


def vocabulary() -> str:
    """A hash of all wordings and keys: a store begun with others must not continue with these."""
    return hashlib.sha256(repr((WORDINGS, KEYS)).encode()).hexdigest()[:16]
