"""Where the study reads and writes, and how a finished result takes its place.

The only module that knows folders. Explained in notebook 00_start_here.

A result is built in a hidden sibling folder and swapped in by two renames, so that a crash leaves the last good one:

    results/<profile>/.work/<name>.files    files a running notebook writes (checkpoints, logs)
    results/<profile>/.work/<name>.new      a result being written
    results/<profile>/.work/<name>.ready    a whole result, waiting to be published
    results/<profile>/.work/<name>.old      the previous result, while it is being replaced
    results/<profile>/<name>                the result
"""

import hashlib
import shutil
from pathlib import Path

__all__ = ["digest", "publish", "recover", "repo_root", "resolve", "shown", "work_folder", "write_text"]


def repo_root() -> Path:
    """The folder of the study: the one that holds pyproject.toml beside evsam_lib, else the nearest such above here."""
    here = Path.cwd()
    for folder in (Path(__file__).resolve().parents[2], here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "evsam_lib").is_dir():
            return folder
    return here


def resolve(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository root, wherever the notebook was started."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else repo_root() / path


def shown(path: str | Path) -> str:
    """The path as we print and record it: relative to the repository root where it lies inside."""
    path = resolve(path)
    return path.relative_to(repo_root()).as_posix() if path.is_relative_to(repo_root()) else path.as_posix()


def work_folder(folder: Path, stage: str) -> Path:
    """The hidden folder in which a stage ("files", "new", "ready", "old") of the result `folder` is kept."""
    return folder.parent / ".work" / f"{folder.name}.{stage}"


def publish(ready: Path, folder: Path) -> None:
    """Put the whole folder `ready` in the place of `folder`; the previous one goes only when the new one stands."""
    recover(folder)
    old = work_folder(folder, "old")
    if folder.exists():
        _remove(old)
        old.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(old)
    ready.rename(folder)
    _remove(old)


def recover(folder: Path) -> None:
    """Bring the last good result back if a crash fell between the two renames of `publish`."""
    old = work_folder(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def _remove(old: Path) -> None:
    """Remove a folder; it stops being one at once, so that `recover` never brings back the rest of it."""
    doomed = old.with_name(f"{old.name}.gone")
    shutil.rmtree(doomed, ignore_errors=True)
    if old.exists():
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def digest(path: Path) -> str:
    """sha256 of a file; of a folder, the sha256 of its files' relative names and sizes."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
    return total.hexdigest()
