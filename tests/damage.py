"""Valid input, damaged: hypothesis strategies for JSON values, bytes and YAML, and the promise that readers keep.

The promise: whatever lies in a file, its reader either takes it or raises the error its docstring names, with one
sentence that names the file. `kept` holds a reader to it.
"""

import copy
import json
import math
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

PROMISED = (ValueError, FileNotFoundError)  # and what the caller adds; their subclasses say too little by themselves
ROOM = 3 << 30  # bytes of address space that a reader may take beyond what the process has; all that is read is tiny

# Values in the place of others: each has broken a reader somewhere.
ODD = [
    *(None, True, False, -1, 0, 1, 2.5, 1e308, -1e308, 2**31, 2**32 + 1, 2**63, 10**400, 10**10),
    *(math.nan, math.inf, -math.inf, "", " ", "1", "é", "\0", "a" * 300, "²", "../x", "\ud800"),
    *([], {}, [[]], [None], {"": None}, [math.nan] * 4, [10**400] * 4, [1, 2, 3, 4], ["1"] * 4, [[1, 2], [3, 4]]),
    *([[0, 0, 1e9, 0, 0, 1e9]], [[0, 0, 1e5, 0, 0, -1e5] * 40], [["a"] * 6], [[None] * 6], ["abcdef"]),
    *({"size": [32, 48], "counts": [1536]}, {"size": [32, 48], "counts": "`1`1"}, {"size": [32, 48], "counts": 10**10}),
    *({"size": [32, 48], "counts": "o" * 9000 + "0"}, {"size": [2**31, 2**31], "counts": []}, {"counts": None}),
]
KEYS = ["id", "image_id", "bbox", "size", "counts", "position", "", "é"]


@st.composite
def broken(draw, valid, times: int = 2):
    """A JSON value of which one to `times` parts were dropped, doubled, renamed, exchanged, nested or made odd."""
    box = [copy.deepcopy(valid)]  # so that the whole is a part too
    for _ in range(draw(st.integers(1, times))):
        places = list(_places(box))
        # Long lists have many alike parts; without this the few at the top would never be met.
        holder, key = places[draw(st.integers(0, min(len(places) - 1, draw(st.sampled_from([8, 60, 10**6])))))]
        change = draw(st.sampled_from(["odd", "odd", "drop", "double", "rename", "exchange", "nest"]))
        if change == "drop" and holder is not box:
            del holder[key]
        elif change == "double" and isinstance(holder, list) and holder is not box:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = holder.pop(key)
        elif change == "exchange":
            other, place = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other[place])
        elif change == "nest":
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}]))
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return box[0]


def _places(value) -> Iterator[tuple[list | dict, int | str]]:
    """Every part of a JSON value, as what holds it and the key there; the upper ones first."""
    level = [value]
    while level:
        pairs = [(h, k) for h in level for k in (h if isinstance(h, dict) else range(len(h)))]
        yield from pairs
        level = [h[k] for h, k in pairs if isinstance(h[k], dict | list)]


@st.composite
def damaged(draw, content: bytes):
    """Bytes cut short, flipped, lengthened, overwritten, emptied, or written in another encoding."""
    place = draw(st.integers(0, len(content))) if draw(st.booleans()) else draw(st.integers(0, min(400, len(content))))
    stray = draw(st.binary(min_size=1, max_size=8))
    flip = bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) if place < len(content) else b""
    length = draw(st.sampled_from([1, 8, 64, 1000]))
    choices = {
        "cut": content[:place],
        "flip": content[:place] + flip + content[place + 1 :],
        "insert": content[:place] + stray + content[place:],
        "overwrite": content[:place] + stray + content[place + len(stray) :],
        "lose": content[:place] + content[place + length :],
        "zeros": content[:place] + bytes(length) + content[place + length :],
        "double": content + content,
        "mark": b"\xef\xbb\xbf" + content,
        "utf-16": content.decode("latin-1").encode("utf-16"),
        "empty": b"",
        "page": b"<html>404</html>",
        "deep": b"[" * 1200,
        "digits": b"9" * 10_000,
        "pickle": pickle.dumps(Trap()),
        "other": stray,
    }
    return choices[draw(st.sampled_from(list(choices)))]


class Trap:
    """Ends the process where a pickle of it is loaded."""

    def __reduce__(self):
        import os

        return os._exit, (86,)


def json_files(valid):
    """A file's bytes: a JSON value with broken parts, or its text damaged."""
    return broken(valid).map(to_json) | damaged(to_json(valid))


def to_json(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@contextmanager
def kept(name: str, *more: type[Exception]) -> Iterator[None]:
    """Fails unless what is done inside goes well or raises a promised error, in one sentence that holds `name`."""
    try:
        yield
    except (*PROMISED, *more) as error:
        assert type(error) in (*PROMISED, *more), f"a bare {type(error).__name__}: {error}"
        text = str(error)
        assert name in text, f"does not name {name}: {text}"
        assert "\n" not in text, f"more than one line: {text}"
        assert len(text) < 900, f"too long: {text}"


@contextmanager
def little_memory() -> Iterator[None]:
    """Lets the process take little more memory than it has, so that a huge allocation fails instead of thriving."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
