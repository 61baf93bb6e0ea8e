"""Every option that the runtime takes does with everything resident what it does in the stock model."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from eval.runtime.calls import HONOURED
from eval.runtime.runtime import LSARuntime
from indexer_train.selection import Budget
from tests.conftest import tiny_model
from tests.eval.runtime.indexers import untrained

PROMPT = 60


class Heard(BaseStreamer):
    """What a streamer was given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def drawn(**options):
    return {"do_sample": True, **options}


def told(**options):
    return {"return_dict_in_generate": True, **options}


CALLS = {
    "max_new_tokens": {"max_new_tokens": 3},
    "max_length": {"max_new_tokens": None, "max_length": PROMPT + 4},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(64))},
    "min_length": {"min_length": PROMPT + 5, "eos_token_id": list(range(64))},
    "max_time": {"max_time": 600.0},
    "stop_strings": {"stop_strings": list("abcdefgh")},
    "tokenizer": {"stop_strings": ["x"]},
    "do_sample": drawn(),
    "temperature": drawn(temperature=0.3),
    "top_k": drawn(top_k=3),
    "top_p": drawn(top_p=0.4),
    "top_h": drawn(top_h=0.4),
    "min_p": drawn(min_p=0.2),
    "typical_p": drawn(typical_p=0.5),
    "epsilon_cutoff": drawn(epsilon_cutoff=0.01),
    "eta_cutoff": drawn(eta_cutoff=0.01),
    "renormalize_logits": drawn(top_k=5, renormalize_logits=True),
    "remove_invalid_values": {"remove_invalid_values": True},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 60)]},
    "sequence_bias": {"sequence_bias": [[[7], 50.0]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 60))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 60))},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 5.0), "eos_token_id": 9},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "bos_token_id": {"bos_token_id": 1},
    "eos_token_id": {"eos_token_id": list(range(64))},
    "pad_token_id": {"pad_token_id": 0},
    "logits_processor": {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(PROMPT + 5, 9)])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(PROMPT + 3)])},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [int(ids[-1]) % 50 + 3]},
    "streamer": {"streamer": Heard},
    "return_dict_in_generate": told(),
    "output_scores": told(output_scores=True),
    "output_logits": told(output_logits=True),
    "generation_config": {"generation_config": GenerationConfig(repetition_penalty=3.0, max_new_tokens=6)},
    "disable_compile": {"disable_compile": True},
    "prefill_chunk_size": {"prefill_chunk_size": 16},
}


def test_no_option_is_left_out():
    assert CALLS.keys() == HONOURED


@pytest.mark.parametrize("option", CALLS)
def test_an_option_does_what_it_does_in_the_stock_model(option, tokenizer):
    model = tiny_model("llama")
    runtime = LSARuntime(untrained(model), model, selection=Budget(budget=1.0))
    prompt = torch.randint(3, 100, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    found = []
    for generate in (model.generate, runtime.generate):
        given = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None} | CALLS[option]
        if "stop_strings" in given:
            given["tokenizer"] = tokenizer
        if option == "streamer":
            given["streamer"] = Heard()
        torch.manual_seed(0)
        found.append((generate(prompt, **given), given.get("streamer")))
    (stock, heard), (ours, heard_of_ours) = found
    if not option.startswith(("return", "output")):
        assert torch.equal(stock, ours)
    else:
        assert torch.equal(stock.sequences, ours.sequences) and stock.keys() == ours.keys()
        name = option.removeprefix("output_")
        torch.testing.assert_close(stock.get(name), ours.get(name))
    if heard:
        assert heard.tokens == heard_of_ours.tokens and heard.ended == heard_of_ours.ended == 1
