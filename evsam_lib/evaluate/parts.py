"""Part files: what one process of a run has done so far, so that runs can be shared out, killed and taken up again.

A part is a text file beside the result: a header, which says what is measured and how, then a line for every image that
is done. Lines are only ever appended. A kill may leave half a line at the end; it is cut off, and its images are done
again. Images are shared out in whole batches, so that one process and many compute the very same batches and get the
very same numbers.
"""

import glob
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from evsam_lib.data.files import is_finite

__all__ = ["append", "finished", "incomplete", "join_parts", "open_part", "part_path", "share"]

# What may differ between the processes of one run: places, not what is there, which is compared by its sha256.
_MAY_DIFFER = ("threads", "images_dir", "annotations", "weights", "detections_file")


def part_path(out: str | Path, shard: tuple[int, int] = (1, 1)) -> Path:
    """Where shard i of n (from 1) of the run that will write `out` keeps its lines."""
    out = Path(out)
    return out.with_name(f"{out.stem}.part-{shard[0]}-of-{shard[1]}.jsonl")


def share(jobs: Sequence, batch: int, shard: tuple[int, int], done: Collection[int]) -> list:
    """The batches of shard i of n (from 1), every n-th beginning with the i-th, but for those that are done whole."""
    number, count = shard
    batches = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
    return [part for part in batches[number - 1 :: count] if any(job.position not in done for job in part)]


def open_part(path: Path, header: dict, *, resume: bool) -> tuple[set[int], TextIO]:
    """Opens a part for writing: a new one, or one that a killed run left.

    Args:
        path: of the part.
        header: what this run measures, ready for JSON.
        resume: go on with a part that is there; otherwise it is replaced.

    Returns:
        the positions of the lines that are there, and the file, ready for more.

    Raises:
        ValueError: the part belongs to a run with other settings, or is damaged.
    """
    header = json.loads(json.dumps(header))
    earlier = _read(path) if resume and path.is_file() else None
    if earlier is None:  # none, or killed before its header was whole
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.open("w", encoding="utf-8")
        append(part, [header])
        return set(), part
    there, lines, whole = earlier
    _check_same(header, there, path)
    os.truncate(path, whole)
    return set(lines), path.open("a", encoding="utf-8")


def finished(out: str | Path, header: dict) -> list[Path] | None:
    """The parts beside `out` that are a whole run between them, however many processes it had; None if there are none.

    Raises:
        ValueError: they are a whole run, but one with other settings.
    """
    out, header = Path(out), json.loads(json.dumps(header))
    for first in sorted(out.parent.glob(f"{glob.escape(out.stem)}.part-1-of-*.jsonl")):
        count = first.stem.rpartition("-")[2]
        if not re.fullmatch("[1-9][0-9]{0,8}", count):  # no name of ours
            continue
        files = (part_path(out, (number, int(count))) for number in range(1, int(count) + 1))
        files = list(takewhile(Path.is_file, files))  # up to the first that is missing, however many there should be
        if len(files) == int(count) and not incomplete(files):
            _check_same(header, join_parts(files)[0], first)
            return files
    return None


def append(part: TextIO, lines: Iterable[dict]) -> None:
    """Writes lines at once and hands them to the operating system, where a kill does not reach them."""
    part.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    part.flush()


def join_parts(paths: Sequence[Path]) -> tuple[dict, list[dict]]:
    """Joins the parts of one run: every image once, in the order of the annotation file.

    Returns:
        a header, and the lines.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: parts of different runs, or images that no part has.
    """
    headers, lines = [], {}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"Part {path} does not exist.")
        part = _read(path)
        if part is None:
            raise ValueError(f"Part {path} is empty.")
        headers.append(part[0])
        _check_same(headers[0], part[0], path)
        lines = part[1] | lines  # the first to have an image counts
    missing = headers[0]["jobs"] - len(lines)
    if missing:
        told = f"{missing} of {headers[0]['jobs']} images are in none of the {len(paths)} parts"
        raise ValueError(f"{told} ({paths[0]}{', ...' if len(paths) > 1 else ''}).")
    return headers[0], [lines[position] for position in sorted(lines)]


def incomplete(paths: Sequence[Path]) -> str | None:
    """One sentence that says why the parts cannot be joined, or None: they can."""
    try:
        join_parts(paths)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def _read(path: Path) -> tuple[dict, dict[int, dict], int] | None:
    """Header, lines by position, and the length in bytes of all that is whole; None if not even the header is."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == 0:
        return None
    header, lines = None, {}
    for number, text in enumerate(content[:whole].splitlines(), 1):
        try:
            line = json.loads(text)
            if header is None:
                header = _header(line)
            else:
                lines.setdefault(_position(line, header["jobs"]), line)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"Line {number} of {path} is damaged; delete the file and run again.") from error
    return None if header is None else (header, lines, whole)


def _header(line: dict) -> dict:
    """The header, if it has what others look for in it; else ValueError, TypeError or KeyError."""
    settings = line["settings"]
    whole = (
        type(line["jobs"]) is int
        and 0 <= line["jobs"] < 2**63
        and isinstance(line["twice"], list)
        and "image_ids" in line
    )
    if not whole or not isinstance(settings["rules"], dict) or not isinstance(settings.get("device", ""), str):
        raise ValueError("no header")
    return line


def _position(line: dict, jobs: int) -> int:
    """Where an image's line belongs, if it is whole; else ValueError, TypeError or KeyError."""
    position, seconds = line["position"], line["seconds"]
    known = type(position) is int and 0 <= position < jobs and is_finite(seconds)
    if not known or not all(isinstance(reason, str) for reason in line["noted"]):
        raise ValueError("no image's line")
    for found in line["objects"]:
        if "pair_id" in found:  # an image and a phrase, which `sam3.phrases` reads
            continue
        numbers = [found[key] for key in ("area", "iou", "score") if key in found]
        if "image_id" not in found or not all(map(is_finite, [*numbers, *found.get("iou_after_click", [])])):
            raise ValueError("no object's record")
    return position


def _check_same(expected: dict, found: dict, path: Path) -> None:
    a, b = _comparable(expected), _comparable(found)
    different = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    if different:
        values = "; ".join(f"{key}: {b.get(key)} there, {a.get(key)} here" for key in different)
        raise ValueError(f"{path} belongs to a run with other settings ({values[:300]}).")


def _comparable(header: dict) -> dict:
    settings = header["settings"] | header["settings"]["rules"]  # one by one, to be named in an error
    settings = {key: value for key, value in settings.items() if key not in (*_MAY_DIFFER, "rules")}
    return settings | {"device": settings.get("device", "").split(":")[0], "jobs": header["jobs"]}
