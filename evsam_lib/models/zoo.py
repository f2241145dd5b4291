"""The one table of models: name -> builder, sizes, checkpoint; and `load_model`, the way to any of them.

Adding a model is adding a row here. Paper figures are not repeated: they live in results/reference. Notebook 01 counts
every row's parameters and multiply-accumulates.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from evsam_lib.models import weights as weight_files
from evsam_lib.models.encoder import EfficientViTImageEncoder
from evsam_lib.models.sam import Sam

OFFICIAL_URL = "https://huggingface.co/mit-han-lab/efficientvit-sam/resolve/main"
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        build: makes the model with a random start.
        image_size: side of the encoder's input in pixels.
        checkpoint: URL of the released weights, or None.
        sha256: of that file, or None where no public sum is known.
        licence: of the released weights.
    """

    build: Callable[[], Sam]
    image_size: int
    checkpoint: str | None = None
    sha256: str | None = None
    licence: str = "Apache-2.0"

    @property
    def file_name(self) -> str | None:
        return self.checkpoint.rsplit("/", 1)[-1] if self.checkpoint else None


def _efficientvit_sam(variant: str, image_size: int, neck_depth: int, neck_expand: int) -> Sam:
    encoder = EfficientViTImageEncoder(variant, neck_depth=neck_depth, neck_expand=neck_expand)
    return Sam(encoder, name=f"efficientvit-sam-{variant}", image_size=image_size, norm_eps=1e-6)


# Half of SAM: sides of frame and grid, channels, heads. The decoder's work falls about sixteenfold.
_MINI = {"frame_size": 512, "embed_dim": 128, "grid": 32, "mlp_hidden": 512, "heads": 4, "iou_hidden": 128}


def _efficientvit_sam_mini() -> Sam:
    encoder = EfficientViTImageEncoder("mini", neck_depth=2, neck_expand=1, channels=128, grid=32)
    return Sam(encoder, name="efficientvit-sam-mini", image_size=256, norm_eps=1e-6, **_MINI)


def _sam_vit(variant: str) -> Sam:
    from evsam_lib.models.peers import VITS, SamVit  # timm takes seconds to import

    spec = VITS[variant]
    options = _MINI if variant == "mini" else {}
    return Sam(SamVit(spec), name=f"sam-vit-{variant}", image_size=spec.image_size, norm_eps=1e-5, **options)


def _official(variant: str, image_size: int, neck_depth: int, neck_expand: int, sha256: str) -> Entry:
    build = partial(_efficientvit_sam, variant, image_size, neck_depth, neck_expand)
    return Entry(build, image_size, f"{OFFICIAL_URL}/efficientvit_sam_{variant}.pt", sha256)


ZOO: dict[str, Entry] = {
    "efficientvit-sam-mini": Entry(_efficientvit_sam_mini, 256),
    "efficientvit-sam-l0": _official(
        "l0", 512, 4, 1, "c4f994b01a16d48bcf2fbbb089448cfbf58fae5811edfa8113c953b8b8cc64b8"
    ),
    "efficientvit-sam-l1": _official(
        "l1", 512, 8, 1, "fa151df2b9b96896accd505470755cdd293a4c50cdabac95478f3fbd86d9152b"
    ),
    "efficientvit-sam-l2": _official(
        "l2", 512, 12, 1, "d4bfd842224cbb99de09acc3325e81ac5b7e8725c8fbdab152305e5d934bfe4a"
    ),
    "efficientvit-sam-xl0": _official(
        "xl0", 1024, 6, 4, "9bc2f87bd23d6e6d1f7b5beff910f98835c7c333fac73e695bac0bec685968f8"
    ),
    "efficientvit-sam-xl1": _official(
        "xl1", 1024, 12, 4, "10f42277679427c1183dcff19758e536aa86bcc4304e4b387ff48865784be05c"
    ),
    "sam-vit-mini": Entry(partial(_sam_vit, "mini"), 512),
    "sam-vit-b": Entry(partial(_sam_vit, "b"), 1024, f"{SAM_URL}/sam_vit_b_01ec64.pth"),
    "sam-vit-l": Entry(partial(_sam_vit, "l"), 1024, f"{SAM_URL}/sam_vit_l_0b3195.pth"),
    "sam-vit-h": Entry(partial(_sam_vit, "h"), 1024, f"{SAM_URL}/sam_vit_h_4b8939.pth"),
}


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
        ValueError: unknown name, weights that do not fit, a checkpoint with the wrong sum.
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
        weight_files.load_strictly(model, weight_files.read_state_dict(path), source=str(path))
    return model.to(device=device, dtype=dtype).eval()


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
    if entry.checkpoint is None:
        raise ValueError(f"{name} has no official weights; it is this study's own model, use weights='mini'.")
    path = weight_files.weights_root() / entry.file_name
    if not path.is_file():
        raise FileNotFoundError(
            f"No checkpoint at {path}; get {entry.checkpoint} and put it there (EVSAM_WEIGHTS_ROOT names the folder)."
        )
    if entry.sha256 is not None and (found := weight_files.sha256(path)) != entry.sha256:
        raise ValueError(f"{path} has sha256 {found}, the released file has {entry.sha256}; get it again.")
    return path
