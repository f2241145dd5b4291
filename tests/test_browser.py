"""Notebook 14 in a real JupyterLab, in a real browser: what a person does, and whether the kernel has what he made.

Needs Chromium and playwright's Python package, and is skipped without. Screenshots are kept in EVSAM_SCREENSHOTS, or
under pytest's temporary folder.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from jupyter_client import BlockingKernelClient

REPO = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 120_000  # milliseconds; a loaded machine is slow to import torch
TOKEN = "evsam"

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on a copy of notebook 14: its address, and the folder where kernels leave their connection files."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install '.[lab]'")
    home = tmp_path_factory.mktemp("lab")
    shutil.copy(REPO / "notebooks" / "14_interactive_demo.ipynb", home)
    for name in ("config", "data", "runtime"):
        (home / f".{name}").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {f"JUPYTER_{name.upper()}_DIR": str(home / f".{name}") for name in ("config", "data", "runtime")}
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home}"]  # fmt: skip
    with (home / "lab.log").open("w") as log:
        environment = os.environ | folders | {"PYTHONPATH": path}
        server = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_for(lambda: urlopen(f"{address}/api/status?token={TOKEN}", timeout=5).status == 200)
            yield address, home / ".runtime"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (Debian's package chromium)")
    with playwright.sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield window
        window.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("EVSAM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _wait_for(ready, seconds=90):
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError("the server did not come up")
        time.sleep(0.3)


class Page:
    """The notebook in the browser, and a line into its kernel."""

    def __init__(self, browser, lab, shots):
        address, runtime = lab
        self.shots, self.errors = shots, []
        self.page = browser.new_page(viewport={"width": 1360, "height": 980}, accept_downloads=True)
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{address}/lab/tree/14_interactive_demo.ipynb?token={TOKEN}")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        self.page.wait_for_function("/\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText)")
        self.page.locator(".jp-Cell").first.click()
        for _ in range(5):  # title, parameters, imports, text, widget
            self.page.keyboard.press("Shift+Enter")
        self.canvas = self.page.locator(".evsam canvas.view")
        self.canvas.wait_for()
        self.page.wait_for_function("document.querySelector('.evsam canvas.view').ariaLabel?.startsWith('Coins')")
        self.status = self.page.locator(".evsam .status .text")
        kernel = _only(json.loads(urlopen(f"{address}/api/kernels?token={TOKEN}").read()))["id"]
        self.kernel_url = f"{address}/api/kernels/{kernel}"
        self.client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{kernel}.json"))
        self.client.load_connection_file()
        self.client.start_channels()
        self.kernel("import json, numpy as np")

    def kernel(self, code, value="None"):
        """Runs code in the notebook's kernel and returns the value of an expression, by way of JSON."""
        reply = self.client.execute_interactive(
            code, user_expressions={"v": f"json.dumps({value})"} if value != "None" else {}, timeout=120,
            output_hook=lambda message: None,
        )  # fmt: skip
        assert reply["content"]["status"] == "ok", reply["content"]
        found = reply["content"]["user_expressions"]
        if not found:
            return None
        assert found["v"]["status"] == "ok", found
        return json.loads(eval(found["v"]["data"]["text/plain"]))

    def at(self, x, y):
        """A place of the coins' picture, on the canvas."""
        self.canvas.scroll_into_view_if_needed()
        edge = self.canvas.bounding_box()
        scale = min(edge["width"] / 384, edge["height"] / 303)
        left, top = (edge["width"] - 384 * scale) / 2, (edge["height"] - 303 * scale) / 2
        return edge["x"] + left + (x + 0.5) * scale, edge["y"] + top + (y + 0.5) * scale

    def told(self, pattern):
        """Waits until the status line says so."""
        self.page.wait_for_function(
            "pattern => new RegExp(pattern).test(document.querySelector('.evsam .status .text').innerText)", arg=pattern
        )

    def shot(self, name):
        self.page.wait_for_timeout(250)
        self.page.locator(".evsam").screenshot(path=self.shots / f"{name}.png")

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=False)


def _only(rows):
    assert len(rows) == 1, rows
    return rows[0]


@pytest.fixture(scope="module")
def page(browser, lab, shots):
    opened = Page(browser, lab, shots)
    yield opened
    opened.client.stop_channels()
    opened.page.close()


COMPARE = """
from evsam_lib import Predictor as _P
_act = widget.segmenter
_p = _P(_act.model); _p.set_image(_act.image)
def _expected(item):
    points = np.array(item.points, float).reshape(-1, 3)
    masks, iou, _ = _p.predict(*((points[:, :2], points[:, 2].astype(int)) if len(points) else (None, None)),
                               None if item.box is None else np.array(item.box))
    return masks[iou.argmax()]
_same = [bool(np.array_equal(mask, _expected(item))) for mask, item in zip(_act.masks(), _act.masked(), strict=True)]
"""
ITEMS = "[[[list(p) for p in i.points], i.box and list(i.box)] for i in widget.segmenter.masked()]"


