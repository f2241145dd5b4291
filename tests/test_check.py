"""A folder's problems are named, one sentence per image, and a good folder has none."""

import json

from evsam_lib.data.check import problems
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.generate import write_coco, write_sa1b
from evsam_lib.data.sa1b import Sa1bFolder


def test_good_folders_have_no_problems(tmp_path):
    assert problems(Sa1bFolder(write_sa1b(tmp_path / "sa1b", 2, seed=0, size=(48, 64)))) == []
    assert problems(CocoImages(*write_coco(tmp_path / "coco", 2, seed=0, size=(48, 64)))) == []


def test_each_broken_image_of_sa1b_gives_one_sentence(tmp_path):
    root = write_sa1b(tmp_path, 4, seed=0, size=(48, 64))
    (root / "images/sa_1.jpg").write_bytes(b"not a picture")
    (root / "masks/sa_2.json").write_text("{}")
    (root / "masks/sa_3.json").unlink()
    found = problems(Sa1bFolder(root))
    assert all(name in told for name, told in zip(("sa_1.jpg", "sa_2.json", "sa_3.json"), found, strict=True))
    assert len(problems(Sa1bFolder(root), limit=1)) == 1


def test_a_coco_picture_of_another_size_is_named(tmp_path):
    images, annotations = write_coco(tmp_path, 1, seed=0, size=(48, 64))
    content = json.loads(annotations.read_text())
    content["images"][0]["height"] += 1
    annotations.write_text(json.dumps(content))
    (sentence,) = problems(CocoImages(images, annotations))
    assert "000000000001.jpg is (48, 64)" in sentence
