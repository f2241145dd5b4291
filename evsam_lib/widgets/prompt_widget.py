"""PromptWidget: a picture one clicks on, in JupyterLab, Notebook, VS Code or Colab (anywidget, no build chain).

The browser draws and sends small messages (a click, a box, a button); `receive` passes each on to the `Segmenter` and
publishes what came of it in traits. The picture travels once, masks as PNG of one bit a pixel. Where no browser
listens, the widget shows itself as a plain picture. Explained in notebook 14.
"""

import base64
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from matplotlib.figure import Figure
from PIL import Image

from evsam_lib.deploy.engines import ENGINES, with_engine
from evsam_lib.models.sam import Sam
from evsam_lib.models.weights import SHIPPED, weights_root
from evsam_lib.models.zoo import ZOO, load_model
from evsam_lib.widgets.pictures import SAMPLES, jpeg, mask_png, sample
from evsam_lib.widgets.segmenter import SUFFIXES, Segmenter
from evsam_lib.widgets.state import Item

__all__ = ["PromptWidget", "engine_choices", "model_choices"]

STATIC = Path(__file__).parent / "static"
SLOW_TO_START = ("compile", "aoti")  # they compile for minutes, which nobody who clicks would wait for
THUMB = 256  # longest side at which the small pictures of the three masks are made, pixels


def model_choices() -> dict[str, str]:
    """Models there are weights for on this machine: name -> "mini" (shipped) or "official" (its checkpoint is here)."""
    shipped = {file.stem: "mini" for file in sorted(SHIPPED.glob("*.safetensors"))}
    here = {n: "official" for n, e in ZOO.items() if e.file_name and (weights_root() / e.file_name).is_file()}
    return {name: weights for name, weights in (shipped | here).items() if name in ZOO}


def engine_choices(device: str = "cpu") -> list[str]:
    """Engines that run on this device with the packages there are, and start within seconds."""
    kind = device.partition(":")[0]
    there = {name: engine for name, engine in ENGINES.items() if kind in engine.devices and not engine.missing}
    return [name for name in there if name not in SLOW_TO_START]


@lru_cache(maxsize=2)
def _loaded(name: str, weights: str, device: str) -> Sam:
    """Two widgets on one model share it; it has no state."""
    return load_model(name, weights, device)


@lru_cache(maxsize=4)
def _behind(model: Sam, engine: str) -> Any:
    return with_engine(model, engine)


