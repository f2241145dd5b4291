"""Videos with masks on disk, as SA-V and DAVIS 2017 lay them out: written from generated clips, read with clear errors.

SA-V's val and test sets: `JPEGImages_24fps/VIDEO/00000.jpg`, and a mask per object and annotated frame (every fourth),
`Annotations_6fps/VIDEO/000/00000.png`. SA-V's training set: `VIDEO_manual.json` with COCO's run lengths for every
fourth frame, beside an mp4, whose frames have to be extracted to `JPEGImages_24fps/VIDEO` first. DAVIS:
`JPEGImages/480p/VIDEO/00000.jpg`, and one palette picture a frame, `Annotations/480p/VIDEO/00000.png`, whose values
number the objects. Notebook 18 reads both real and generated ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from .clips import VERSION, clip
from .files import decode_segmentation, read_json, read_rgb
from .write import make_folder

__all__ = ["Video", "read_videos", "write_videos"]

SAV = "JPEGImages_24fps", "Annotations_6fps"
DAVIS = "JPEGImages/480p", "Annotations/480p"
STEP = 4  # SA-V is annotated at 6 of 24 frames a second
PALETTE = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]


@dataclass(frozen=True)
class Video:
    """A video on disk; pictures and masks are read when asked for.

    Attributes:
        name: of the video.
        paths: of its T frames, in order.
        objects: names of its N objects.
        annotated: numbers of the frames that have masks.
    """

    name: str
    paths: list[Path]
    objects: list[str]
    annotated: list[int]
    _read: Callable[[int], np.ndarray] = field(repr=False)

    @property
    def frames(self) -> Sequence[np.ndarray]:
        """T times (H, W, 3) uint8, read when looked at; a ValueError where one is not of the size of the first."""
        return _Frames(self.paths)

    @property
    def masks(self) -> np.ndarray:
        """(N, T, H, W) bool, nothing in frames that are not annotated.

        Raises:
            ValueError: a mask's size is not that of the frames, or it cannot be read.
        """
        size = self.frames[0].shape[:2]
        found = np.zeros((len(self.objects), len(self.paths), *size), bool)
        for t in self.annotated:
            masks = self._read(t)
            if masks.shape[1:] != size:
                raise ValueError(
                    f"A mask of {self.name}, frame {t}, is {masks.shape[2]} x {masks.shape[1]} pixels, the frames are "
                    f"{size[1]} x {size[0]}."
                )
            found[:, t] = masks
        return found

    @cached_property
    def first(self) -> list[int]:
        """The frame in which each object is first seen; -1 for one that never is."""
        seen = np.asarray(self.masks.any((2, 3)))  # (N, T)
        return [int(row.argmax()) if row.any() else -1 for row in seen]


class _Frames(Sequence[np.ndarray]):
    """Pictures on disk, all of one size."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, t: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, t: slice) -> "_Frames": ...
    def __getitem__(self, t: int | slice) -> "np.ndarray | _Frames":
        if isinstance(t, slice):
            return _Frames(self.paths[t])
        frame = read_rgb(self.paths[t])
        with Image.open(self.paths[0]) as first:  # reads the head of the file only
            width, height = first.size
        if frame.shape[:2] != (height, width):
            raise ValueError(
                f"{self.paths[t]} is {frame.shape[1]} x {frame.shape[0]} pixels, the first frame is "
                f"{width} x {height}; all frames of a video must have one size."
            )
        return frame


def read_videos(root: str | Path) -> list[Video]:
    """The videos of a folder, by name.

    Args:
        root: of SA-V (val, test, or train with extracted frames) or DAVIS 2017.

    Raises:
        FileNotFoundError: the folder has neither layout, or a video has no frames or no masks; the path is named.
        ValueError: a mask belongs to no frame.
    """
    root = Path(root)
    for pictures, annotations in (SAV, DAVIS):
        if (root / pictures).is_dir():
            names = sorted(path.name for path in (root / pictures).iterdir() if path.is_dir())
            return [_video(root, name, root / pictures / name, root / annotations / name) for name in names]
    raise FileNotFoundError(f"{root} holds neither {SAV[0]} (SA-V) nor {DAVIS[0]} (DAVIS); expected one of them.")


def _video(root: Path, name: str, pictures: Path, annotations: Path) -> Video:
    paths = sorted(pictures.glob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"{pictures} holds no frames (.jpg).")
    numbers = {path.stem: t for t, path in enumerate(paths)}
    if (root / f"{name}_manual.json").is_file():
        return _run_lengths(root / f"{name}_manual.json", name, paths)
    files = sorted(annotations.rglob("*.png"))
    if not files:
        raise FileNotFoundError(f"{annotations} holds no masks (.png), and {name}_manual.json is not there either.")
    if stray := [path for path in files if path.stem not in numbers]:
        raise ValueError(f"{stray[0]} belongs to no frame of {pictures}.")
    annotated = sorted({numbers[path.stem] for path in files})
    objects = sorted(path.name for path in annotations.iterdir() if path.is_dir())
    if objects:
        return Video(name, paths, objects, annotated, lambda t: _separate(annotations, objects, paths[t].stem))
    ids = sorted(set(np.unique(_levels(files[0])).tolist()) - {0})
    return Video(name, paths, [str(i) for i in ids], annotated, lambda t: _together(annotations, ids, paths[t].stem))


