"""The batch scripts as they ship, run with a stand-in for Slurm that sets what Slurm sets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import cli

HERE = Path(cli.__file__).parent
SCRIPTS = HERE / "recipes" / "cluster"
COMMANDS = {
    # One task after the other, as many as the script's array has.
    "sbatch": """last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)$/\\1/p' "$1")
export SLURM_CPUS_PER_TASK=$(sed -n 's/^#SBATCH --cpus-per-task=\\([0-9]*\\)$/\\1/p' "$1")
last=${ARRAY_LAST:-$last}
for i in $(seq 0 "${last:-0}"); do
  SLURM_JOB_ID=1$i SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$((last + 1)) bash "$1" || exit
done""",
    # As many tasks as the job has nodes, side by side; of the job's CPUs they get one each unless told otherwise.
    "srun": """echo "${SRUN_CPUS_PER_TASK:-1} CPUs a task"
for i in $(seq 0 $((${SLURM_NNODES:-1} - 1))); do
  SLURM_PROCID=$i SLURM_STEP_NUM_TASKS=${SLURM_NNODES:-1} SLURM_LOCALID=0 "$@" & pids="$pids $!"
done
trap 'kill -TERM $pids' TERM
for pid in $pids; do wait "$pid" || code=$?; done
exit ${code:-0}""",
    "scontrol": """[ "$1" = show ] && echo localhost || echo "$@" >> "$REQUEUED" """,
    "lookahead": f'exec {sys.executable} -m cli "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def slurm(tmp_path, recipe):
    """(script, variables) -> a running job."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    for name, script in COMMANDS.items():
        (venv / name).write_text(f"#!/bin/bash\n{script}\n")
        (venv / name).chmod(0o755)
    (venv / "activate").write_text("")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{venv}:{os.environ['PATH']}", "VENV": str(venv.parent), "RECIPE": str(recipe)}
    environment |= {"REQUEUED": str(tmp_path / "requeued"), "PYTHONPATH": str(HERE)}

    def call(script, **variables):
        command = ["sbatch", str(SCRIPTS / script)]
        return subprocess.Popen(command, env=environment | variables, cwd=HERE, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip

    return call


def content(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_an_array_traces_what_one_process_does(slurm, finished, tmp_path):
    job = slurm("generate.sbatch", OUT=str(tmp_path / "traces"), ARRAY_LAST="1")
    printed = job.communicate()[0]
    assert job.returncode == 0, printed
    assert "shard 0/2" in printed and "shard 1/2" in printed and printed.count("8 CPUs a task\n") == 2
    assert content(tmp_path / "traces") == content(finished / "traces")


def test_a_task_out_of_time_asks_for_another_turn(slurm, recipe, tmp_path):
    out, settings = tmp_path / "traces", yaml.safe_load(recipe.read_text())
    settings["documents"]["train"] = {"single": 100}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(settings))
    given = {"OUT": str(out), "ARRAY_LAST": "0", "RECIPE": str(tmp_path / "more.yaml")}
    job = slurm("generate.sbatch", **given)
    deadline = time.monotonic() + 120
    while not list(out.rglob("doc_*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in Path("/proc").glob("[0-9]*"):  # Slurm signals the batch script alone
        if _command(process) == f"bash\0{SCRIPTS / 'generate.sbatch'}\0".encode():
            os.kill(int(process.name), signal.SIGUSR1)
    printed = job.communicate()[0]
    assert job.returncode == 0, printed
    assert (tmp_path / "requeued").read_text() == "requeue 10\n"
    early = {path: path.stat().st_mtime_ns for path in out.rglob("doc_*")}
    assert 0 < len(early) < 104
    printed = slurm("generate.sbatch", **given).communicate()[0]
    assert "train: 100 documents" in printed and len(list(out.rglob("doc_*"))) == 104
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in early.items())


def _command(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_nodes_train_together(slurm, finished, tmp_path):
    nodes = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "GPUS": "1", "PORT": "29533"}
    job = slurm("train.sbatch", TRACES=str(finished / "traces" / "train"), OUT=str(tmp_path / "run"), **nodes)
    printed = job.communicate()[0]
    assert job.returncode == 0, printed
    assert (tmp_path / "run" / "indexer" / "modules.json").exists() and "64 CPUs a task\n" in printed


@pytest.mark.parametrize("name", ["generate.sbatch", "train.sbatch"])
def test_each_script_is_short_and_says_what_to_edit(name):
    lines = (SCRIPTS / name).read_text().splitlines()
    assert 20 <= len(lines) <= 40 and any("Edit" in line for line in lines[:6])
