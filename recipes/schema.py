"""What a recipe holds, and how one is read: a YAML file, a section for each step."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from data_gen.config import BackboneConfig, DocumentsConfig, TraceConfig
from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from eval.online.config import BenchmarkConfig, DecodeConfig
from indexer_train.config import IndexerConfig, TrainConfig

Stage = Literal["generate", "train", "evaluate", "export", "decode"]


class Took(Strict):
    """How long `lookahead run` took once. It shows these times when it starts, of a shipped recipe called by name.

    Those of a recipe file are left out: it may have been changed since. where: the machine and the commit; seconds: how
    many seconds each stage took.
    """

    where: str
    seconds: dict[Stage, Annotated[float, Field(gt=0)]]

    @model_validator(mode="after")
    def _every_stage(self) -> Self:
        if missing := [name for name in get_args(Stage) if name not in self.seconds]:
            raise ValueError(f"took.seconds: lacks {', '.join(missing)}")
        return self


class Recipe(Strict):
    """Everything that one experiment needs, a section for each step."""

    backbone: BackboneConfig
    documents: DocumentsConfig
    trace: TraceConfig
    indexer: IndexerConfig
    train: TrainConfig
    decode: DecodeConfig = DecodeConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    took: Took | None = None

    @model_validator(mode="after")
    def _texts_outlast_decoding(self) -> Self:
        shortest, followed = self.documents.tokens[0], self.decode.text_tokens
        if self.documents.heldout.get("text") and self.decode.text_documents and followed >= shortest:
            raise ValueError(f"decode.text_tokens {followed}: a text of documents.tokens {shortest} has no prompt left")
        return self

    @model_validator(mode="after")
    def _first_windows_are_no_longer_than_others(self) -> Self:
        for section, first in (("decode", self.decode.first_window), ("benchmark", self.benchmark.first_window)):
            if first is not None and first > self.trace.window:
                raise ValueError(f"{section}.first_window {first}: longer than trace.window {self.trace.window}")
        return self


def load_recipe(name: str) -> Recipe:
    """A recipe by name (those that ship with the package) or by path, then without what it took.

    Raises InputError on any mistake in it.
    """
    path = Path(name)
    shipped = files("recipes") / f"{name}.yaml"
    own = path.suffix in {".yaml", ".yml"}
    if own:
        if not path.exists():
            raise InputError(f"recipe {path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"recipe {path}: not UTF-8 text") from error
    elif shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    else:
        names = [file.name for file in files("recipes").iterdir()]
        known = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
        raise InputError(f"recipe {name!r}: neither a .yaml file nor one of {', '.join(known)}")
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"recipe {name}: {where or 'top level'}: {reason}") from error
    except Exception as error:  # of YAML: also numbers of 5,000 digits, or brackets without end
        raise InputError(f"recipe {name}: not YAML ({one_line(error)})") from error
    if own:
        recipe.took = None  # measured with what ships, and a file may be a changed copy of that
    return recipe
