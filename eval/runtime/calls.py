"""Which calls of `generate` the runtime takes, and whether one may continue from what was read before.

What a call may ask for is listed here; everything else is refused by name, for it would come out wrong, fail on the way
or be passed over in silence.
"""

import hashlib
import itertools
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from data_gen.core.errors import InputError

HONOURED = frozenset(
    {
        "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "tokenizer",
        "do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "renormalize_logits", "remove_invalid_values", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
        "exponential_decay_length_penalty", "watermarking_config", "bos_token_id", "eos_token_id", "pad_token_id",
        "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "return_dict_in_generate",
        "output_scores", "output_logits", "generation_config",
        "disable_compile", "prefill_chunk_size",
    }
)  # fmt: skip
"""Options of `generate` that do here what they do there."""

NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
    # `dynamic` is the default's own name; `hybrid` stands in checkpoints of Gemma, and transformers takes no notice.
    "cache_implementation": ("dynamic", "hybrid"),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "low_memory": (False,),
    "is_assistant": (False,),
    "synced_gpus": (False,),
    "trust_remote_code": (False,),
    "output_attentions": (False,),  # a prompt is read in two pieces: these would be of its last token alone
    "output_hidden_states": (False,),
}
"""Options that would change what is done, with the values beside None that ask for nothing."""

IDLE = frozenset(
    {
        "length_penalty", "early_stopping", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind",
        "max_matching_ngram_size", "max_cache_len", "cache_config", "compile_config", "continuous_batching_config",
        "decoder_start_token_id", "speculation_type",
    }
)  # fmt: skip
"""Settings of a generation config that only speak where an option of NEUTRAL, or another one refused, is asked for."""


def check_call(
    model: PreTrainedModel, context: int, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options for the model's own `generate`; raises InputError, by name, for what a call cannot have.

    context: of the model, in tokens; ids: [B, S]; mask: [B, S] or None; options: all others of the call.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise InputError("input_ids: not an integer tensor; give what a tokenizer makes with return_tensors='pt'")
    if ids.ndim != 2 or not len(ids):
        raise InputError(f"input_ids: {list(ids.shape)} is not [sequences, tokens]; give one row per sequence")
    if ids.shape[1] < 2:
        raise InputError("the prompt must have at least two tokens: the resident set is fixed before its last one")
    _check_tokens(ids, len(cast(nn.Embedding, model.get_input_embeddings()).weight))
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"attention_mask: {list(mask.shape)}, but input_ids are {list(ids.shape)}; leave it out")
    if mask is not None and not bool(mask.all()):
        raise InputError("padding: sequences of a batch must have equal length; generate the others separately")
    passed = dict(options)
    _check_positions(ids, passed.pop("position_ids", None))
    configs = [config for config in (options.get("generation_config"), model.generation_config) if config is not None]

    def setting(name: str) -> Any:
        found = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    asked = {name for name, value in options.items() if value is not None} - {"position_ids"}
    for name in sorted(asked | {name for config in configs for name in _set_in(config)}):
        known = name in HONOURED or (name in IDLE and name not in asked)
        if not known and (value := setting(name)) is not None and value not in NEUTRAL.get(name, ()):
            raise InputError(
                f"{name}: lookahead sparse attention writes one answer per prompt, greedy or sampled, from its own "
                f"cache; leave {name} out of the options and of the generation config"
            )
    if mask is None:
        _check_padding(ids, setting("pad_token_id"), setting("eos_token_id"))
    new, longest = setting("max_new_tokens"), setting("max_length")
    # Unasked it stops at the context by itself.
    longest = ids.shape[1] + new if new is not None else longest or ids.shape[1]
    if longest > context:
        raise InputError(
            f"{ids.shape[1]} prompt tokens and the new ones are up to {longest}, but the backbone's context is "
            f"{context}; ask for fewer (max_new_tokens) or shorten the prompt"
        )
    if setting("cache_implementation") == "dynamic":
        # transformers takes this name and a cache for a contradiction, wherever the name stands; `hybrid` it unsets.
        passed["cache_implementation"] = "hybrid"
    passed.pop("past_key_values", None)  # None, or it was refused: the cache is the runtime's
    return passed


