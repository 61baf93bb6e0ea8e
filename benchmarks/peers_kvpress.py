"""The part of `benchmarks.peers` that runs in kvpress's environment: token ids in, token ids out, nothing else shared.

    PYTHON_WITH_KVPRESS -m benchmarks.peers_kvpress OUT ... K/N

Reads OUT/plan.jsonl, one question or text a line with the methods that answer it, and adds what became of the K-th of N
shares to OUT/answers-kvpress-K.jsonl; a stopped run continues. Several OUTs, with the same weights, are answered one
after the other. A prompt is read once: presses evict after a layer has attended, which no later layer sees, so each is
given what the layer was given, and a copy of the cache. What follows is read with what is left. KVzip reads by itself;
`quest` evicts nothing: benchmarks/quest.py.
"""

import copy
import json
import logging
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress  # pyright: ignore[reportMissingImports]
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging as progress

from benchmarks.machine import origin
from benchmarks.peers_journal import AnswerFile, begun
from benchmarks.quest import PagedLayer, paged

STEP_BY_STEP = ("AdaKVPress", "CriticalAdaKVPress", "KVzipPress")
"""Presses that put a vector which no query of a pass meets in the place of a key: sought for one token at a time."""


def press(setting: Any, question: int) -> Any:
    """A press as `setting` describes it: its `class` and fields; "question" stands for as many tokens as that has."""
    if not isinstance(setting, dict):
        return question if setting == "question" else setting
    fields = {name: press(value, question) for name, value in setting.items() if name != "class"}
    return getattr(kvpress, setting["class"])(**fields)


