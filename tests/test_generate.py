"""Generated scenes: the same bytes everywhere, exact masks, objects of all sizes, and their files."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from evsam_lib.data import write
from evsam_lib.data.categories import coco_categories
from evsam_lib.data.cells import cells
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.generate import MIN_PIXELS, Scene, scene
from evsam_lib.data.sa1b import Sa1bFolder
from evsam_lib.data.sginw import SGINW
from evsam_lib.data.write import write_coco, write_detections, write_lvis, write_sa1b, write_sginw

SIZE = (96, 128)
COCO_NAMES = {category["id"]: category["name"].replace(" ", "_") for category in coco_categories()}

# Bytes of scene(0, 0..2, size=(96, 128)). A change here means: raise generate.VERSION, and train the mini models again.
PINNED = [
    "981c66f67c148056f97e912615e1907f59c067613bb854c9b5909ab5e3955ae1",
    "d0e110be82776aedcd0b9d3133052304c2a8c6875b58f7cc0033da2ed36340ba",
    "583200d0d7d76c477d3478be57941da891aadb7bd42b5de37100f3e7a6b963e7",
]


# Annotation files of 2 scenes of seed 5, size (64, 96), as bytes. A change here means: generated folders differ from
# those that stored results were made on.
PINNED_FILES = {
    "coco": "6537f2b923aab8f5492704100760b9ca6ce8b77484bdc64a8fc3fe1901229ed6",
    "lvis": "5a7e2ecdb308182c32515cab90d010afe874b07e7eb27c34b37fe47311b5b84c",
    "sginw": "6e46af0bcbf75470ab62c636ffc43eba656b8e518a859ec6df2e839124392bc7",
    "detections": "1fafac40832013fd02717c0a9440bb96c8a51cd895482b663882c58e4084cfa4",
}


def digest(made: Scene) -> str:
    found = hashlib.sha256()
    for array in (made.image, made.masks, made.category_ids.astype("<i8"), made.parents.astype("<i8")):
        found.update(np.ascontiguousarray(array).tobytes())
    if made.crowd is not None:
        found.update(made.crowd.tobytes() + bytes([made.crowd_category_id]))
    return found.hexdigest()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(1, index, size=(120, 160)) for index in range(40)]


# ---- scenes


@pytest.mark.parametrize("index", range(3))
def test_bytes_are_pinned(index):
    assert digest(scene(0, index, size=SIZE)) == PINNED[index]


def test_order_and_neighbours_do_not_matter():
    forward = [digest(scene(4, index, size=SIZE)) for index in range(4)]
    assert [digest(scene(4, index, size=SIZE)) for index in reversed(range(4))] == forward[::-1]
    assert len(set(forward)) == 4
    assert digest(scene(5, 0, size=SIZE)) not in forward


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (107, 160), (160, 107), (40, 300)])
def test_shapes_and_types(size):
    made = scene(2, 7, size=size)
    count = len(made.masks)
    assert count >= 1
    assert made.image.shape == (*size, 3)
    assert made.image.dtype == np.uint8
    assert made.masks.shape == (count, *size)
    assert made.masks.dtype == bool
    assert made.category_ids.shape == made.parents.shape == (count,)


def test_wholes_are_disjoint_and_parts_lie_inside_theirs(scenes):
    for made in scenes:
        assert made.masks[made.parents < 0].sum(axis=0).max() == 1
        assert made.masks.sum(axis=(1, 2)).min() >= MIN_PIXELS
        for part, parent in zip(made.masks, made.parents, strict=True):
            if parent >= 0:
                assert made.parents[parent] == -1
                assert not (part & ~made.masks[parent]).any()
                assert part.sum() < made.masks[parent].sum()
        if made.crowd is not None:
            assert not (made.crowd & made.masks.any(axis=0)).any()


def test_parts_and_crowds_occur(scenes):
    assert sum((made.parents >= 0).any() for made in scenes) > len(scenes) / 4
    assert 0 < sum(made.crowd is not None for made in scenes) < len(scenes) / 2
    assert len({int(number) for made in scenes for number in made.category_ids}) >= 15


def test_sizes_cover_small_medium_and_large():
    """COCO's bounds at 640 x 480, scaled to the side used here; each class holds at least a tenth."""
    area = np.concatenate([scene(3, i, size=(240, 320)).masks.sum(axis=(1, 2)) for i in range(12)])
    shares = np.histogram(area, [0, 16**2, 48**2, np.inf])[0] / len(area)
    assert shares.min() > 0.1
    assert 8 <= len(area) / 12 <= 60


def test_objects_can_be_seen(scenes):
    """Across outlines of larger objects colours differ more than inside them (in the mean over scenes)."""
    across, inside = [], []
    for made in scenes:
        step = np.abs(np.diff(made.image.astype(int), axis=1)).sum(axis=2)
        for mask in made.masks[made.masks.sum(axis=(1, 2)) > 400]:
            edge = mask[:, 1:] != mask[:, :-1]
            across.append(step[edge].mean())
            inside.append(step[mask[:, 1:] & mask[:, :-1]].mean())
    assert np.mean(across) > 2 * np.mean(inside)


