"""MemoryIndexer: a query encoder per backbone layer beside frozen keys, made of sentence-transformers modules."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Router

from data_gen.core.files import replace_sealed, seal_folder, whole, write_atomically, writing
from data_gen.core.keys import check_stored, key_vectors
from indexer_train.card import model_card
from indexer_train.scorer import Scorer
from indexer_train.scoring import join_layers
from indexer_train.spec import IndexerSpec

REMEDY = "copy it again, or delete the indexer and run `lookahead train`"
"""What to do with a damaged indexer."""


class QueryEncoder(Scorer, InputModule):
    """The query route: hidden states of all layers -> packed queries, layer after layer, and the position."""

    save_in_root = False
    config_file_name = "spec.json"

    @property
    def modalities(self) -> list[Any]:
        """What sentence-transformers asks of an input module: no text, no image."""
        return ["hidden_states"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Batch (hidden states [L, hidden], position) pairs; a pair, because a bare tensor is taken for audio."""
        hidden, places = zip(*inputs, strict=True)
        positions = torch.tensor(places)
        if self.spec.rope is not None:
            self.spec.rope.check(positions)
        return {"input_features": torch.stack(hidden), "positions": positions}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """features["input_features"]: [B, L, hidden], ["positions"]: [B] -> ["sentence_embedding"]: `pack` of both."""
        features["sentence_embedding"] = self.pack(features["input_features"], features["positions"])
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the packed queries."""
        return len(self.spec.layers) * self.spec.packed.size + 1

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write spec and weights into an existing folder."""
        (Path(output_path) / self.config_file_name).write_text(self.spec.model_dump_json(indent=2))
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """The saved module, by sentence-transformers' own arguments. Raises InputError when it is damaged."""
        hub: dict[str, Any] = {"token": token, "cache_folder": cache_folder, "revision": revision}
        hub["local_files_only"] = local_files_only
        folder = Path(model_name_or_path) / subfolder
        with whole(folder / cls.config_file_name, "indexer", REMEDY):
            module = cls(IndexerSpec.model_validate(cls.load_config(model_name_or_path, subfolder=subfolder, **hub)))
        with whole(folder / "model.safetensors", "indexer", REMEDY):
            path = cls.load_file_path(model_name_or_path, "model.safetensors", subfolder=subfolder, **hub)
            if path is None:  # a pickled file beside it is not what was saved
                raise FileNotFoundError("it is missing")
            module.load_state_dict(load_file(path))
        return module


class KeyDecoder(InputModule):
    """The document route, without parameters: stored keys -> fp32 keys of all layers."""

    save_in_root = False

    @property
    def modalities(self) -> list[Any]:
        """What sentence-transformers asks of an input module: no text, no image."""
        return ["keys"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Stack (keys [L, ...] as stored,) of N chunks into [N, L, ...]."""
        stored = torch.stack([keys for (keys,) in inputs])
        check_stored(stored)
        return {"input_values": stored}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """features["input_values"]: [N, L, ...] as stored -> features["sentence_embedding"]: [N, L * key_width]."""
        features["sentence_embedding"] = key_vectors(features["input_values"]).flatten(1)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing to save: it has no weights and no settings."""

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Self:
        """A new one: there is nothing to read."""
        return cls()


class MemoryIndexer(SentenceTransformer):
    """The trained model; a document is the chunks of one history, in order.

    Usage:
        queries = indexer.encode_query([(hidden, position), ...])  # hidden: [L, hidden]
        chunks = indexer.encode_document([(keys,), ...])  # keys: [L, key_width], one entry per chunk
        scores = indexer.similarity(queries, chunks)  # [B, N], what serving ranks by
    """

    _module_classes = {  # noqa: RUF012 - the attribute the base class reads to load without remote code
        "indexer_train.model.QueryEncoder": QueryEncoder,
        "indexer_train.model.KeyDecoder": KeyDecoder,
    }
    accepts_loss_kwargs = False

    @classmethod
    def from_spec(cls, spec: IndexerSpec, device: str | None = None) -> Self:
        """A new indexer with random weights (seed torch first)."""
        router = Router.for_query_document([QueryEncoder(spec)], [KeyDecoder()])
        return cls(modules=[router], device=device)

    @property
    def query_encoder(self) -> QueryEncoder:
        """The query route's module."""
        router: Any = self[0]
        return router.sub_modules["query"][0]

    @property
    def spec(self) -> IndexerSpec:
        """What it is besides its weights."""
        return self.query_encoder.spec

    def pack(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Packed queries of hidden states [B, L, hidden] at `positions` [B], which may lie on any device.

        Returns [B, L * size + 1] on the indexer's own, as `Scorer.pack`. Raises InputError at positions beyond the
        backbone's range, found before they leave the CPU.
        """
        if self.spec.rope is not None and positions.is_cpu:
            self.spec.rope.check(positions)
        return self.query_encoder.pack(hidden.to(self.device), positions.to(self.device))

    def layer_logits(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        chunks: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Logits per layer, as `Scorer.layer_logits`."""
        return self.query_encoder.layer_logits(queries, keys, chunks, candidates, dtype)

    def surrogate(self, queries: torch.Tensor) -> torch.Tensor:
        """The layers' sum as one inner product with a chunk's keys, ReLU and distance left out.

        queries: [B, L * size + 1] -> [B, L * key_width]: finds candidates, never ranks them.
        """
        packed = queries[:, :-1].float().chunk(len(self.spec.layers), dim=1)
        return torch.cat([self.spec.packed.surrogate(query) for query in packed], dim=1)

    @torch.no_grad()
    def joined_scores(self, hidden: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What serving ranks by: hidden [B, L, hidden], stored keys [N, L, ...], positions [B] -> [B, N] fp32."""
        return self.similarity(self.pack(hidden, positions), key_vectors(keys, self.device).flatten(1))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Joined scores of packed queries [B, L * size + 1] and decoded keys [N, L * key_width]: [B, N] fp32."""
        logits = self.layer_logits(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2))
        return join_layers(logits, self.spec.shape.join)

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Save into a folder and seal it with checksums, which loading compares."""
        super().save(path, *args, **kwargs)
        seal_folder(Path(path))

    def digest(self) -> str:
        """SHA-256 of what its scores depend on: weights and spec, without how it is served and what it was made of."""
        digest = hashlib.sha256(self.spec.model_dump_json(exclude={"selections", "provenance", "outputs"}).encode())
        for value in self.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save_whole(self, folder: Path) -> None:
        """Save into a new folder, which appears whole or not at all. Raises OSError when there is no room for it."""
        folder = folder.resolve()
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        try:
            with writing(folder):
                self.save_pretrained(str(unfinished))
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def save_spec(self, folder: Path) -> None:
        """Bring the saved indexer in `folder` up to date with `spec`: all but the weights."""
        (path,) = folder.rglob(QueryEncoder.config_file_name)
        replace_sealed(path, folder, lambda file: file.write_text(self.spec.model_dump_json(indent=2)))
        self._create_model_card(str(folder))

    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        card = model_card(self.spec)
        write_atomically(Path(path) / "README.md", lambda file: file.write_text(card, encoding="utf-8"))
