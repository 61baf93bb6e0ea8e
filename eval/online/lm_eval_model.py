"""lm-evaluation-harness asks a model under an indexer: `python -m eval.online.lm_eval_model --model lookahead ...`.

The harness (0.4.13) knows the models of its own package alone; this module adds `lookahead` to its list and hands over
to its command line. Prompts are read once with full attention, all but their last token; what follows, the scored
continuation as well as the answer, is read under the policy, its resident set fixed every window.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from transformers import PreTrainedTokenizerBase

from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig
from data_gen.core.errors import InputError
from eval.online.config import BenchmarkConfig
from eval.online.cycle import Course, Keep, go_on
from eval.online.online_policies import ONLINE_POLICIES, Circumstances, Foresight
from eval.online.runner import Prefill, check_backbone, stop_tokens
from eval.online.session import Session, open_session
from eval.runtime.cycle import Choice, check_first
from indexer_train.formats.bundle import load_bundle


@register_model("lookahead")
class LookaheadLM(TemplateLM):
    """A bundle's indexer, or another policy that foresees nothing, under its backbone.

    bundle: an exported bundle; pretrained, dtype: its backbone; budget: share of chunks kept on top of the protected
    ones; policy: a name of `ONLINE_POLICIES`, or `full`; first_window: as of a recipe's `benchmark`; max_gen_toks: most
    tokens of an answer whose task says none; batch_size, max_batch_size, device: what the harness always tells;
    requests are read one by one, on the best device there is. Raises InputError for what does not fit.
    """

    def __init__(
        self,
        bundle: str,
        pretrained: str,
        dtype: str = "float32",
        budget: float = 0.1,
        policy: str = "indexer",
        first_window: int | None = None,
        max_gen_toks: int = 256,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        indexer = load_bundle(Path(bundle))
        model, tokenizer = load_backbone(BackboneConfig.model_validate({"path": pretrained, "dtype": dtype}))
        backbone = adapter(model)
        check_backbone(indexer, backbone)
        budget = BenchmarkConfig().changed([], budgets=[budget]).budgets[0]
        known = {each.name: each for each in ONLINE_POLICIES if not each.foresees and each.has(indexer)}
        if policy not in ("full", *known):
            raise InputError(f"policy {policy!r}: not one of full, {', '.join(known)}")
        circumstances = Circumstances(indexer, Foresight(indexer.spec.window), budget)
        self._policy = None if policy == "full" else lambda: known[policy].keep(circumstances)
        check_first(first_window, indexer.spec.window)
        self._context, self._most = backbone.info.context, max_gen_toks
        self._tau, self._first = indexer.spec.window, first_window
        self._stop = stop_tokens(model, tokenizer)
        self._prefill = Prefill(lambda: open_session(model, indexer.spec))
        self.tokenizer: PreTrainedTokenizerBase = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        assert isinstance(token, int), token
        return token

    @property
    def tokenizer_name(self) -> str:
        """As the harness's caches call it."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; without being told, special tokens where the text does not begin with one."""
        begins = bool(self.tokenizer.bos_token) and string.startswith(str(self.tokenizer.bos_token))
        special = not begins if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special, verbose=False).input_ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the backbone's template writes it."""
        opened: Any = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return opened

    def _kept(self) -> Keep | None:
        """What fixes one request's resident set, once there are chunks; None keeps everything."""
        if self._policy is None:
            return None
        keep = self._policy()
        nothing = Choice([torch.arange(0)], [0], ["demand"])
        return lambda session: keep(session) if session.host.cache.total else nothing

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is what greedy decoding writes) of each request."""

        def scored(session: Session, given: list[int], place: int) -> tuple[float, bool]:
            _, _, continuation = requests[place]
            rows: list[torch.Tensor] = []
            course = Course(session, self._kept(), [*given, *continuation[:-1]])
            course.watchers.append(lambda session, logits: rows.append(logits.float().log_softmax(dim=-1).cpu()))
            go_on([course], self._tau, self._first)
            said = rows[len(given) - 1 :]
            each = [float(row[token]) for row, token in zip(said, continuation, strict=True)]
            greedy = all(int(row.argmax()) == token for row, token in zip(said, continuation, strict=True))
            return math.fsum(each), greedy

        found = self._asked([context for _, context, _ in requests], [len(right) for *_, right in requests], scored)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in nats, each after the token that ends texts."""
        texts = [request.args[0] for request in requests]
        tokens = [self.tok_encode(text, add_special_tokens=False) for text in texts]
        asked = [(("", text), [self.prefix_token_id], ids) for text, ids in zip(texts, tokens, strict=True)]
        return [total for total, _ in self._loglikelihood_tokens(asked)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first of a request's `until`. Raises InputError for a request to sample."""
        asked: list[tuple[Any, ...]] = [request.args for request in requests]
        settings = [dict(options) for _, options in asked]
        if any(each.get("do_sample") or each.get("temperature") for each in settings):
            raise InputError(
                "the task samples (do_sample, temperature), but policies are compared on greedy answers; "
                "take another task"
            )
        most = [int(each.get("max_gen_toks", self._most)) for each in settings]

        def answered(session: Session, given: list[int], place: int) -> str:
            until = settings[place].get("until") or []
            ends = [end for end in ([until] if isinstance(until, str) else until) if end]

            def text(answer: list[int]) -> str:
                return str(self.tokenizer.decode(answer, skip_special_tokens=True))

            def ended(answer: list[int]) -> bool:
                said = text(answer)
                return answer[-1] in self._stop or any(end in said for end in ends)

            course = Course(session, self._kept(), given, most[place], ended)
            go_on([course], self._tau, self._first)
            said = text(course.answer)
            return said[: min([said.find(end) for end in ends if end in said], default=len(said))]

        found = self._asked([self.tok_encode(request.args[0]) for request in requests], most, answered)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    def _asked(
        self, contexts: Sequence[list[int]], sizes: Sequence[int], ask: Callable[[Session, list[int], int], Any]
    ) -> list[Any]:
        """What `ask` makes of (a session that has read a context, its last token, the request's place) for each.

        Contexts that begin alike are read once, one after the other.
        """
        for context, size in zip(contexts, sizes, strict=True):
            if self._context is not None and len(context) + size > self._context:
                raise InputError(
                    f"a request of {len(context)} tokens and {size} to follow: the backbone's context is "
                    f"{self._context} tokens; choose shorter examples, because they are not cut"
                )
        order = sorted(range(len(contexts)), key=lambda place: contexts[place])
        found: dict[int, Any] = {}
        for place, after in zip(order, [*order[1:], None], strict=True):
            shared = None if after is None else contexts[after][:-1]
            session = self._prefill.read(contexts[place][:-1], shared).fork()
            found[place] = ask(session, contexts[place][-1:], place)
        return [found[place] for place in range(len(contexts))]


def main() -> None:
    """The harness's own command line, with `--model lookahead` among its models."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
