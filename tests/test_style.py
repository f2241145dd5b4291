"""The house's rules for code, held by its tools: layout, lint, types."""

import subprocess
import sys

import pytest

from evsam_lib.study.paths import repo_root

# The types are checked with the packages of the very interpreter that runs the tests.
TYPES = ("pyrefly", "check", "--output-format", "min-text", "--python-interpreter-path", sys.executable)
TOOLS = {
    "format": ("ruff", "format", "--check", "--no-cache", "."),
    "lint": ("ruff", "check", "--no-cache", "--output-format", "concise", "."),
    "types": TYPES,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_has_nothing_to_say(tool):
    command = [sys.executable, "-m", *TOOLS[tool]]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(TOOLS[tool])}\n{done.stdout}{done.stderr}"
