"""The part of `benchmarks.peers` that runs in kvpress's environment: token ids in, token ids out, nothing else shared.

    PYTHON_WITH_KVPRESS -m benchmarks.peers_kvpress OUT K/N

Reads OUT/plan.jsonl, one question or text a line with the methods that answer it, and adds what became of the K-th of N
shares to OUT/answers-kvpress-K.jsonl; a stopped run continues. A prompt is read under a press, which thereby evicts;
what follows is read with what is left. `quest` evicts nothing: benchmarks/quest.py.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from benchmarks.peers_journal import AnswerFile
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


class Reader:
    """A model, one prompt read by it, and what followed. full: transformer layers that see all of the history."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model = model.to(device).eval()
        decoder: Any = self.model.model.layers
        self.full = [place for place, layer in enumerate(decoder) if not getattr(layer.self_attn, "is_sliding", False)]
        self.modules = {place: decoder[place].self_attn for place in self.full}

    @contextmanager
    def pressed(self, given: Any) -> Iterator[None]:
        """Compress what is read within. Sliding layers are left alone, as the package does for models that it knows."""
        if len(self.full) == len(self.model.model.layers) or isinstance(given, kvpress.KVzipPress):
            with given(self.model):
                yield
            return
        given.post_init_from_model(self.model)
        hooks = []
        for module in self.modules.values():
            module.rotary_emb = partial(self.model.model.rotary_emb, layer_type="full_attention")
            hooks.append(module.register_forward_hook(given.forward_hook, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def ids(self, tokens: list[int]) -> torch.Tensor:
        """[1, tokens]."""
        return torch.tensor([tokens], device=self.model.device)

    @torch.no_grad()
    def answer(
        self, asked: dict[str, Any], setting: dict[str, Any] | None, full: torch.Tensor | None
    ) -> dict[str, Any]:
        """What became of one question or text. full: log-probabilities of full attention, for a text."""
        for module in self.modules.values():
            module.masked_key_indices = None
        cache = DynamicCache(config=self.model.config)
        share, prompt, given = asked["share"], asked["prompt"], asked["given"]
        name = "full" if setting is None else setting["class"]
        if setting is None or name == "quest":
            self.model.model(input_ids=self.ids(prompt), past_key_values=cache)
        else:
            compress = press(setting, asked["question"])
            compress.compression_ratio = 1 - whole_chunks(compress, share, len(prompt))
            with self.pressed(compress):
                self.model.model(input_ids=self.ids(prompt), past_key_values=cache)
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
    out, (share, shares) = Path(sys.argv[1]), map(int, sys.argv[2].split("/"))
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # it warns of costs, which are measured here
    progress.disable_progress_bar()
    kept = AnswerFile(out / f"answers-kvpress-{share}.jsonl")
    reader = Reader(out.parent / "weights")
    made = origin(reader.model.device) | {"kvpress": version("kvpress")}
    plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    for asked in tqdm(plan[share::shares], out.name, disable=share > 0):
        methods = {name: each for name, each in asked["methods"].items() if (asked["name"], name) not in kept.done}
        followed = methods and asked["most"] == 0  # of what is timed the first pass warms up
        full = reader.answer(asked, None, None)["log_p"] if followed else None
        for name, setting in methods.items():
            try:
                found = reader.answer(asked, setting, full)
                found.pop("log_p", None)
            except Exception as error:  # of presses that do not fit a model or a prompt, each in its own way
                found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
            kept.add(asked["name"], name, found | {"origin": made})


if __name__ == "__main__":
    main()
