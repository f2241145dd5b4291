"""The one table of models: name -> builder, frame, checkpoint; and `load_model`, the way to any of them.

Adding a model is adding a row here. Paper figures are not repeated: they live in results/reference. Notebook 01 counts
every row's parameters and multiply-accumulates.
"""

import difflib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from evsam_lib.data.transforms import Frame, LongestSide, Stretch
from evsam_lib.models import weights as weight_files
from evsam_lib.models.encoder import EfficientViTImageEncoder
from evsam_lib.models.sam import Sam, build_sam

OFFICIAL_URL = "https://huggingface.co/mit-han-lab/efficientvit-sam/resolve/main"
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"
GITHUB_URL = "https://raw.githubusercontent.com"
# The authors' own repositories, each at one commit, so that what is behind the address stays the same.
MOBILE_SAM_URL = f"{GITHUB_URL}/ChaoningZhang/MobileSAM/34bbbfdface3c18e5221aa7de6032d7220c6c6a1/weights"
EFFICIENT_SAM_URL = f"{GITHUB_URL}/yformer/EfficientSAM/d525f622e6f640acf5a0fc37c7ca1f243da5bde0/weights"
# Beside it lies edge_sam_3x.pth, trained on three times the images: 42.7 COCO AP to 42.1, which is what Table 4 prints.
EDGE_SAM_URL = "https://huggingface.co/spaces/chongzhou/EdgeSAM/resolve/main/weights"


class Builder(Protocol):
    """Makes a model with a random start, on the meta device too."""

    def __call__(self, *, name: str, frame: Frame) -> Sam: ...


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: of the model, the key of `ZOO`.
        builder: makes it.
        frame: the way between an image and the model: sizes, resizing, normalisation.
        checkpoint: URL of the released weights, or None.
        sha256: of that file, or None where no public sum is known.
        licence: of the released weights.
    """

    name: str
    builder: Builder
    frame: Frame
    checkpoint: str | None = None
    sha256: str | None = None
    licence: str = "Apache-2.0"

    def build(self) -> Sam:
        """The model with a random start."""
        return self.builder(name=self.name, frame=self.frame)

    @property
    def image_size(self) -> int:
        """Side of the encoder's input in pixels."""
        return self.frame.image_size

    @property
    def file_name(self) -> str | None:
        """Of the released weights, which are looked for under `weights_root()`."""
        return self.checkpoint.rsplit("/", 1)[-1] if self.checkpoint else None


# Half of SAM: sides of frame and grid, channels, heads. The decoder's work falls about sixteenfold.
_MINI = {"embed_dim": 128, "grid": 32, "mlp_hidden": 512, "heads": 4, "iou_hidden": 128}


def _efficientvit_sam(variant: str, neck_depth: int, neck_expand: int, *, name: str, frame: Frame) -> Sam:
    encoder = EfficientViTImageEncoder(variant, neck_depth=neck_depth, neck_expand=neck_expand)
    return build_sam(encoder, name=name, frame=frame, norm_eps=1e-6)


def _efficientvit_sam_mini(*, name: str, frame: Frame) -> Sam:
    encoder = EfficientViTImageEncoder("mini", neck_depth=2, neck_expand=1, channels=128, grid=32)
    return build_sam(encoder, name=name, frame=frame, norm_eps=1e-6, **_MINI)


# The peers stand on timm, which takes seconds to import: not before one of them is wanted.
def _sam_vit(variant: str, *, name: str, frame: Frame) -> Sam:
    from evsam_lib.models.peers import VITS, SamVit

    options: dict[str, Any] = _MINI if variant == "mini" else {}
    return build_sam(SamVit(VITS[variant]), name=name, frame=frame, norm_eps=1e-5, **options)


def _mobile_sam(*, name: str, frame: Frame) -> Sam:
    from evsam_lib.models.peers import TinyViT

    return build_sam(TinyViT(), name=name, frame=frame, norm_eps=1e-5)


def _edge_sam(*, name: str, frame: Frame) -> Sam:
    from evsam_lib.models.peers import RepViT

    return build_sam(RepViT(), name=name, frame=frame, norm_eps=1e-5, best_by="stability")


def _efficient_sam(width: int, heads: int, *, name: str, frame: Frame) -> Sam:
    from evsam_lib.models.efficient_sam import build_efficient_sam

    return build_efficient_sam(width, heads, name=name, frame=frame)


_SAM_FRAME = LongestSide(pixel_scale=1.0)