class PromptWidget(anywidget.AnyWidget):
    """Click, drag, see masks.

    Args:
        model: a model, or the name of one of `model_choices()`.
        image: anything `Segmenter.set_image` takes, or the name of a sample; None starts with an empty canvas.
        device: of models that are loaded by name.
        engine: one of `engine_choices(device)`.

    Attributes:
        segmenter: all that was done, and the masks: `widget.segmenter.masks()`.
        picture: the picture as a file for the browser.
        masks: {object's number: PNG of one bit a pixel, colored}.
        scene: all else that is drawn; see `_scene`.
        status: the line below: {"text", "error"}.
        reply: id of the last message that was dealt with.
        error: the exception behind the last error in `status`, for the curious.

    Raises:
        ValueError: no such model or no such picture. Later errors are told in the status line.
    """

    _esm = STATIC / "prompt.js"
    _css = STATIC / "prompt.css"
    picture = traitlets.Bytes().tag(sync=True)
    masks = traitlets.Dict().tag(sync=True)
    scene = traitlets.Dict().tag(sync=True)
    status = traitlets.Dict({"text": "", "error": False}).tag(sync=True)
    reply = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        model: Sam | str = "efficientvit-sam-mini",
        image: np.ndarray | Image.Image | str | Path | bytes | None = "Coins",
        *,
        device: str = "cpu",
        engine: str = "eager",
    ):
        self.device, self.engine = device, engine
        self.error: Exception | None = None
        self._files: dict[str, list[bytes]] = {}  # uploads on their way
        self._pngs: dict[tuple, bytes] = {}
        self._choices = model_choices()
        self._base = self._model(model) if isinstance(model, str) else model  # as it is, before any engine
        self.segmenter = Segmenter(_behind(self._base, engine))
        super().__init__()
        if image is not None:
            self._set_image(image)
        self._publish("Click on an object. Press ? for all keys." if image is not None else "Choose a picture.")
        self.on_msg(lambda _, content, buffers: self.receive(content, buffers))

    def receive(self, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        """One message of the browser. Errors become the status line; the state is then what it was.

        Args:
            message: {"do": what, "id": str, ...}, see `_do`.
            buffers: bytes that belong to it: a part of an uploaded file.
        """
        try:
            text = self._do(message, buffers)
            if text is not None:
                self._publish(text)
        except Exception as error:  # nobody reads tracebacks of a callback; the next click must work
            self.error = error
            known = isinstance(error, ValueError | OSError)
            text = str(error) if known else f"That did not work ({type(error).__name__}: {error})."
            self.status = {"text": text, "error": True}
        self.reply = str(message.get("id", ""))

    def _do(self, message: dict[str, Any], buffers: Sequence[bytes]) -> str | None:
        """Carries a message out; returns the status, or None where nothing changed that is drawn."""
        act = self.segmenter
        match message:
            case {"do": "point", "x": x, "y": y, "label": label}:
                return self._told(act.add_point(x, y, label))
            case {"do": "box", "box": [x0, y0, x1, y1]}:
                return self._told(act.set_box(x0, y0, x1, y1))
            case {"do": "choose", "choice": choice}:
                return self._told(act.choose(choice))
            case {"do": "hover", "x": x, "y": y}:
                return self._hover(x, y)
            case {"do": "undo"}:
                return "Undone." if act.undo() else "Nothing to undo."
            case {"do": "redo"}:
                return "Done again." if act.redo() else "Nothing to redo."
            case {"do": "next"}:
                return f"Object {act.next_object().number}: click on it, or drag a box around it."
            case {"do": "select", "number": number}:
                return f"Object {act.select(number).number}: the next click is about it."
            case {"do": "remove", "number": number}:
                act.remove(number)
                return f"Object {number} removed; Undo brings it back."
            case {"do": "clear"}:
                act.clear()
                return "All objects removed; Undo brings them back."
            case {"do": "feed back", "on": on}:
                act.feed_back = bool(on)
                return f"The last mask is {'given to the model with the next click' if on else 'not fed back'}."
            case {"do": "model", "name": name}:
                return self._change_model(name)
            case {"do": "engine", "name": name}:
                return self._change_engine(name)
            case {"do": "sample", "name": name}:
                return self._set_image(sample(name), name)
            case {"do": "upload", "name": name, "part": part, "parts": parts}:
                return self._upload(name, part, parts, buffers)
            case {"do": "export", "suffix": suffix}:
                return self._export(suffix)
        raise ValueError(f"Not understood: {message.get('do')!r}.")

    def _set_image(self, image: Any, name: str = "") -> str:
        if isinstance(image, str) and image in SAMPLES:
            image, name = sample(image), image
        self.segmenter.set_image(image, name=name)
        self._pngs.clear()
        with self.hold_sync():
            self.masks, self.scene = {}, self._scene()  # the old objects go before the new picture comes
            self.picture = jpeg(self.segmenter.picture, self.segmenter.view_hw)
        height, width = self.segmenter.size_hw
        return f"{self.segmenter.name}, {width} x {height} pixels: click on an object."

    def _upload(self, name: str, part: int, parts: int, buffers: Sequence[bytes]) -> str | None:
        """Files come in parts, since the server of notebooks takes no message over 10 MB."""
        if part == 0:
            self._files = {name: []}
        self._files[name].append(bytes(buffers[0]))
        if part + 1 < parts:
            return None
        return self._set_image(b"".join(self._files.pop(name)), name)

    def _change_model(self, name: str) -> str:
        self.status = {"text": f"Loading {name} ...", "error": False}
        base = self._model(name)
        self.segmenter.set_model(_behind(base, self.engine))
        self._base = base
        return f"{name}: the picture is encoded anew, and every object asked for again."

    def _change_engine(self, name: str) -> str:
        if name not in (there := engine_choices(self._base.device.type)):
            raise ValueError(f"There is no engine {name!r} here; there are {', '.join(there)}.")
        self.status = {"text": f"Preparing {name} ...", "error": False}
        self.segmenter.set_model(_behind(self._base, name))
        self.engine = name
        return f"{self._base.name} in {name}: compare the two times."

    def _model(self, name: str) -> Sam:
        if name not in self._choices:
            raise ValueError(f"There are no weights for {name!r} here; there are for {', '.join(self._choices)}.")
        return _loaded(name, self._choices[name], self.device)

    def _hover(self, x: float, y: float) -> None:
        answer = self.segmenter.preview(x, y)
        png = mask_png(answer.mask(answer.best, self.segmenter.view_hw), self.segmenter.current.color)
        iou = float(answer.iou[answer.best])
        self.send({"kind": "hover", "x": x, "y": y, "iou": iou, "ms": answer.ms}, [png])

    def _export(self, suffix: str) -> str:
        data = self.segmenter.encoded(suffix)
        name = f"{Path(self.segmenter.name).stem}_masks{suffix}"
        self.send({"kind": "file", "name": name}, [data])
        return f"{name}, {max(len(data) // 1000, 1)} kB, goes to your downloads. In Python: widget.segmenter."

    def _told(self, item: Item) -> str:
        chosen = "the model's choice" if item.choice is None else "yours"
        return f"Object {item.number}: mask {item.shown + 1} of 3, {chosen}, predicted IoU {item.iou:.2f}."

    def _publish(self, text: str) -> None:
        """All traits at once, in one message to the browser."""
        with self.hold_sync():
            if self.segmenter.image is not None:
                self.masks = self._masks()
            self.scene = self._scene()
            self.status = {"text": text, "error": False}

    def _masks(self) -> dict[str, bytes]:
        """PNGs of all objects, encoded only where new."""
        shown = {(item.number, item.answer, item.shown): item for item in self.segmenter.masked()}
        hw = self.segmenter.view_hw
        self._pngs = {key: self._pngs.get(key) or mask_png(item.mask(hw), item.color) for key, item in shown.items()}
        return {str(number): png for (number, _, _), png in self._pngs.items()}

    def _scene(self) -> dict[str, Any]:
        """What the browser draws, in pixels of the picture."""
        act, given = self.segmenter, self.segmenter.model.name
        there = act.image is not None
        return {
            "size": list(act.size_hw[::-1]) if there else [0, 0],  # width, height
            "name": act.name,
            "items": [_drawn(item, act.view_hw, act.size_hw) for item in act.items] if there else [],
            "current": act.current.number,
            "candidates": self._candidates() if there else [],
            "can": {"undo": act.can_undo, "redo": act.can_redo, "export": there and bool(act.masked())},
            "feed_back": act.feed_back,
            "encode_ms": act.encode_ms if there else None,
            "decode_ms": act.decode_ms[-1] if act.decode_ms else None,
            "model": given,
            "models": list(dict.fromkeys([*self._choices, given])),
            "engine": self.engine,
            "engines": list(dict.fromkeys([*engine_choices(self._base.device.type), self.engine])),
            "samples": list(SAMPLES),
            "exports": list(SUFFIXES),
        }

    def _candidates(self) -> list[dict[str, Any]]:
        """The three masks of the current object, cut to the part of the picture (shares of it, XYXY) they lie in."""
        item, (height, width) = self.segmenter.current, self.segmenter.view_hw
        if item.answer is None:
            return []
        scale = min(1.0, THUMB / max(height, width))
        hw = max(round(height * scale), 1), max(round(width * scale), 1)
        masks = [item.answer.mask(k, hw) for k in range(len(item.answer.iou))]
        x0, y0, x1, y1 = _window(np.logical_or.reduce(masks))
        window = [x0 / hw[1], y0 / hw[0], x1 / hw[1], y1 / hw[0]]
        return [
            {
                "iou": float(iou),
                "png": mask_png(masks[k][y0:y1, x0:x1], item.color),
                "window": window,
                "shown": k == item.shown,
            }
            for k, iou in enumerate(item.answer.iou)
        ]

    def static_png(self) -> bytes:
        """Picture, masks and prompts as they stand, as a PNG file."""
        height, width = self.segmenter.view_hw
        figure = Figure(figsize=(6.4, min(6.4 * height / width, 12.0) + 0.3), layout="constrained")
        self.segmenter.show(figure.subplots(), title=f"{self.segmenter.name}, {self.segmenter.model.name}")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        return file.getvalue()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None or self.segmenter.image is None:
            return bundle
        data, metadata = bundle
        data["text/plain"] = f"PromptWidget({self.segmenter.model.name}, {self.segmenter.name})"
        data["image/png"] = base64.b64encode(self.static_png()).decode()
        if "EVSAM_RUNNING" in os.environ:  # the runner: nobody watches, and readers later have no kernel
            data = {key: value for key, value in data.items() if "widget-view" not in key}
        return data, metadata


def _window(mask: np.ndarray) -> tuple[int, int, int, int]:
    """XYXY of a part of the picture around a mask, at its aspect, not too small; all of it for an empty mask."""
    height, width = mask.shape
    if not mask.any():
        return 0, 0, width, height
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    share = max(np.ptp(rows) / height, np.ptp(columns) / width) * 1.3
    side = [max(round(min(max(share, 0.2), 1.0) * n), 1) for n in (width, height)]
    middle = [(columns[0] + columns[-1]) / 2, (rows[0] + rows[-1]) / 2]
    x, y = (int(min(max(m - s / 2, 0), n - s)) for m, s, n in zip(middle, side, (width, height), strict=True))
    return x, y, x + side[0], y + side[1]


def _drawn(item: Item, view_hw: tuple[int, int], size_hw: tuple[int, int]) -> dict[str, Any]:
    """An object for the browser; `tag` is where its number stands, the middle of its mask's topmost row."""
    drawn: dict[str, Any] = {
        "number": item.number,
        "color": item.color,
        "points": [list(point) for point in item.points],
    }
    drawn |= {"box": item.box and list(item.box), "chosen": item.choice, "area": 0, "iou": None, "tag": None}
    if item.answer is not None:
        mask = item.mask(view_hw)
        drawn["iou"], share = item.iou, float(mask.mean())
        drawn["area"] = round(share * size_hw[0] * size_hw[1])
        if drawn["area"]:
            top = int(mask.any(axis=1).argmax())
            middle = float(np.flatnonzero(mask[top]).mean())
            drawn["tag"] = [middle * size_hw[1] / view_hw[1], top * size_hw[0] / view_hw[0]]
    return drawn