class TestNotebook14:
    def test_click_and_shift_click(self, page):
        page.shot("1_opened")
        page.page.mouse.click(*page.at(50, 60))
        page.told("Object 1: mask")
        page.shot("2_click")
        page.page.keyboard.down("Shift")
        page.page.mouse.click(*page.at(90, 100))
        page.page.keyboard.up("Shift")
        page.page.wait_for_function("!document.querySelector('.evsam').classList.contains('busy')")
        (points, box), = page.kernel("", ITEMS)  # fmt: skip
        assert box is None
        assert [label for *_, label in points] == [1, 0]
        for (x, y, _), aim in zip(points, [(50, 60), (90, 100)], strict=True):
            assert abs(x - aim[0]) <= 1 and abs(y - aim[1]) <= 1

    def test_undo_takes_back(self, page):
        page.page.keyboard.press("z")
        page.told("Undone")
        assert len(page.kernel("", ITEMS)[0][0]) == 1

    def test_drag_makes_a_box(self, page):
        page.button("Next object (N)").click()
        page.told("Object 2: click on it")
        page.page.mouse.move(*page.at(132, 28))
        page.page.mouse.down()
        page.page.mouse.move(*page.at(160, 60), steps=4)
        page.page.mouse.move(*page.at(180, 74), steps=4)
        page.shot("3_dragging")
        page.page.mouse.up()
        page.told("Object 2: mask")
        box = page.kernel("", ITEMS)[1][1]
        assert all(abs(a - b) <= 2 for a, b in zip(box, (132, 28, 180, 74), strict=True)), box

    def test_the_kernel_has_the_masks_of_the_library(self, page):
        page.shot("4_two_objects")
        assert page.kernel(COMPARE, "_same") == [True, True]

    def test_what_is_seen_is_what_the_kernel_has(self, page):
        """The middle of the first mask is tinted in its color, the ground beside it is not."""
        x, y = page.at(40, 50)
        pixel = page.page.evaluate(
            "([x, y]) => { const c = document.querySelector('.evsam canvas.view'), e = c.getBoundingClientRect();"
            " return [...c.getContext('2d').getImageData((x - e.x) * devicePixelRatio, (y - e.y) * devicePixelRatio,"
            " 1, 1).data] }",
            [x, y],
        )
        assert pixel[2] > pixel[0] + 25  # #0072B2 over grey

    def test_hover_and_choice(self, page):
        page.page.mouse.move(*page.at(210, 60))
        page.page.mouse.move(*page.at(212, 62))
        page.page.wait_for_timeout(1200)
        page.shot("5_hover")
        page.page.keyboard.press("2")
        page.told("mask 2 of 3, yours")
        assert page.kernel("", "widget.segmenter.current.choice") == 1
        page.page.keyboard.press("0")
        page.told("the model's choice")

    @pytest.mark.parametrize(("name", "suffix"), [("Label picture", ".png"), ("COCO", ".json"), ("NumPy", ".npz")])
    def test_export_downloads_what_the_kernel_exports(self, page, name, suffix, tmp_path):
        with page.page.expect_download() as download:
            page.button(name).click()
        path = tmp_path / f"got{suffix}"
        download.value.save_as(path)
        code = f"_got = open({str(path)!r}, 'rb').read()"
        if suffix == ".npz":  # an archive holds the time of its making
            code = f"_got = np.load({str(path)!r})['masks']"
            assert page.kernel(code, "bool(np.array_equal(_got, widget.segmenter.masks()))")
        else:
            assert page.kernel(code, f"_got == widget.segmenter.encoded({suffix!r})")

    def test_own_photograph(self, page, tmp_path):
        """Larger than one message may be, so it comes in parts; grey, too."""
        import numpy as np
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 255, (2000, 3000), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "mine.png")
        assert (tmp_path / "mine.png").stat().st_size > 4e6
        page.page.set_input_files(".evsam input[type=file]", tmp_path / "mine.png")
        page.told(r"mine\.png, 3000 x 2000 pixels")
        assert page.kernel("", "list(widget.segmenter.image.shape)") == [2000, 3000, 3]
        (tmp_path / "no.png").write_bytes(b"no picture")
        page.page.set_input_files(".evsam input[type=file]", tmp_path / "no.png")
        page.told("cannot be read")
        page.shot("6_error")
        page.page.locator(".evsam select[aria-label=Picture]").select_option("Coffee")
        page.told("Coffee, 600 x 400")

    def test_another_engine(self, page):
        page.page.locator(".evsam select[aria-label=Engine]").select_option("fused")
        page.told("in fused: compare the two times")
        assert page.kernel("", "widget.engine") == "fused"
        page.page.locator(".evsam select[aria-label=Engine]").select_option("eager")
        page.told("in eager: compare")

    def test_help_zoom_and_keyboard_alone(self, page):
        page.page.locator(".evsam").focus()
        page.page.keyboard.press("?")
        page.shot("7_help")
        page.page.keyboard.press("Escape")
        page.page.keyboard.press("+")
        for key in ("ArrowUp", "ArrowLeft", "Enter"):
            page.page.keyboard.press(key)
        page.told("Object 1: mask")
        page.shot("8_keyboard_zoomed")
        page.page.keyboard.press("r")

    def test_second_widget_and_dead_kernel(self, page):
        page.kernel("_second = PromptWidget(widget.segmenter.model); _second.receive({'do': 'point', 'x': 50, 'y': 60,"
                    " 'label': 1})")  # fmt: skip
        assert page.kernel("", "[len(widget.segmenter.masked()), len(_second.segmenter.masked())]") == [1, 1]
        page.page.request.post(f"{page.kernel_url}/restart?token={TOKEN}")
        page.page.wait_for_timeout(1500)
        page.canvas.click(position={"x": 200, "y": 150})
        page.told("restarted|does not listen")
        page.shot("9_kernel_gone")

    def test_nothing_was_thrown(self, page):
        assert not page.errors
        text = page.page.locator(".jp-Notebook").inner_text()
        assert not re.search(r"Traceback|Error displaying widget", text)
