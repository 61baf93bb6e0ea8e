"""The end-to-end check: the same model, full attention beside lookahead sparse attention and its baselines."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_gen.backbones.load import Backbone
from data_gen.core.errors import InputError
from data_gen.text.documents import Document
from eval.online.config import DecodeConfig
from eval.online.cycle import Usage, fidelity, follow_text, generate
from eval.online.open import open_session
from eval.online.policies import decode_policies
from indexer_train.model import MemoryIndexer

Progress = Callable[[Iterable[Document], str], Iterable[Document]]


@dataclass(frozen=True)
class DecodeRow:
    """One policy.

    correct of examples: every value is in the answer (the benchmark's `string_match_all` gives the share of the values
    instead, which has no Wilson interval), with a 95 % Wilson interval [low, high]; agreement: share of text tokens
    whose most likely successor is full attention's; kl: KL(full || policy) per text token in nats; chunks: resident
    ones; kv_share: resident tokens / all tokens while answering; kv_mb: resident keys and values in 10^6 bytes;
    refreshes: times the resident set was fixed in the longest text continuation.

    chunks, kv_share and kv_mb are averages over the tokens of each policy's own answers. One that is right ends before
    the others to the same question, whose later tokens see more: policies that keep alike differ a little in these.
    """

    policy: str
    correct: int
    examples: int
    low: float
    high: float
    agreement: float | None
    kl: float | None
    chunks: float
    kv_share: float
    kv_mb: float
    refreshes: int


def check_backbone(indexer: MemoryIndexer, backbone: Backbone) -> None:
    """Raise InputError unless the bundle was made for this very model."""
    if indexer.spec.backbone != backbone.info.fingerprint:
        raise InputError(
            f"the bundle is for a backbone with fingerprint {indexer.spec.backbone}, "
            f"this model has {backbone.info.fingerprint}"
        )


def decode_check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    indexer: MemoryIndexer,
    documents: list[Document],
    config: DecodeConfig,
    progress: Progress,
) -> tuple[list[DecodeRow], list[dict[str, Any]]]:
    """Answer every needle document and follow some text under every policy, from one prefill a document.

    An answer ends when it is right, at a stop token, or after `config.answer_tokens`. Returns a row per policy and, for
    each needle document, what every policy answered. Raises InputError when there is nothing to decode, or a text has
    no prompt left before its last `config.text_tokens` tokens.
    """
    policies = decode_policies(indexer)
    needles = [document for document in documents if document.values]
    texts = [document for document in documents if not document.values][: config.text_documents]
    if not needles and not texts:
        raise InputError("the recipe has no held-out document to decode")
    prompts = {document.name: _prompt(document, config) for document in [*needles, *texts]}
    usages: dict[str, list[Usage]] = {name: [] for name in policies}
    text_usages: dict[str, list[Usage]] = {name: [] for name in policies}
    correct = dict.fromkeys(policies, 0)
    agreement: dict[str, list[float]] = {name: [] for name in policies}
    kl: dict[str, list[float]] = {name: [] for name in policies}
    answers = []
    stop = stop_tokens(model, tokenizer)

    def said(answer: list[int]) -> str:
        return tokenizer.decode(answer, skip_special_tokens=True)

    tau = indexer.spec.window
    for document in progress([*needles, *texts], "decoding"):
        asked = bool(document.values)
        prompt = prompts[document.name]
        session = open_session(model, indexer.spec)
        session.read(document.tokens[:prompt])
        if asked:
            first, values = document.tokens[prompt], document.values
            given = generate(
                session, policies, config.budget, tau, first, config.answer_tokens,
                lambda answer, values=values: answer[-1] in stop or right(said(answer), values),
            )  # fmt: skip
            record: dict[str, Any] = {"document": document.name, "task": document.task, "values": values}
            for name, (tokens, run) in given.items():
                record[name] = said(tokens)
                correct[name] += right(record[name], values)
                usages[name].append(run.usage)
            answers.append(record)
            continue
        followed = follow_text(session, policies, config.budget, tau, document.tokens[prompt:-1])
        full = followed["full"][0].float().log_softmax(dim=-1)
        for name, (logits, run) in followed.items():
            agrees, apart = fidelity(logits.float().log_softmax(dim=-1), full)
            agreement[name].append(float(agrees.mean()))
            kl[name].append(float(apart.mean()))
            text_usages[name].append(run.usage)
    rows = []
    for name in policies:
        used = usages[name] or text_usages[name]
        low, high = wilson(correct[name], len(needles))
        rows.append(
            DecodeRow(
                policy=name,
                correct=correct[name],
                examples=len(needles),
                low=low,
                high=high,
                agreement=statistics.fmean(agreement[name]) if texts else None,
                kl=statistics.fmean(kl[name]) if texts else None,
                chunks=statistics.fmean(u.resident / u.steps for u in used) / indexer.spec.chunking.tokens,
                kv_share=statistics.fmean(u.kept_share for u in used),
                kv_mb=statistics.fmean(u.mean_bytes for u in used) / 1e6,
                refreshes=max((u.refreshes for u in text_usages[name]), default=0),
            )
        )
    return rows, answers


def _prompt(document: Document, config: DecodeConfig) -> int:
    """Tokens to read in full: a conversation is cut before its answer, plain text before its last tokens."""
    if document.values or document.task == "chat":
        return document.prompt - 1
    prompt = len(document.tokens) - config.text_tokens - 1
    if prompt < 1:
        raise InputError(
            f"{document.name}: {len(document.tokens)} tokens leave no prompt before the last {config.text_tokens}; "
            "lower decode.text_tokens, or take longer documents"
        )
    return prompt


def right(answer: str, values: list[str]) -> bool:
    """Whether every value is in the answer: what is written after it changes nothing."""
    return all(value in answer for value in values)


def as_rows(rows: list[DecodeRow]) -> list[dict[str, Any]]:
    """The rows as results.json holds them."""
    return [asdict(row) for row in rows]


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
