"""Ray's actors on a local cluster leave the bytes of one process, whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import cli

if find_spec("ray") is None and "CI" not in os.environ:
    pytest.skip("Ray is not installed: pip install '.[ray]'", allow_module_level=True)

LIMIT = 300
"""Seconds that a driver may take: one that waits for a cluster that is gone fails its test."""
TRIAL_LIMIT = 90
"""Seconds; 25 on two slow cores."""
TRIAL = """import ray
import ray.data

class Same:
    def __call__(self, batch):
        return batch

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
rows = ray.data.range(4).map_batches(Same, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1).take_all()
assert len(rows) == 4
"""
RAY = {"RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
"""Of the suite's clusters: actors that yield to its other processes, or die for its memory, do not end in time."""
READS_NOTHING = """import cli, indexer_train.load
def here(store):
    raise AssertionError("the driver reads all traces")
indexer_train.load.check_store = here
cli.main()
"""


@pytest.fixture(scope="module", autouse=True)
def _ray_works():
    """Skip all where Ray itself, without this project, does not get four rows through an actor."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        try:
            trial = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, timeout=TRIAL_LIMIT)
        except subprocess.TimeoutExpired:
            pytest.skip(f"Ray's own actor pool hands no row back within {TRIAL_LIMIT} s on this machine")
        if trial.returncode:
            said = trial.stderr.splitlines() or [f"exit status {trial.returncode}"]
            pytest.skip(f"Ray's own actor pool fails on this machine: {said[-1]}")
        yield


def start(*arguments, program=("-m", "cli"), **settings):
    """`lookahead` in a process of its own: Ray ends a driver whose cluster fails, at once and whatever else it does."""
    return subprocess.Popen([sys.executable, *program, *map(str, arguments)], cwd=Path(cli.__file__).parent, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)  # fmt: skip


def end(driver):
    """(exit code, standard output, last line of standard error), as the fixture `lookahead` gives them."""
    try:
        out, err = driver.communicate(timeout=LIMIT)
    finally:
        driver.kill()
    assert "Traceback" not in err, err
    return driver.returncode, out, (err.splitlines() or [""])[-1]


def on_ray(*arguments, **settings):
    return end(start(*arguments, "--ray", **settings))


def content(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def actors(driver):
    """Process ids of the actors of the cluster that the process `driver` has started, as the kernel knows them."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (process / "cmdline").read_bytes(), (process / "stat").read_text()
        except OSError:
            continue
        parents[int(process.name)] = int(status.rpartition(")")[2].split()[1])
        if command.startswith(b"ray::") and b"MapWorker" in command:
            found.append(int(process.name))

    def descends(process):
        return process == driver or (process in parents and descends(parents[process]))

    return [actor for actor in found if descends(actor)]


@pytest.fixture(scope="module")
def once(recipe, tmp_path_factory):
    """(recipe, files) of 42 documents traced by one process."""
    folder = tmp_path_factory.mktemp("once")
    settings = yaml.safe_load(recipe.read_text())
    settings["documents"] |= {"train": {"text": 20, "single": 20}, "heldout": {"single": 2}}
    path = folder / "more.yaml"
    path.write_text(yaml.safe_dump(settings))
    alone = end(start("generate", path, "--out", folder / "traces"))
    assert alone[0] == 0, alone
    return path, content(folder / "traces")


