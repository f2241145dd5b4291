"""Segmenting by hand: `Segmenter`, the plain-Python state behind it, and `PromptWidget`, the picture one clicks on.

Explained in notebook 14. `Segmenter` needs no notebook and no browser.
"""

from importlib import import_module

__all__ = ["PromptWidget", "Segmenter"]

_HOMES = {"PromptWidget": "evsam_lib.widgets.prompt_widget", "Segmenter": "evsam_lib.widgets.segmenter"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evsam_lib.widgets' has no attribute {name!r}")
