"""On what a figure was measured: a figure without it cannot be repeated."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def machine() -> str:
    """Commit (with -dirty where files were changed), processor, cores and threads at hand, PyTorch: one line."""
    call = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    information = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"commit {commit or 'unknown'}, {named[1] if named else platform.machine()}, {cores} cores, "
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )
