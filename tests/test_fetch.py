"""Fetching weights and data: from a server in this process that cuts, changes, refuses and lies; no network."""

import dataclasses
import errno
import hashlib
import io
import json
import pickle
import re
import socket
import stat
import threading
import urllib.error
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evsam_lib.data.coco import CocoImages
from evsam_lib.fetch import __main__ as command
from evsam_lib.fetch import download
from evsam_lib.fetch.catalog import DATA, SAM3_FILES, Item, Source, choose, fetch, state, weights
from evsam_lib.fetch.download import FetchError, ensure
from evsam_lib.fetch.unpack import BadArchive, marker_of, unpack
from evsam_lib.models.zoo import ZOO, weights_path

BODY = bytes(range(256)) * 40  # 10,240 bytes
OTHER = BODY[::-1]


def sha(body):
    return hashlib.sha256(body).hexdigest()


class Server:
    """Serves `files`; `plan` lists what to do to the next requests, None or a dictionary of misdeeds each.

    Misdeeds: status (instead of 200), cut (bytes of body after which the connection ends), no_range, no_if_range,
    headers (set or, if None, left out).
    """

    def __init__(self):
        self.files, self.plan, self.seen, self.tokens = {}, [], [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request):
        plan = (self.plan.pop(0) if self.plan else None) or {}
        self.tokens.append(request.headers.get("Authorization"))
        body = self.files.get(request.path)
        status = plan.get("status", 200 if body is not None else 404)
        if status >= 300:
            self.seen.append((request.headers.get("Range"), request.headers.get("If-Range"), 0))
            request.send_response(status)
            for key, value in plan.get("headers", {}).items():
                request.send_header(key, value)
            request.end_headers()
            return
        etag, total, start = f'"{sha(body)}"', len(body), 0
        headers = {"ETag": etag, "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        condition = None if plan.get("no_if_range") else request.headers.get("If-Range")
        if wanted and not plan.get("no_range") and condition in (None, etag):
            start, status = int(wanted[1]), 206
            if start >= total:
                status, headers["Content-Range"], body = 416, f"bytes */{total}", b""
            else:
                headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        headers["Content-Length"] = str(len(body) - start if body else 0)
        rest = body[start:][: plan.get("cut")]
        self.seen.append((request.headers.get("Range"), request.headers.get("If-Range"), len(rest)))
        request.send_response(status)
        for key, value in (headers | plan.get("headers", {})).items():
            if value is not None:
                request.send_header(key, value)
        request.end_headers()
        request.wfile.write(rest)


@pytest.fixture(autouse=True)
def quick_and_plain(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setattr(download, "CHUNK", 1000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_ENDPOINT", "EVSAM_WEIGHTS_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    server = Server()
    server.files["/net.pt"] = BODY
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def said():
    return []


@pytest.fixture
def get(server, tmp_path, said):
    """`ensure` of the server's net.pt, in an own folder."""
    return lambda **options: ensure(f"{server.url}/net.pt", tmp_path / "w" / "net.pt", say=said.append, **options)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# One file


def test_a_file_arrives_and_a_second_call_asks_for_nothing(get, server, tmp_path):
    assert get(sha256=sha(BODY), size=len(BODY))
    assert (tmp_path / "w" / "net.pt").read_bytes() == BODY
    assert files(tmp_path) == ["net.pt"]
    assert not get(sha256=sha(BODY))
    assert len(server.seen) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_cut_is_resumed_and_only_the_rest_is_sent(get, server, tmp_path, known):
    server.plan = [{"cut": 3000}, {"cut": 5000}]
    assert get(sha256=sha(BODY) if known else None)
    etag = f'"{sha(BODY)}"'
    assert server.seen == [(None, None, 3000), ("bytes=3000-", etag, 5000), ("bytes=8000-", etag, len(BODY) - 8000)]
    assert (tmp_path / "w" / "net.pt").read_bytes() == BODY


def test_a_later_call_goes_on(get, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.plan = [{"cut": 3000}]
    with pytest.raises(FetchError, match=r"cut off at 3000 of 10240 bytes; given up after 1 attempts; 3 kB are kept"):
        get(sha256=sha(BODY))
    assert files(tmp_path) == ["net.pt.part", "net.pt.part.json"]
    assert get(sha256=sha(BODY))
    assert server.seen[1][2] == len(BODY) - 3000
    assert files(tmp_path) == ["net.pt"]


@pytest.mark.parametrize("misdeed", [{}, {"no_if_range": True}])
def test_a_file_that_changed_meanwhile_is_fetched_anew(get, server, tmp_path, monkeypatch, misdeed):
    server.plan = [{"cut": 3000}]
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(FetchError):
            get()
    server.files["/net.pt"] = OTHER
    server.plan = [misdeed]
    assert get()
    assert (tmp_path / "w" / "net.pt").read_bytes() == OTHER


def test_a_part_from_another_address_is_dropped(get, server, tmp_path, monkeypatch):
    server.plan = [{"cut": 3000}]
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(FetchError):
            get()
    server.files["/mirror/net.pt"] = BODY
    assert ensure(f"{server.url}/mirror/net.pt", tmp_path / "w" / "net.pt", say=str)
    assert server.seen[1] == (None, None, len(BODY))


@pytest.mark.parametrize("span", [f"bytes 2000-{len(BODY) - 1}/{len(BODY)}", f"bytes 3000-{len(BODY)}/{len(BODY) + 1}"])
def test_a_rest_that_does_not_fit_is_not_taken(get, server, tmp_path, span):
    bare = {"ETag": None}
    server.plan = [{"cut": 3000, "headers": bare}, {"headers": bare | {"Content-Range": span}}, {"headers": bare}]
    assert get(sha256=sha(BODY))
    assert server.seen[2][0] is None


def test_many_cuts_are_outlasted_while_each_attempt_brings_more(get, server):
    server.plan = [{"cut": 1000}] * (2 * download.ATTEMPTS)
    assert get(sha256=sha(BODY))


def test_more_than_the_file_is_started_again(get, server, tmp_path):
    spoilt = {"headers": {"Content-Length": None, "ETag": None}}  # its size is ours to know
    server.files["/net.pt"] = BODY + b"more"
    server.plan = [spoilt] * download.ATTEMPTS
    with pytest.raises(FetchError, match=r"more came than belongs to it"):
        get(sha256=sha(BODY), size=len(BODY))
    assert files(tmp_path) == []


def test_a_server_without_ranges_sends_it_from_the_start(get, server, tmp_path, said):
    server.plan = [{"cut": 3000}, {"no_range": True}]
    assert get(sha256=sha(BODY))
    assert server.seen[1] == ("bytes=3000-", f'"{sha(BODY)}"', len(BODY))
    assert (tmp_path / "w" / "net.pt").read_bytes() == BODY
    assert "net.pt: the server sends it from the start" in said


@pytest.mark.parametrize("known", [True, False])
def test_without_tag_and_date_only_a_known_sum_allows_to_resume(get, server, tmp_path, known):
    bare = {"headers": {"ETag": None}}
    server.plan = [bare | {"cut": 3000}, bare]
    assert get(sha256=sha(BODY) if known else None)
    assert server.seen[1][0] == ("bytes=3000-" if known else None)
    assert (tmp_path / "w" / "net.pt").read_bytes() == BODY


def test_a_weak_tag_is_no_condition_and_a_date_is(get, server):
    headers = {"ETag": 'W/"1"', "Last-Modified": "Wed, 11 Jul 2018 00:00:00 GMT"}
    server.plan = [{"cut": 3000, "headers": headers}, {"headers": headers, "no_if_range": True}]
    assert get()
    assert server.seen[1][:2] == ("bytes=3000-", "Wed, 11 Jul 2018 00:00:00 GMT")


def test_a_part_that_the_server_cannot_continue_is_dropped(get, server, tmp_path):
    get(sha256=sha(BODY))
    folder = tmp_path / "w"
    note = {"url": f"{server.url}/net.pt", "total": None, "ETag": None, "Last-Modified": None}
    (folder / "net.pt").rename(folder / "net.pt.part")
    (folder / "net.pt.part.json").write_text(json.dumps(note))
    assert get(sha256=sha(BODY))  # 416, then from the start
    assert [line[0] for line in server.seen] == [None, f"bytes={len(BODY)}-", None]


def test_a_part_that_is_whole_needs_no_request(get, server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "_sum", lambda path: pytest.fail("stopped before the check"))
        with pytest.raises(pytest.fail.Exception):
            get(sha256=sha(BODY))
    assert get(sha256=sha(BODY))
    assert len(server.seen) == 1


def test_a_part_without_its_note_or_with_a_broken_one_is_dropped(get, server, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "net.pt.part").write_bytes(OTHER[:3000])
    (tmp_path / "w" / "net.pt.part.json").write_text("[]")
    assert get(sha256=sha(BODY))
    assert server.seen == [(None, None, len(BODY))]


def test_a_wrong_sum_leaves_nothing(get, tmp_path):
    with pytest.raises(FetchError, match=f"net.pt came whole but has sha256 {sha(BODY)}, not {sha(OTHER)}"):
        get(sha256=sha(OTHER))
    assert files(tmp_path) == []


def test_a_wrong_file_stays_until_the_right_one_is_whole(get, server, tmp_path):
    path = tmp_path / "w" / "net.pt"
    path.parent.mkdir()
    path.write_bytes(OTHER)
    server.plan = [{"status": 404}]
    with pytest.raises(FetchError):
        get(sha256=sha(BODY))
    assert path.read_bytes() == OTHER
    assert get(sha256=sha(BODY))
    assert path.read_bytes() == BODY


def test_a_file_that_never_comes_whole_is_given_up(get, server, tmp_path):
    server.plan = [{"cut": 4000, "no_range": True}] * 9
    with pytest.raises(FetchError, match="cut off at 4000 of 10240 bytes; given up"):
        get(sha256=sha(BODY))
    assert not (tmp_path / "w" / "net.pt").exists()
    assert len(server.seen) <= download.ATTEMPTS + 1


def test_a_body_without_length_is_checked_by_the_known_size(get, server):
    server.plan = [{"cut": 4000, "headers": {"Content-Length": None}}]
    assert get(sha256=sha(BODY), size=len(BODY))
    assert [line[0] for line in server.seen] == [None, "bytes=4000-"]


def test_another_size_is_noticed_before_the_download(get, tmp_path):
    with pytest.raises(FetchError, match="has 10240 bytes, 99 are expected"):
        get(sha256=sha(BODY), size=99)
    assert files(tmp_path) == []


def test_an_unknown_sum_is_recorded_and_holds(get, server, tmp_path, said):
    folder = tmp_path / "w"
    assert get()
    assert (folder / "net.pt.sha256").read_text() == f"{sha(BODY)}  net.pt\n"
    assert any("no public sha256 is known" in line for line in said)
    assert not get()
    (folder / "net.pt").unlink()
    server.files["/net.pt"] = OTHER
    with pytest.raises(FetchError, match=r"is that of the first download: .* delete .*net.pt.sha256"):
        get()
    assert files(folder) == ["net.pt.sha256"]
    (folder / "net.pt.sha256").unlink()
    assert get()


def test_the_sum_of_a_file_put_there_by_hand_is_recorded(get, server, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "net.pt").write_bytes(OTHER)
    assert not get()
    assert sha(OTHER) in (tmp_path / "w" / "net.pt.sha256").read_text()
    assert server.seen == []


def test_a_passing_fault_is_waited_out(get, server, said):
    server.plan = [{"status": 503}, {"status": 429}]
    assert get(sha256=sha(BODY))
    assert [line for line in said if "again in" in line] == [
        "net.pt: the server answers 503; again in 0 s",
        "net.pt: the server answers 429; again in 0 s",
    ]


def test_the_server_says_how_long_to_wait(get, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.plan = [
        {"status": 503, "headers": {"Retry-After": "7"}},
        {"status": 503, "headers": {"Retry-After": "3600"}},
    ]
    assert get()
    assert pauses == [7, download.LONGEST_PAUSE_S]


def test_without_a_terminal_progress_is_plain_lines(get, said, monkeypatch):
    monkeypatch.setattr(download, "LINE_EVERY_S", -1.0)
    get()
    assert said[:2] == ["net.pt: 1 kB of 10 kB", "net.pt: 2 kB of 10 kB"]


@pytest.mark.parametrize(("status", "text"), [(404, "is not there"), (403, "is not given out"), (418, "is refused")])
def test_a_lasting_refusal_is_not_repeated(get, server, tmp_path, status, text):
    server.plan = [{"status": status}]
    with pytest.raises(FetchError, match=rf"net.pt {text}.*\(HTTP {status}\)"):
        get()
    assert len(server.seen) == 1
    assert files(tmp_path) == []


def test_a_web_page_is_no_file(get, server, tmp_path):
    server.plan = [{"headers": {"Content-Type": "text/html; charset=utf-8"}}]
    with pytest.raises(FetchError, match="a web page came instead"):
        get()
    assert files(tmp_path) == []


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/net.pt"
    with pytest.raises(FetchError, match=r"the connection is refused; given up after 4 attempts$"):
        ensure(url, tmp_path / "net.pt", say=str)

    def no_name(*_, **__):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", no_name)
    with pytest.raises(FetchError, match="no network, or no such host"):
        ensure(url, tmp_path / "net.pt", say=str)


def test_only_web_addresses_are_opened(tmp_path):
    (tmp_path / "secret").write_bytes(BODY)
    with pytest.raises(FetchError, match="no http or https address"):
        ensure((tmp_path / "secret").as_uri(), tmp_path / "copy", say=str)


def test_a_mirror_of_hugging_face(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hf/")
    server.files["/hf/some/model/resolve/main/net.pt"] = BODY
    assert ensure("https://huggingface.co/some/model/resolve/main/net.pt", tmp_path / "net.pt", say=str)


def test_room_on_the_disk_is_asked_for_before_anything_is_written(get, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2 * len(BODY) - 1})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FetchError, match="has 20 kB free, 20 kB are needed"):
        get(room=2.0)
    assert files(tmp_path) == []


def break_writing(monkeypatch, error, after):
    """Every file opened from here on raises `error` at the write that passes `after` bytes."""

    class Full(io.FileIO):
        def write(self, chunk):
            if self.tell() + len(chunk) > after:
                raise error
            return super().write(chunk)

    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **k: Full(path, mode) if mode in ("wb", "ab") else plain(path, mode, **k)
    )


def test_a_full_disk_keeps_what_came(get, server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_writing(patch, OSError(errno.ENOSPC, "No space left on device"), after=4500)
        with pytest.raises(FetchError, match=r"^the disk of .* is full; 4 kB of net.pt are kept$"):
            get(sha256=sha(BODY))
    assert get(sha256=sha(BODY))
    assert server.seen[1][0] == "bytes=4000-"


def test_ctrl_c_keeps_what_came_and_says_so(get, server, said, monkeypatch):
    with monkeypatch.context() as patch:
        break_writing(patch, KeyboardInterrupt(), after=4500)
        with pytest.raises(KeyboardInterrupt):
            get(sha256=sha(BODY))
    assert said[-1] == "stopped: 4 kB of net.pt are kept, the same command goes on from there"
    assert get(sha256=sha(BODY))
    assert server.seen[1][0] == "bytes=4000-"


def test_a_folder_that_cannot_be_written(get, tmp_path, monkeypatch):
    (tmp_path / "w").write_text("a file where the folder belongs")
    with pytest.raises(FetchError, match=r"cannot write .*File exists"):
        get()
    (tmp_path / "w").unlink()

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FetchError, match=r"^no permission to write .*w$"):
        get()


def test_nothing_is_unpickled(server, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    server.files["/trap.pt"] = pickle.dumps(Trap())
    assert ensure(f"{server.url}/trap.pt", tmp_path / "trap.pt", say=str)
    assert not ensure(f"{server.url}/trap.pt", tmp_path / "trap.pt", say=str)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (815_585_330, "816 MB"), (19.34e9, "19.3 GB")]
)
def test_sizes_as_people_say_them(count, text):
    assert download.size_text(count) == text


# Archives


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def small_coco(images=2):
    entries = [{"id": i, "height": 4, "width": 4, "file_name": f"{i:012}.jpg"} for i in range(images)]
    return (
        zipped({"val2017/": "", **{f"val2017/{e['file_name']}": "jpeg" for e in entries}, "val2017/notes.txt": "x"}),
        zipped({"annotations/instances_val2017.json": json.dumps({"images": entries, "annotations": []}), "more": "y"}),
    )


@pytest.fixture
def coco(server):
    """The source `coco` with an archive of two pictures on our server."""
    items = []
    for item, body in zip(DATA["coco"].items, small_coco(), strict=True):
        server.files[f"/{item.name}"] = body
        count = 2 if item.count > 1 else 1
        url = f"{server.url}/{item.name}"
        items.append(dataclasses.replace(item, url=url, sha256=sha(body), size=len(body), count=count))
    return dataclasses.replace(DATA["coco"], items=tuple(items))


def test_a_data_set_is_laid_out_as_its_loader_reads_it(coco, server, tmp_path):
    assert [state(item, tmp_path) for item in coco.items] == ["absent", "absent"]
    assert fetch(coco, tmp_path, say=str)
    folder = tmp_path / "coco"
    assert files(folder) == ["000000000000.jpg", "000000000001.jpg", "instances_val2017.json"]  # and no archive
    images = CocoImages(folder / "val2017", folder / "annotations" / "instances_val2017.json")
    assert all(image.path.is_file() for image in images)
    assert [state(item, tmp_path) for item in coco.items] == ["present", "present"]
    assert not fetch(coco, tmp_path, say=str)
    assert len(server.seen) == 2


def test_a_kept_archive_is_used_again(coco, server, tmp_path):
    assert fetch(coco, tmp_path, keep_archive=True, say=str)
    assert "val2017.zip" in files(tmp_path)
    (tmp_path / "coco" / "val2017" / "000000000000.jpg").unlink()
    assert state(coco.items[0], tmp_path) == "partial"
    assert fetch(coco, tmp_path, say=str)
    assert len(server.seen) == 2


def test_unpacking_that_was_stopped_is_done_again(coco, server, tmp_path, said, monkeypatch):
    with monkeypatch.context() as patch:
        break_writing(patch, KeyboardInterrupt(), after=len(small_coco()[0]))  # the archive fits, its contents do not
        patch.setattr("shutil.copyfileobj", lambda source, sink, _: sink.write(b"x" * 10**6))
        with pytest.raises(KeyboardInterrupt):
            fetch(coco, tmp_path, say=said.append)
    assert said[-1] == "stopped: val2017.zip is kept, the same command unpacks it again"
    assert files(tmp_path) == [".val2017.zip.unpacking", "val2017.zip"]
    for index in range(2):  # all that is asked for is there, but not surely whole
        (tmp_path / "coco" / "val2017").mkdir(exist_ok=True)
        (tmp_path / "coco" / "val2017" / f"{index:012}.jpg").touch()
    assert state(coco.items[0], tmp_path) == "partial"
    assert fetch(coco, tmp_path, say=str)
    assert (tmp_path / "coco" / "val2017" / "000000000000.jpg").read_text() == "jpeg"
    assert not marker_of(tmp_path / "coco" / "val2017.zip").exists()
    assert len(server.seen) == 2


def test_an_archive_with_too_few_files_is_said_and_kept(coco, tmp_path):
    short = dataclasses.replace(coco, items=(dataclasses.replace(coco.items[0], count=3),))
    with pytest.raises(FetchError, match="are not the 3 files expected"):
        fetch(short, tmp_path, say=str)
    assert "val2017.zip" in files(tmp_path)


def link_entry():
    info = zipfile.ZipInfo("val2017/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name", ["../out.jpg", "a/../../out.jpg", "/out.jpg", "..\\out.jpg", "C:/out.jpg", link_entry()], ids=str
)
def test_an_archive_that_leads_out_is_refused_whole(tmp_path, name):
    archive, folder = tmp_path / "in" / "a.zip", tmp_path / "in"
    folder.mkdir()
    archive.write_bytes(zipped({"good.jpg": "x", name: "/etc/passwd"}))
    with pytest.raises(BadArchive, match=r"leads out of the folder|is a link"):
        unpack(archive, folder, say=str)
    assert files(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("damage", ["no zip", "bad content"])
def test_a_damaged_archive_of_unknown_sum_is_not_remembered(server, tmp_path, damage):
    body = (
        b"no zip at all"
        if damage == "no zip"
        else zipped({"a.json": "contents of it"}).replace(b"contents", b"CONTENTS")
    )
    server.files["/a.zip"] = body
    item = Item(f"{server.url}/a.zip", members="*", makes="a.json")
    with pytest.raises(BadArchive, match=r"is no usable zip archive"):
        fetch(Source("", "", (item,)), tmp_path, say=str)
    assert set(files(tmp_path)) <= {".a.zip.unpacking"}
    server.files["/a.zip"] = zipped({"a.json": "{}"})
    assert fetch(Source("", "", (item,)), tmp_path, say=str)
    assert state(item, tmp_path) == "present"


def test_room_for_the_contents_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(zipped({"a": "x" * 1000}))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 999}))
    with pytest.raises(FetchError, match="are needed"):
        unpack(tmp_path / "a.zip", tmp_path, say=str)
    assert files(tmp_path) == ["a.zip"]


def test_a_full_disk_while_unpacking_keeps_the_archive(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(zipped({"a": "x" * 1000}))
    break_writing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), after=500)
    with pytest.raises(FetchError, match=r"cannot unpack .*a.zip: No space left on device; it is kept"):
        unpack(tmp_path / "a.zip", tmp_path, say=str)
    assert files(tmp_path) == [".a.zip.unpacking", "a.zip"]


# What there is


def test_every_checkpoint_of_the_zoo_can_be_fetched():
    released = {name for name, entry in ZOO.items() if entry.checkpoint}
    assert set(weights()) == released | set(SAM3_FILES) | {"SAM3"}
    for name in released:
        source = weights()[name]
        (item,) = source.items
        assert item.url == ZOO[name].checkpoint
        assert source.licence == ZOO[name].licence
        assert (item.name, item.sha256, item.members) == (ZOO[name].file_name, ZOO[name].sha256, None)


def test_sam3s_files_are_those_that_its_own_table_names():
    from evsam_lib.sam3 import zoo
    from evsam_lib.sam3.load import SAM3_FILE

    files = {name: source.items[0].name for name, source in weights().items()}
    assert {name: files[name] for name in zoo.IMAGES} == {name: row.file_name for name, row in zoo.IMAGES.items()}
    assert {name: files[f"{name}-geometry"] for name in zoo.FINE_TUNED} == zoo.FINE_TUNED
    assert {text: files[f"LiteText-{text[-1]}"] for text in zoo.TEXTS} == zoo.LITETEXT
    assert files["SAM3"] == SAM3_FILE


