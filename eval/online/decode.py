"""`lookahead decode`: the held-out documents of a recipe, full attention beside lookahead sparse attention."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.core.tell import Progress
from data_gen.text.documents import Document
from eval.online.config import DecodeConfig
from eval.online.examples import Example, TextExample
from eval.online.online_policies import ONLINE_POLICIES
from eval.online.records import Record
from eval.online.runner import Runner
from eval.online.summary import answer_rows, decode_rows
from eval.report.rows import AnswerRow, DecodeRow
from indexer_train.model import MemoryIndexer


def decode_check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    indexer: MemoryIndexer,
    documents: list[Document],
    config: DecodeConfig,
    progress: Progress,
) -> tuple[list[DecodeRow], list[AnswerRow]]:
    """Answer every needle document and follow some text under every policy, from one prefill a document.

    An answer ends when it is right, at a stop token, or after `config.answer_tokens`. Returns a row per policy and, for
    each needle document, what every policy answered. Raises InputError when there is nothing to decode, or a text has
    no prompt left before its last `config.text_tokens` tokens.
    """
    questions = [_question(document, config) for document in documents if document.values]
    texts = [document for document in documents if not document.values][: config.text_documents]
    if not questions and not texts:
        raise InputError("the recipe has no held-out document to decode")
    followed = [_text(document, config) for document in texts]
    seeing = [policy.name for policy in ONLINE_POLICIES if policy.under == "budgets" and not policy.foresees]
    runner = Runner(
        model, tokenizer, indexer, seeing, [config.budget], in_step=True, correction=config.correction,
        first_window=config.first_window,
    )  # fmt: skip
    records: list[Record] = [runner.run(example) for example in progress([*questions, *followed], "decoding")]
    answered = records[: len(questions)]
    values = {example.name: example.references for example in questions}
    return decode_rows(answered, records[len(questions) :]), answer_rows(answered, values)


def _question(document: Document, config: DecodeConfig) -> Example:
    """A conversation is cut before its answer."""
    return Example(
        name=document.name,
        benchmark="heldout",
        task=document.task,
        length=None,
        messages=[],
        references=document.values,
        scorer="every_value",
        answer_tokens=config.answer_tokens,
        ids=document.tokens[: document.prompt],
        until_right=True,
    )


def _text(document: Document, config: DecodeConfig) -> TextExample:
    """A chat is followed from its last answer on, plain text over its last tokens."""
    length = len(document.tokens)
    follow = length - document.prompt if document.task == "chat" else config.text_tokens
    if follow + 1 >= length:
        raise InputError(
            f"{document.name}: {length} tokens leave no prompt before the last {config.text_tokens}; "
            "lower decode.text_tokens, or take longer documents"
        )
    return TextExample(document.name, None, document.tokens, follow, "heldout", document.task, scorer="at_once")
