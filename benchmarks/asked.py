"""What benchmarks ask of a recipe's documents beyond recall: questions to answer and texts to follow, of two sets that
share nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.ablation_tables import SETS
from data_gen.text.documents import draw_documents, heldout_share
from eval.online.examples import Example, TextExample
from eval.online.generated import Haystack, generate_examples
from recipes import Recipe

SEEDS = 2
"""Sets of held-out questions, each of the recipe's numbers."""


@dataclass(frozen=True)
class Asked:
    """What one prompt is asked. length: 0 for documents that the recipe holds out; given: read token by token after
    the prompt, which is read with full attention; most: tokens generated after that; values: what a right answer has
    to contain, none for text that is followed."""

    name: str
    length: int
    task: str
    prompt: list[int]
    given: list[int]
    most: int
    values: list[str]


def held_out(
    recipe: Recipe, name: str, source: list[str] | None, follow: int, tokenizer: Any, context: int
) -> Iterator[Asked]:
    """Documents as the recipe holds them out, of SEEDS seeds, for one of SETS; source: text of its own."""
    asked = recipe.documents
    if source is not None:
        asked = asked.model_copy(update={"source": source, "heldout_share": 0.02 if name == "development" else 0.98})
    for seed in range(asked.seed, asked.seed + SEEDS):
        sides = {"train": {}, "heldout": {}, SETS[name]: asked.heldout}
        built = asked.model_copy(update=sides | {"seed": seed})
        for document in draw_documents(built, recipe.trace, tokenizer, context, SETS[name]):
            place = document.prompt - 1 if document.values else len(document.tokens) - follow - 1
            given = document.tokens[place : place + 1] if document.values else document.tokens[place:-1]
            yield Asked(f"{name} {seed} {document.name}", 0, document.task, document.tokens[:place], given,
                        recipe.decode.answer_tokens, document.values)  # fmt: skip


def at_length(
    recipe: Recipe,
    name: str,
    source: list[str] | None,
    lengths: list[int],
    tasks: Sequence[str],
    follow: int,
    tokenizer: Any,
) -> Iterator[Callable[[], Asked]]:
    """What `lookahead benchmark` asks at these lengths, its numbers, for one of SETS, the shortest first."""
    config = recipe.benchmark.model_copy(update={"text_tokens": follow, "tasks": tasks})
    documents = recipe.documents
    share = 1.0 if source is not None else heldout_share(documents)
    where = documents.source if source is None else source
    haystack = Haystack(where, documents.text_field, share, tokenizer, max(lengths), documents.bad_rows)

    def asked(label: str, build: Callable[[], Example | TextExample]) -> Asked:
        example = build()
        if isinstance(example, TextExample):
            place = len(example.tokens) - follow - 1
            prompt, given, most, values = example.tokens[:place], example.tokens[place:-1], 0, []
        else:
            ids = example.prompt(tokenizer, recipe.documents.thinking)
            prompt, given = ids[:-1], [ids[-1], *example.opening(tokenizer)]
            most, values = example.answer_tokens, example.references
        return Asked(label, example.length or 0, example.task, prompt, given, most, values)

    examples = generate_examples(config, lengths, haystack, tokenizer, recipe.documents.thinking, SETS[name])
    for each, build in examples.items():
        if each.rsplit("-", 2)[0] in tasks:
            yield partial(asked, f"{name} {each}", build)


def right(answer: str, values: list[str]) -> bool:
    """Whether every value is in the answer: what is written after it changes nothing."""
    return all(value in answer for value in values)
