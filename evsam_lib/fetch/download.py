"""One file over HTTP: whole and right, or not there at all.

While it comes, it is NAME.part, and NAME.part.json holds what the server said of it: a later call takes up a download
that was cut off, if the server still has the same file. It gets its name when its length and sha256 are right. Where no
public sum is known, that of the first download is kept in NAME.sha256 and holds from then on.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

__all__ = ["FetchError", "Refused", "check_room", "ensure", "part_of", "record_of", "size_text"]

ATTEMPTS = 4  # in a row that bring nothing new; then we give up
PAUSE_S = 1.0  # before the second attempt, doubled each time
LONGEST_PAUSE_S = 60.0
TIMEOUT_S = 60.0  # without a byte from the server
LINE_EVERY_S = 20.0  # between progress lines where there is no terminal
CHUNK = 1 << 18
HUGGING_FACE = "https://huggingface.co"
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that may be others in a moment
STATES = {401: "needs a log-in", 403: "is not given out to us", 404: "is not there", 410: "is no longer there"}


class FetchError(Exception):
    """Something could not be fetched; the message says what and why, in one sentence."""


class Refused(FetchError):
    """The server does not give it to us, but may to others."""


class _Cut(Exception):
    """A fault that may pass."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Stale(Exception):
    """What we kept is no part of what the server has now."""


def ensure(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    room: float = 1.0,
    token: str | None = None,
    say: Callable[[str], object] = print,
) -> bool:
    """Downloads a file, unless it is there and right.

    Args:
        url: http or https. Addresses of huggingface.co go to $HF_ENDPOINT, if that is set.
        path: of the file. A wrong file in its place stays until the right one is whole.
        sha256: the public sum; None for the one in NAME.sha256, which the first download writes.
        size: in bytes, where known.
        room: free disk asked for, as a multiple of the file's size.
        token: shown to the server, and to no other that it sends us on to.
        say: takes lines of progress.

    Returns:
        Whether anything was downloaded.

    Raises:
        Refused: the server does not give it to us.
        FetchError: it could not be had, or is not what it should be.
    """
    expected = sha256 or _recorded(path)
    if path.is_file():
        found = _sum(path)
        if expected is None:
            _record(path, found, say)
        if expected in (None, found):
            say(f"{path.name}: already there, sha256 {'recorded' if expected is None else 'right'}")
            return False
        say(f"{path} has sha256 {found}, not {expected}: fetching it again; it stays until the new one is whole")
    how = {"expected": expected, "public": sha256 is not None, "size": size, "room": room, "token": token, "say": say}
    _download(_mirrored(url), path, **how)
    return True


def part_of(path: Path) -> Path:
    """Where the file is while it comes."""
    return path.with_name(path.name + ".part")


def record_of(path: Path) -> Path:
    """Where the sum of the first download is kept."""
    return path.with_name(path.name + ".sha256")


def check_room(folder: Path, need: float) -> None:
    """Raises FetchError if the disk of an existing folder has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise FetchError(f"{folder} has {size_text(free)} free, {size_text(need)} are needed")


def size_text(count: float) -> str:
    """Bytes as people say them, in powers of ten: 815585330 -> "816 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _download(
    url: str, path: Path, *, expected: str | None, public: bool, size: int | None, room: float, token: str | None, say
) -> None:
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _bring(url, part, summed=expected is not None, size=size, room=room, token=token, say=say)
        found = _sum(part)
        if expected not in (None, found):
            _discard(part)
            raise FetchError(_wrong_sum(path, found, expected, public))
        part.replace(path)
        _note_of(part).unlink(missing_ok=True)
        if expected is None:
            _record(path, found, say)
    except KeyboardInterrupt:
        say(f"stopped: {size_text(_length(part))} of {path.name} are kept, the same command goes on from there")
        raise
    except OSError as error:  # the network's own are _Cut by then
        raise FetchError(_local_fault(error, part)) from error
    say(f"{path.name}: {size_text(path.stat().st_size)}, sha256 {'right' if expected else found}")


def _bring(url: str, part: Path, *, summed: bool, size: int | None, room: float, token: str | None, say) -> None:
    """Fills `part`, in as many attempts as it takes while each brings more; a passing fault is waited out."""
    failures, most = 0, _length(part)
    while True:
        try:
            return _attempt(url, part, summed=summed, size=size, room=room, token=token, say=say)
        except _Stale as fault:
            _discard(part)
            reason, wait_s = str(fault), 0.0
        except _Cut as fault:
            reason, wait_s = str(fault), fault.wait_s
        failures = 1 if _length(part) > most else failures + 1
        most = max(most, _length(part))
        if failures >= ATTEMPTS:
            kept = f"; {size_text(_length(part))} are kept for the next call" if _length(part) else ""
            raise FetchError(f"{url}: {reason}; given up after {failures} attempts{kept}")
        wait_s = min(max(wait_s, PAUSE_S * 2 ** (failures - 1)), LONGEST_PAUSE_S)
        say(f"{part.stem}: {reason}; again in {wait_s:.0f} s")
        time.sleep(wait_s)


