"""On what a figure was measured: a figure without it cannot be repeated."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_gen.core.cpu import processor


def origin(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Command, commit, device, cores, threads and versions; Python's too, whose text the source `builtin` reads."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": commit(Path(__file__).parent),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def commit(folder: Path) -> str | None:
    """The commit of the checkout that a folder lies in; -dirty: files were changed; None: there is no checkout."""
    call = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or None


def machine() -> str:
    """`origin` in one line."""
    found = origin()
    parts = [f"commit {found['commit'] or 'unknown'}", found["device"], f"{found['cores']} cores"]
    return ", ".join([*parts, f"{found['threads']} threads", f"PyTorch {found['torch']}"])