def _separate(annotations: Path, objects: list[str], stem: str) -> np.ndarray:
    """SA-V: a file per object; an object without one is not seen."""
    files = [annotations / name / f"{stem}.png" for name in objects]
    found = {file: _levels(file) for file in files if file.is_file()}
    for file, levels in found.items():
        if len(np.unique(levels)) > 2:
            raise ValueError(f"{file} shows {len(np.unique(levels)) - 1} objects; SA-V has one mask a file.")
    size = next(iter(found.values())).shape
    return np.stack([found[file] > 0 if file in found else np.zeros(size, bool) for file in files])


def _together(annotations: Path, ids: list[int], stem: str) -> np.ndarray:
    """DAVIS: one file, its values are the objects' numbers; 255 stands for no decision."""
    levels = _levels(annotations / f"{stem}.png")
    return levels[None] == np.array(ids)[:, None, None]


def _levels(path: Path) -> np.ndarray:
    """(H, W) values of a palette or grey picture as they are stored."""
    try:
        with Image.open(path) as picture:
            levels = np.array(picture)
    except OSError as error:
        raise ValueError(f"Mask {path} cannot be read, it is corrupt or no picture: {error}.") from error
    if levels.ndim != 2:
        raise ValueError(f"Mask {path} has {levels.shape[2]} channels; expected a palette or a grey picture.")
    return levels


def _run_lengths(path: Path, name: str, paths: list[Path]) -> Video:
    """SA-V's training set: frames 0, 4, 8, ... have a list of run lengths, one an object."""
    record = read_json(path, "masklet", "masklet_id", "video_height", "video_width")
    size, masklets = (int(record["video_height"]), int(record["video_width"])), record["masklet"]
    annotated = [t for t in range(0, len(paths), STEP) if t // STEP < len(masklets)]

    def read(t: int) -> np.ndarray:
        where = f"{path}, frame {t}"
        return np.stack([decode_segmentation(rle, *size, where=where) > 0 for rle in masklets[t // STEP]])

    return Video(name, paths, [f"{i:03d}" for i in record["masklet_id"]], annotated, read)


def write_videos(
    root: str | Path, count: int, *, seed: int, size: tuple[int, int], frames: int = 8, objects: int = 3,
    start: int = 0, layout: str = "sav",
) -> Path:  # fmt: skip
    """Writes clips start .. start + count - 1 as SA-V's val set or as DAVIS 2017, every frame annotated.

    Args:
        root: folder to make; reused if it already holds exactly this data.
        count: number of clips.
        seed: of the clips.
        size: (height, width) in pixels.
        frames: of a clip.
        objects: of a clip, at most.
        start: index of the first clip.
        layout: "sav" or "davis".

    Returns:
        root.

    Raises:
        ValueError: an unknown layout, count below 1, or see `clip`.
        FileExistsError: root holds files that were not generated.
    """
    if layout not in ("sav", "davis"):
        raise ValueError(f"layout must be 'sav' or 'davis', got {layout!r}.")
    pictures, annotations = SAV if layout == "sav" else DAVIS

    def write(folder: Path) -> None:
        names = [f"clip_{index:06d}" for index in range(start, start + count)]
        for index, name in enumerate(names, start):
            made = clip(seed, index, size=size, frames=frames, objects=objects)
            (folder / pictures / name).mkdir(parents=True)
            (folder / annotations / name).mkdir(parents=True)
            for t, frame in enumerate(made.frames):
                Image.fromarray(frame).save(folder / pictures / name / f"{t:05d}.jpg", quality=95, subsampling=0)
            (_save_sav if layout == "sav" else _save_davis)(made.masks, folder / annotations / name)
        (folder / ("sav_val.txt" if layout == "sav" else "val.txt")).write_text("".join(f"{n}\n" for n in names))

    also = {"frames": frames, "objects": objects, "clips": VERSION}
    return make_folder(Path(root), write, layout=layout, count=count, seed=seed, size=size, start=start, also=also)


def _save_sav(masks: np.ndarray, folder: Path) -> None:
    for n, t in np.ndindex(masks.shape[:2]):
        (folder / f"{n:03d}").mkdir(exist_ok=True)
        Image.fromarray(masks[n, t]).save(folder / f"{n:03d}/{t:05d}.png")


def _save_davis(masks: np.ndarray, folder: Path) -> None:
    numbers = np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None, None]
    for t, labels in enumerate((masks * numbers).sum(0, dtype=np.uint8)):  # masks are disjoint
        picture = Image.fromarray(labels).convert("P")
        picture.putpalette([value for colour in PALETTE for value in colour])
        picture.save(folder / f"{t:05d}.png")
