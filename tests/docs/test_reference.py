"""Committed pages are what their commands make, and every link of the documents leads somewhere."""

import re
import runpy
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field, PositiveFloat

import cli
from docs.reference import PAGES, meanings, type_of
from tests.conftest import needs_pinned

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_made_page_is_what_the_command_makes(path, monkeypatch):
    if path.name == "cli.md":  # whose layout is typer's
        needs_pinned("typer")
    monkeypatch.setenv("COLUMNS", "80")
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run `python -m docs.reference`"


def test_the_command_line_lists_every_verb_in_its_group():
    verbs = re.findall(r"^\| (.+) \| \[`(.+)`\]", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict.fromkeys(group for group, _ in verbs) == dict.fromkeys(
        [cli.MAKE, cli.TRAIN, cli.LOOK, cli.SERVE, cli.EXCHANGE]
    )
    assert len(verbs) == len(cli.app.registered_commands) and (cli.SERVE, "export") in verbs


def test_the_picture_is_what_its_script_draws():
    script = ROOT / "docs/pictures/idea.py"
    drawn = runpy.run_path(str(script))["picture"]()
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == drawn, "run `python docs/pictures/idea.py`"
    assert "prefers-color-scheme: dark" in drawn


def test_a_setting_without_a_meaning_is_an_error():
    class Told(BaseModel):
        """One. first, second: both of them; third: the last."""

        first: int
        second: int = Field(2)
        third: int

    assert meanings(Told) == {"first": "both of them", "second": "both of them", "third": "the last"}

    class Silent(Told):
        """One. first: this."""

    with pytest.raises(ValueError, match="Silent: its docstring says nothing of second, third"):
        meanings(Silent)


def test_bounds_stand_behind_a_number():
    class Bounded(BaseModel):
        share: float = Field(gt=0, le=1)
        count: Annotated[int, Field(ge=1, lt=1 << 31)]
        maybe: Annotated[int, Field(ge=0)] | None = None
        several: list[PositiveFloat]

    found = {name: type_of(field.annotation, field.metadata) for name, field in Bounded.model_fields.items()}
    assert found == {
        "share": "number > 0, ≤ 1",
        "count": "integer ≥ 1",
        "maybe": "integer ≥ 0 or null",
        "several": "list of number > 0",
    }


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|href)="([^"]+)"', text)]
    wrong = []
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = document.parent / target if target else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(link)
    assert not wrong


def test_every_page_is_in_the_site():
    pages = set(re.findall(r"([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}
