"""What an exported file says about itself: the model, whose weights, and what goes in and out.

The card lies in the ONNX file's metadata, so a graph explains itself wherever it travels, and an engine needs neither
the zoo nor the weights to run it. Notebook 06 shows one.
"""

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evsam_lib.data.transforms import Frame, LongestSide, Stretch
from evsam_lib.models.sam import BestBy

FORMAT = 2  # counts up when the card gets other entries, or the inputs or outputs of the graphs another meaning
FRAMES = {"LongestSide": LongestSide, "Stretch": Stretch}


@dataclass(frozen=True)
class Port:
    """One input or output of a graph.

    Attributes:
        name: of the tensor.
        shape: lengths; a word stands for any length.
        dtype: "float32", "int64", "uint8" or "bool".
        meaning: what it holds, in words.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))}), {self.meaning}"


@dataclass(frozen=True)
class Card:
    """Everything that is known of one exported graph.

    Attributes:
        part: "encoder", "decoder" or "pipeline".
        model: the zoo's name.
        study_version: of the library that wrote it.
        opset: of ONNX.
        weights: "mini", "official", "random" or the weight file's name; "" where the caller did not say.
        weights_sha256: of the weight file, "" where there is none.
        state_sha256: of the model's tensors, see `fingerprint`.
        frame: the way between an image's pixels and the model.
        best_by: what chooses among several masks, see `Sam.quality`.
        grid: side of the embedding in cells.
        embed_dim: its channels.
        padding_point: the graph adds SAM's padding point where a prompt needs it (all models but EfficientSAM).
        slots: the fixed number of tokens of a prompt (EfficientSAM), or 0 for any number.
        select: the masks that come out, see `graphs.DecoderGraph`.
        uint8_input: images come as bytes and are normalised inside.
        mask_input: prompts may hold a mask.
        upsample: masks come out at the original size too.
        inputs: of the graph.
        outputs: of the graph.
        precision: "fp32", or what most layers compute in: "fp16" or "int8". Inputs and outputs are the same in all.
        fp32_layers: of a graph in lower precision, the layers that stayed in float32 to keep it right.
    """

    part: str
    model: str
    study_version: str
    opset: int
    weights: str
    weights_sha256: str
    state_sha256: str
    frame: Frame
    best_by: BestBy
    grid: int
    embed_dim: int
    padding_point: bool
    slots: int
    select: str
    uint8_input: bool
    mask_input: bool
    upsample: bool
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: str = "fp32"
    fp32_layers: tuple[str, ...] = ()

    def to_properties(self) -> dict[str, str]:
        """As ONNX metadata: names to text, JSON where it is not text by itself."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["frame"] = {"kind": type(self.frame).__name__, **asdict(self.frame)}
        for name in ("inputs", "outputs"):
            values[name] = [asdict(port) for port in values[name]]
        text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        return {"evsam_format": str(FORMAT), **text}

    @classmethod
    def from_properties(cls, properties: dict[str, str], *, source: str) -> "Card":
        """Reads what `to_properties` wrote.

        Args:
            properties: metadata of an ONNX file.
            source: the file, for the message.

        Raises:
            ValueError: the file is not from this study, or from a version with other graphs.
        """
        found = properties.get("evsam_format")
        if found is None:
            raise ValueError(f"{source} was not written by evsam_lib.deploy.onnx, so its inputs are unknown.")
        if found != str(FORMAT):
            raise ValueError(
                f"{source} was exported by version {properties.get('study_version', '?')} in format {found}, this "
                f"version reads format {FORMAT}: export it again with `python -m evsam_lib.deploy.onnx export "
                f"{properties.get('model', 'MODEL')}`."
            )
        values: dict[str, Any] = {
            field.name: properties[field.name] if field.type in (str, BestBy) else json.loads(properties[field.name])
            for field in fields(cls)
        }
        values["frame"] = FRAMES[values["frame"].pop("kind")](**values["frame"])
        values["fp32_layers"] = tuple(values["fp32_layers"])
        for name in ("inputs", "outputs"):
            values[name] = tuple(Port(**port | {"shape": tuple(port["shape"])}) for port in values[name])
        return cls(**values)


def read_card(path: Path) -> Card:
    """The card of an ONNX file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is from elsewhere.
    """
    need("onnx")
    import onnx

    if not path.is_file():
        raise FileNotFoundError(
            f"No {path.name} in {path.parent}; write it by `python -m evsam_lib.deploy.onnx export`."
        )
    properties = onnx.load(path, load_external_data=False).metadata_props
    return Card.from_properties({entry.key: entry.value for entry in properties}, source=str(path))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of a model's state dict: the same weights, the same text, whatever file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def given_inputs(card: Card, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as arrays of the types that a graph takes.

    Raises:
        ValueError: inputs are missing or unknown.
    """
    given, wanted = set(inputs), {port.name for port in card.inputs}
    if given != wanted:
        raise ValueError(f"{card.part} takes {', '.join(sorted(wanted))}, got {', '.join(sorted(given))}.")
    return {port.name: inputs[port.name].to("cpu", getattr(torch, port.dtype)).numpy() for port in card.inputs}


def need(*packages: str) -> None:
    """Raises ModuleNotFoundError, naming the extra that brings them, if one of the packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"Not installed: {', '.join(missing)}. Get it by pip install 'evsam[onnx]'.")