def until_traced(driver, out):
    """How many documents the driver had traced when the first one was seen."""
    deadline = time.monotonic() + LIMIT
    while not list(out.rglob("doc_*")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(list(out.rglob("doc_*")))


def test_two_workers_of_which_one_is_killed(once, tmp_path):
    driver = start("generate", once[0], "--out", tmp_path, "--ray", "--workers", 2)
    early = until_traced(driver, tmp_path)
    os.kill(actors(driver.pid)[0], signal.SIGKILL)
    code, printed, line = end(driver)
    assert code == 0, line
    assert 0 < early < 42
    assert "to trace on Ray: 42 documents by 2 workers" in printed
    assert content(tmp_path) == once[1]


def test_a_cluster_named_by_its_address_loses_a_node(once, tmp_path):
    """Its documents go to actors on another one."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | memory)
    try:
        going = cluster.add_node(num_cpus=2, **memory)
        driver = start("generate", once[0], "--out", tmp_path, "--ray", "--workers", 2, "--gpus-per-worker", 0,
                       env=os.environ | {"RAY_ADDRESS": cluster.address})  # fmt: skip
        early = until_traced(driver, tmp_path)
        cluster.add_node(num_cpus=2, **memory)
        cluster.remove_node(going, allow_graceful=False)
        code, _, line = end(driver)
        assert code == 0, line
        assert 0 < early < 42 and content(tmp_path) == once[1]
    finally:
        cluster.shutdown()


def test_a_killed_driver_loses_nothing(once, tmp_path, lookahead):
    """And whoever goes on needs no Ray."""
    driver = start("generate", once[0], "--out", tmp_path, "--ray")
    until_traced(driver, tmp_path)
    running = actors(driver.pid)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + LIMIT
    early = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("doc_*")}
    while any(Path(f"/proc/{actor}").exists() for actor in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert 0 < len(early) < 42 and running and not any(Path(f"/proc/{actor}").exists() for actor in running)
    assert lookahead("generate", once[0], "--out", tmp_path)[0] == 0
    assert content(tmp_path) == once[1]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in early.items())


def test_more_gpus_than_there_are_is_refused(once, tmp_path):
    """Ray would wait for them for ever."""
    code, _, line = on_ray("generate", once[0], "--out", tmp_path, "--workers", 2, "--gpus-per-worker", 99)
    assert code == 2 and "--ray: 2 workers of 99 GPUs each, but this machine has " in line


def test_a_named_cluster_without_gpus_is_asked_about(once, tmp_path):
    """They may come later: whether the documents are traced on CPUs is for the caller to say."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False,
                                                            "object_store_memory": 100 << 20})  # fmt: skip
    try:
        driver = start("generate", once[0], "--out", tmp_path, "--ray",
                       env=os.environ | {"RAY_ADDRESS": cluster.address})  # fmt: skip
        _, errors = driver.communicate(timeout=LIMIT)
    finally:
        cluster.shutdown()
    said = [line for line in errors.splitlines() if line.startswith("lookahead: ")]  # Ray says things of its own
    assert driver.returncode == 2 and len(said) == 1 and "Traceback" not in errors
    assert "--ray: the cluster that RAY_ADDRESS names has no GPU now; say --gpus-per-worker 1" in said[0]
    assert not list(tmp_path.rglob("doc_*"))


def test_every_byte_is_checked_by_who_measures_it(finished, recipe, tmp_path):
    traces = shutil.copytree(finished / "traces" / "heldout", tmp_path / "heldout")
    damaged = sorted(traces.rglob("doc_*"))[2]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    asked = ("evaluate", recipe, "--indexer", finished / "indexer", "--traces", traces, "--out", tmp_path / "out")
    code, _, line = on_ray(*asked, program=("-c", READS_NOTHING))
    assert code == 2 and f"{damaged.name}: damaged trace (its bytes are not those that were written)" in line


def test_documents_are_measured_as_by_one_process_and_refusals_are_one_line(finished, recipe, tmp_path, lookahead):
    asked = ("evaluate", recipe, "--indexer", finished / "indexer", "--traces", finished / "traces" / "heldout")
    assert lookahead(*asked, "--out", tmp_path / "one")[0] == 0
    code, _, line = on_ray(*asked, "--out", tmp_path / "ray", "--workers", 2)
    assert code == 0, line
    assert (tmp_path / "ray" / "results.json").read_bytes() == (tmp_path / "one" / "results.json").read_bytes()
    changed = yaml.safe_load(recipe.read_text())
    changed["trace"]["layers"] = [0, 7]
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    code, _, line = on_ray("generate", tmp_path / "changed.yaml", "--out", tmp_path / "traces")
    assert code == 2 and "trace.layers: [7] are not full-attention layers" in line
    shutil.copytree(finished / "traces", tmp_path / "whole")  # where nothing is left to trace, too
    changed["trace"]["layers"] = [0]
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    code, _, line = on_ray("generate", tmp_path / "changed.yaml", "--out", tmp_path / "whole")
    assert code == 2 and "holds traces made with another trace" in line


def test_what_kills_actors_has_failed_and_what_the_disk_refuses_ends_in_one_line(once, tmp_path, lookahead):
    (tmp_path / "shards").mkdir()  # as actors leave it that the system has killed three times at a document
    (tmp_path / "shards" / "train-text-0000004.begun").write_text("\n" * 3)
    generate = ("generate", once[0], "--out", tmp_path)
    code, printed, line = on_ray(*generate)
    assert code == 0 and "1 documents failed" in printed and "about " in printed, line
    (failure,) = map(json.loads, (tmp_path / "failed.jsonl").read_text().splitlines())
    assert failure["document"] == "train-text-0000004" and "3 workers died while they traced it" in failure["reason"]
    (tmp_path / "shards" / "train-text-0000004.begun").mkdir()  # no file can be written there
    code, _, line = on_ray(*generate)
    assert code == 2 and line.endswith("train-text-0000004.begun: Is a directory") and "\n" not in line
    (tmp_path / "shards" / "train-text-0000004.begun").rmdir()
    assert lookahead(*generate)[0] == 0 and content(tmp_path) == once[1]
