"""Which calls of `generate` the runtime takes: others would come out wrong or fail on the way."""

from typing import Any

import torch
from transformers import PreTrainedModel

from data_gen.core.errors import InputError

PLAIN: dict[str, tuple] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
    "cache_implementation": ("hybrid",),  # in checkpoints of Gemma; transformers takes no notice of it
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "past_key_values": (),
    "inputs_embeds": (),
    "custom_generate": (),
    "assistant_model": (),
    "assistant_early_exit": (),
    "prompt_lookup_num_tokens": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
}
"""Options of `generate`, and the values beside None that they may have here."""


def check_call(
    model: PreTrainedModel, context: int, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> None:
    """Raise InputError, by name, for what a call of `generate` asks for and cannot have.

    context: of the model, in tokens; ids: [B, S]; mask: [B, S] or None; options: all others of the call.
    """
    if ids.ndim != 2 or not len(ids):
        raise InputError(f"input_ids: {list(ids.shape)} is no [sequences, tokens]; give one row a sequence")
    if ids.shape[1] < 2:
        raise InputError("the prompt must have at least two tokens: the resident set is fixed before its last one")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"attention_mask: {list(mask.shape)}, but input_ids are {list(ids.shape)}; leave it out")
    if mask is not None and not bool(mask.all()):
        raise InputError("padding: sequences of a batch must be of equal length; generate the others apart")

    def setting(name: str) -> Any:
        configs = (options.get("generation_config"), model.generation_config)
        found = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    for name, allowed in PLAIN.items():
        if (value := setting(name)) is not None and value not in allowed:
            raise InputError(
                f"{name}: lookahead sparse attention writes one answer a prompt, greedy or sampled, from its own "
                f"cache; leave {name} out of the options and of the generation config"
            )
    new, longest = setting("max_new_tokens"), setting("max_length")
    # Unasked it stops at the context by itself.
    longest = ids.shape[1] + new if new is not None else longest or ids.shape[1]
    if longest > context:
        raise InputError(
            f"{ids.shape[1]} tokens and the new ones make up to {longest}, but the backbone's context is "
            f"{context}; ask for fewer (max_new_tokens) or shorten the prompt"
        )
