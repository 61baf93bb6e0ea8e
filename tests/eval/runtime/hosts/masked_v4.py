"""The truth beside which restricted decoding is held: the stock DeepSeek-V4, masked from outside."""

from contextlib import contextmanager

import torch

from data_gen.backbones.deepseek_v4_hooks import csa_layers


@contextmanager
def masked(model, evicted):
    """The stock model, -inf for the chunks evicted[b]: as native scores, and again as attention bias."""
    hooks = []

    def score(_, __, scores):
        for row, chunks in zip(scores, evicted, strict=True):
            row[:, [c for c in chunks if c < scores.shape[-1]]] = -torch.inf
        return scores

    def attend(_, __, output):
        for row, chunks in zip(output[1], evicted, strict=True):
            row[..., [c for c in chunks if c < output[1].shape[-1]]] = -torch.inf
        return output

    for layer in csa_layers(model):
        compressor = model.get_decoder().layers[layer].self_attn.compressor
        hooks += [compressor.indexer.scorer.register_forward_hook(score), compressor.register_forward_hook(attend)]
    yield
    for hook in hooks:
        hook.remove()
