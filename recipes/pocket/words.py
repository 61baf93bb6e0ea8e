"""The pocket language: word classes, filler sentences, and the word-level tokenizer."""

from dataclasses import dataclass
from itertools import product
from random import Random

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recipes.pocket.config import VocabularyConfig

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
MARKERS = ["note", "alias", "step", "recall", "list", "trace", "repeat", "?", "."]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
DETERMINERS = ["the", "a", "this", "that", "every", "another"]
ADJECTIVES = [
    "quiet", "old", "bright", "narrow", "gentle", "dusty", "early", "famous", "hollow", "green", "heavy", "silver",
    "patient", "broken", "distant", "warm", "careful", "empty", "clever", "golden", "humble", "simple", "tired",
    "young",
]  # fmt: skip
NOUNS = [
    "river", "garden", "baker", "window", "letter", "market", "teacher", "forest", "engine", "harbor", "painter",
    "mountain", "village", "lantern", "sailor", "kitchen", "library", "bridge", "farmer", "station", "doctor",
    "meadow", "tower", "orchard", "carpenter", "valley",
]  # fmt: skip
VERBS = [
    "crosses", "paints", "follows", "watches", "carries", "repairs", "remembers", "visits", "opens", "measures",
    "finds", "leaves", "describes", "builds", "guards", "sells", "admires", "reaches",
]  # fmt: skip
PREPOSITIONS = ["near", "behind", "under", "beyond", "beside", "across", "inside", "without"]


@dataclass(frozen=True)
class Lexicon:
    """Words of each class, as they appear in text; every word is one token."""

    keys: list[str]
    names: list[str]
    values: list[str]
    ordinals: list[str]

    @property
    def vocabulary(self) -> list[str]:
        """All words in id order."""
        filler = [*DETERMINERS, *ADJECTIVES, *NOUNS, *VERBS, *PREPOSITIONS]
        return [*SPECIAL, *MARKERS, *filler, *self.ordinals, *self.keys, *self.names, *self.values]


def build_lexicon(config: VocabularyConfig) -> Lexicon:
    """Pseudo-words for keys and (capitalised) names, three-digit numbers for values; the same for every seed."""
    syllables = [c + v for c, v in product("bdfgklmnprstvz", "aeiou")]
    words = [a + b + c for a, b, c in product(syllables, syllables, "lnrs")]
    Random(0).shuffle(words)
    keys, names = words[: config.keys], words[config.keys : config.keys + config.names]
    values = [str(100 + i) for i in range(config.values)]
    return Lexicon(keys, [n.capitalize() for n in names], values, ORDINALS[: config.ordinals])


def build_tokenizer(lexicon: Lexicon) -> PreTrainedTokenizerFast:
    """Whole words split at white space; a document starts with <bos>."""
    ids = {word: i for i, word in enumerate(lexicon.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def filler(rng: Random, count: int) -> list[str]:
    """`count` words of plain sentences; the last sentence is cut short."""
    words: list[str] = []
    choice = rng.choice
    while len(words) < count:
        words += [choice(DETERMINERS), choice(ADJECTIVES), choice(NOUNS), choice(VERBS), choice(DETERMINERS)]
        words += [choice(NOUNS), choice(PREPOSITIONS), choice(DETERMINERS), choice(NOUNS), "."]
    return words[:count]
