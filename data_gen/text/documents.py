"""Documents as token ids: packed text, whole texts, chats, and needle tasks, split into training and held-out."""

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_gen.config import DocumentsConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from data_gen.text.needles import NEEDLE_TASKS, Split, Vocabulary, make_task
from data_gen.text.rows import RawDocument, Skipped
from data_gen.text.sources import WHOLE, Numbered, documents_of, whole_documents
from data_gen.text.stream import Stream
from data_gen.traces.types import Span

TASKS = ("text", "document", "chat", *NEEDLE_TASKS)
LONG = 16
"""Characters that few tokens have."""
INSTRUCTION = "Read the text below, then answer the question at its end.\n\n"


@dataclass(frozen=True)
class Document:
    """Token ids to read, and the query tokens that matter in them.

    prompt: tokens before the (last) answer, the whole document for text; values: what a right answer must contain;
    seed: what was drawn of it is a function of; sources: numbers of the source's documents that its text is from, and
    source: a hash of those as they were.
    """

    name: str
    task: str
    tokens: list[int]
    prompt: int
    spans: list[Span]
    positions: list[int]
    values: list[str] = field(default_factory=list)
    depth: float | None = None
    seed: str = ""
    sources: list[int] = field(default_factory=list)
    source: str = ""

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits for all that is read and traced of it."""
        read = json.dumps([self.tokens, self.prompt, self.positions], separators=(",", ":"))
        return hashlib.sha256(read.encode()).hexdigest()[:16]


def draw_documents(
    config: DocumentsConfig,
    trace: TraceConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    split: Split,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """The documents of one split, one at a time and the same ones on every call.

    skipped: counts bad rows where the recipe skips them, and the texts and chats that make no whole document. Raises
    InputError when the source has too little text, or a document is shorter than one window or longer than `context`
    tokens.
    """
    counts = {"train": config.train, "heldout": config.heldout}
    if unknown := sorted((config.train.keys() | config.heldout.keys()) - set(TASKS)):
        raise InputError(f"documents: unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    builder = _Builder(config, trace, tokenizer, context, split, counts, skipped)
    for task in TASKS:
        for index in range(counts[split].get(task, 0)):
            yield builder.build(task, index)


def source_hash(digests: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits for the source's documents (`raw_digest`) that one document's text comes from."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


class _Builder:
    def __init__(
        self,
        config: DocumentsConfig,
        trace: TraceConfig,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        split: Split,
        counts: dict[str, dict[str, int]],
        skipped: Skipped | None,
    ) -> None:
        self.config, self.trace, self.tokenizer, self.context = config, trace, tokenizer, context
        self.split: Split = split
        self.words: Vocabulary = config.wordings if split == "heldout" else "train"
        self.skipped = skipped or Skipped()
        self.source = Numbered(documents_of(config, self.skipped))
        self.used: dict[int, bytes] = {}
        whole = {side: sum(tasks.get(task, 0) for task in WHOLE) for side, tasks in counts.items()}
        if counts[split].get("chat") and config.turns == "all" and trace.own_tokens:
            raise InputError("documents.turns: with trace.own_tokens only the last answer can be traced; use `last`")
        self.whole: Iterator[RawDocument] = iter(())
        if any(whole.values()):
            if any(count for tasks in counts.values() for task, count in tasks.items() if task not in WHOLE):
                raise InputError("documents: whole documents or chats and packed text need separate recipes")
            self.whole = whole_documents(self.source, config, split == "heldout")
        else:
            self.stream = Stream(self.source, heldout_share(config), tokenizer, split)

    def build(self, task: str, index: int) -> Document:
        """Number `index` of a task."""
        seed = f"{self.config.seed} {self.split}-{task}-{index:04d}"
        self.used = {}
        name = f"{self.split}-{task}-{index:07d}"
        document = self._whole(task, name) if task in WHOLE else self._packed(task, name, random.Random(seed))
        return replace(document, seed=seed, sources=list(self.used), source=source_hash(self.used.values()))

    def _whole(self, task: str, name: str) -> Document:
        """The next text or chat that makes a document, where the recipe skips bad rows; else the next one."""
        while True:
            raw = self._next(name)
            try:
                return self._chat(name, raw) if task == "chat" else self._text(name, raw)
            except InputError as error:
                if self.config.bad_rows != "skip":
                    raise
                self.skipped.add(error)
                self.skipped.unfit.add(self.source.last[0])

    def _packed(self, task: str, name: str, rng: random.Random) -> Document:
        length = rng.randint(*self.config.tokens)
        if task == "text":
            ids = self._text_ids("\n\n".join(self.stream.take(length, self.used)))[:length]
            return self._plain(name, task, ids)
        return self._needles(task, name, length, rng)

    def _next(self, name: str) -> RawDocument:
        document = next(self.whole, None)
        if document is None:
            raise InputError(
                f"documents {self.config.source}: no document is left for {name} (hashes decide which are held out, "
                "see documents.heldout_share); ask for fewer, or give more"
                + (f"; {self.skipped}" if self.skipped.count else "")
            )
        self.used = dict([self.source.last])
        return document

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False).input_ids

    def _refuse_longer(self, name: str, text: str) -> None:
        """Raise InputError where the beginning of `text` alone is too long: tokenising all of it could take minutes."""
        beginning = text[: LONG * self.context]
        if len(beginning) < len(text) and (tokens := len(self._text_ids(beginning))) > self.context:
            raise InputError(
                f"{name}: {len(text)} characters; the first {len(beginning)} alone are {tokens} tokens, but "
                f"the backbone's context is {self.context}"
            )

    def _text(self, name: str, text: RawDocument) -> Document:
        if not isinstance(text, str):
            raise InputError(f"documents {self.config.source}: {name} needs text")
        self._refuse_longer(name, text)
        return self._plain(name, "document", self._text_ids(text))

    def _plain(self, name: str, task: str, ids: list[int]) -> Document:
        first = max(len(ids) - self.trace.text_rows, _first_useful(self.trace.chunking))
        rows = len(ids) - first
        spans = [Span(first=0, last=rows, serve=0, tail=False)]
        return self._checked(Document(name, task, ids, len(ids), spans, list(range(first, len(ids)))))

    def _needles(self, name: str, document: str, length: int, rng: random.Random) -> Document:
        task = make_task(name, self.words, rng, self.config.keys, self.config.values)
        overhead = len(
            conversation(
                self.tokenizer, [user(_question(task.question, [])), assistant(task.answer)], self.config.thinking
            )
        )
        overhead += sum(len(self._text_ids(sentence)) + 4 for sentence, _ in task.needles) + 8
        if length - overhead < 64:
            raise InputError(f"documents: {length} tokens leave no room for text around the needles of {name!r}")
        paragraphs = self.stream.take(length - overhead, self.used)
        placed = sorted(task.needles, key=lambda needle: -needle[1])
        for sentence, depth in placed:
            paragraphs.insert(round(depth * len(paragraphs)), sentence)
        messages = [user(_question(task.question, paragraphs)), assistant(task.answer)]
        return self._answered(document, name, messages, [1], task.values, task.depth)

    def _chat(self, name: str, messages: RawDocument) -> Document:
        if isinstance(messages, str):
            raise InputError(f"documents {self.config.source}: {name} needs messages")
        self._refuse_longer(name, "\n".join(message["content"] for message in messages))
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise InputError(f"documents {self.config.source}: {name} must end with an assistant message")
        if self.config.turns == "last":
            return self._answered(name, "chat", messages, [len(messages) - 1])
        return self._answered(name, "chat", messages, [i for i, m in enumerate(messages) if m["role"] == "assistant"])

    def _answered(
        self,
        name: str,
        task: str,
        messages: list[dict[str, str]],
        turns: list[int],
        values: Sequence[str] = (),
        depth: float | None = None,
    ) -> Document:
        """A conversation of which the messages `turns` are traced, each with a few tokens before it."""
        try:
            ids, places = located(self.tokenizer, messages, turns, self.config.thinking)
        except InputError as error:
            where = f"documents {self.config.source}: {name}" if task == "chat" else name
            raise InputError(f"{where}: {error}") from error
        spans: list[Span] = []
        positions: list[int] = []
        for prompt, end in places:
            row, first = len(positions), max(prompt - self.trace.answer_lead, positions[-1] + 1 if positions else 0)
            positions += range(first, end - 1)
            # Serving reads the prompt but for its last token, so that the first answer token is predicted sparsely.
            spans.append(Span(first=row, last=len(positions), serve=row + max(0, prompt - 2 - first), tail=True))
        prompt = places[-1][0]
        return self._checked(Document(name, task, ids, prompt, spans, positions, list(values), depth))

    def _checked(self, document: Document) -> Document:
        length = len(document.tokens)
        if length > self.context:
            raise InputError(f"{document.name}: {length} tokens, but the backbone's context is {self.context}")
        window = self.trace.tail if document.spans[0].tail else self.trace.window
        shortest = _first_useful(self.trace.chunking) + window
        if length < shortest:
            raise InputError(
                f"{document.name}: {length} tokens; the protected chunks and one window need at least {shortest}"
            )
        return document


def heldout_share(config: DocumentsConfig) -> float:
    """The share of the source's documents that packed text of the held-out side is taken from."""
    if config.heldout_share is not None:
        return config.heldout_share
    packed = {
        side: sum(count for task, count in counts.items() if task not in WHOLE)
        for side, counts in (("train", config.train), ("heldout", config.heldout))
    }
    return packed["heldout"] / max(1, sum(packed.values()))


def _first_useful(chunking: Chunking) -> int:
    """The first position with an unprotected chunk to choose."""
    return (chunking.sink + chunking.recent + 1) * chunking.tokens - 1


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
        ids: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, enable_thinking=thinking, return_dict=False
        )
        return ids
    except Exception as error:  # a template is a program of whoever made the model
        reason = f"the model's chat template refuses the messages ({one_line(error)}); mend or leave them out"
        raise InputError(reason) from error


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
    if any(message.get("tool_calls") for message in messages):
        raise InputError("messages with tool calls need a chat template, and the model has none")
    pieces = [tokenizer(f"{message['content']}\n\n", verbose=False).input_ids for message in messages]
    special = set(tokenizer.all_special_ids)
    return [*pieces[:1], *([token for token in piece if token not in special] for piece in pieces[1:])]


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """The model's message."""
    return {"role": "assistant", "content": text}


def _question(question: str, paragraphs: list[str]) -> str:
    return INSTRUCTION + "\n\n".join([*paragraphs, question])