def test_images_differ_in_brightness_and_contrast(scenes):
    assert np.ptp([made.image.mean() for made in scenes]) > 60
    assert min(made.image.std() for made in scenes) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 0, SIZE), "0 or more, got -1"), ((0, -2, SIZE), "-2"), ((0, 0, (31, 64)), "at least 32 .* got 31 x 64")],
)
def test_bad_arguments_are_named(arguments, message):
    seed, index, size = arguments
    with pytest.raises(ValueError, match=message):
        scene(seed, index, size=size)


def test_scenes_need_numpy_only():
    code = (
        "import sys; from evsam_lib.data.generate import scene; scene(0, 0, size=(64, 64));"
        "assert not {'torch', 'PIL', 'pycocotools', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- files


def test_sa1b_files_have_the_official_layout(tmp_path):
    root = write_sa1b(tmp_path / "sa", 2, seed=6, size=SIZE, start=3)
    assert (root / "sa_images_ids.txt").read_text() == "4\n5\n"
    record = json.loads((root / "masks/sa_4.json").read_text())
    assert record["image"] == {"image_id": 4, "width": 128, "height": 96, "file_name": "sa_4.jpg"}
    made = scene(6, 3, size=SIZE)
    assert len(record["annotations"]) == len(made.masks)
    for annotation, mask in zip(record["annotations"], made.masks, strict=True):
        rows, columns = np.nonzero(mask)
        corner = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation["bbox"] == corner
        assert annotation["area"] == mask.sum()
        x, y = annotation["point_coords"][0]
        assert mask[int(y), int(x)]
        assert {"id", "segmentation", "predicted_iou", "stability_score", "crop_box"} <= set(annotation)


def test_coco_has_its_eighty_categories_and_varied_shapes(tmp_path):
    images = CocoImages(*write_coco(tmp_path / "coco", 4, seed=6, size=SIZE))
    assert len(images.categories) == 80
    assert (images.categories[1], images.categories[18], images.categories[90]) == ("person", "dog", "toothbrush")
    shapes = {(image.height, image.width) for image in images}
    assert len(shapes) >= 3
    assert {h > w for h, w in shapes} == {True, False}


def test_bytes_of_annotations_are_pinned(tmp_path):
    size = (64, 96)
    _, coco = write_coco(tmp_path / "coco", 2, seed=5, size=size)
    _, lvis = write_lvis(tmp_path / "lvis", 2, seed=5, size=size)
    sginw = write_sginw(tmp_path / "sginw", 2, seed=5, size=size)
    boxes = write_detections(tmp_path / "boxes.json", coco, seed=5)
    texts = {"coco": [coco], "lvis": [lvis], "sginw": sorted(sginw.glob("*/*/*.json")), "detections": [boxes]}
    found = {name: hashlib.sha256(b"".join(path.read_bytes() for path in paths)) for name, paths in texts.items()}
    assert {name: value.hexdigest() for name, value in found.items()} == PINNED_FILES


def test_lvis_is_federated(tmp_path):
    """Names no image file; what is annotated, listed as absent or as incomplete agrees with the scene."""
    _, path = write_lvis(tmp_path / "lvis", 12, seed=6, size=SIZE)
    content = json.loads(path.read_text())
    assert not any("file_name" in image for image in content["images"])
    assert {image["coco_url"].split("/")[-2] for image in content["images"]} == {"train2017", "val2017"}
    names = [category["name"] for category in content["categories"]]
    assert names == sorted(names)
    groups = {category["id"]: category["frequency"] for category in content["categories"]}
    assert {groups[annotation["category_id"]] for annotation in content["annotations"]} == {"r", "c", "f"}
    unknown = 0
    for image in content["images"]:
        made = scene(6, image["id"] - 1, size=write._coco_size(image["id"] - 1, SIZE))
        there = Counter(names.index(COCO_NAMES[int(c)]) + 1 for c in made.category_ids[made.parents < 0])
        own = Counter(a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"])
        partial = set(image["not_exhaustive_category_ids"])
        assert own
        assert not there.keys() & set(image["neg_category_ids"])
        assert partial <= own.keys() <= there.keys()
        assert all(own[number] == there[number] for number in own.keys() - partial)
        unknown += len(there.keys() - own.keys())
    assert unknown > 0
    assert any(image["not_exhaustive_category_ids"] for image in content["images"])


def test_sginw_sets_differ(tmp_path):
    root = write_sginw(tmp_path / "sginw", 3, seed=6, size=SIZE)
    contents = {p.parents[1].name: json.loads(p.read_text()) for p in sorted(root.glob("*/valid/*.json"))}
    assert set(contents) <= set(SGINW)
    assert len({(c["images"][0]["height"], c["images"][0]["width"]) for c in contents.values()}) == 4
    scenes_used = [image["file_name"] for content in contents.values() for image in content["images"]]
    assert len(set(scenes_used)) == len(scenes_used) == 12
    for name, content in contents.items():
        assert {image["id"] for image in content["images"]} == {a["image_id"] for a in content["annotations"]}
        assert [category["id"] for category in content["categories"]] == list(range(1, len(content["categories"]) + 1))
        assert {a["category_id"] for a in content["annotations"]} <= {c["id"] for c in content["categories"]}
        assert all((root / name / "valid" / image["file_name"]).is_file() for image in content["images"])


def test_a_longer_set_begins_with_the_shorter(tmp_path):
    """Every image is a function of its index alone."""
    few, many = (write_lvis(tmp_path / str(count), count, seed=6, size=SIZE)[1] for count in (2, 3))
    few, many = json.loads(few.read_text()), json.loads(many.read_text())
    assert many["images"][:2] == few["images"]
    assert many["annotations"][: len(few["annotations"])] == few["annotations"]


def test_polygons_cover_what_they_outline():
    """With a hole and a loose piece; pycocotools' rasteriser gives the mask back to the pixel."""
    from pycocotools import mask as coco_mask

    mask = np.zeros((40, 50), bool)
    mask[5:30, 5:30] = True
    mask[10:20, 12:18] = False
    mask[22:25, 8:11] = False
    mask[33:38, 40:50] = True
    polygons = write._polygons(mask)
    assert len(polygons) == 2
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, 40, 50))
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)


