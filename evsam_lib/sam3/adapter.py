"""EfficientSAM3's own names over ours, so that what was written for its code runs here.

`install()` makes `sam3.model_builder` and `sam3.model.sam3_image_processor` importable; after that the quick start of
its README runs as printed. The state is a dictionary with its keys. Two things are its own: text falls back to SAM3's
encoder where no student is named, and small holes in clicked masks are filled. Our own interface is `Sam3Processor`.
"""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from evsam_lib.sam3 import processor as ours
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.zoo import IMAGES, TEXTS

__all__ = ["Sam3Processor", "build_efficientsam3_image_model", "install"]

MAX_HOLE_AREA = 256  # cells of the low-resolution mask; the official predictor's default


def install() -> None:
    """Makes the official import lines work; an installed package named `sam3` is left alone.

    Raises:
        RuntimeError: another package of that name is imported.
    """
    if "sam3" in sys.modules and not hasattr(sys.modules["sam3"], "evsam_adapter"):
        raise RuntimeError("A package named 'sam3' is already imported; the adapter would hide it.")
    names = ("sam3", "sam3.model_builder", "sam3.model", "sam3.model.sam3_image_processor")
    modules: list[Any] = [ModuleType(name) for name in names]
    package, builder, model, processors = modules
    package.evsam_adapter, package.model_builder, package.model = True, builder, model
    package.__path__, model.__path__ = [], []
    builder.build_efficientsam3_image_model = build_efficientsam3_image_model
    model.sam3_image_processor, processors.Sam3Processor = processors, Sam3Processor
    sys.modules |= dict(zip(names, modules, strict=True))