_ROWS = (
    Entry("efficientvit-sam-mini", _efficientvit_sam_mini, LongestSide(256, 512)),
    Entry(
        "efficientvit-sam-l0",
        partial(_efficientvit_sam, "l0", 4, 1),
        LongestSide(512),
        f"{OFFICIAL_URL}/efficientvit_sam_l0.pt",
        "c4f994b01a16d48bcf2fbbb089448cfbf58fae5811edfa8113c953b8b8cc64b8",
    ),
    Entry(
        "efficientvit-sam-l1",
        partial(_efficientvit_sam, "l1", 8, 1),
        LongestSide(512),
        f"{OFFICIAL_URL}/efficientvit_sam_l1.pt",
        "fa151df2b9b96896accd505470755cdd293a4c50cdabac95478f3fbd86d9152b",
    ),
    Entry(
        "efficientvit-sam-l2",
        partial(_efficientvit_sam, "l2", 12, 1),
        LongestSide(512),
        f"{OFFICIAL_URL}/efficientvit_sam_l2.pt",
        "d4bfd842224cbb99de09acc3325e81ac5b7e8725c8fbdab152305e5d934bfe4a",
    ),
    Entry(
        "efficientvit-sam-xl0",
        partial(_efficientvit_sam, "xl0", 6, 4),
        LongestSide(1024),
        f"{OFFICIAL_URL}/efficientvit_sam_xl0.pt",
        "9bc2f87bd23d6e6d1f7b5beff910f98835c7c333fac73e695bac0bec685968f8",
    ),
    Entry(
        "efficientvit-sam-xl1",
        partial(_efficientvit_sam, "xl1", 12, 4),
        LongestSide(1024),
        f"{OFFICIAL_URL}/efficientvit_sam_xl1.pt",
        "10f42277679427c1183dcff19758e536aa86bcc4304e4b387ff48865784be05c",
    ),
    Entry("sam-vit-mini", partial(_sam_vit, "mini"), LongestSide(512, 512)),
    Entry(
        "sam-vit-b",
        partial(_sam_vit, "b"),
        _SAM_FRAME,
        f"{SAM_URL}/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    Entry(
        "sam-vit-l",
        partial(_sam_vit, "l"),
        _SAM_FRAME,
        f"{SAM_URL}/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    Entry(
        "sam-vit-h",
        partial(_sam_vit, "h"),
        _SAM_FRAME,
        f"{SAM_URL}/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    Entry(
        "mobile-sam",
        _mobile_sam,
        _SAM_FRAME,
        f"{MOBILE_SAM_URL}/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    Entry(
        "edge-sam",
        _edge_sam,
        _SAM_FRAME,
        f"{EDGE_SAM_URL}/edge_sam.pth",
        licence="NTU S-Lab License 1.0 (non-commercial)",
    ),
    Entry("efficient-sam-ti", partial(_efficient_sam, 192, 3), Stretch(), f"{EFFICIENT_SAM_URL}/efficient_sam_vitt.pt"),
    Entry(  # zipped by its authors; the file is read as it is
        "efficient-sam-s", partial(_efficient_sam, 384, 6), Stretch(), f"{EFFICIENT_SAM_URL}/efficient_sam_vits.pt.zip"
    ),
)
ZOO: dict[str, Entry] = {entry.name: entry for entry in _ROWS}


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Sam:
    """A model of the zoo, in evaluation mode.

    Args:
        name: a key of `ZOO`, such as "efficientvit-sam-l0".
        weights: None for a random start (torch's global generator decides it), the path of a weight file, "mini" for
            the weights that ship with this library, or "official" for the released checkpoint under `weights_root()`.
        device: where the model lives.
        dtype: of its parameters: float32, bfloat16 or float16.

    Returns:
        The model.

    Raises:
        ValueError: unknown name, weights that do not fit (the message says whose they are, if the zoo has the model), a
            checkpoint with the wrong sum.
        FileNotFoundError: the weight file does not exist.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown model {name!r}; the zoo has {', '.join(ZOO)}.{hint}")
    path = weights_path(name, weights)  # before the model is built: a wrong path is known at once
    if path is None:
        model = ZOO[name].build()
    else:  # no time spent on a random start that the file replaces
        with torch.device("meta"):
            model = ZOO[name].build()
        state = weight_files.read_state_dict(path)
        weight_files.load_strictly(model, state, source=str(path), known=state_shapes)
    return model.to(device=device, dtype=dtype).eval()


@cache
def state_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """For every model of the zoo, the name and shape of every entry of its state dict. Costs no memory for weights."""
    with torch.device("meta"):
        states = {name: entry.build().state_dict() for name, entry in ZOO.items()}
    return {model: {key: tuple(value.shape) for key, value in state.items()} for model, state in states.items()}


def weights_path(name: str, weights: str | Path | None) -> Path | None:
    """The file that `load_model` would read, checked to be there; None for a random start.

    Raises:
        ValueError: the model has no such weights, or the released checkpoint's sum is wrong.
        FileNotFoundError: the file is not there.
    """
    if weights is None:
        return None
    if weights == "mini":
        path = weight_files.SHIPPED / f"{name}.safetensors"
        if not path.is_file():
            shipped = sorted(file.stem for file in weight_files.SHIPPED.glob("*.safetensors"))
            raise ValueError(f"No weights ship for {name}; they ship for {', '.join(shipped) or 'no model'}.")
        return path
    if weights == "official":
        return _official_path(name)
    if not Path(weights).is_file():
        raise FileNotFoundError(f"No weight file at {weights}; give a path, 'mini', 'official' or None.")
    return Path(weights)


def _official_path(name: str) -> Path:
    entry = ZOO[name]
    file_name = entry.file_name
    if file_name is None:
        raise ValueError(f"{name} has no official weights; it is this study's own model, use weights='mini'.")
    path = weight_files.weights_root() / file_name
    if not path.is_file():
        raise FileNotFoundError(
            f"No checkpoint at {path}; get it by `python -m evsam_lib.fetch weights {name}` "
            "(EVSAM_WEIGHTS_ROOT names the folder)."
        )
    if entry.sha256 is not None and (found := weight_files.sha256(path)) != entry.sha256:
        raise ValueError(f"{path} has sha256 {found}, the released file has {entry.sha256}; fetch it again.")
    return path