def whole_chunks(given: Any, share: float, tokens: int) -> float:
    """The share that makes a press of whole chunks keep as many tokens as the others, not up to a chunk less."""
    size = getattr(given, "chunk_length", None)
    if size is None:
        return share
    rest = tokens % size
    chunks = max(1, round((share * tokens - rest) / size) + (rest > 0))
    return min(1.0, (chunks + 0.5) / (tokens // size + (rest > 0)))


@dataclass
class Prompt:
    """What a model made of a prompt: its cache, and each call of a full-attention layer as a forward hook sees it."""

    cache: Cache
    calls: list[tuple[Any, ...]]

    def copied(self) -> Cache:
        """A cache that can be compressed and continued without changing this one: layers replace their tensors."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


class Reader:
    """A model, one prompt read by it, and what followed. full: transformer layers that see all of the history."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model = model.to(device).eval()
        decoder: Any = self.model.model.layers
        self.full = [place for place, layer in enumerate(decoder) if not getattr(layer.self_attn, "is_sliding", False)]
        self.modules = {place: decoder[place].self_attn for place in self.full}
        rotary = self.model.model.rotary_emb
        if len(self.full) < len(decoder):
            rotary = partial(rotary, layer_type="full_attention")
        for module in self.modules.values():  # as kvpress's own context does for the models that it knows
            module.rotary_emb = rotary

    def read_prompt(self, tokens: list[int]) -> Prompt:
        """Read a prompt and keep everything."""
        calls: list[tuple[Any, ...]] = []

        def called(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls.append((module, args, kwargs, output))

        hooks = [module.register_forward_hook(called, with_kwargs=True) for module in self.modules.values()]
        cache = DynamicCache(config=self.model.config)
        try:
            self.model.model(input_ids=self.ids(tokens), past_key_values=cache)
        finally:
            for hook in hooks:
                hook.remove()
        if self.model.device.type == "cuda":  # of what a mask of 32K x 32K took, other processes on the GPU have need
            torch.cuda.empty_cache()
        return Prompt(cache, calls)

    def compressed(self, given: Any, prompt: Prompt, tokens: list[int]) -> Cache:
        """The cache that a press leaves of a prompt. Sliding layers are left alone, as the package does for models that
        it knows."""
        if isinstance(given, kvpress.KVzipPress):
            cache = DynamicCache(config=self.model.config)
            with given(self.model):
                self.model.model(input_ids=self.ids(tokens), past_key_values=cache)
            return cache
        cache = prompt.copied()
        given.post_init_from_model(self.model)
        for module, args, kwargs, output in prompt.calls:
            given.forward_hook(module, args, kwargs | {"past_key_values": cache}, output)
        return cache

    def ids(self, tokens: list[int]) -> torch.Tensor:
        """[1, tokens]."""
        return torch.tensor([tokens], device=self.model.device)

    @torch.no_grad()
    def answer(
        self, asked: dict[str, Any], prompt: Prompt, setting: dict[str, Any] | None, full: torch.Tensor | None
    ) -> dict[str, Any]:
        """What became of one question or text. prompt: what `read_prompt` made of it; full: log-probabilities of full
        attention, for a text."""
        for module in self.modules.values():
            module.masked_key_indices = None
        share, given = asked["share"], asked["given"]
        name = "full" if setting is None else setting["class"]
        if setting is None or name == "quest":
            cache = prompt.copied()
        else:
            compress = press(setting, asked["question"])
            compress.compression_ratio = 1 - whole_chunks(compress, share, len(asked["prompt"]))
            cache = self.compressed(compress, prompt, asked["prompt"])
        if name == "quest":
            assert setting is not None
            options = {option: value for option, value in setting.items() if option != "class"}
            room = len(given) + asked["most"]
            with paged(self.model, cache, self.full, share=share, room=room, **options) as paging:
                return self.follow(asked, cache, paging, full, True)
        layers: list[Any] = cache.layers
        lengths = {layers[place].get_seq_length() for place in self.full}
        alone = len(lengths) > 1 or name in STEP_BY_STEP
        return self.follow(asked, cache, [], full, alone or asked["reading"] == "speed")

    def follow(
        self, asked: dict[str, Any], cache: Cache, layers: list[PagedLayer], full: torch.Tensor | None, alone: bool
    ) -> dict[str, Any]:
        """Read what is given, token by token where each must be read alone, then answer greedily."""
        held, whole = self.resident(cache, layers), self.whole(len(asked["prompt"]))
        place, rows, said, began = len(asked["prompt"]), [], [], self.clock()
        pieces = [[token] for token in asked["given"]] if alone else [asked["given"]]
        for piece in pieces:
            rows.append(self.read(piece, place, cache, asked["most"] == 0))
            place += len(piece)
        while len(said) < asked["most"]:
            said.append(int(rows[-1][-1].argmax()))
            if said[-1] in asked["stop"] or len(said) == asked["most"]:
                break
            rows.append(self.read([said[-1]], place, cache, False))
            place += 1
        seconds, steps = self.clock() - began, place - len(asked["prompt"])
        moved = sum(layer.fetched * layer.page_bytes for layer in layers)
        index = sum(layer.low.nbytes + layer.high.nbytes for layer in layers)
        found: dict[str, Any] = {"said": said, "kept": held / whole, "bytes": held, "index": index}
        found |= {"moved": moved / steps, "seconds": seconds / steps}
        if asked["most"] == 0:
            log_p = torch.cat(rows).float().log_softmax(dim=-1)
            base = log_p if full is None else full
            agrees = (log_p.argmax(dim=-1) == base.argmax(dim=-1)).float().mean()
            found |= {"kl": float((base.exp() * (base - log_p)).sum(dim=-1).mean()), "agreement": float(agrees)}
            found["log_p"] = log_p
        return found

    def clock(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(self, tokens: list[int], place: int, cache: Cache, every: bool) -> torch.Tensor:
        """Logits after the tokens, or the last one: [tokens, vocabulary]. place: position of the first."""
        positions = torch.arange(place, place + len(tokens), device=self.model.device)[None]
        keep = 0 if every else 1
        return self.model(self.ids(tokens), past_key_values=cache, position_ids=positions, logits_to_keep=keep).logits[
            0
        ]

    def resident(self, cache: Cache, layers: list[PagedLayer]) -> int:
        """Bytes of keys and values that full-attention layers hold on the device; what a press masks is not counted,
        though the package frees nothing of it."""
        held = 0
        for place, module in self.modules.items():
            layer: Any = cache.layers[place]
            if layer in layers:
                held += layer.hot.nbytes + layer.tail.nbytes
                continue
            masked = getattr(module, "masked_key_indices", None)
            a_token = (layer.keys.nbytes + layer.values.nbytes) // (layer.keys.shape[1] * layer.keys.shape[2])
            held += layer.keys.nbytes + layer.values.nbytes - (0 if masked is None else len(masked[0]) * a_token)
        return held

    def whole(self, tokens: int) -> int:
        """Bytes of keys and values of a prompt, everything kept."""
        config = self.model.config.get_text_config(decoder=True)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return tokens * len(self.full) * config.num_key_value_heads * 2 * width * self.model.dtype.itemsize


def main() -> None:
    """Answer one share of the plan."""
    *folders, share = sys.argv[1:]
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # it warns of costs, which are measured here
    progress.disable_progress_bar()
    reader = Reader(Path(folders[0]).parent / "weights")
    for folder in folders:
        answer(Path(folder), reader, *map(int, share.split("/")))


@torch.no_grad()
def answer(out: Path, reader: Reader, share: int, shares: int) -> None:
    """Answer the K-th of N shares of OUT/plan.jsonl."""
    kept = AnswerFile(out / f"answers-kvpress-{share}.jsonl")
    made = origin(reader.model.device) | {"kvpress": version("kvpress")}
    plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    for asked in tqdm(plan[share::shares], out.name, disable=share > 0):
        methods = {name: each for name, each in asked["methods"].items() if (asked["name"], name) not in kept.done}
        if not methods:
            continue
        prompt = reader.read_prompt(asked["prompt"])
        followed = asked["most"] == 0
        full = reader.answer(asked, prompt, None, None)["log_p"] if followed else None
        for name, setting in methods.items():
            try:
                if asked["reading"] == "speed":
                    reader.answer(begun(asked), prompt, setting, None)
                found = reader.answer(asked, prompt, setting, full)
                found.pop("log_p", None)
            except torch.OutOfMemoryError:  # of a GPU that several processes share: no method's fault, so asked again
                raise
            except Exception as error:  # of presses that do not fit a model or a prompt, each in its own way
                found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
            kept.add(asked["name"], name, found | {"origin": made})


if __name__ == "__main__":
    main()
