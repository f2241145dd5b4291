"""Where a result came from: one small function. See notebook 00_start_here."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .paths import repo_root

__all__ = ["ask", "provenance"]

_PACKAGES = [
    *("evsam", "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "pillow", "matplotlib"),
    *("pycocotools", "faster-coco-eval", "papermill", "ipykernel"),
    *("onnx", "onnxruntime", "openvino", "tensorrt"),
    *("transformers", "open_clip_torch"),
]


def provenance(
    *, notebook: str, run_id: str, started: datetime, parameters: dict[str, Any], device: str, inputs: list[dict]
) -> dict[str, Any]:
    """Code, time, parameters, versions, machine and inputs of one run.

    Args:
        notebook: the notebook's name, or the command's.
        run_id: of this run.
        started: in UTC.
        parameters: all of them, `seed` among them, and of a notebook `profile`.
        device: the one used, after "auto" was resolved.
        inputs: {"path", "sha256"} of each data set and checkpoint.
    """
    finished = datetime.now(UTC)
    torch = sys.modules.get("torch")
    changes = ask("git", "status", "--porcelain")
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "notebook": notebook,
        "run_id": run_id,
        "profile": parameters.get("profile"),
        "seed": parameters["seed"],
        "git": {"sha": ask("git", "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)},
        "started": started.isoformat(timespec="seconds"),
        "finished": finished.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "parameters": parameters,
        "versions": versions,
        "machine": {"system": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count()},
        "device": device,
        "threads": torch.get_num_threads() if torch else None,
        "gpu": ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "inputs": inputs,
    }


def ask(*command: str) -> str | None:
    """What a command prints, stripped, or None where it does not exist or fails."""
    try:
        answer = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
