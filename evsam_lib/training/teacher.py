"""The teacher of phase 1: its embeddings, run anew at each step or kept on disk.

Paper: Sec. 3.2 distils SAM-ViT-H's image embedding. A teacher of that size costs 28 times what L0's training step does,
so over few images it pays to run it once. A cached embedding is 2 bytes a value in fp16 (2.1 MB for 256 x 64 x 64, 23
TB for SA-1B) or 1 byte in int8, where each channel of each image has a scale of its own. Explained in notebook 04.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from evsam_lib.models.sam import Sam
from evsam_lib.training.loop import autocast
from evsam_lib.training.ranks import Ranks

__all__ = ["Cache", "bytes_per_image", "cache_embeddings", "teacher_embedding"]

_TYPES = {"fp16": np.float16, "int8": np.int8}


class Cache:
    """Embeddings of a folder's images on disk, read by image id."""

    def __init__(self, folder: Path) -> None:
        """Opens what `cache_embeddings` wrote."""
        self.folder = folder
        self.note: dict[str, Any] = json.loads((folder / "cache.json").read_text())
        self._ids = np.load(folder / "ids.npy")
        self._order = np.argsort(self._ids)
        self._values = np.load(folder / "values.npy", mmap_mode="r")
        self._scales = np.load(folder / "scales.npy", mmap_mode="r") if self.note["kind"] == "int8" else None

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, image_id: int) -> torch.Tensor:
        """(C, h, w) float32.

        Raises:
            ValueError: the cache has no such image.
        """
        place = np.searchsorted(self._ids, image_id, sorter=self._order)
        row = self._order[min(place, len(self._ids) - 1)]
        if self._ids[row] != image_id:
            raise ValueError(f"the cache {self.folder} has no embedding of image {image_id}: remove it to make it anew")
        values = self._values[row].astype(np.float32)
        return torch.from_numpy(values if self._scales is None else values * self._scales[row][:, None, None])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])


@torch.no_grad()
def teacher_embedding(teacher: Sam, images: torch.Tensor, *, amp: str = "none") -> torch.Tensor:
    """The teacher's embedding (B, C, h, w) float32 of images (B, 3, St, St) preprocessed for the teacher."""
    with autocast(teacher.device, amp):
        return teacher.encode(images.to(teacher.device)).float()


def cache_embeddings(
    teacher: Sam, data: Any, folder: str | Path, *, kind: str = "fp16", batch_size: int = 8, amp: str = "none"
) -> Cache:
    """The teacher's embeddings of all images, computed once; processes that train together share the work.

    Args:
        teacher: in eval mode.
        data: `len(data)` and `data[i]` with `image` and `image_id`.
        folder: of the cache; cache.json in it says which teacher and images it belongs to.
        kind: "fp16" or "int8".
        batch_size: images at a time.
        amp: mixed precision of the teacher.

    Returns:
        The cache; `note["error"]` is the relative error of what is stored (root mean square over all values).

    Raises:
        ValueError: the folder holds embeddings of another teacher, other images or another kind; no images.
    """
    folder, ranks = Path(folder), Ranks.of_torchrun()
    if len(data) < 1:
        raise ValueError("no images to cache embeddings of: expected at least one")
    made_of = {"teacher": teacher.name, "weights": fingerprint(teacher), "images": len(data), "kind": kind, "amp": amp}
    if ranks.by_first(lambda: _usable(folder, made_of)):
        return Cache(folder)
    shape = (teacher.embed_dim, teacher.grid, teacher.grid)
    files: dict[str, tuple[tuple[int, ...], type]] = {
        "values": ((len(data), *shape), _TYPES[kind]),
        "scales": ((len(data), shape[0]), np.float32),
        "ids": ((len(data),), np.int64),
    }
    ranks.by_first(lambda: _create(folder, files))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in files}
    own = range(ranks.rank, len(data), ranks.world)
    sums = np.zeros(2)
    for first in range(0, len(own), batch_size):
        rows = own[first : first + batch_size]
        records = [data[i] for i in rows]
        images = torch.stack([teacher.preprocess(record.image) for record in records])
        embedding = teacher_embedding(teacher, images, amp=amp).cpu().numpy()
        values, scales = _encoded(embedding, kind)
        arrays["values"][rows], arrays["scales"][rows] = values, scales
        arrays["ids"][rows] = [record.image_id for record in records]
        back = values.astype(np.float32) * scales[:, :, None, None]
        sums += [np.square(back - embedding, dtype=np.float64).sum(), np.square(embedding, dtype=np.float64).sum()]
    for array in arrays.values():
        array.flush()
    wrong, all_of_it = np.sum(ranks.gather(sums.tolist()), axis=0)
    note = made_of | {"error": float(np.sqrt(wrong / all_of_it)) if all_of_it else 0.0}
    ranks.by_first(lambda: (folder / "cache.json").write_text(json.dumps(note, indent=1) + "\n"))
    return Cache(folder)


def bytes_per_image(embed_dim: int, grid: int, kind: str) -> int:
    """What an embedding takes on disk: "fp16", or "int8" with a float32 scale per channel."""
    values = embed_dim * grid * grid
    return 2 * values if kind == "fp16" else values + 4 * embed_dim


def fingerprint(module: nn.Module) -> str:
    """Sixteen digits that change with any weight."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _usable(folder: Path, made_of: dict[str, Any]) -> bool:
    file = folder / "cache.json"
    if not file.is_file():
        return False
    found = json.loads(file.read_text())
    if {name: found.get(name) for name in made_of} != made_of:
        raise ValueError(
            f"the cache {folder} holds embeddings of {found}, expected {made_of}: remove it or name another"
        )
    return True


def _create(folder: Path, files: dict[str, tuple[tuple[int, ...], type]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shape, kind) in files.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)


def _encoded(embedding: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(B, C, h, w) float32 -> stored values and the scale (B, C) that brings them back."""
    if kind == "fp16":
        return embedding.astype(np.float16), np.ones(embedding.shape[:2], np.float32)
    largest = np.abs(embedding).max((2, 3))
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(embedding / scales[:, :, None, None]).astype(np.int8), scales
