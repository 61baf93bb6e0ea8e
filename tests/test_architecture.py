"""The arrows between rooms, read from the imports themselves: those inside functions count, those for types alone not.

A string "package.module:name", which something resolves when it runs, counts as an import of it.

core <- data_gen <- indexer_train <- eval <- cli; recipes stand beside and import settings (docs/architecture.md).
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_gen", "indexer_train", "eval", "recipes")
LONGEST = 350
ARROWS = {
    "data_gen/core": ["data_gen/core"],
    "data_gen": ["data_gen"],
    "indexer_train": ["data_gen", "indexer_train"],
    "eval": ["data_gen", "indexer_train", "eval"],
    "recipes": ["data_gen", "indexer_train/config.py", "eval/online/config.py", "recipes"],
    # The trainer reads traces; a backbone is nothing that it could load.
    "indexer_train/": [
        "data_gen/core",
        "data_gen/config.py",
        "data_gen/traces",
        "data_gen/flashmemory",
        "indexer_train",
    ],
    "eval/serving": ["data_gen", "indexer_train", "eval/serving"],
    "eval/runtime": ["data_gen", "indexer_train", "eval/serving", "eval/runtime"],
    "eval/report": ["data_gen", "indexer_train", "eval/report"],
}
"""What a folder may import of ours, by beginnings of paths; every key that fits a file counts."""
LOOP = [
    "indexer_train/training",
    "indexer_train/checkpoints.py",
    "indexer_train/data/batches.py",
    "indexer_train/data/sampling.py",
    "indexer_train/data/mixture.py",
]
"""The training loop: what evaluation of traces does without."""
DOORS = {
    "eval/serving": ["level1.py", "select.py", "pools.py", "residency.py", "level2.py", "entries.py"],
    "eval/runtime": [
        "runtime.py",
        "cycle.py",
        "correction.py",
        "hosts/dense.py",
        "hosts/dense_cache.py",
        "hosts/dsa.py",
        "hosts/deepseek_v4.py",
        "hosts/together.py",
    ],
    "eval/offline": ["verbs.py"],
    "eval/online": ["verbs.py", "config.py", "formats/__init__.py"],
}
"""What the packages may import of a room from outside of it (docs/architecture.md says why it is these)."""
BESIDE = {"benchmarks", "docs", "examples", "tests"}
"""What stands beside the packages and is not shipped with them."""
RESOLVED = re.compile(r"[a-z_]\w*(\.\w+)+:\w+")
HUGGING_FACE = {"transformers", "sentence_transformers", "datasets", "tokenizers", "accelerate", "huggingface_hub"}


@cache
def modules():
    """Every module of the packages and cli.py: path -> syntax tree."""
    paths = [ROOT / "cli.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree):
    """All nodes that run at some time."""
    for node in ast.iter_child_nodes(tree):
        if not for_types(node):
            yield node
            yield from statements(node)


def imports_of(nodes):
    """(line, dotted name) of everything that import statements among `nodes` name; `from a import b` is a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import of {node.module} in line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported(path):
    """The same of all that a module imports, wherever, or names to be resolved."""
    nodes = list(statements(modules()[path]))
    yield from imports_of(nodes)
    yield from resolved(nodes)


def resolved(nodes):
    """(line, dotted name) of every string among `nodes` that says "package.module:name"."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and RESOLVED.fullmatch(node.value):
            yield node.lineno, node.value.replace(":", ".")


def file_of(name):
    """The file that a dotted name of ours lies in; None of others'."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        stem = "/".join(parts[:count])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in modules():
                return path
    return None


@cache
def edges():
    """Imports among our files: path -> {path imported: line}."""
    found = defaultdict(dict)
    for path in modules():
        for line, name in imported(path):
            target = file_of(name)
            if target is not None and target != path:
                found[path].setdefault(target, line)
    return found


def inside(path, folder):
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def reached(starts, inner=True):
    """Files that importing `starts` loads, those that a call may load included: path -> the files that lead there.

    inner: of files beyond `starts` the imports inside functions count too, whoever calls those.
    """
    chains = {path: [path] for path in starts}
    queue = list(starts)
    while queue:
        path = queue.pop()
        for target in edges()[path] if inner or path in starts else at_once(path):
            if target not in chains:
                chains[target] = [*chains[path], target]
                queue.append(target)
    return chains