@pytest.mark.parametrize("name", DATA)
def test_data_sources_are_well_formed(name):
    for item in DATA[name].items:
        assert item.url.startswith("https://")
        assert item.sha256 is None or re.fullmatch("[0-9a-f]{64}", item.sha256)
        assert (item.members is None) == (item.makes is None)
        assert not Path(item.folder).is_absolute()
        if item.members is not None and DATA[name].by_hand is None:
            assert item.name.endswith(".zip")
    assert DATA[name].licence
    assert DATA[name].purpose


def test_names_are_chosen_in_order_and_all_leaves_out_what_needs_consent():
    assert list(choose(["lvis", "coco"], DATA)) == ["lvis", "coco"]
    assert list(choose(["all"], DATA)) == [name for name in DATA if name not in ("sa1b", "saco-gold", "sa-v")]
    assert list(choose(["all"], weights())) == [name for name in weights() if name != "SAM3"]


def test_what_needs_consent_is_explained_until_it_is_there(tmp_path):
    with pytest.raises(FetchError, match=r"accept its licence.*unpack them into .*sa1b$"):
        fetch(DATA["sa1b"], tmp_path, say=str)
    (tmp_path / "sa1b" / "sa_000020").mkdir(parents=True)
    (tmp_path / "sa1b" / "sa_000020" / "sa_1.jpg").touch()
    assert not fetch(DATA["sa1b"], tmp_path, say=str)


