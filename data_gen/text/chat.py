"""Conversations as token ids, and where their answers lie."""

import itertools

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError


def conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], thinking: bool, prompt: bool = False
) -> list[int]:
    """Token ids of messages through the chat template, or one after the other where the model has none.

    prompt: ends where the model's answer begins; thinking: whether templates that can let it think first. Raises
    InputError where the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        return list(itertools.chain(*_pieces(tokenizer, messages)))
    # Templates that know no thinking ignore the word; of the others, some open every answer with a thought.
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, enable_thinking=thinking, return_dict=False
        )
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses the messages ({error}); mend or leave them out") from error


def located(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], turns: list[int], thinking: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and where the messages `turns` begin and end in it.

    Raises InputError for templates that write earlier turns otherwise once later ones follow.
    """
    if tokenizer.chat_template is None:
        pieces = _pieces(tokenizer, messages)
        ends = list(itertools.accumulate(map(len, pieces)))
        return list(itertools.chain(*pieces)), [(ends[turn] - len(pieces[turn]), ends[turn]) for turn in turns]
    ids, places = conversation(tokenizer, messages, thinking), []
    for turn in turns:
        prompt = conversation(tokenizer, messages[:turn], thinking, prompt=True)
        if ids[: len(prompt)] != prompt:
            raise InputError("the chat template rewrites earlier turns: answers cannot be located")
        places.append((len(prompt), len(conversation(tokenizer, messages[: turn + 1], thinking))))
    return ids, places


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[list[int]]:
    """Message by message, so that no token spans two of them; special tokens in the first one only."""
    pieces = [tokenizer(f"{message['content']}\n\n", verbose=False).input_ids for message in messages]
    special = set(tokenizer.all_special_ids)
    return [*pieces[:1], *([token for token in piece if token not in special] for piece in pieces[1:])]
