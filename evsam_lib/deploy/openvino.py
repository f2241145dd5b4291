"""Exported graphs in OpenVINO, the fastest engine without a GPU (Table 1 on a laptop; notebook 07)."""

from pathlib import Path

import torch
from torch import Tensor

from evsam_lib.deploy.card import Card, given_inputs

__all__ = ["OpenVinoGraph"]

_TYPES = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoGraph:
    """One exported file in OpenVINO, on the CPU; with the interface of `runtime.Graph`.

    Args:
        path: of the ONNX file.
        precision: of an encoder's arithmetic: "fp32" or "bf16". A decoder always has float32, which a prompt's
            coordinates need.
        threads: of one operation; None is torch's number.

    Attributes:
        card: what the file says of itself.

    Raises:
        ValueError: the file is damaged, from elsewhere, or from another version of the study.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path, *, precision: str = "fp32", threads: int | None = None):
        import onnx
        import openvino

        properties = onnx.load(str(path), load_external_data=False).metadata_props
        self.card = Card.from_properties({entry.key: entry.value for entry in properties}, source=str(path))
        encoder = self.card.part == "encoder"
        self._core = openvino.Core()
        self._model = self._core.read_model(str(path))
        self._options = {
            "INFERENCE_PRECISION_HINT": _TYPES[precision if encoder else "fp32"],
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs the graph; see `runtime.Graph`. An encoder is compiled anew for every batch size."""
        arrays = given_inputs(self.card, inputs)
        batch = len(arrays["images"]) if self.card.part == "encoder" else None
        if batch not in self._compiled:
            self._compiled[batch] = self._compile(batch)
        found = self._compiled[batch](arrays)
        return {port.name: torch.from_numpy(found[port.name].copy()) for port in self.card.outputs}

    def _compile(self, batch: int | None):
        model = self._model.clone()
        if batch is not None:
            model.reshape({port.name: [batch, *model.input(port.name).partial_shape[1:]] for port in self.card.inputs})
        return self._core.compile_model(model, "CPU", self._options)
