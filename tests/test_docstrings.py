"""Whatever is public says what it is for, of what shape its tensors are, and when it refuses its input."""

import ast
import re
from functools import cache

import pytest

from tests.test_architecture import modules

SHAPED = re.compile(r"\[|shape|scalar", re.IGNORECASE)
REFUSES = re.compile(r"Raise|InputError")


@cache
def classes():
    """Every class of ours by name: where it lies does not matter, public names are given once."""
    return {node.name: node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def bases(cls):
    """Its bases by name, those of its bases of ours too."""
    for base in cls.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        yield name
        if name in classes():
            yield from bases(classes()[name])


def overrides(cls, name):
    """Whether a base has said already what a method is for: one of ours, or any of others that might."""
    ours = [classes()[base] for base in bases(cls) if base in classes()]
    theirs = set(bases(cls)) - set(classes()) - {"Protocol", "Generic", "ABC", "BaseModel", "NamedTuple", "Exception"}
    return bool(theirs) or any(isinstance(node, ast.FunctionDef) and node.name == name
                               for base in ours for node in base.body)  # fmt: skip


def public(body, within=()):
    """(node, the classes around it) of every public class and function that is no override and sets no property."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield node, within
            yield from public(node.body, (*within, node))
        elif not (within and overrides(within[-1], node.name)) and "setter" not in ast.unparse(node).split("def ")[0]:
            yield node, within


def has_tensors(function):
    returned = "" if function.returns is None else ast.unparse(function.returns)
    return bool(re.search(r"Tensor\b|ndarray", f"{ast.unparse(function.args)} {returned}"))


def refuses(node):
    """Whether a function's own lines raise InputError, or those that make an object of a class."""
    if isinstance(node, ast.ClassDef):
        return any(refuses(each) for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    raised = [ast.unparse(each.exc) for each in ast.walk(node) if isinstance(each, ast.Raise) and each.exc]
    return any(text.startswith("InputError") for text in raised)


@pytest.mark.parametrize("path", [path for path in modules() if "kernels" not in path])
def test_what_is_public_says_what_it_is(path):
    tree = modules()[path]
    for node, within in public(tree.body):
        place = f"{path}:{node.lineno} {node.name}"
        own = ast.get_docstring(node)
        assert own, f"{place}: no docstring"
        said = own + "".join(ast.get_docstring(each) or "" for each in within)
        if isinstance(node, ast.FunctionDef) and has_tensors(node):
            assert SHAPED.search(said), f"{place}: its docstring says no shape of its tensors"
        if refuses(node) and path != "cli.py":  # those docstrings are the help of the command
            assert REFUSES.search(said), f"{place}: it raises InputError, and its docstring does not say when"


def test_a_violation_would_be_seen():
    tree = ast.parse("class Open:\n    def read(self, x: Tensor): ...\n    def _own(self): ...\ndef f() -> int: ...")
    found = [node.name for node, _ in public(tree.body)]
    assert found == ["Open", "read", "f"] and not any(ast.get_docstring(node) for node, _ in public(tree.body))
    assert [has_tensors(node) for node, _ in public(tree.body) if isinstance(node, ast.FunctionDef)] == [True, False]
    tree = ast.parse("class A:\n    def __init__(self):\n        raise InputError('')\n    def f(self): ...")
    assert [refuses(node) for node, _ in public(tree.body)] == [True, False]
