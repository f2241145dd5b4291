"""COCO and LVIS annotation files: indexed once, every form of mask, and errors that name the file."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.generate import scene, write_coco
from evsam_lib.data.write import _coco_size

SIZE = (96, 128)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco", 8, seed=9, size=SIZE)


def annotation(number=1, image_id=1, **values) -> dict:
    square = [[1, 1, 5, 1, 5, 4, 1, 4]]
    plain = {"id": number, "image_id": image_id, "bbox": [1, 1, 4, 3], "area": 12, "segmentation": square}
    return plain | {"category_id": 1, "iscrowd": 0} | values


def image(image_id=1, **values) -> dict:
    return {"id": image_id, "file_name": f"{image_id}.jpg", "height": 6, "width": 8} | values


def coco(folder, images, annotations, **values) -> CocoImages:
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations} | values))
    return CocoImages(folder, path)


def square() -> np.ndarray:
    mask = np.zeros((6, 8), bool)
    mask[1:4, 1:5] = True
    return mask


def test_what_was_written_is_read(written):
    images = CocoImages(*written)
    crowds = 0
    assert len(images) == 8
    for index, record in enumerate(images):
        made = scene(9, index, size=_coco_size(index, SIZE))
        picture = images.read(record)
        assert picture.shape == made.image.shape == (record.height, record.width, 3)
        plain = [a for a in record.annotations if not a["iscrowd"]]
        for ann, mask in zip(plain, made.masks[made.parents < 0], strict=True):
            decoded = images.mask(ann)
            assert decoded.dtype == bool
            assert (decoded & mask).sum() > 0.9 * (decoded | mask).sum()
            assert ann["area"] == decoded.sum()
            rows, columns = np.nonzero(decoded)
            assert ann["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        for ann in record.annotations:
            if ann["iscrowd"]:
                crowds += 1
                assert isinstance(ann["segmentation"]["counts"], list)
                np.testing.assert_array_equal(images.mask(ann), made.crowd)
                assert ann["area"] == made.crowd.sum()
    assert crowds >= 1


def test_pycocotools_reads_it_too(written):
    from pycocotools.coco import COCO

    images, official = CocoImages(*written), COCO(str(written[1]))
    for record in images:
        assert official.getAnnIds(imgIds=record.image_id) == [a["id"] for a in record.annotations]
        for ann in record.annotations:
            np.testing.assert_array_equal(official.annToMask(ann), images.mask(ann))


def test_order_is_that_of_the_file(tmp_path):
    images = coco(tmp_path, [image(7), image(3)], [annotation(9, 3), annotation(4, 7), annotation(2, 3)])
    assert [record.image_id for record in images] == [7, 3]
    assert [[a["id"] for a in record.annotations] for record in images] == [[4], [9, 2]]
    assert images[1] is images.by_id[3]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 5, 1, 5, 4, 1, 4]],
        [[1, 1, 3, 1, 3, 4, 1, 4], [3, 1, 5, 1, 5, 4, 3, 4]],
        {"size": [6, 8], "counts": [7, 3, 3, 3, 3, 3, 3, 3, 20]},
        coco_mask.encode(np.asfortranarray(square(), dtype=np.uint8)) | {"size": [6, 8]},
    ],
    ids=["polygon", "two polygons", "uncompressed", "compressed"],
)
def test_every_form_of_mask(tmp_path, segmentation):
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        segmentation["counts"] = segmentation["counts"].decode()
    images = coco(tmp_path, [image()], [annotation(segmentation=segmentation)])
    np.testing.assert_array_equal(images.mask(images[0].annotations[0]), square())


def test_lvis_names_images_by_address(tmp_path):
    entry = {"id": 5, "height": 6, "width": 8, "coco_url": "http://images.cocodataset.org/train2017/000000000005.jpg"}
    images = coco(tmp_path, [entry], [])
    assert images[0].path == tmp_path / "train2017/000000000005.jpg"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_become_rgb(tmp_path, mode):
    Image.new(mode, (8, 6)).save(tmp_path / "1.jpg")
    images = coco(tmp_path, [image()], [])
    assert images.read(images[0]).shape == (6, 8, 3)


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 6)).save(tmp_path / "1.jpg", exif=exif)
    images = coco(tmp_path, [image()], [])
    assert images.read(images[0]).shape == (6, 8, 3)


# ---- bad input


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image folder .*absent does not exist"):
        CocoImages(tmp_path / "absent", tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"a\.json does not exist"):
        CocoImages(tmp_path, tmp_path / "a.json")


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_json_without_a_key(tmp_path, key):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [], "annotations": []} | {"info": {}}).replace(f'"{key}"', '"other"'))
    with pytest.raises(ValueError, match=f"a.json must be a JSON object with '{key}'"):
        CocoImages(tmp_path, path)


def test_annotation_of_an_unknown_image(tmp_path):
    with pytest.raises(ValueError, match=r"Annotation 3 in .* refers to image 8, which"):
        coco(tmp_path, [image(1)], [annotation(3, 8)])


def test_annotation_that_lacks_a_key(tmp_path):
    lame = annotation()
    del lame["bbox"], lame["area"]
    with pytest.raises(ValueError, match="lacks bbox, area"):
        coco(tmp_path, [image()], [lame])


def test_image_without_a_name(tmp_path):
    with pytest.raises(ValueError, match="needs id, height, width and file_name or coco_url"):
        coco(tmp_path, [{"id": 1, "height": 6, "width": 8}], [])


def test_missing_and_corrupt_picture(tmp_path):
    images = coco(tmp_path, [image()], [])
    with pytest.raises(FileNotFoundError, match=r"1\.jpg does not exist"):
        images.read(images[0])
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read"):
        images.read(images[0])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "at least three"),
        ([[1, 1, 5, 1]], "at least three"),
        ([[1, 1, 5, 1, 5]], "at least three"),
        ([["a"] * 6], "cannot be decoded"),
        ({"size": [6, 8], "counts": [7, 3]}, "counts sum to 10"),
        ({"size": [6, 8], "counts": [-1, 49]}, "counts sum to"),
        ({"size": [6, 9], "counts": [54]}, "made for 6 x 9"),
        ({"size": [6, 8], "counts": "1"}, "counts sum to"),
        ("mask", "cannot be decoded"),
    ],
)
def test_malformed_mask(tmp_path, segmentation, message):
    images = coco(tmp_path, [image()], [annotation(17, segmentation=segmentation)])
    with pytest.raises(ValueError, match=f"annotation 17 .*{message}"):
        images.mask(images[0].annotations[0])