def at_once(path):
    """Files of ours that a module imports when it is imported itself."""
    names = [name for node in modules()[path].body if not for_types(node) for _, name in imports_of([node])]
    return {target for name in names if (target := file_of(name)) is not None}


def cycles(graph):
    """Strongly connected parts of more than one node, as sorted lists."""

    def follow(start):
        seen, queue = set(), [start]
        while queue:
            for target in graph.get(queue.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        return seen

    after = {node: follow(node) for node in graph}
    parts = {tuple(sorted(other for other in after if other in after[node] and node in after[other])) for node in after}
    return sorted(list(part) for part in parts if len(part) > 1)


@pytest.mark.parametrize("folder", ARROWS)
def test_a_room_imports_only_what_lies_before_it(folder):
    wrong = [
        f"{path}:{line} imports {target}"
        for path in modules()
        if inside(path, folder)
        for target, line in edges()[path].items()
        if not any(inside(target, allowed) for allowed in ARROWS[folder])
    ]
    assert not wrong, "\n".join(wrong)


def passes_a_door(path, target):
    """Whether one file may import another: from outside of a room only what is named in DOORS."""
    return all(
        target in [f"{room}/{door}" for door in doors]
        for room, doors in DOORS.items()
        if inside(target, room) and not inside(path, room)
    )


def test_rooms_are_entered_by_their_doors():
    doors = {f"{room}/{door}" for room, names in DOORS.items() for door in names}
    assert doors <= modules().keys()
    wrong = [
        f"{path}:{line} imports {target}"
        for path in modules()
        for target, line in edges()[path].items()
        if not passes_a_door(path, target)
    ]
    assert not wrong, "\n".join(wrong)


def not_shipped(names):
    """Those of (line, dotted name) that lie in BESIDE."""
    return [(line, name) for line, name in names if name.split(".")[0] in BESIDE]


def test_no_package_imports_what_is_not_shipped_with_it():
    wrong = [f"{path}:{line} imports {name}" for path in modules() for line, name in not_shipped(imported(path))]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_cycle_of_files():
    found = cycles({path: set(targets) for path, targets in edges().items()})
    assert not found, "\n".join(" <-> ".join(part) for part in found)


def room(path):
    """The folder that counts as one: indexer_train/data; the files of a package itself are one each."""
    parts = path.split("/")
    return path if len(parts) < 3 else "/".join(parts[:2])


def test_there_is_no_cycle_of_rooms():
    graph, why = defaultdict(set), {}
    for path, targets in edges().items():
        for target, line in targets.items():
            if room(path) != room(target):
                graph[room(path)].add(room(target))
                why.setdefault((room(path), room(target)), f"{path}:{line} imports {target}")
    wrong = [why[one, other] for part in cycles(graph) for one in part for other in part if (one, other) in why]
    assert not wrong, "\n".join(wrong)


def test_serving_imports_no_hugging_face():
    """Nor does what it loads; a function that serving does not call may (a bundle opens as a MemoryIndexer as well)."""
    room = [path for path in modules() if inside(path, "eval/serving")]
    wrong = []
    for path, chain in reached(room, inner=False).items():
        nodes = statements(modules()[path]) if path in room else modules()[path].body
        found = [(line, name) for line, name in imports_of(nodes) if name.split(".")[0] in HUGGING_FACE]
        wrong += [f"{' -> '.join(chain)}:{line} imports {name}" for line, name in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("starts", "forbidden"),
    [
        (["indexer_train/"], ["data_gen/backbones", "data_gen/generate.py"]),
        (["eval"], LOOP),
        (["indexer_train/load.py"], LOOP),
    ],
    ids=["the trainer reaches no backbone", "evaluation reaches no training loop", "loading reaches no training loop"],
)
def test_nothing_leads_there(starts, forbidden):
    chains = reached([path for path in modules() if any(inside(path, start) for start in starts)])
    wrong = [" -> ".join(chain) for path, chain in chains.items() if any(inside(path, folder) for folder in forbidden)]
    assert not wrong, "\n".join(wrong)


def loaded(statement):
    """Names of our modules and of others' packages that a fresh process has after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_a_process_that_trains_has_loaded_no_backbone():
    names = loaded("import indexer_train.training.trainer, indexer_train.artefacts, indexer_train.load")
    assert "indexer_train.training.trainer" in names
    assert not {name for name in names if name.startswith(("data_gen.backbones", "data_gen.generate"))}


def test_a_process_that_serves_has_loaded_no_hugging_face():
    every = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
             for path in modules() if inside(path, "eval/serving")]  # fmt: skip
    plain = [name for name in every if "triton" not in name and "kernels" not in name and "vllm" not in name]
    names = loaded(f"import {', '.join(plain)}")
    assert "eval.serving.select" in names and not names & HUGGING_FACE


def test_no_two_classes_have_one_name():
    """Nor those inside of others."""
    found = defaultdict(list)
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(f"{path}:{node.lineno}")
    wrong = [f"{name}: {', '.join(places)}" for name, places in found.items() if len(places) > 1]
    assert not wrong, "\n".join(wrong)


def test_every_module_can_be_read_in_one_sitting():
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules()}
    wrong = [f"{path}: {count} lines" for path, count in lines.items() if count > LONGEST and path != "cli.py"]
    assert not wrong, "\n".join(wrong)


def test_every_verb_is_a_few_lines():
    """cli.py is a list of verbs, most of it their options: what a verb does lies in its room."""
    wrong = []
    for node in modules()["cli.py"].body:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            lines = node.end_lineno - node.body[0].end_lineno
            if lines > 16:
                wrong.append(f"cli.py:{node.lineno} {node.name}: {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_a_violation_would_be_seen():
    """The readers above, on imports made up for them."""
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []
    tree = ast.parse("def f():\n    import x\nif TYPE_CHECKING:\n    import y\n")
    assert [node.names[0].name for node in statements(tree) if isinstance(node, ast.Import)] == ["x"]
    assert file_of("data_gen.core.errors.InputError") == "data_gen/core/errors.py" and file_of("torch.nn") is None
    assert not inside("eval/serving2/a.py", "eval/serving") and inside("eval/serving/a.py", "eval/serving")
    tree = ast.parse("A = {'a': 'eval.online.cycle:go_on', 'b': 'a: b'}\ndef f():\n    from benchmarks.timing import g")
    named, imports = list(resolved(statements(tree))), list(imports_of(statements(tree)))
    assert named == [(1, "eval.online.cycle.go_on")] and file_of(named[0][1]) == "eval/online/cycle.py"
    assert not_shipped(imports) == [(3, "benchmarks.timing.g")] and not not_shipped(named)
    assert passes_a_door("eval/runtime/cycle.py", "eval/serving/select.py")
    assert passes_a_door("eval/serving/level1.py", "eval/serving/level1_torch.py")
    assert not passes_a_door("eval/runtime/cycle.py", "eval/serving/level1_torch.py")
    assert not passes_a_door("cli.py", "eval/runtime/hosts/base.py")


def test_the_documents_name_what_is_there():
    """Paths, and the lists to join, of docs/architecture.md; names in code of docs/glossary.md."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tops = (*PACKAGES, "benchmarks", "tests", "cli.py")
    paths = {word for word in re.findall(r"`([\w./]+)`", text) if word.split("/")[0] in tops}
    assert len(paths) > 40
    assert not sorted(path for path in paths if not (ROOT / path).exists())
    words = text + (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    source = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in modules())
    lists = set(re.findall(r"`([A-Z][A-Z_]+)`", words))
    assert {"LOSSES", "ADAPTERS", "POLICIES", "KEY_RECIPES", "FORMATS"} <= lists
    assert not sorted(name for name in lists if not re.search(rf"^{name}\b.* = ", source, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_what_the_documents_import_is_there(document):
    """Every `from a import b` of ours in a document's code names a module, and something in it."""
    text = (ROOT / document).read_text(encoding="utf-8")
    ours = re.compile(r"^from ((?:data_gen|indexer_train|eval|recipes)[\w.]*) import ([\w, ]+)$", re.MULTILINE)
    for module, names in ours.findall(text):
        path = file_of(module)
        assert path and path.removesuffix(".py").removesuffix("/__init__") == module.replace(".", "/"), module
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not [name for name in names.split(", ") if not re.search(rf"\b{name}\b", source)], (module, names)
