"""SA-1B for many epochs and many nodes: one pass writes litdata chunks at training size, training streams them.

Paper: Sec. 3.2, both phases; explained in notebook 03. Needs the extra [stream].

    python -m evsam_lib.data.stream optimise SRC... --out DIR --image-size 512 --target-size 256

The pass does once what every epoch would repeat: it resizes the image (as `preprocess` does) and re-encodes each mask
as run lengths at the size of the targets. What is lost: JPEG is written a second time, and targets lose their soft
edge; `--format png` and `--target-size 0` (run lengths as they are) keep the one and the other, for more bytes.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evsam_lib.compat import ensure_torchvision

from .files import decode_rgb, decode_segmentation, rle_text
from .runs import Runs, read_runs
from .sa1b import Sa1bFolder, Sa1bRecord
from .skip import Skipped, check_on_error
from .transforms import resize_longest

__all__ = ["Sa1bStream", "optimise"]

FORMATS = ("jpeg", "png")
_NOTE = "stream.json"  # beside the chunks: what they were made of


class Sa1bStream:
    """Chunks written by `optimise`, with the interface of `Sa1bFolder`: `len(data)`, `data[i]`, `masks`, `runs`.

    A record's image has the training size, its boxes are in pixels of that image and its masks have the target size;
    `training_sample` makes the same sample of it as of the original. `data[i]` reads any image in any order; `loader`
    reads chunk after chunk, which is what discs and networks like.
    """

    def __init__(self, root: str | Path) -> None:
        """Opens a folder, or an address that litdata can read (s3://...).

        Raises:
            ImportError: litdata is not installed.
            ValueError: the folder holds no chunks.
        """
        self.root = str(root)
        if "://" not in self.root and not (Path(root) / "index.json").is_file():
            raise ValueError(f"{root} holds no chunks: expected index.json, which `optimise` writes last.")
        self._opened: tuple[int, Any] | None = None
        self._count = len(self._all())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sa1bRecord:
        if not -self._count <= index < self._count:
            raise IndexError(f"index {index} of {self._count} images")
        return _record(self._all()[index % self._count])

    def masks(self, record: Sa1bRecord, indices: Sequence[int]) -> np.ndarray:
        """The chosen masks at their stored size, (len(indices), h, w) uint8, 0 or 1."""
        height, width = _mask_hw(record)
        out = np.empty((len(indices), height, width), np.uint8)
        for mask, index in zip(out, indices, strict=True):
            mask[:] = decode_segmentation(record.rles[index], height, width, where=f"image {record.image_id}")
        return out

    def runs(self, record: Sa1bRecord, indices: Sequence[int]) -> Runs:
        """The chosen masks as run lengths, at their stored size."""
        where = f"image {record.image_id} in {self.root}"
        return read_runs([record.rles[index] for index in indices], *_mask_hw(record), where=where)

    def loader(
        self,
        batch_size: int,
        *,
        make: Callable[[Sa1bRecord, int], Any] | None = None,
        collate: Callable[[list], Any] = list,
        workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Any:
        """Batches of one epoch after another: litdata's loader, each rank and worker with chunks of its own.

        Shuffled, chunks are dealt out anew to the nodes in each epoch and images mixed within them. `state_dict()` of
        the loader, given to `load_state_dict()` of a new one, goes on in the middle of an epoch with the images that
        had not been seen. Rank and node come from torchrun's variables. With several ranks, each gets equally many
        images and up to a batch per worker and rank is left out of an epoch.

        Args:
            batch_size: images per batch and rank.
            make: (record, epoch) -> sample, run in the workers; None gives the record itself. Draws that depend on
                the epoch and `record.image_id` alone survive a resume.
            collate: list of samples -> batch.
            workers: processes per rank; 0 reads in the loop.
            shuffle: as above; False keeps the order of writing.
            seed: of the shuffle.

        Returns:
            A `litdata.StreamingDataLoader`; every iteration over it is an epoch, the first is number 1.
        """
        place = _Place.of_torchrun()
        step = _Step(make)
        dataset = _open(self.root, place, shuffle=shuffle, seed=seed, transform=step)
        step.dataset = dataset
        return _litdata().StreamingDataLoader(
            dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate, drop_last=place.world > 1
        )

    def _all(self) -> Any:
        """litdata's random access to all images; opened anew in each process, since it keeps files open."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _open(self.root, _Place(world=1, rank=0, nodes=1), shuffle=False)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}


def optimise(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    image_size: int,
    target_size: int,
    workers: int = 1,
    limit: int | None = None,
    on_error: str = "skip",
    image_format: str = "jpeg",
    quality: int = 95,
    chunk_mb: int = 64,
    cache: str | Path | None = None,
) -> dict[str, Any]:
    """Writes litdata chunks; `out` appears when all is written.

    Args:
        sources: folders, tars or folders of tars, as `Sa1bFolder` reads them.
        out: folder to make.
        image_size: S, long side of the stored images: the largest input of the models to train (a teacher's too).
        target_size: T, long side of the stored masks; 0 keeps the run lengths as they are.
        workers: processes.
        limit: only so many images, the first ones.
        on_error: "skip" lists images that cannot be read in out/skipped.txt and goes on, "raise" stops at the first.
        image_format: "jpeg" or "png".
        quality: of JPEG, 1 to 100; colours are not subsampled.
        chunk_mb: size of a chunk.
        cache: folder for the tars' index files.

    Returns:
        images (written), skipped ({position: reason}), bytes, seconds and the settings; also in out/stream.json.

    Raises:
        ImportError: litdata is not installed.
        FileNotFoundError, ValueError: a source that is none, `out` is not empty, a bad setting, or nothing readable;
            with on_error="raise" the first corrupt image.
    """
    out = Path(out)
    check_on_error(on_error)
    if image_format not in FORMATS:
        raise ValueError(f"image format must be one of {', '.join(FORMATS)}, got {image_format!r}.")
    if image_size < 1 or target_size < 0 or not 1 <= quality <= 100:
        raise ValueError(f"sizes must be positive and quality 1 to 100: {image_size=}, {target_size=}, {quality=}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: name a new folder, or remove it.")
    began = time.perf_counter()
    folders = [Sa1bFolder(source, cache=cache) for source in sources]
    fresh = out.with_name(f".{out.name}.new-{os.getpid()}")
    fresh.mkdir(parents=True)
    try:
        skipped = Skipped(fresh / "skipped.txt")
        encode = _Encode(folders, image_size, target_size, image_format, quality, on_error, skipped)
        positions = list(range(sum(map(len, folders))))[:limit]
        _write_chunks(encode, positions, fresh, workers=workers, chunk_mb=chunk_mb)
        reasons = list(skipped.read().values())
        if reasons and (on_error == "raise" or len(reasons) == len(positions)):
            raise ValueError(f"{len(reasons)} of {len(positions)} images cannot be read. {reasons[0]}")
        done = {
            "images": len(positions) - len(skipped.read()), "skipped": skipped.read(), "image_size": image_size,
            "target_size": target_size, "format": image_format, "quality": quality, "sources": [*map(str, sources)],
            "bytes": sum(file.stat().st_size for file in fresh.iterdir()), "seconds": time.perf_counter() - began,
        }  # fmt: skip
        (fresh / _NOTE).write_text(json.dumps(done, indent=1) + "\n")
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return done


@dataclass(frozen=True)
class _Encode:
    """Position among all sources -> what is stored of that image, None if it is skipped."""

    folders: list[Sa1bFolder]
    image_size: int
    target_size: int
    image_format: str
    quality: int
    on_error: str
    skipped: Skipped

    def __call__(self, position: int) -> dict[str, Any] | None:
        if self.on_error == "raise" and self.skipped.log is not None and self.skipped.log.exists():
            return None  # litdata waits for ever for a worker that raised: the first error is noted, the rest is idle
        folder, index = self._find(position)
        try:
            record = folder[index]
            runs = folder.runs(record, range(len(record.rles)))
        except (FileNotFoundError, ValueError) as error:
            self.skipped.add(position, str(error))
            return None
        rles = runs.shrink(self.target_size) if self.target_size and record.rles else record.rles
        size = rles[0]["size"] if rles else record.image.shape[:2]
        return {
            "id": record.image_id,
            "hw": np.array(record.image.shape[:2]),
            "image": self._picture(resize_longest(record.image, self.image_size)),
            "boxes": record.boxes_xywh,
            "mask_hw": np.array(size),
            "counts": b"\n".join(rle_text(rle, *size) for rle in rles),  # no count holds a line end
        }

    def _find(self, position: int) -> tuple[Sa1bFolder, int]:
        for folder in self.folders:
            if position < len(folder):
                return folder, position
            position -= len(folder)
        raise IndexError(position)

    def _picture(self, image: np.ndarray) -> bytes:
        file = BytesIO()
        options = {"quality": self.quality, "subsampling": 0} if self.image_format == "jpeg" else {}
        Image.fromarray(image).save(file, self.image_format, **options)
        return file.getvalue()


def _record(item: dict[str, Any]) -> Sa1bRecord:
    image = decode_rgb(BytesIO(item["image"]), name=f"sa_{item['id']}.jpg")
    size = [int(side) for side in item["mask_hw"]]
    texts = bytes(item["counts"]).split(b"\n") if len(item["boxes"]) else []
    height, width = item["hw"]
    scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
    return Sa1bRecord(
        image_id=int(item["id"]),
        image=image,
        rles=[{"size": size, "counts": text.decode("ascii")} for text in texts],
        boxes_xywh=np.asarray(item["boxes"]) * scale,
    )


def _mask_hw(record: Sa1bRecord) -> tuple[int, int]:
    return tuple(record.rles[0]["size"]) if record.rles else record.image.shape[:2]


class _Step:
    """What the loader does with an item, in the worker that read it."""

    def __init__(self, make: Callable[[Sa1bRecord, int], Any] | None) -> None:
        self.make = make
        self.dataset: Any = None  # that of litdata which this belongs to; it counts the epochs

    def __call__(self, item: dict[str, Any]) -> Any:
        record = _record(item)
        return record if self.make is None else self.make(record, self.dataset.current_epoch)


@dataclass(frozen=True)
class _Place:
    """Where this process stands among those that train together."""

    world: int
    rank: int
    nodes: int

    @staticmethod
    def of_torchrun() -> "_Place":
        world = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return _Place(world, int(os.environ.get("RANK", 0)), max(world // local, 1))


def _open(root: str, place: _Place, **options: Any) -> Any:
    """litdata guesses rank and nodes from initialised process groups and GPUs; here torchrun's word counts."""
    dataset = _litdata().StreamingDataset(root, drop_last=place.world > 1, **options)
    dataset.drop_last = place.world > 1
    dataset.distributed_env = type(dataset.distributed_env)(place.world, place.rank, place.nodes)
    return dataset


def _write_chunks(encode: _Encode, positions: list[int], out: Path, *, workers: int, chunk_mb: int) -> None:
    with _apart(out / ".work"):
        _litdata().optimize(
            encode, positions, output_dir=str(out), chunk_bytes=chunk_mb << 20, num_workers=max(workers, 1),
            keep_data_ordered=True, reorder_files=False, verbose=False,
            start_method="fork" if "fork" in multiprocessing.get_all_start_methods() else None,
        )  # fmt: skip


@contextmanager
def _apart(folder: Path):
    """Two passes at once must not share litdata's working folder; its start method must not stay behind either."""
    names = ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
    before = {name: os.environ.get(name) for name in names}
    method = multiprocessing.get_start_method(allow_none=True)
    os.environ.update({name: str(folder / name) for name in names})
    try:
        yield
    finally:
        multiprocessing.set_start_method(method, force=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _litdata() -> Any:
    ensure_torchvision()  # litdata imports it
    try:
        import litdata
    except ImportError as error:
        raise ImportError("Streaming needs litdata, which the extra brings: pip install 'evsam[stream]'.") from error
    return litdata


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.data.stream", description=__doc__.splitlines()[0])
    command = parser.add_subparsers(required=True, metavar="optimise").add_parser("optimise", help="write the chunks")
    command.add_argument("sources", nargs="+", metavar="SRC", help="folder, tar or folder of tars")
    command.add_argument("--out", required=True, help="folder to make")
    command.add_argument("--image-size", type=int, required=True, help="long side of the images in pixels")
    command.add_argument("--target-size", type=int, required=True, help="long side of the masks; 0: as they are")
    command.add_argument("--workers", type=int, default=1)
    command.add_argument("--limit", type=int, help="only the first so many images")
    command.add_argument("--on-error", default="skip", help="skip or raise")
    command.add_argument("--format", default="jpeg", dest="image_format", help=" or ".join(FORMATS))
    command.add_argument("--quality", type=int, default=95, help="of JPEG")
    command.add_argument("--chunk-mb", type=int, default=64)
    command.add_argument("--cache", help="folder for the tars' index files")
    options = vars(parser.parse_args(arguments))
    sources, out = options.pop("sources"), options.pop("out")
    try:
        done = optimise(sources, out, **options)
    except (ImportError, FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(Skipped.summary(done["skipped"], done["images"] + len(done["skipped"])))
    print(f"{done['images']} images, {done['bytes'] / 1e6:.1f} MB in {out}, {done['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
