"""Run a file's kernels in Triton's interpreter, in a process of its own: it is chosen before triton is imported."""

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by the file's test_in_the_interpreter")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def run_interpreted(file: str) -> None:
    """Run the tests of `file` marked `in_interpreter`; fails with their output."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-p", "no:cacheprovider", file]
    found = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout + found.stderr
