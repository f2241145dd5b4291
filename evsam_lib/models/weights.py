"""Weight files: read without running what is in them, checked against the model name by name, verified by sha256.

Reads safetensors, and torch files of tensors only (`weights_only=True`), bare or under `state_dict` or `model` as the
released checkpoints have them. Notebook 05 loads what notebook 04 wrote.
"""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHIPPED = Path(__file__).resolve().parent.parent / "weights"


def weights_root() -> Path:
    """Folder of downloaded checkpoints: $EVSAM_WEIGHTS_ROOT, or `weights` in the working directory."""
    return Path(os.environ.get("EVSAM_WEIGHTS_ROOT", "weights"))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pt or .pth file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weight file at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable weight file: {_first_line(error)}") from error
    except Exception as error:  # pickle's own errors, refused objects among them
        raise ValueError(f"{path} is refused, only tensors are read from it: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict (names to tensors), it holds {type(state).__name__}.")
    return state


def load_strictly(module: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Loads `state` into `module`, which may be on the meta device; every name and shape must fit.

    Args:
        module: takes the tensors.
        state: names to tensors.
        source: where the tensors come from, for the message.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ; says how many and which first. The module is left
            as it was.
    """
    expected = module.state_dict()
    problems = [
        *_named("missing", [key for key in expected if key not in state]),
        *_named("unexpected", [key for key in state if key not in expected]),
        *_named(
            "of another shape",
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in expected
                if key in state and state[key].shape != expected[key].shape
            ],
        ),
    ]
    if problems:
        name = getattr(module, "name", type(module).__name__)
        raise ValueError(f"The weights of {source} do not fit {name}: {'; '.join(problems)}.")
    on_meta = any(value.is_meta for value in expected.values())
    if on_meta:  # the tensors become the module's own; shipped weights are stored in half precision
        state = {key: value.to(expected[key].dtype) for key, value in state.items()}
    module.load_state_dict(state, assign=on_meta)


def save_weights(module: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes the module's state dict as safetensors, complete or not at all.

    Args:
        module: whose weights.
        path: of the file.
        dtype: floating-point tensors are stored as this; the random Fourier matrix, whose every digit counts, stays
            float32.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    if dtype is not None:
        state = {
            key: value.to(dtype) if value.is_floating_point() and "gaussian_matrix" not in key else value
            for key, value in state.items()
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial)
    partial.replace(path)
    return path


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    return [f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
