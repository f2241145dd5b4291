"""A reproducible study of EfficientViT-SAM and its kin: models, data, training, evaluation, the notebooks' machinery.

`load_model`, `Predictor` and `segment_everything` are imported on first use, so `import evsam_lib` itself is instant.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Predictor", "load_model", "segment_everything"]

_HOMES = {
    "load_model": "evsam_lib.models.zoo",
    "Predictor": "evsam_lib.predict",
    "segment_everything": "evsam_lib.everything",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evsam_lib' has no attribute {name!r}")