def test_finished_folder_is_used_again(tmp_path):
    root = write_sa1b(tmp_path / "sa", 1, seed=6, size=SIZE)
    stamp = (root / "images/sa_1.jpg").stat().st_mtime_ns
    write_sa1b(root, 1, seed=6, size=SIZE)
    assert (root / "images/sa_1.jpg").stat().st_mtime_ns == stamp
    before = (root / "images/sa_1.jpg").read_bytes()
    write_sa1b(root, 1, seed=7, size=SIZE)
    assert (root / "images/sa_1.jpg").read_bytes() != before
    mark = json.loads((root / "generated.json").read_text())
    assert (mark["seed"], mark["count"], mark["layout"]) == (7, 1, "sa1b")
    assert [path.name for path in tmp_path.iterdir()] == ["sa"]


def test_of_two_processes_the_first_to_end_writes(tmp_path, monkeypatch):
    """What another process finished meanwhile is not taken from under its reader."""
    root, real, stamps = tmp_path / "sa", write.scene, []

    def meanwhile(*args, **options):
        monkeypatch.setattr(write, "scene", real)
        with monkeypatch.context() as other:
            other.setattr(write.os, "getpid", lambda: -1)
            write_sa1b(root, 1, seed=6, size=SIZE)
        stamps.append(root.stat().st_ino)
        return real(*args, **options)

    monkeypatch.setattr(write, "scene", meanwhile)
    write_sa1b(root, 1, seed=6, size=SIZE)
    assert stamps == [root.stat().st_ino]
    assert [path.name for path in tmp_path.iterdir()] == ["sa"]


def test_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    root = write_sa1b(tmp_path / "sa", 1, seed=6, size=SIZE)
    monkeypatch.setattr(write, "scene", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_sa1b(root, 2, seed=6, size=SIZE)
    assert len(Sa1bFolder(root)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sa"]


def test_real_data_are_never_overwritten(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="not generated"):
        write_coco(tmp_path, 1, seed=0, size=SIZE)
    assert (tmp_path / "photo.jpg").read_bytes() == b"precious"


def test_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least 1 .* got 0"):
        write_sa1b(tmp_path / "sa", 0, seed=0, size=SIZE)


def test_cells_are_a_pure_function_with_disjoint_masks():
    one, again, other = (cells(seed, 3, size=(64, 96)) for seed in (1, 1, 2))
    assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert one.image.shape == (64, 96, 3)
    assert (one.masks.sum(axis=0) <= 1).all()
    assert (one.masks.sum(axis=(1, 2)) >= MIN_PIXELS).all()
    assert (one.parents == -1).all()
    with pytest.raises(ValueError, match="sides from 32, got 0, 0, 16 x 96"):
        cells(0, 0, size=(16, 96))


def test_cells_differ_little_from_what_lies_around_them():
    made = cells(0, 0, size=(240, 320))
    inside = made.masks.any(axis=0)
    assert abs(float(made.image[inside].mean()) - float(made.image[~inside].mean())) < 25  # of 255 grey levels
    assert 0.02 < inside.mean() < 0.5


def test_cells_in_coco_form(tmp_path):
    _, annotations = write_coco(tmp_path / "cells", 2, seed=1, size=(64, 96), look="cells")
    content = json.loads(annotations.read_text())
    assert [category["name"] for category in content["categories"]] == ["cell"]
    assert {annotation["category_id"] for annotation in content["annotations"]} == {1}
    with pytest.raises(ValueError, match="look must be one of scenes, cells"):
        write_coco(tmp_path / "other", 2, seed=1, size=(64, 96), look="stars")
