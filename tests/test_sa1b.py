"""SA-1B folders: both layouts, the official split, masks on demand, and errors that name the file."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from evsam_lib.data.generate import scene
from evsam_lib.data.sa1b import Sa1bFolder
from evsam_lib.data.write import write_sa1b

SIZE = (64, 96)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_sa1b(tmp_path_factory.mktemp("data") / "sa", 3, seed=8, size=SIZE)


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "sa")


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_was_written_is_read(written):
    data = Sa1bFolder(written)
    assert data.image_ids == [1, 2, 3]
    for index, record in enumerate(data):
        made = scene(8, index, size=SIZE)
        assert record.image_id == index + 1
        assert record.image.dtype == np.uint8
        assert np.abs(record.image.astype(int) - made.image).mean() < 4  # JPEG, quality 95
        assert record.boxes_xywh.shape == (len(made.masks), 4)
        np.testing.assert_array_equal(data.masks(record, range(len(record.rles))), made.masks)


def test_masks_are_decoded_as_asked(written):
    data = Sa1bFolder(written)
    made = scene(8, 1, size=SIZE)
    masks = data.masks(1, [3, 0, 3])
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks, made.masks[[3, 0, 3]])
    assert data.masks(1, []).shape == (0, *SIZE)


def test_archives_layout_gives_the_same(written, tmp_path):
    for image_id in (1, 2, 3):
        folder = tmp_path / ("." if image_id == 1 else f"sa_00000{image_id}")
        folder.mkdir(exist_ok=True)
        shutil.copy(written / f"images/sa_{image_id}.jpg", folder)
        shutil.copy(written / f"masks/sa_{image_id}.json", folder)
    flat, archive = Sa1bFolder(written), Sa1bFolder(tmp_path)
    assert archive.image_ids == flat.image_ids
    for one, other in zip(flat, archive, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.rles == other.rles


@pytest.mark.parametrize(("count", "train"), [(2, 1), (3, 2), (100, 99), (250, 247)])
def test_split_is_the_official_one(tmp_path, count, train):
    (tmp_path / "sa_images_ids.txt").write_text("\n".join(str(n) for n in range(count, 0, -1)))
    assert Sa1bFolder(tmp_path, split="train").image_ids == list(range(count, 0, -1))[:train]
    assert Sa1bFolder(tmp_path, split="val").image_ids == list(range(count, 0, -1))[train:]


def test_grey_pictures_become_rgb(root):
    Image.fromarray(np.full(SIZE, 77, np.uint8)).save(root / "images/sa_1.jpg")
    assert (Sa1bFolder(root)[0].image == 77).all()
    assert Sa1bFolder(root)[0].image.shape == (*SIZE, 3)


def test_image_without_masks(root):
    change(root / "masks/sa_1.json", annotations=[])
    record = Sa1bFolder(root)[0]
    assert record.boxes_xywh.shape == (0, 4)


# ---- bad input


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        Sa1bFolder(tmp_path / "absent")


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match=r"holds no SA-1B images: expected sa_images_ids\.txt"):
        Sa1bFolder(tmp_path)


def test_unknown_split(written):
    with pytest.raises(ValueError, match="'train', 'val' or None, got 'test'"):
        Sa1bFolder(written, split="test")


def test_split_of_one_image(tmp_path):
    (tmp_path / "sa_images_ids.txt").write_text("1\n")
    with pytest.raises(ValueError, match=r"train split of .* is empty"):
        Sa1bFolder(tmp_path, split="train")


def test_id_that_is_no_number(tmp_path):
    (tmp_path / "sa_images_ids.txt").write_text("1\nsa_2\n")
    with pytest.raises(ValueError, match="one image number a line, got 'sa_2'"):
        Sa1bFolder(tmp_path)


@pytest.mark.parametrize("name", ["images/sa_1.jpg", "masks/sa_1.json"])
def test_missing_file(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        Sa1bFolder(root)[0]


@pytest.mark.parametrize("keep", [0, 20, 0.5])
def test_corrupt_picture(root, keep):
    path = root / "images/sa_1.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"sa_1\.jpg cannot be read"):
        Sa1bFolder(root)[0]


def test_json_that_is_none(root):
    (root / "masks/sa_1.json").write_text('{"annotations": [')
    with pytest.raises(ValueError, match=r"sa_1\.json is not valid JSON"):
        Sa1bFolder(root)[0]


@pytest.mark.parametrize("content", ['{"image": {}}', "[1, 2]"])
def test_json_without_annotations(root, content):
    (root / "masks/sa_1.json").write_text(content)
    with pytest.raises(ValueError, match=r"sa_1\.json must be a JSON object with 'annotations'"):
        Sa1bFolder(root)[0]


@pytest.mark.parametrize("annotation", [{"bbox": [1, 2, 3, 4]}, {"segmentation": {}, "bbox": [1, 2, 3]}, 5])
def test_annotation_without_mask_or_box(root, annotation):
    change(root / "masks/sa_1.json", annotations=[annotation])
    with pytest.raises(ValueError, match="needs 'segmentation' and a 'bbox' of four numbers"):
        Sa1bFolder(root)[0]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [64, 96], "counts": "PP"}, "counts sum to"),
        ({"size": [64, 96], "counts": "o"}, "counts sum to"),
        ({"size": [64, 96], "counts": ""}, "counts sum to 0"),
        ({"size": [64, 96], "counts": "\u00e4"}, "ascii"),
        ({"size": [64, 96], "counts": "! "}, "does not occur"),
        ({"size": [96, 64], "counts": "PP"}, "made for 96 x 64 pixels"),
        ({"size": [64, 96]}, "counts"),
        (None, "cannot be decoded"),
    ],
)
def test_malformed_mask(root, segmentation, message):
    change(root / "masks/sa_1.json", annotations=[{"segmentation": segmentation, "bbox": [0, 0, 1, 1]}])
    data = Sa1bFolder(root)
    with pytest.raises(ValueError, match=f"annotation 0 of image 1 .*{message}"):
        data.masks(0, [0])