def build_efficientsam3_image_model(
    bpe_path: str | None = None,
    device: str | None = None,
    eval_mode: bool = True,
    checkpoint_path: str | None = None,
    load_from_HF: bool = False,
    enable_segmentation: bool = True,
    enable_inst_interactivity: bool = False,
    compile: bool = False,
    backbone_type: str = "efficientvit",
    model_name: str = "b0",
    efficientvit_model: str | None = None,
    text_encoder_type: str | None = None,
    text_encoder_context_length: int = 77,
):
    """EfficientSAM3's builder, with its arguments.

    Args:
        bpe_path: not needed; the byte pairs come with open_clip.
        device: where the model lives; None is a GPU if there is one.
        eval_mode: evaluation mode.
        checkpoint_path: a released file, or one of ours; None is a random start.
        load_from_HF: does nothing, as in the official code.
        enable_segmentation: must be true; there is no model without masks.
        enable_inst_interactivity: points and boxes are wanted: a file without a tracker is then an error.
        compile: must be false; use `torch.compile` on what is returned.
        backbone_type: "efficientvit", "repvit" or "tinyvit".
        model_name: "b0", "b1", "b2", "m0.9", "m1.1", "m2.3", "5m", "11m" or "21m".
        efficientvit_model: the old name of the same.
        text_encoder_type: "MobileCLIP-S0", "MobileCLIP-S1" or "MobileCLIP2-L"; None is SAM3's own.
        text_encoder_context_length: tokens of a phrase, for a student.

    Returns:
        transformers' `Sam3VideoModel`, with `predict_inst(state, ...)` beside its own methods.

    Raises:
        ValueError: no such model, an option that has no counterpart, or weights that do not fit.
    """
    if not enable_segmentation or compile:
        raise ValueError("enable_segmentation=False and compile=True have no counterpart here.")
    if efficientvit_model is not None:
        backbone_type, model_name = "efficientvit", efficientvit_model
    variant = (backbone_type, model_name.replace("_", "."))
    name = next((n for n, row in IMAGES.items() if row.official == variant), None)
    if name is None:
        known = ", ".join(" ".join(row.official) for row in IMAGES.values())
        raise ValueError(f"No student {backbone_type} {model_name}; there are {known}.")
    text = next((n for n, row in TEXTS.items() if row.official == text_encoder_type), None)
    if text_encoder_type is not None and text is None:
        known = ", ".join(row.official for row in TEXTS.values())
        raise ValueError(f"No text encoder {text_encoder_type}; there are {known}.")
    model: Any = load_sam3(
        name,
        checkpoint_path,
        text=text or "SAM3",
        context=text_encoder_context_length if text else None,
        scale=_scale,
        without=() if enable_inst_interactivity else ("tracker",),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    model.predict_inst = lambda state, **prompt: _predict_inst(model, state, **prompt)
    return model if eval_mode else model.train()


_scale = "full"  # tests make it "mini"


class Sam3Processor:
    """EfficientSAM3's processor: every call takes and fills a dictionary.

    Args:
        model: of `build_efficientsam3_image_model`.
        resolution: must be the model's; None is that.
        device: must be the model's; None is that.
        confidence_threshold: instances with a lower score are left out.
    """

    def __init__(self, model, resolution: int | None = None, device=None, confidence_threshold: float = 0.5):
        side = model.config.image_size
        if resolution not in (None, side):
            raise ValueError(f"This model was built for {side} pixels, the processor is asked for {resolution}.")
        if device is not None and torch.device(device).type != model.device.type:
            raise ValueError(f"The model is on {model.device}, the processor is asked for {device}.")
        self.model, self._ours = model, ours.Sam3Processor(model, confidence_threshold)

    def set_image(self, image, state: dict | None = None) -> dict:
        """Encodes a PIL image or (H, W, 3) array."""
        state = {} if state is None else state
        seen = self._ours.set_image(image)
        state.update(original_height=seen.size[0], original_width=seen.size[1], backbone_out=seen)
        return state

    def set_text_prompt(self, prompt: str, state: dict) -> dict:
        """All instances of a phrase; adds `masks`, `masks_logits`, `boxes`, `scores` and, ours, `presence`."""
        return self._answer(self._ours.set_text_prompt(prompt, _seen(state)), state)

    def add_geometric_prompt(self, box: list[float], label: bool, state: dict) -> dict:
        """One more example: centre, width and height in 0..1."""
        seen = _seen(state)
        (height, width), (x, y, w, h) = seen.size, box
        corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * [width, height, width, height]
        inside = np.clip(corners, 0, [width, height, width, height])
        return self._answer(self._ours.add_example(inside, seen, label=int(label)), state)

    def set_confidence_threshold(self, threshold: float, state: dict | None = None) -> dict | None:
        """Another threshold; answers again if there is something to answer."""
        self._ours.confidence_threshold = threshold
        if state is not None and "boxes" in state:
            return self._answer(self._ours.find(_seen(state)), state)
        return state

    def reset_all_prompts(self, state: dict) -> None:
        """Forgets prompts and answers."""
        self._ours.reset_prompts(_seen(state))
        for key in ("masks", "masks_logits", "boxes", "scores", "presence"):
            state.pop(key, None)

    def _answer(self, found: ours.Concepts, state: dict) -> dict:
        state["masks"] = torch.from_numpy(found.masks)[:, None]  # (N, 1, H, W)
        state["masks_logits"] = torch.from_numpy(found.probabilities)[:, None]
        state["boxes"], state["scores"] = torch.from_numpy(found.boxes), torch.from_numpy(found.scores)
        state["presence"] = found.presence
        return state


def _seen(state: dict) -> ours.ImageState:
    if "backbone_out" not in state:
        raise ValueError("The state holds no image; call set_image first.")
    return state["backbone_out"]


def _predict_inst(model, state: dict, **prompt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks (K, H, W) float32, predicted IoU (K,), low-res logits (K, 4h, 4w), as the official method returns them."""
    return_logits = prompt.pop("return_logits", False)
    seen = _seen(state)
    found = ours.Sam3Processor(model).predict(seen, **prompt)
    logits = ours.enlarged(torch.from_numpy(filled(found.low_res)), seen.size).numpy()
    return logits if return_logits else (logits > 0).astype(np.float32), found.scores, found.low_res.clip(-32, 32)


def filled(low_res: np.ndarray, area: int = MAX_HOLE_AREA) -> np.ndarray:
    """Low-res logits (K, h, w) whose holes of at most `area` cells are set to 10, diagonal neighbours connected."""
    out = low_res.copy()
    for mask in out:
        holes, count = ndimage.label(mask <= 0, np.ones((3, 3)))
        sizes = np.bincount(holes.ravel(), minlength=count + 1)
        sizes[0] = area + 1  # the mask itself
        mask[sizes[holes] <= area] = 10.0
    return out
