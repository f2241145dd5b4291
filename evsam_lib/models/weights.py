"""Weight files: read without running what is in them, checked against the model name by name, verified by sha256.

Reads safetensors, and torch files of tensors only (`weights_only=True`), bare or under `state_dict` or `model` as the
released checkpoints have them, also as the one file in a zip archive (EfficientSAM-S). Names must be those of the
model, all of them and no others; nothing is renamed, skipped or stripped. Half precision is widened to the model's.
Notebook 05 loads what notebook 04 wrote.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
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
        state = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except Exception as error:  # pickle alone has a dozen kinds
        if refused := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise ValueError(
                f"{path} is refused: it holds {_short(refused[1])}, and only tensors are read. If you trust the file, "
                "load it with torch yourself and save its state dict alone."
            ) from error
        raise ValueError(f"{path} is not a readable weight file: {_damage(path) or _first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict (names to tensors), it holds {_content(state)}.")
    for key, value in state.items():
        if not isinstance(key, str) or value.is_meta or value.layout != torch.strided:
            raise ValueError(f"{path} must hold plain tensors under their names, {_short(key)!r} is none.")
    return state


def _load_torch(path: Path) -> object:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
            if not any(name.endswith("/data.pkl") for name in files):  # not torch's own format, which is a zip too
                if len(files) != 1:
                    raise ValueError(f"a zip archive with {len(files)} files; unpack it and give the weight file")
                with archive.open(files[0]) as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    known: Callable[[], dict[str, dict[str, tuple[int, ...]]]] | None = None,
) -> None:
    """Loads `state` into `module`, which may be on the meta device; every name, shape and kind of number must fit.

    Args:
        module: takes the tensors.
        state: names to tensors.
        source: where the tensors come from, for the message.
        known: the names and shapes of other models, asked only if the weights do not fit, to say whose they are.

    Raises:
        ValueError: names are missing or unexpected, shapes differ, or whole numbers stand where real ones belong; says
            how many and which first, and which known model they look like. The module is left as it was.
    """
    expected = module.state_dict()
    real = {key: value.is_floating_point() for key, value in expected.items()}
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
        *_named(
            "of another type",
            [
                f"{key} {state[key].dtype} instead of {expected[key].dtype}"
                for key in expected
                if key in state and (state[key].is_complex() or state[key].is_floating_point() < real[key])
            ],
        ),
    ]
    if problems:
        name = getattr(module, "name", type(module).__name__)
        whose = "" if known is None else whose_weights(state, known(), not_of=name)
        raise ValueError(f"The weights of {source} do not fit {name}: {'; '.join(problems)}.{whose and ' ' + whose}")
    on_meta = any(value.is_meta for value in expected.values())
    if on_meta:  # the tensors become the module's own; shipped weights are stored in half precision
        state = {key: value.to(expected[key].dtype) for key, value in state.items()}
    module.load_state_dict(state, assign=on_meta)


def whose_weights(
    state: dict[str, Tensor], known: dict[str, dict[str, tuple[int, ...]]], *, not_of: str | None = None
) -> str:
    """A sentence about the known model that a state dict looks like, by its names and shapes; "" if there is none.

    Args:
        state: names to tensors.
        known: for every model its names and shapes.
        not_of: a model that is out of the question.
    """
    heads = {key.split(".")[0] for key in state}
    for prefix in ["", *(f"{head}." for head in heads if len(heads) == 1)]:  # such as "module." of a wrapped model
        shapes = {(key.removeprefix(prefix), tuple(value.shape)) for key, value in state.items()}
        likeness = {
            model: len(shapes & entries.items()) / len(shapes | entries.items()) for model, entries in known.items()
        }
        best = max(likeness, key=likeness.__getitem__)
        if likeness[best] >= 0.5 and (prefix or best != not_of):  # half of all names and shapes, or no claim is made
            start = f"Every name begins with {prefix!r}; without that" if prefix else "By names and shapes"
            entries = known[best].items()
            how = "exactly" if likeness[best] == 1 else f"{len(shapes & entries)} of {len(shapes | entries)}"
            return f"{start} they are those of {best} ({how})."
    return ""


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
    return [f"{len(keys)} {what} ({', '.join(map(_short, keys[:3]))}{', ...' if len(keys) > 3 else ''})"]


def _first_line(error: Exception) -> str:
    return _short(str(error).strip().splitlines()[0], 300) if str(error).strip() else type(error).__name__


def _short(text: object, limit: int = 120) -> str:
    """In one line, and not longer: a damaged file may hold anything."""
    return " ".join(str(text).split())[:limit]


def _damage(path: Path) -> str | None:
    """What usually lies under the name of a weight file that is none, told by its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, the answer of a server that did not send the file"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file it stands for"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "its end is missing, as after a broken download"
    return None


def _content(state: object) -> str:
    if isinstance(state, dict):
        others = [
            f"{_short(key)!r}: {type(value).__name__}" for key, value in state.items() if not isinstance(value, Tensor)
        ]
        return f"also {', '.join(others[:3])}" if others else "nothing"
    return type(state).__name__