def _attempt(url: str, part: Path, *, summed: bool, size: int | None, room: float, token: str | None, say) -> None:
    """One request, for what is missing.

    Raises:
        _Cut: it ended early.
        _Stale: what we kept cannot be continued.
    """
    note = _kept(url, part, summed=summed)
    have = _length(part)
    if have and have == note["total"]:
        return  # whole since last time, only not checked yet
    headers = {"User-Agent": "evsam-fetch", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := _validator(note):
            headers["If-Range"] = validator
    with _open(url, headers, token) as response:
        start, total = _place(url, response, have, note)
        total = size if total is None else total
        if size is not None and total != size:
            raise FetchError(f"{url} has {total} bytes, {size} are expected: it is another file")
        check_room(part.parent, (total or 0) * room - start)
        if have and not start:
            say(f"{part.stem}: the server sends it from the start")
        if not start:
            part.unlink(missing_ok=True)  # before the note: a note never describes another file's part
            note = {"url": url, "total": total, **{key: response.headers.get(key) for key in ("ETag", "Last-Modified")}}
            _note_of(part).write_text(json.dumps(note), encoding="utf-8")
        _copy(response, part, start, total, say)
    if total is not None and _length(part) < total:
        raise _Cut(f"cut off at {_length(part)} of {total} bytes")
    if total is not None and _length(part) > total:
        raise _Stale("more came than belongs to it; is another call fetching the same?")


def _kept(url: str, part: Path, *, summed: bool) -> dict:
    """What the server said of the part we have; a part that cannot be continued safely is removed."""
    try:
        note = json.loads(_note_of(part).read_text(encoding="utf-8"))
        known = summed or note["ETag"] or note["Last-Modified"]  # else nothing would tell a mixture of two files
        if note["url"] == url and known:
            return note
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    _discard(part)
    return {}


def _validator(note: dict) -> str | None:
    """For If-Range: a strong entity tag, or the date."""
    etag = note["ETag"]
    return etag if etag and not etag.startswith("W/") else note["Last-Modified"]


def _open(url: str, headers: dict[str, str], token: str | None) -> http.client.HTTPResponse:
    if not url.startswith(("https://", "http://")):
        raise FetchError(f"{url} is no http or https address")
    request = urllib.request.Request(url, headers=headers)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise _Stale("the part kept here does not fit the server's file") from None
        if error.code in PASSING:
            wait = error.headers.get("Retry-After") or ""
            raise _Cut(f"the server answers {error.code}", float(wait) if wait.isdecimal() else 0.0) from None
        kind = Refused if error.code in (401, 403) else FetchError
        raise kind(f"{url} {STATES.get(error.code, 'is refused')} (HTTP {error.code})") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FetchError(f"{url}: the server's certificate is not trusted here ({error.reason.reason})") from None
        raise _Cut(_network_fault(error.reason)) from None
    except (http.client.HTTPException, OSError) as error:
        raise _Cut(_network_fault(error)) from None


def _place(url: str, response: http.client.HTTPResponse, have: int, note: dict) -> tuple[int, int | None]:
    """Where the body begins in the file, and the file's length if the server says it."""
    headers = response.headers
    if headers.get_content_type() == "text/html":
        raise FetchError(f"{url}: a web page came instead of the file; is there a log-in or a proxy in between?")
    if response.status == 200:
        length = headers.get("Content-Length")
        return 0, int(length) if length is not None else None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range") or "")
    if response.status != 206 or span is None:
        raise FetchError(f"{url}: the server's answer is not understood (HTTP {response.status})")
    same = all(headers.get(key) in (None, note[key]) for key in ("ETag", "Last-Modified") if note[key])
    if not same or int(span[1]) != have or note["total"] not in (None, int(span[2])):
        raise _Stale("the server has another file by now")
    return have, int(span[2])


def _copy(response: http.client.HTTPResponse, part: Path, start: int, total: int | None, say) -> None:
    spoken, done = time.monotonic(), start
    bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, leave=False, disable=None)
    with part.open("ab") as file, bar:
        while chunk := _read(response):
            file.write(chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if bar.disable and time.monotonic() - spoken > LINE_EVERY_S:  # no terminal
                spoken = time.monotonic()
                say(f"{part.stem}: {size_text(done)}" + (f" of {size_text(total)}" if total else ""))


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (http.client.HTTPException, OSError) as error:
        raise _Cut(_network_fault(error)) from None


def _mirrored(url: str) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return endpoint + url.removeprefix(HUGGING_FACE) if endpoint and url.startswith(HUGGING_FACE + "/") else url


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(path: Path) -> str | None:
    record = record_of(path)
    return record.read_text(encoding="utf-8").split()[0] if record.is_file() else None


def _record(path: Path, found: str, say) -> None:
    record_of(path).write_text(f"{found}  {path.name}\n", encoding="utf-8")  # as sha256sum -c reads it
    say(f"{path.name}: no public sha256 is known; this file's is kept in {record_of(path).name} and holds from now on")


def _wrong_sum(path: Path, found: str, expected: str, public: bool) -> str:
    text = f"{path.name} came whole but has sha256 {found}, not {expected}; what came is removed"
    if public:
        return text
    return f"{text}. The sum is that of the first download: if the file was replaced for good, delete {record_of(path)}"


def _network_fault(error: Exception | str) -> str:
    if isinstance(error, socket.gaierror):
        return "no network, or no such host"
    if isinstance(error, TimeoutError):
        return f"no answer for {TIMEOUT_S:.0f} s"
    if isinstance(error, ConnectionRefusedError):
        return "the connection is refused"
    return f"the connection broke ({' '.join(str(error).split()) or type(error).__name__})"


def _local_fault(error: OSError, part: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {part.parent} is full; {size_text(_length(part))} of {part.stem} are kept"
    if isinstance(error, PermissionError):
        return f"no permission to write {error.filename or part}"
    return f"cannot write {error.filename or part}: {error.strerror or error}"
