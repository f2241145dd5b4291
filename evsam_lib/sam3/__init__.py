"""EfficientSAM3 on transformers' SAM3: students of timm and MobileCLIP, prompts, video, counts (extra `[sam3]`).

EfficientSAM3 (arXiv 2511.15833) replaces SAM3's image tower by nine small networks and its text tower by three;
detector, mask decoder and tracker stay. Notebook 16 explains the parts and what each costs. Everything is imported on
first use.
"""

from importlib import import_module
from importlib.util import find_spec

from evsam_lib.compat import ensure_torchvision

__all__ = ["Sam3Processor", "VideoPredictor", "load_sam3"]

_MISSING = [name for name in ("transformers", "open_clip") if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"evsam_lib.sam3 needs {' and '.join(_MISSING)}: pip install -c requirements.lock -e '.[sam3]'"
    )
ensure_torchvision()  # before transformers' SAM3 and timm, which import torchvision

_HOMES = {
    "load_sam3": "evsam_lib.sam3.load",
    "Sam3Processor": "evsam_lib.sam3.processor",
    "VideoPredictor": "evsam_lib.sam3.video",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evsam_lib.sam3' has no attribute {name!r}")
