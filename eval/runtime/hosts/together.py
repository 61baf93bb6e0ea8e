"""One forward pass for a token of each of several sequences: the model's weights come from memory once for all."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from data_gen.backbones.observe import AttentionCall, observe
from data_gen.core.errors import InputError
from eval.runtime.hosts.corrector import Rows
from eval.runtime.hosts.dense_cache import ResidentCache


class _Caches(Cache):
    """What the model takes for its cache: keys and values of each sequence go to its own, and come back as lists.

    Asked for lengths, the first one answers: they are all alike.
    """

    def __init__(self, caches: Sequence[ResidentCache]) -> None:
        super().__init__(layers=caches[0].layers)
        self.caches = caches

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        rows = zip(self.caches, key_states.split(1), value_states.split(1), strict=True)
        pairs = [cache.update(key, value, layer_idx, *args, **kwargs) for cache, key, value in rows]
        return [key for key, _ in pairs], [value for _, value in pairs]


@torch.no_grad()
def read_together(
    model: PreTrainedModel,
    caches: Sequence[ResidentCache],
    tokens: Sequence[int],
    observer: Callable[[AttentionCall], None],
) -> torch.Tensor:
    """Read a token into each cache, of one sequence each and all at the same position; returns logits [B, vocabulary].

    A single token sees all that its cache holds, so there is no mask. Results are those of reading alone, up to the
    rounding of products with more than one row. Raises InputError beyond the model's context.
    """
    lengths = {cache.get_seq_length() for cache in caches}
    if len(lengths) > 1:
        raise ValueError(f"sequences of {sorted(lengths)} tokens: only those at the same position are read together")
    context = model.config.get_text_config(decoder=True).max_position_embeddings
    if (length := 1 + lengths.pop()) > context:
        raise InputError(f"{length} tokens, the backbone's context is {context}")

    def note(call: AttentionCall) -> None:
        caches[call.sequence].remember(call)
        observer(call)

    def extend(layer: int, sequence: int, query: torch.Tensor, scaling: float) -> Rows | None:
        return caches[sequence].extend(layer, sequence, query, scaling)

    together = _Caches(caches)
    with observe(model, note, together, extend):
        ids = torch.tensor(tokens, device=model.device)[:, None]
        return model(ids, past_key_values=together, logits_to_keep=1).logits[:, -1]
