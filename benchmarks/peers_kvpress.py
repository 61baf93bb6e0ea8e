"""The part of `benchmarks.peers` that runs in kvpress's environment: token ids in, token ids out, nothing else shared.

    PYTHON_WITH_KVPRESS -m benchmarks.peers_kvpress OUT ... K/N

Reads OUT/plan.jsonl, one question or text a line with the methods that answer it, and adds what became of the K-th of N
shares to OUT/answers-kvpress-K.jsonl; a stopped run continues. Several OUTs, with the same weights, are answered one
after the other. A prompt is read once: presses evict after a layer has attended, which no later layer sees, so each is
given what the layer was given, and a copy of the cache. What follows is read with what is left, in step by the methods
that leave equally many tokens, and token by token where a press puts a vector which no query of a pass meets in the
place of a key: it is sought for one token at a time. KVzip reads by itself; `quest` evicts nothing:
benchmarks/quest.py.
"""

import copy
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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


@dataclass
class Left:
    """What a method left of a prompt. lengths: tokens in each full-attention layer; masked: layer -> its sequence, head
    and place of each key that is only masked, as kvpress keeps them."""

    cache: Cache
    lengths: tuple[int, ...]
    masked: dict[int, tuple[torch.Tensor, ...]]


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

    def left(self, asked: dict[str, Any], prompt: Prompt, setting: dict[str, Any] | None) -> Left:
        """What a method leaves of the prompt of one question or text, None for full attention. prompt: what
        `read_prompt` made of it."""
        for module in self.modules.values():
            module.masked_key_indices = None
        if setting is None:
            cache = prompt.copied()
        else:
            compress = press(setting, asked["question"])
            compress.compression_ratio = 1 - whole_chunks(compress, asked["share"], len(asked["prompt"]))
            cache = self.compressed(compress, prompt, asked["prompt"])
        found: dict[int, Any] = {
            place: getattr(module, "masked_key_indices", None) for place, module in self.modules.items()
        }
        masked = {place: indices for place, indices in found.items() if indices is not None}
        layers: list[Any] = cache.layers
        return Left(cache, tuple(layers[place].get_seq_length() for place in self.full), masked)

    @torch.no_grad()
    def answer(
        self, asked: dict[str, Any], prompt: Prompt, settings: dict[str, Any], full: torch.Tensor | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name of a setting, and what became of one question or text under it. Settings that leave equally many tokens
        go on in step, but not what is timed. full: log-probabilities of full attention, for a text."""
        groups: dict[Any, dict[str, Left]] = defaultdict(dict)
        for name, setting in settings.items():
            if setting is not None and setting["class"] == "quest":
                yield from self.tried([name], lambda setting=setting: self.paged(asked, prompt, setting, full))
                continue
            ((_, left),) = self.tried([name], lambda setting=setting: [self.left(asked, prompt, setting)])
            if not isinstance(left, Left):
                yield name, left
            elif asked["reading"] == "speed":
                yield from self.tried([name], lambda left=left: self.follow(asked, [left], [], full))
            else:
                groups[left.lengths, bool(left.masked)][name] = left
        for members in groups.values():
            found = list(self.tried(list(members), lambda m=members: self.follow(asked, list(m.values()), [], full)))
            if len(members) > 1 and any("failed" in each for _, each in found):  # not by the fault of all
                for name in members:
                    yield from self.answer(asked, prompt, {name: settings[name]}, full)
            else:
                yield from found

    def tried(self, names: list[str], work: Callable[[], list[Any]]) -> Iterator[tuple[str, Any]]:
        """What becomes of each, or why it failed."""
        try:
            yield from zip(names, work(), strict=True)
        except torch.OutOfMemoryError:  # of a GPU that several processes share: no method's fault, so asked again
            raise
        except Exception as error:  # of presses that do not fit a model or a prompt, each in its own way
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            yield from ((name, {"failed": failed}) for name in names)

    def paged(
        self, asked: dict[str, Any], prompt: Prompt, setting: dict[str, Any], full: torch.Tensor | None
    ) -> list[dict[str, Any]]:
        """What became of one question or text under page selection, which evicts nothing."""
        left = self.left(asked, prompt, None)
        options = {option: value for option, value in setting.items() if option != "class"}
        room = len(asked["given"]) + asked["most"]
        with paged(self.model, left.cache, self.full, share=asked["share"], room=room, **options) as paging:
            return self.follow(asked, [left], paging, full)

    def follow(
        self, asked: dict[str, Any], lefts: list[Left], paging: list[PagedLayer], full: torch.Tensor | None
    ) -> list[dict[str, Any]]:
        """Read what is given, token by token where each must be read alone, then answer greedily, each of `lefts` for
        itself, in step. `seconds` are those of a step of all of them."""
        held, whole = [self.resident(left, paging) for left in lefts], self.whole(len(asked["prompt"]))
        alone = paging or lefts[0].masked or len(set(lefts[0].lengths)) > 1 or asked["reading"] == "speed"
        pieces = [[token] for token in asked["given"]] if alone else [asked["given"]]
        cache, place, rows = self.joined(lefts), len(asked["prompt"]), []
        said, steps, going = [[] for _ in lefts], [0] * len(lefts), set(range(len(lefts)))
        began = self.clock()
        for piece in pieces:
            rows.append(self.read([piece] * len(lefts), place, cache, asked["most"] == 0))
            place += len(piece)
        while going and asked["most"]:
            following = rows[-1][:, -1].argmax(dim=-1).tolist()
            for number in sorted(going):
                said[number].append(following[number])
                if following[number] in asked["stop"] or len(said[number]) == asked["most"]:
                    going.remove(number)
                    steps[number] = place - len(asked["prompt"])
            if going:  # the others read on, and nobody looks at it
                rows.append(self.read([[token] for token in following], place, cache, False))
                place += 1
        seconds, last = self.clock() - began, place - len(asked["prompt"])
        moved = sum(layer.fetched * layer.page_bytes for layer in paging)
        index = sum(layer.low.nbytes + layer.high.nbytes for layer in paging)
        found: list[dict[str, Any]] = []
        for number in range(len(lefts)):
            taken = steps[number] or last
            each = {"said": said[number], "kept": held[number] / whole, "bytes": held[number], "index": index}
            each |= {"moved": moved / taken, "seconds": seconds / last}
            if asked["most"] == 0:
                log_p = torch.cat([row[number] for row in rows]).float().log_softmax(dim=-1)
                base = log_p if full is None else full
                agrees = (log_p.argmax(dim=-1) == base.argmax(dim=-1)).float().mean()
                each |= {"kl": float((base.exp() * (base - log_p)).sum(dim=-1).mean()), "agreement": float(agrees)}
                each |= {"log_p": log_p} if full is None else {}
            found.append(each)
        return found

    def joined(self, lefts: list[Left]) -> Cache:
        """One cache of several of equal lengths; what they mask becomes what the model's layers mask."""
        cache: Any = lefts[0].cache
        if len(lefts) > 1:
            every: list[Any] = [left.cache for left in lefts]
            for place, layer in enumerate(cache.layers):
                layer.keys = torch.cat([each.layers[place].keys for each in every])
                layer.values = torch.cat([each.layers[place].values for each in every])
        for place, module in self.modules.items():
            masks = [(number, left.masked[place]) for number, left in enumerate(lefts) if place in left.masked]
            columns = [(sequence.to(seat.device) + number, head, seat) for number, (sequence, head, seat) in masks]
            module.masked_key_indices = tuple(map(torch.cat, zip(*columns, strict=True))) if columns else None
        return cache

    def clock(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(self, tokens: list[list[int]], place: int, cache: Cache, every: bool) -> torch.Tensor:
        """Logits after the tokens of each sequence, or the last ones: [sequences, tokens, vocabulary]. place: position
        of the first."""
        ids = torch.tensor(tokens, device=self.model.device)
        positions = torch.arange(place, place + ids.shape[1], device=ids.device).expand(len(ids), -1)
        keep = 0 if every else 1
        return self.model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=keep).logits

    def resident(self, left: Left, paging: list[PagedLayer]) -> int:
        """Bytes of keys and values that full-attention layers hold on the device; what a press masks is not counted,
        though the package frees nothing of it."""
        held = 0
        for place in self.full:
            layer: Any = left.cache.layers[place]
            if layer in paging:
                held += layer.hot.nbytes + layer.tail.nbytes
                continue
            a_token = (layer.keys.nbytes + layer.values.nbytes) // (layer.keys.shape[1] * layer.keys.shape[2])
            masked = left.masked.get(place)
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
        prompt, full = reader.read_prompt(asked["prompt"]), None
        if asked["reading"] == "text":
            ((_, base),) = reader.answer(asked, prompt, {"full": None}, None)
            full = base["log_p"]
        if asked["reading"] == "speed":
            for _ in reader.answer(begun(asked), prompt, methods, None):
                pass
        for name, found in reader.answer(asked, prompt, methods, full):
            found.pop("log_p", None)
            kept.add(asked["name"], name, found | {"origin": made})


if __name__ == "__main__":
    main()