def _check_tokens(ids: torch.Tensor, size: int) -> None:
    """Raise InputError for a token that the model has no embedding of; on a GPU it would end the process."""
    lowest, highest = ids.aminmax()
    if lowest < 0 or highest >= size:
        token = int(lowest) if lowest < 0 else int(highest)
        raise InputError(
            f"input_ids: token {token} is not in the model's vocabulary of {size}; take this model's tokenizer"
        )


def _set_in(config: GenerationConfig) -> set[str]:
    """What a generation config sets otherwise than by default; who wrote it says nothing."""
    known = vars(GenerationConfig()).keys() - {"transformers_version"}  # checkpoints add words that nobody reads
    return {name for name in config.to_diff_dict() if name in known and not name.startswith("_")}


def _check_positions(ids: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Raise InputError for position ids that are not those of the tokens' places."""
    if positions is None:
        return
    usual = torch.arange(ids.shape[1], device=positions.device)
    if positions.shape[-1] != ids.shape[1] or not bool((positions == usual).all()):
        raise InputError(
            "position_ids: chunks are counted from the first token of every sequence, so a token's position is its "
            "place; leave position_ids out"
        )


def _check_padding(ids: torch.Tensor, pad: int | None, ends: int | list[int] | None) -> None:
    """Raise InputError for a batch without a mask that looks padded: its padding would be read as text."""
    if pad is None:
        return
    text = ids != pad
    outside = (text.cumsum(1) == 0) | (text.flip(1).cumsum(1).flip(1) == 0)  # of pads before, or after, all text
    runs = outside.sum(dim=1)
    also_text = pad in (ends if isinstance(ends, list) else [ends])  # then alike in every sequence it may be meant
    if bool((runs != runs[0]).any()) or (not also_text and bool(runs.any())):
        raise InputError(
            f"padding: a sequence begins or ends with the pad token ({pad}) and there is no attention_mask; give "
            "sequences of equal length without padding, or a mask of ones if the token is text"
        )


@torch.no_grad()
def model_state(model: PreTrainedModel) -> str:
    """A digest of what a model's answers come from: weights and buffers in whole, modules and their settings.

    An adapter that is added, switched, scaled or merged changes it, and so does one value written in place, through
    `.data` as well, or two that change places. It reads every weight twice, where it lies, a part at
    a time; `benchmarks.runtime` prints how long that is beside a token.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = {key: value for key, value in sorted(vars(module).items()) if "hook" not in key and _plain(value)}
        digest.update(repr((name, type(module).__qualname__, settings)).encode())
    sums: dict[tuple, torch.Tensor] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in itertools.chain(parameters, model.named_buffers(remove_duplicate=False)):
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        digest.update(repr((name, *where[2:])).encode())
        if where not in sums:  # tied weights are read once
            sums[where] = _word_sum(tensor.detach())
    for device in dict.fromkeys(where[0] for where in sums):  # one wait a device
        here = torch.stack([found for where, found in sums.items() if where[0] == device])
        digest.update(here.cpu().numpy().tobytes())
    return digest.hexdigest()


ROW = 64
"""Words that are summed up first, along rows and along columns: two that change places change one of both sums."""


def _word_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over a tensor's bytes that depends on their places, int64 modulo 2^64, on its device."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // (8 * ROW) * 8 * ROW
    words, rest = raw[:whole].view(torch.int64).view(-1, ROW), raw[whole:].long()
    return _placed(words.sum(dim=1), 2) + _placed(words.sum(dim=0), 6) + _placed(rest, 10)


def _placed(numbers: torch.Tensor, step: int) -> torch.Tensor:
    """A sum in which each number counts by its place: mixed first, or a multiple of a power of two could vanish."""
    mixed = (numbers ^ (numbers >> 29)) * 0x1E3779B97F4A7C15
    return (mixed * (step * torch.arange(len(mixed), device=mixed.device) + 1)).sum()


def _plain(value: object) -> bool:
    """Settings, not parts: what modules keep of numbers, names and flags, alone or in lists and dicts."""
    if isinstance(value, dict):
        return all(map(_plain, value)) and all(map(_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
