"""Engine files of TensorRT: what they are engines of, where they run, and which package runs them.

An engine fits the GPU, the version and the lengths it was built for, and nothing in the file tells people; `Origin`
lies beside it and does. `tensorrt.py` builds and runs them.
"""

import hashlib
import importlib
import importlib.util
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType

from evsam_lib.deploy.card import Card

PACKAGES = {
    "tensorrt": "pip install tensorrt, on a machine that reaches NVIDIA's package index",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt_lean": "pip install tensorrt-lean-cu13",
}


@dataclass(frozen=True)
class Profile:
    """Lengths an engine is built for: (least, the one it is tuned for, most).

    The decoder needs memory for the most: about 8 MB for each prompt of each image at the official sizes.

    Attributes:
        batch: images.
        prompts: of an image.
        points: tokens of a prompt; boxes have two.
        height: of images and masks at their own size, pixels.
        width: of the same.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    prompts: tuple[int, int, int] = (1, 1, 16)
    points: tuple[int, int, int] = (1, 2, 8)
    height: tuple[int, int, int] = (32, 480, 2048)
    width: tuple[int, int, int] = (32, 640, 2048)

    def __post_init__(self):
        for axis in fields(self):
            span = getattr(self, axis.name)
            if len(span) != 3 or not 1 <= span[0] <= span[1] <= span[2]:
                raise ValueError(f"{axis.name} of a profile is least, usual, most, each 1 or more; got {span}.")

    def shapes(self, shape: tuple[int | str, ...]) -> list[tuple[int, ...]]:
        """Least, usual and most of a port's shape."""
        spans = [(axis,) * 3 if isinstance(axis, int) else getattr(self, axis) for axis in shape]
        return list(zip(*spans, strict=True))


@dataclass(frozen=True)
class Origin:
    """What an engine file is an engine of, and where it runs; kept beside it, and its name is made of it.

    Attributes:
        model: the zoo's name.
        part: "encoder", "decoder" or "pipeline".
        precision: of the graph.
        graph_sha256: of the ONNX file.
        package: that built it, a key of `PACKAGES`.
        version: of the package.
        gpu: name and compute capability, or the capability alone ("sm89") where it was built without the GPU.
        version_compatible: later versions of the same major number, and the lean runtime, take it too.
        profile: lengths it was built for.
    """

    model: str
    part: str
    precision: str
    graph_sha256: str
    package: str
    version: str
    gpu: str
    version_compatible: bool
    profile: Profile = field(default_factory=Profile)

    @property
    def file_name(self) -> str:
        """Of the engine; another profile is another file."""
        digest = hashlib.sha256(json.dumps([self.graph_sha256, asdict(self.profile)]).encode()).hexdigest()[:8]
        compatible = "-vc" if self.version_compatible else ""
        key = (self.model, self.part, self.precision, f"{self.package}{self.version}{compatible}", self.gpu, digest)
        return re.sub(r"[^\w.+-]+", "_", "-".join(key)) + ".plan"

    def refusal(self, package: str, version: str, gpu: str, capability: str) -> str | None:
        """Why this engine does not run there, in words; None if it does."""
        again = "build it again there with `python -m evsam_lib.deploy.tensorrt build`"
        if self.gpu not in (gpu, capability):
            return f"was built for {self.gpu}, this machine has {gpu}; {again}"
        if self.version_compatible and package in (self.package, "tensorrt_lean"):
            if numbers(version)[0] == numbers(self.version)[0] and numbers(version) >= numbers(self.version):
                return None
        elif (package, version) == (self.package, self.version):
            return None
        return f"was built by {self.package} {self.version}, here is {package} {version}; {again}"


def find_package(name: str) -> ModuleType:
    """Imports a TensorRT package.

    Raises:
        ValueError: no such package is known.
        ModuleNotFoundError: it is not installed, or its libraries are not there; says how to get it.
    """
    if name not in PACKAGES:
        raise ValueError(f"TensorRT comes as {', '.join(PACKAGES)}, got {name!r}.")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"not run: {name} missing; get it by {PACKAGES[name]}.")
    try:
        return importlib.import_module(name)
    except ImportError as error:  # bindings without the libraries
        raise ModuleNotFoundError(f"not run: {name} does not load ({error}); get it by {PACKAGES[name]}.") from error


def read_origin(plan: Path) -> tuple[Origin, Card]:
    """What lies beside an engine.

    Raises:
        FileNotFoundError: the engine or its .json is missing.
    """
    record = plan.with_suffix(".json")
    if missing := [file.name for file in (plan, record) if not file.is_file()]:
        raise FileNotFoundError(f"No {' and no '.join(missing)} in {plan.parent}; build the engine there.")
    values = json.loads(record.read_text())
    card = Card.from_properties(values.pop("card"), source=str(plan))
    profile = Profile(**{name: tuple(span) for name, span in values.pop("profile").items()})
    return Origin(**values, profile=profile), card


def numbers(version: str) -> tuple[int, ...]:
    """Of a version: 10.16.1.11 -> (10, 16, 1, 11), which compares as versions do."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