@pytest.mark.parametrize("name", ["saco-gold", "sa-v"])
def test_sam3s_data_are_explained(name, tmp_path):
    with pytest.raises(FetchError, match=r"into .*/sa(co_gold|_v)$"):
        fetch(DATA[name], tmp_path, say=str)


class TestGate:
    """Files that their owners give to those they admit, by the user's own token."""

    @pytest.fixture
    def gated(self, server, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # nobody's own token
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hub" / "token"))
        item = Item(f"{server.url}/net.pt", gate="https://example.org/model")
        return lambda: fetch(Source("", "", (item,)), tmp_path / "w", say=str)

    def test_without_a_token(self, gated, server, tmp_path):
        server.plan = [{"status": 401}]
        with pytest.raises(
            FetchError, match=r"net.pt is given to those .* ask for access at https://example.org/model"
        ):
            gated()
        assert server.tokens == [None]
        assert files(tmp_path) == []

    def test_with_a_token_that_is_not_admitted(self, gated, server, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        server.plan = [{"status": 403}]
        with pytest.raises(FetchError, match="wait for the answer to your request"):
            gated()

    def test_the_token_goes_to_the_server_and_not_on_from_there(self, gated, server, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        server.files["/elsewhere"] = BODY
        server.plan = [{"status": 302, "headers": {"Location": f"{server.url}/elsewhere"}}]
        assert gated()
        assert server.tokens == ["Bearer hf_mine", None]
        assert (tmp_path / "w" / "net.pt").read_bytes() == BODY

    def test_others_never_see_a_token(self, get, server, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        assert get()
        assert server.tokens == [None]


# The command line


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty repository, so that nobody's params/local.yaml takes part."""
    monkeypatch.setattr(command, "repo_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def zoo(server, monkeypatch):
    """Two models of the zoo with their checkpoints on our server: the one right, the other's sum wrong."""
    for name, expected in (("efficientvit-sam-l0", BODY), ("efficientvit-sam-l1", OTHER)):
        url = f"{server.url}/{ZOO[name].file_name}"
        server.files[f"/{ZOO[name].file_name}"] = BODY
        monkeypatch.setitem(ZOO, name, dataclasses.replace(ZOO[name], checkpoint=url, sha256=sha(expected)))


def test_weights_land_where_load_model_looks(zoo, home, monkeypatch, capsys):
    monkeypatch.setenv("EVSAM_WEIGHTS_ROOT", str(home / "checkpoints"))
    assert command.main(["weights", "efficientvit-sam-l0"]) == 0
    assert weights_path("efficientvit-sam-l0", "official") == home / "checkpoints" / "efficientvit_sam_l0.pt"
    assert "Apache-2.0" in capsys.readouterr().out


def test_weights_elsewhere(zoo, home, capsys):
    assert command.main(["weights", "efficientvit-sam-l0", "--to", "there"]) == 0
    assert (home / "there" / "efficientvit_sam_l0.pt").read_bytes() == BODY
    assert f"EVSAM_WEIGHTS_ROOT={home / 'there'}" in capsys.readouterr().out


def test_folders_of_local_yaml_are_used(home, monkeypatch):
    assert command._root("weights") == Path("weights")
    (home / "params").mkdir()
    (home / "params" / "local.yaml").write_text("data_root: /big/data\nweights_root: /big/weights\n")
    assert command._root("data") == Path("/big/data")
    assert command._root("weights") == Path("/big/weights")
    monkeypatch.setenv("EVSAM_WEIGHTS_ROOT", "/mine")
    assert command._root("weights") == Path("/mine")


def test_one_that_fails_does_not_stop_the_others(zoo, home, capsys):
    assert command.main(["weights", "efficientvit-sam-l1", "efficientvit-sam-l0"]) == 1
    out, err = capsys.readouterr()
    assert "1 fetched, 0 already there, 1 failed (efficientvit-sam-l1)" in out
    assert re.fullmatch(r"evsam_lib.fetch: efficientvit-sam-l1: efficientvit_sam_l1.pt came whole but .*\n", err)
    assert files(home) == ["efficientvit_sam_l0.pt"]
    assert command.main(["weights", "efficientvit-sam-l0"]) == 0


def test_data_by_name(coco, home, monkeypatch):
    monkeypatch.setitem(DATA, "coco", coco)
    assert command.main(["data", "coco", "--to", "d", "--keep-archive"]) == 0
    assert (home / "d" / "coco" / "val2017.zip").is_file()
    assert command.main(["data", "sa1b", "--to", "d"]) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["weights", "efficientvit-sam-l9"], "unknown name 'efficientvit-sam-l9'. The nearest are efficientvit-sam-l"),
        (["weights", "sam-vit-mini"], "It has no released checkpoint"),
        (["data", "cooc"], "unknown name 'cooc'. The nearest are coco"),
        (["data"], "name what to fetch"),
        ([], "name what to fetch"),
    ],
)
def test_a_wrong_request_is_2(home, capsys, arguments, text):
    assert command.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_ctrl_c_is_130(zoo, home, monkeypatch, capsys):
    break_writing(monkeypatch, KeyboardInterrupt(), after=4500)
    assert command.main(["weights", "efficientvit-sam-l0"]) == 130
    assert "are kept, the same command goes on from there" in capsys.readouterr().out


def test_the_list_asks_no_network(home, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    (home / "weights").mkdir()
    (home / "weights" / "efficientvit_sam_l0.pt").write_bytes(BODY)
    (home / "weights" / "efficientvit_sam_l1.pt.part").write_bytes(BODY)
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in (*weights(), *DATA))
    states = {line.split()[0]: line for line in lines if line.startswith("efficientvit-sam-")}
    assert "present" in states["efficientvit-sam-l0"]
    assert "partial" in states["efficientvit-sam-l1"]
    assert "absent" in states["efficientvit-sam-l2"]
    assert any("19.3 GB" in line and "coco/train2017" in line for line in lines)
    assert files(home) == ["efficientvit_sam_l0.pt", "efficientvit_sam_l1.pt.part"]
