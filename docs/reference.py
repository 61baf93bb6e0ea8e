"""Make docs/recipes.md of the settings' models and docs/cli.md of the command line: `python -m docs.reference`.

A setting's meaning is what the docstring of its model says of it: "name, other: meaning; next: meaning."
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

import cli
from recipes import Recipe

HERE = Path(__file__).parent
INTRODUCTION = """# Recipes

Made by `python -m docs.reference` of the models that read a recipe: every key, its type, its default and its meaning.

A recipe is one YAML file with a section for each step. Unknown keys are errors, and so are numbers that are infinite
or out of bounds. Bounds stand behind the type, except those that only keep out what no machine holds. Verbs take the
name of a shipped recipe (`recipes/*.yaml`) or a `.yaml` file of your own.
"""


WORDS = {type(None): "null", str: "text", int: "integer", float: "number", bool: "true or false"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
"""Of bounds, by their names in pydantic."""
HUGE = 1 << 16


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What a model's docstring says of each of its fields. Raises ValueError for a field that it leaves out."""
    text = " ".join(inspect.getdoc(model).split())  # pyright: ignore[reportOptionalMemberAccess] - each has one
    name = "|".join(model.model_fields)
    starts = list(re.finditer(rf"(?:^|(?<=[;.] ))((?:{name})(?:, (?:{name}))*): ", text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    found = {}
    for match, end in zip(starts, ends, strict=True):
        meaning = text[match.end() : end].strip().rstrip(";.").replace("None", "`null`")
        found |= dict.fromkeys(match[1].split(", "), meaning)
    if missing := sorted(set(model.model_fields) - set(found)):
        raise ValueError(f"{model.__name__}: its docstring says nothing of {', '.join(missing)}")
    return found


def purpose(model: type[BaseModel]) -> str:
    """The first sentences of a model's docstring, up to what it says of its fields."""
    first = inspect.getdoc(model).split("\n\n")[0]  # pyright: ignore[reportOptionalMemberAccess]
    return "" if re.match(rf"({'|'.join(model.model_fields)})\b.*?: ", first) else " ".join(first.split())


def inner(annotation: Any) -> Any:
    """A type without its bounds."""
    return inner(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def type_of(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """A type in a reader's words. bounds: what pydantic knows of its values beside the annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(arguments[0], [*bounds, *arguments[1:]])
    if origin is None:
        return WORDS.get(annotation, annotation.__name__) + bounds_of(bounds)
    if origin is list:
        return f"list of {type_of(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_of, arguments))}]"
    if origin is dict:
        return f"map of {type_of(arguments[0])} to {type_of(arguments[1])}"
    if str(origin) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in arguments)
    return " or ".join(type_of(argument, () if argument is type(None) else bounds) for argument in arguments)


def bounds_of(known: Sequence[Any]) -> str:
    """Bounds of a number as they stand behind its type; not those that only keep out what no machine holds."""
    limits = [limit for each in known for limit in (each.metadata if isinstance(each, FieldInfo) else [each])]
    found = {sign: getattr(limit, name) for limit in limits for name, sign in SIGNS.items() if hasattr(limit, name)}
    return ",".join(f" {sign} {value:g}" for sign, value in found.items() if abs(value) < HUGE)


def default_of(field: FieldInfo) -> str:
    """A default as it is written in YAML; `required` where there is none."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its own defaults"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else str(value).replace(chr(39), '')}`"


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A model's sections and theirs, each with the keys that lead to it."""
    for name, field in model.model_fields.items():
        for part in parts(field.annotation):
            where = f"{path}.{name}" if path else name
            yield where, part
            yield from sections(part, where)


def parts(annotation: Any) -> list[type[BaseModel]]:
    """The models within a type."""
    annotation = inner(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts(argument)]


def recipes_page() -> str:
    """docs/recipes.md."""
    pages = [INTRODUCTION]
    for where, model in sections(Recipe):
        said = meanings(model)
        lines = [f"## `{where}`", "", purpose(model), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            kind = "a section, see below" if parts(field.annotation) else type_of(field.annotation, field.metadata)
            cells = [f"`{name}`", kind, default_of(field), said[name]]
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        pages.append("\n".join(lines) + "\n")
    return "\n".join(pages)


def cli_page() -> str:
    """docs/cli.md: what typer makes of the command, with the verbs in the groups of `lookahead --help`."""
    command: Any = typer.main.get_command(cli.app)
    context = typer.Context(command, info_name="lookahead")
    text = get_docs_for_click(obj=command, ctx=context, name="lookahead", title="Command line").strip()
    verbs = ["| group | verb | what it does |", "|---|---|---|"]
    for group in (cli.MAKE, cli.TRAIN, cli.LOOK, cli.SERVE, cli.EXCHANGE):
        for name, verb in command.commands.items():
            if verb.rich_help_panel == group:
                does = verb.help.split(". ")[0].rstrip(".")
                verbs.append(f"| {group} | [`{name}`](#lookahead-{name}) | {does} |")
    start, end, table = text.index("**Commands**"), text.index("\n## "), "\n".join(verbs)
    return f"{text[:start]}{table}\n{text[end:]}\n"


PAGES = {HERE / "recipes.md": recipes_page, HERE / "cli.md": cli_page}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
