"""Zip archives: every name is checked before anything is written, and a file is there whole or not at all."""

import fnmatch
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from evsam_lib.fetch.download import FetchError, check_room

__all__ = ["BadArchive", "marker_of", "unpack"]


class BadArchive(FetchError):
    """The archive itself is at fault; unpacking it again will not help."""


def unpack(archive: Path, folder: Path, *, members: str = "*", say: Callable[[str], object] = print) -> int:
    """Unpacks an archive; files of the same names are replaced.

    Args:
        archive: a zip file.
        folder: where its files go.
        members: pattern of the files to unpack; `*` stands for any text, slashes too.
        say: takes lines of progress.

    Returns:
        How many files were written.

    Raises:
        BadArchive: it is damaged, or a name in it leads out of the folder; in that case nothing is written.
        FetchError: the disk is too small, or the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                _check(info, archive)
            chosen = [i for i in opened.infolist() if not i.is_dir() and fnmatch.fnmatchcase(i.filename, members)]
            check_room(folder, sum(info.file_size for info in chosen))
            say(f"{archive.name}: unpacking {len(chosen)} files to {folder}")
            marker_of(archive).touch()  # stays if we are stopped: what lies there is not whole then
            for info in tqdm(chosen, desc=archive.name, unit="file", leave=False, disable=None):
                _write(opened, info, folder / info.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadArchive(f"{archive} is no usable zip archive ({' '.join(str(error).split())})") from error
    except KeyboardInterrupt:
        say(f"stopped: {archive.name} is kept, the same command unpacks it again")
        raise
    except OSError as error:
        raise FetchError(f"cannot unpack {archive}: {error.strerror or error}; it is kept") from error
    marker_of(archive).unlink()
    return len(chosen)


def marker_of(archive: Path) -> Path:
    """The file that stands beside an archive while it is unpacked."""
    return archive.with_name(f".{archive.name}.unpacking")


def _check(info: zipfile.ZipInfo, archive: Path) -> None:
    name = PurePosixPath(info.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
        raise BadArchive(f"{archive} is refused: {info.filename!r} in it leads out of the folder")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise BadArchive(f"{archive} is refused: {info.filename!r} in it is a link")


def _write(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    try:
        with opened.open(info) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
