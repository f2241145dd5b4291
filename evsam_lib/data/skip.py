"""Training goes on over corrupt images: they are skipped, counted and listed.

At SA-1B's size (paper Sec. 3.2, 11 M images) some members arrive broken: a picture cut off, JSON that is none, run
lengths of another size, one file of a pair missing. Shown in notebook 03.
"""

import os
from pathlib import Path
from typing import Any

__all__ = ["ON_ERROR", "Skipping", "guarded", "summary"]

ON_ERROR = ("skip", "raise")
_IN_A_ROW = 100  # so many broken images one after the other are a broken disk or a wrong folder


def guarded(data: Any, *, on_error: str, log: str | Path | None = None) -> Any:
    """A data set as it is ("raise"), or one that skips what cannot be read ("skip").

    Raises:
        ValueError: `on_error` is neither.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}.")
    return Skipping(data, log=log) if on_error == "skip" else data


class Skipping:
    """A data set whose unreadable images are replaced by the next readable one.

    Which image stands in depends on the index alone, so batches stay a pure function of their step and full on every
    rank. A record's masks are checked with it, all of them: a broken one shows before it can break a batch.
    """

    def __init__(self, data: Any, *, log: str | Path | None = None) -> None:
        """Wraps a data set.

        Args:
            data: an `Sa1bFolder` or `Sa1bStream`.
            log: file to which every process adds a line per skipped image; without it each process knows its own only.
        """
        self.data = data
        self.log = None if log is None else Path(log)
        self._found: dict[int, str] = {}  # of this process

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        """Reads an image, or the next one that can be read.

        Raises:
            IndexError: past the end.
            ValueError: a hundred in a row, or all there are, cannot be read.
        """
        count = len(self.data)
        if not -count <= index < count:
            raise IndexError(f"index {index} of {count} images")
        for step in range(min(_IN_A_ROW, count)):
            place = (index + step) % count
            try:
                record = self.data[place]
                self.data.runs(record, range(len(record.rles)))
                return record
            except (FileNotFoundError, ValueError) as error:
                self._note(place, str(error))
        raise ValueError(f"{step + 1} images in a row cannot be read, the last one because: {self._found[place]}")

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "__setstate__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)

    def problems(self) -> dict[int, str]:
        """Index and reason of every image skipped so far, by all processes that share the log."""
        if self.log is None or not self.log.is_file():
            return dict(sorted(self._found.items()))
        lines = (line.split("\t", 1) for line in self.log.read_text().splitlines())
        return dict(sorted({int(index): reason for index, reason in lines}.items()))

    def _note(self, index: int, reason: str) -> None:
        if index not in self._found:
            self._found[index] = reason
            if self.log is not None:
                append(self.log, index, reason)


def append(log: Path, index: int, reason: str) -> None:
    """Adds one line, whole even where many processes write at once."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = f"{index}\t{' '.join(reason.split())}\n".encode()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def summary(problems: dict[int, str], count: int, *, show: int = 5) -> str:
    """What was skipped, in a few lines: how many of `count` images, and why the first `show` of them."""
    if not problems:
        return f"All {count} images could be read."
    lines = [f"{len(problems)} of {count} images were skipped:"]
    lines += [f"  {reason}" for reason in list(problems.values())[:show]]
    if len(problems) > show:
        lines.append(f"  and {len(problems) - show} more")
    return "\n".join(lines)
