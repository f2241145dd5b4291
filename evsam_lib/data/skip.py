"""Training goes on over corrupt images: they are skipped, counted and listed.

At SA-1B's size (paper Sec. 3.2, 11 M images) some members arrive broken: a picture cut off, JSON that is none, run
lengths of another size, one file of a pair missing. Shown in notebook 03.
"""

import os
from pathlib import Path
from typing import Any

__all__ = ["ON_ERROR", "Skipped", "Skipping", "check_on_error", "guarded"]

ON_ERROR = ("skip", "raise")
_IN_A_ROW = 100  # so many broken images one after the other are a broken disk or a wrong folder


def guarded(data: Any, *, on_error: str, log: str | Path | None = None) -> Any:
    """A data set as it is ("raise"), or one that skips what cannot be read ("skip").

    Raises:
        ValueError: `on_error` is neither.
    """
    check_on_error(on_error)
    return Skipping(data, log=log) if on_error == "skip" else data


def check_on_error(on_error: str) -> None:
    """Raises ValueError unless `on_error` is "skip" or "raise"."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}.")


class Skipped:
    """Which images were skipped and why: a number and a reason, in a file that many processes may share."""

    def __init__(self, log: Path | None) -> None:
        """Starts a list.

        Args:
            log: file to add lines to; None keeps this process's own in memory.
        """
        self.log = log
        self._own: dict[int, str] = {}

    def add(self, index: int, reason: str) -> None:
        """Notes an image, once per process; the line is whole even where many processes write at once."""
        if index in self._own:
            return
        self._own[index] = " ".join(reason.split())
        if self.log is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"{index}\t{self._own[index]}\n".encode())
        finally:
            os.close(file)

    def read(self) -> dict[int, str]:
        """All that were skipped, by all processes that share the file, in order."""
        if self.log is None:
            return dict(sorted(self._own.items()))
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        found = (line.split("\t", 1) for line in lines)
        return dict(sorted((int(index), reason) for index, reason in found))

    @staticmethod
    def summary(skipped: dict[int, str], count: int, *, show: int = 5) -> str:
        """In a few lines: how many of `count` images were skipped, and why the first `show` of them."""
        if not skipped:
            return f"All {count} images could be read."
        lines = [f"{len(skipped)} of {count} images were skipped:"]
        lines += [f"  {reason}" for reason in list(skipped.values())[:show]]
        if len(skipped) > show:
            lines.append(f"  and {len(skipped) - show} more")
        return "\n".join(lines)


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
        self.skipped = Skipped(None if log is None else Path(log))

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
        tried, reason = min(_IN_A_ROW, count), ""
        for step in range(tried):
            place = (index + step) % count
            try:
                record = self.data[place]
                self.data.runs(record, range(len(record.rles)))
                return record
            except (FileNotFoundError, ValueError) as error:
                reason = str(error)
                self.skipped.add(place, reason)
        raise ValueError(f"{tried} images in a row cannot be read, the last one because: {reason}")

    def __getattr__(self, name: str) -> Any:
        if name in ("data", "__setstate__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)

    def summary(self) -> str:
        """A few lines for the end of a run."""
        return Skipped.summary(self.skipped.read(), len(self.data))
