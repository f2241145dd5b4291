"""SA-1B's archives read where they lie: an index of member offsets, made once, then plain reads at an offset.

SA-1B (paper Sec. 3.2) comes as a thousand tars of about 11,186 images each, sa_<id>.jpg and sa_<id>.json side by side,
10 TB in all; unpacking them doubles that and makes 22 million files. Explained in notebook 03. An image costs 32 bytes
of index (360 MB for all of SA-1B), in one array that forked workers share; no file stays open between reads.
"""

import os
import re
import tarfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from .files import excerpt

__all__ = ["Tars", "tar_index"]

_VERSION = 1  # of the index file
_MEMBER = re.compile(r"sa_([0-9]{1,18})\.(jpg|json)")
_BROKEN = (tarfile.TarError, ValueError, OverflowError, EOFError)  # what tarfile makes of a damaged header
_ROW = np.dtype([("id", "i8"), ("jpg_at", "i8"), ("json_at", "i8"), ("jpg_size", "u4"), ("json_size", "u4")])


class Tars:
    """Images of one or more tars, tar after tar, by id within each."""

    def __init__(self, paths: Sequence[Path], *, cache: Path | None = None) -> None:
        """Indexes the tars, or reads the indices made before.

        Args:
            paths: plain (uncompressed) tars.
            cache: folder for the index files; None keeps each beside its tar.

        Raises:
            FileNotFoundError, ValueError: see `tar_index`.
        """
        self.paths = list(paths)
        tables = [tar_index(path, cache=cache) for path in self.paths]
        self._rows = np.concatenate(tables)
        self._tar = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])

    @property
    def image_ids(self) -> np.ndarray:
        """(N,) int64."""
        return self._rows["id"]

    def keep(self, part: slice) -> "Tars":
        """The same tars with a part of their images."""
        kept = object.__new__(Tars)
        kept.paths, kept._rows, kept._tar = self.paths, self._rows[part], self._tar[part]
        return kept

    def names(self, index: int) -> tuple[str, str]:
        """How the two members of an image are called in error messages."""
        stem = f"{self.paths[self._tar[index]]}:sa_{self._rows['id'][index]}"
        return f"{stem}.jpg", f"{stem}.json"

    def read(self, index: int) -> tuple[bytes, bytes]:
        """The JPEG and the JSON of an image.

        Raises:
            FileNotFoundError: if one of them is not in the tar.
            ValueError: if the tar ends before them.
        """
        row = self._rows[index]
        with self.paths[self._tar[index]].open("rb") as file:
            members = []
            for name, kind in zip(self.names(index), ("jpg", "json"), strict=True):
                at, size = int(row[f"{kind}_at"]), int(row[f"{kind}_size"])
                if at < 0:
                    raise FileNotFoundError(f"{name} does not exist: the tar holds only one file of the pair.")
                left = max(file.seek(0, os.SEEK_END) - at, 0)
                if left < size:
                    raise ValueError(f"{name} is cut off: the tar ends after {left} of its {size} bytes.")
                file.seek(at)
                members.append(file.read(size))
        return members[0], members[1]


def tar_index(path: Path, *, cache: Path | None = None) -> np.ndarray:
    """Where the images of a tar lie; read from `<tar>.index.npy` if that was made for this very file, else made.

    Args:
        path: the tar.
        cache: folder of the index file; None: beside the tar. Where it cannot be written the index is kept in memory
            only, with a warning.

    Returns:
        (N,) records id, jpg_at, json_at (offset in bytes, -1: not in the tar), jpg_size, json_size, by id.

    Raises:
        FileNotFoundError: if there is no such tar.
        ValueError: if it is no plain tar or holds no SA-1B image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Tar {path} does not exist.")
    stat = path.stat()
    mark = np.array([(_VERSION, stat.st_size, stat.st_mtime_ns, 0, 0)], _ROW)  # first row: which file it is of
    file = (cache or path.parent) / f"{path.name}.index.npy"
    rows = _load(file)
    if rows is not None and rows[:1].tobytes() == mark.tobytes() and _inside(rows[1:], stat.st_size):
        return rows[1:]
    rows = _scan(path)
    _save(file, np.concatenate([mark, rows]))
    return rows


def _scan(path: Path) -> np.ndarray:
    """Reads all headers of a tar, skipping what they describe."""
    found: dict[int, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    # pyrefly: ignore[missing-attribute]: the stubs leave it out
                    tar.members.clear()  # it would keep them all
                    match = _MEMBER.fullmatch(PurePosixPath(member.name).name)
                    if match and member.isreg() and 0 <= member.size < 2**32:  # a larger one is damage
                        found.setdefault(int(match[1]), {})[match[2]] = (member.offset_data, member.size)
            except _BROKEN:
                warnings.warn(f"Tar {path} is cut off: {len(found)} images were found before its end.", stacklevel=4)
    except _BROKEN as error:
        raise ValueError(f"{path} is no plain tar (compressed ones must be unpacked): {excerpt(error)}.") from error
    if not found:
        raise ValueError(f"Tar {path} holds no SA-1B images: expected members sa_<id>.jpg and sa_<id>.json.")
    absent = (-1, 0)
    rows = [(n, *zip(pair.get("jpg", absent), pair.get("json", absent), strict=True)) for n, pair in found.items()]
    rows = [(n, *offsets, *sizes) for n, offsets, sizes in sorted(rows)]
    return np.array(rows, _ROW)


def _load(file: Path) -> np.ndarray | None:
    try:
        rows = np.load(file)
    except Exception:  # absent, unreadable or damaged, and numpy has many words for that: make it again
        return None
    return rows if isinstance(rows, np.ndarray) and rows.dtype == _ROW and rows.ndim == 1 else None


def _inside(rows: np.ndarray, size: int) -> bool:
    """Whether all that an index names begins in a tar of so many bytes, as it does unless the index is damaged."""
    places = np.concatenate([rows["jpg_at"], rows["json_at"]])
    return len(rows) > 0 and places.min() >= -1 and places.max() < size and rows["id"].min() >= 0


def _save(file: Path, rows: np.ndarray) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            np.save(out, rows)
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(f"The index {file} cannot be kept ({error.strerror}): name a cache folder.", stacklevel=4)
