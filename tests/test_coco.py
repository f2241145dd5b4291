"""COCO and LVIS annotation files: indexed once, every form of mask, and errors that name the file."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.generate import scene
from evsam_lib.data.sginw import SGINW, sginw_images
from evsam_lib.data.write import _coco_size, write_coco, write_lvis, write_sginw

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


def test_lvis_keeps_what_scoring_needs(tmp_path):
    images = CocoImages(*write_lvis(tmp_path / "lvis", 4, seed=9, size=SIZE))
    assert images.generated
    assert set(images.frequency.values()) == {"r", "c", "f"}
    assert [record.path.parent.name for record in images] == ["train2017"] * 3 + ["val2017"]
    assert all(record.path.is_file() for record in images)
    scored = json.loads(images.annotations_json.read_text())
    for record, entry in zip(images, scored["images"], strict=True):
        assert record.neg_category_ids == tuple(entry["neg_category_ids"])
        assert record.not_exhaustive_category_ids == tuple(entry["not_exhaustive_category_ids"])
    assert any(record.neg_category_ids for record in images)
    assert {category["id"] for category in scored["categories"]} == set(images.categories)


def test_coco_is_not_lvis(written):
    images = CocoImages(*written)
    assert images.generated
    assert images[0].neg_category_ids == ()


def test_the_25_sets_of_sginw(tmp_path):
    assert len(SGINW) == 25
    assert SGINW["Trash"].categories == 22
    assert all(row.licence and "valid" in row.splits for row in SGINW.values())
    root = write_sginw(tmp_path / "seginw", 2, seed=9, size=SIZE)
    images = sginw_images(root, "Phones")
    assert images.generated
    assert images.read(images[0]).shape == (96, 76, 3)
    with pytest.raises(FileNotFoundError, match=r"Cows.valid does not exist"):
        sginw_images(root, "Cows")
    with pytest.raises(ValueError, match="Unknown set 'cows', expected one of Airplane-Parts"):
        sginw_images(root, "cows")
    with pytest.raises(ValueError, match="Unknown split 'test', expected one of train"):
        sginw_images(root, "Cows", split="test")


@pytest.mark.parametrize(("mode", "values"), [("L", 100), ("CMYK", (0, 155, 155, 0)), ("P", 3), ("LA", (100, 7))])
def test_other_colours_become_rgb(tmp_path, mode, values):
    name = "1.jpg" if mode in ("L", "CMYK") else "1.png"
    picture = Image.new(mode, (8, 6), values)
    if mode == "P":
        picture.putpalette([100] * 768)
    picture.save(tmp_path / name)
    images = coco(tmp_path, [image(file_name=name)], [])
    pixels = images.read(images[0])
    assert (pixels.shape, pixels.dtype) == ((6, 8, 3), np.uint8)
    expected = (255, 100, 100) if mode == "CMYK" else (100, 100, 100)
    np.testing.assert_allclose(pixels[0, 0], expected, atol=2)  # JPEG


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    levels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300
    Image.fromarray(levels).save(tmp_path / "1.png")
    images = coco(tmp_path, [image(file_name="1.png")], [])
    np.testing.assert_array_equal(images.read(images[0]), np.stack([levels // 256] * 3, axis=-1))


def test_more_bits_are_refused(tmp_path):
    Image.new("F", (8, 6)).save(tmp_path / "1.tif")
    images = coco(tmp_path, [image(file_name="1.tif")], [])
    with pytest.raises(ValueError, match=r"1\.tif cannot be read.* mode F, expected 8 or 16 bits"):
        images.read(images[0])


def test_exif_rotation_is_not_applied(tmp_path):
    """COCO's annotations are made for the pixels as they are stored, and the official evaluation reads them so."""
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


def test_what_changes_no_number_is_left_out_and_counted(tmp_path):
    boxes_only = [annotation(n, segmentation=empty) for n, empty in ((3, []), (4, [[]]), (5, None))]
    images = coco(tmp_path, [image(1), image(2)], [annotation(1, 1), annotation(2, 8), *boxes_only])
    assert [a["id"] for a in images[0].annotations] == [1]
    assert images.skipped == {
        "annotation of an image that the file does not list": 1,
        "annotation without a mask": 3,
    }
    assert images.noted == {"image without annotations": 1}


def test_what_is_odd_is_used_and_counted(tmp_path):
    """The official evaluation prompts with any box; only the annotation's area decides whether it counts."""
    odd = [
        annotation(1, bbox=[1, 1, 0, 3]),
        annotation(2, bbox=[3, 1, 2, -1]),
        annotation(3, bbox=[8, 0, 2, 2]),
        annotation(4, bbox=[-5, 0, 4, 2]),
        annotation(5, category_id=9),
        annotation(0),
    ]
    images = coco(tmp_path, [image()], odd, categories=[{"id": 1, "name": "cat"}])
    assert len(images[0].annotations) == 6
    assert images.skipped == {}
    assert images.noted == {
        "annotation whose box has no area": 2,
        "annotation whose box lies outside its image": 2,
        "annotation of a category that the file does not list": 1,
        "annotation with id 0, which pycocotools takes for no match": 1,
    }


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"bbox": [1, 1, float("nan"), 3]}, r"\[1, 1, nan, 3\] and area 12"),
        ({"bbox": [1, 1, 3]}, r"\[1, 1, 3\]"),
        ({"bbox": None}, "None"),
        ({"area": float("inf")}, "area inf"),
    ],
)
def test_a_box_or_area_that_is_no_number_stops(tmp_path, values, shown):
    with pytest.raises(ValueError, match=f"Annotation 1 in .* has bbox .*{shown}"):
        coco(tmp_path, [image()], [annotation(**values)])


def test_nothing_is_listed_twice(tmp_path):
    with pytest.raises(ValueError, match="lists image 1 twice"):
        coco(tmp_path, [image(), image()], [])
    with pytest.raises(ValueError, match="lists annotation 4 twice"):
        coco(tmp_path, [image()], [annotation(4), annotation(4)])


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


def test_truncated_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "1.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    images = coco(tmp_path, [image(height=60, width=80)], [])
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read.*: image file is truncated"):
        images.read(images[0])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 1]], "at least three"),
        ([[1, 1, 5, 1, 5]], "at least three"),
        ([[], [1, 1, 5, 1, 5, 4]], "at least three"),
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
