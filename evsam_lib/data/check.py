"""Reads data once and says, a sentence each, what is missing or wrong with it: before an evaluation or a training.

Not part of the paper; shown in notebook 03.

    python -m evsam_lib.data.check                                    all that the paper profile reads
    python -m evsam_lib.data.check /big/data --need coco lvis-boxes   some of it, under another data_root
    python -m evsam_lib.data.check --images PICTURES --annotations FILE.json [--detections BOXES.json ...]
    python -m evsam_lib.data.check --sa1b FOLDER

`--quick` compares names and counts and opens no picture. Exit code 0: all is well; 1: something is missing or broken;
2: a wrong request.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .coco import CocoImage, CocoImages
from .detections import Detections
from .files import why_absent
from .sa1b import Sa1bFolder
from .sginw import ANNOTATIONS, SGINW

__all__ = ["Finding", "check_coco", "check_detections", "check_sa1b", "check_sginw", "main", "problems"]

_SHOWN = 20  # sentences of one data set that are printed
_EXIF_ORIENTATION = 0x0112


def problems(data: Sa1bFolder | CocoImages, *, limit: int | None = None) -> list[str]:
    """Reads every picture and decodes every mask.

    Args:
        data: the folder, opened. Opening fails by itself where the folder or its list of images is unusable.
        limit: look at this many images only, the first ones.

    Returns:
        One sentence per unusable image; empty if all is well. An image's first problem hides its others.
    """
    return list(_told(partial(_read, data, index) for index in islice(range(len(data)), limit)))


def _told(looks: Iterable[Callable[[], None]]) -> Iterator[str]:
    for look in looks:
        try:
            look()
        except (FileNotFoundError, ValueError) as error:
            yield str(error)


def _read(data: Sa1bFolder | CocoImages, index: int) -> None:
    if isinstance(data, Sa1bFolder):
        record = data[index]
        data.masks(record, range(len(record.rles)))
        return
    image = data[index]
    shape = data.read(image).shape[:2]
    if shape != (image.height, image.width):
        stated = f"{data.annotations_json} says {(image.height, image.width)}"
        raise ValueError(f"Image {image.path} is {shape}, {stated}{_turned(image, shape)}.")
    for annotation in image.annotations:
        data.mask(annotation)


def _turned(image: CocoImage, shape: tuple[int, int]) -> str:
    """A hint, if the annotations are made for the picture as its EXIF tag turns it."""
    with Image.open(image.path) as picture:
        turned = picture.getexif().get(_EXIF_ORIENTATION, 1) > 4  # 5 to 8 exchange height and width
    if not turned or shape != (image.width, image.height):
        return ""
    return ": it is annotated as its EXIF orientation turns it, which is not applied here; turn its pixels and save it"


# ---- whole data sets


@dataclass
class Finding:
    """What was found out about one data set.

    Attributes:
        summary: what is there, in a few words.
        problems: a sentence for each thing that is missing or broken.
        notes: {reason: count} of what is left out or odd, and no problem.
    """

    summary: str
    problems: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


def check_coco(
    images_dir: Path, annotations_json: Path, *, quick: bool = False, limit: int | None = None, expected: int = 0
) -> Finding:
    """Checks pictures and annotations in COCO's or LVIS's form.

    Args:
        images_dir: as `CocoImages` takes it.
        annotations_json: likewise.
        quick: compare names only; otherwise every picture is read and every mask decoded.
        limit: read this many pictures only, the first ones.
        expected: number of images that the released file lists; 0 for any number.
    """
    images, told = _open(images_dir, annotations_json)
    if images is None:
        return Finding("cannot be opened", told)
    objects = sum(len(image.annotations) for image in images)
    finding = Finding(f"{len(images)} images, {objects} annotations", notes=images.skipped | images.noted)
    if expected and images.generated:
        finding.problems.append(f"{images_dir} holds generated images, expected the {expected} released ones.")
    elif expected and len(images) != expected:
        finding.problems.append(f"{annotations_json} lists {len(images)} images, the released file {expected}.")
    absent = _absent(images)
    if absent:
        first = images[min(absent)].path
        finding.problems.append(f"{len(absent)} of {len(images)} pictures are missing, the first is {first}.")
    if not quick:
        chosen = [index for index in islice(range(len(images)), limit) if index not in absent]
        looks = (partial(_read, images, index) for index in _progress(chosen, images_dir))
        finding.problems += _told(looks)
    return finding


@lru_cache(maxsize=1)  # files of detections follow their annotation file, which may take a while to open
def _open(images_dir: Path, annotations_json: Path) -> tuple[CocoImages | None, list[str]]:
    """The images, or what is wrong."""
    needed = (("Image folder", images_dir, Path.is_dir), ("Annotation file", annotations_json, Path.is_file))
    told = [f"{what} {path} {why_absent(path)}." for what, path, is_there in needed if not is_there(path)]
    if told:
        return None, told
    try:
        return CocoImages(images_dir, annotations_json), []
    except ValueError as error:
        return None, [str(error)]


def _absent(images: CocoImages) -> set[int]:
    """Positions of images without a file; every folder is listed once."""
    there = {folder: {path.name for path in folder.glob("*")} for folder in {image.path.parent for image in images}}
    return {index for index, image in enumerate(images) if image.path.name not in there[image.path.parent]}


def check_detections(json_path: Path, images_dir: Path, annotations_json: Path) -> Finding:
    """Checks a file of detections against the annotation file that it belongs to; opens no picture."""
    if not json_path.is_file():
        return Finding(f"{json_path.name} cannot be opened", [f"Detection file {json_path} {why_absent(json_path)}."])
    images, _ = _open(images_dir, annotations_json)
    if images is None:
        sentence = f"{json_path} cannot be checked without {annotations_json} and its pictures, see there."
        return Finding(f"{json_path.name} cannot be checked", [sentence])
    try:
        detections = Detections(json_path, images)
    except ValueError as error:
        return Finding(f"{json_path.name} cannot be opened", [str(error)])
    found = sum(bool(len(detections.of(image.image_id)[1])) for image in images)
    summary = f"{json_path.name}: {len(detections)} detections on {found} of {len(images)} images"
    return Finding(summary, notes=detections.skipped | detections.noted)


def check_sginw(root: Path, *, quick: bool = False, limit: int | None = None, expected: bool = True) -> Finding:
    """Checks the sets of SGinW that are there, and, where `expected`, that all 25 are; `limit` counts for each set."""
    there = [name for name, row in SGINW.items() if (root / row.folder).is_dir()]
    finding = Finding(f"{len(there)} of {len(SGINW)} sets")
    if not there:
        finding.problems.append(f"{root} does not exist or holds none of the {len(SGINW)} sets.")
    elif expected and len(there) < len(SGINW):
        missing = ", ".join(name for name in SGINW if name not in there)
        finding.problems.append(f"{root} lacks {len(SGINW) - len(there)} sets: {missing}.")
    if expected and (root / "generated.json").is_file():
        finding.problems.append(f"{root} holds generated images, expected the released ones.")
    for name in there:
        folder = root / SGINW[name].folder / "valid"
        found = check_coco(folder, folder / ANNOTATIONS, quick=quick, limit=limit)
        finding.problems += found.problems
        finding.notes |= {reason: finding.notes.get(reason, 0) + count for reason, count in found.notes.items()}
    return finding


def check_sa1b(root: Path, *, quick: bool = False, limit: int | None = None) -> Finding:
    """Checks a folder of SA-1B, any part of it; `quick` looks at names only."""
    try:
        data = Sa1bFolder(root)
    except (FileNotFoundError, ValueError) as error:
        return Finding("cannot be opened", [str(error)])
    finding = Finding(f"{len(data)} images")
    if quick:
        files = [file for pair in data.files for file in pair]
        absent = [file for file in files if not file.is_file()]
        if absent:
            finding.problems.append(f"{len(absent)} of {len(files)} files are missing, the first is {absent[0]}.")
    else:
        chosen = _progress(list(islice(range(len(data)), limit)), root)
        finding.problems += _told(partial(_read, data, index) for index in chosen)
    return finding


def _progress(items: list[int], where: Path) -> tqdm:
    return tqdm(items, desc=str(where), unit="image", leave=False, disable=not sys.stderr.isatty())


# ---- the command line


def _needs(root: Path, *, mini: bool, quick: bool, limit: int | None) -> dict[str, Callable[[], list[Finding]]]:
    """What notebooks read, by the names of `python -m evsam_lib.fetch data`."""
    root = root / "mini" if mini else root
    look = {"quick": quick, "limit": limit}
    coco = (root / "coco/val2017", root / "coco/annotations/instances_val2017.json")
    lvis = root / ("lvis" if mini else "coco")
    lvis = (lvis, lvis / "annotations/lvis_v1_val.json")

    def boxes(of: tuple[Path, Path], *names: str) -> list[Finding]:
        return [check_detections(of[1].parents[1] / "source_json_file" / name, *of) for name in names]

    coco_boxes = ("coco_vitdet.json", *(() if mini else ("coco_yolov8.json", "coco_groundingdino.json")))
    return {
        "coco": lambda: [check_coco(*coco, **look, expected=0 if mini else 5000)],
        "coco-boxes": lambda: boxes(coco, *coco_boxes),
        "lvis": lambda: [check_coco(*lvis, **look, expected=0 if mini else 19_809)],
        "lvis-boxes": lambda: boxes(lvis, "lvis_vitdet.json"),
        "sginw": lambda: [check_sginw(root / "seginw", **look, expected=not mini)],
        "sa1b": lambda: [check_sa1b(root / "sa1b", **look)],
    }


NEEDS = tuple(_needs(Path(), mini=False, quick=True, limit=None))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    own = [options.images, options.annotations, options.detections, options.sa1b]
    try:
        if bool(options.images) != bool(options.annotations) or (options.detections and not options.images):
            raise ValueError("--images and --annotations belong together, and --detections to both.")
        if any(own) and (options.root or options.need):
            raise ValueError("give a data root, or folders of your own, not both.")
        if options.limit is not None and options.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {options.limit}.")
        root: Path = Path() if any(own) else (options.root or _default_root()).absolute()
    except ValueError as error:
        print(f"evsam_lib.data.check: {error}", file=sys.stderr)
        return 2
    if any(own):
        return 1 if _tell("own", _own(options), None) else 0
    mini = options.profile == "mini"
    needs = _needs(root, mini=mini, quick=options.quick, limit=options.limit)
    print(f"{root}, for the {options.profile} profile")
    wrong = 0
    for name in options.need or needs:
        help_ = "notebooks 03 and 08-12 make it: python -m evsam_lib.run --profile mini"
        wrong += _tell(name, needs[name](), help_ if mini else f"to get it: python -m evsam_lib.fetch data {name}")
    return 1 if wrong else 0


def _own(options: argparse.Namespace) -> list[Finding]:
    look, found = {"quick": options.quick, "limit": options.limit}, []
    if options.images:
        found.append(check_coco(options.images, options.annotations, **look))
        found += [check_detections(path, options.images, options.annotations) for path in options.detections]
    if options.sa1b:
        found.append(check_sa1b(options.sa1b, **look))
    return found


def _tell(name: str, findings: list[Finding], help_: str | None) -> int:
    """Prints what was found; returns the number of problems."""
    count = sum(len(finding.problems) for finding in findings)
    for finding in findings:
        print(f"{name}: {finding.summary}{'' if finding.problems else ', no problem'}")
        for sentence in finding.problems[:_SHOWN]:
            print(f"  {sentence}")
        if len(finding.problems) > _SHOWN:
            print(f"  and {len(finding.problems) - _SHOWN} more problems")
        for reason, number in finding.notes.items():
            print(f"  (note) {number} x {reason}")
    if count and help_:
        print(f"  {help_}")
    return count


def _default_root() -> Path:
    from evsam_lib.study.params import read_yaml  # the settings of the study; only the command line knows them
    from evsam_lib.study.paths import repo_root, resolve

    return resolve(read_yaml(repo_root() / "params" / "local.yaml").get("data_root") or "data")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.data.check", description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, help="data_root; that of params/local.yaml, or data, without it")
    parser.add_argument("--profile", choices=("paper", "mini"), default="paper", help="whose folders to look for")
    parser.add_argument("--need", nargs="+", choices=NEEDS, help="what to check; all without it")
    parser.add_argument("--images", type=Path, help="folder of pictures of your own")
    parser.add_argument("--annotations", type=Path, help="their JSON in COCO's form")
    parser.add_argument("--detections", type=Path, nargs="+", default=[], help="boxes for them, COCO's results format")
    parser.add_argument("--sa1b", type=Path, help="folder of your own in a layout of SA-1B")
    parser.add_argument("--quick", action="store_true", help="names and counts only, open no picture")
    parser.add_argument("--limit", type=int, help="read this many pictures of each set only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
