"""A folder's problems are named, one sentence per image, and a good folder has none; and the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from evsam_lib.data.check import NEEDS, check_coco, check_detections, check_sa1b, check_sginw, main, problems
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.sa1b import Sa1bFolder
from evsam_lib.data.write import write_coco, write_detections, write_lvis, write_sa1b, write_sginw

SIZE = (48, 64)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_good_folders_have_no_problems(tmp_path):
    assert problems(Sa1bFolder(write_sa1b(tmp_path / "sa1b", 2, seed=0, size=SIZE))) == []
    assert problems(CocoImages(*write_coco(tmp_path / "coco", 2, seed=0, size=SIZE))) == []


def test_each_broken_image_of_sa1b_gives_one_sentence(tmp_path):
    root = write_sa1b(tmp_path, 4, seed=0, size=SIZE)
    (root / "images/sa_1.jpg").write_bytes(b"not a picture")
    (root / "masks/sa_2.json").write_text("{}")
    (root / "masks/sa_3.json").unlink()
    found = problems(Sa1bFolder(root))
    assert all(name in told for name, told in zip(("sa_1.jpg", "sa_2.json", "sa_3.json"), found, strict=True))
    assert len(problems(Sa1bFolder(root), limit=1)) == 1
    (sentence,) = check_sa1b(root, quick=True).problems
    assert sentence == f"1 of 8 files are missing, the first is {root / 'masks/sa_3.json'}."
    assert len(check_sa1b(root).problems) == 3


def test_a_coco_picture_of_another_size_is_named(tmp_path):
    images, annotations = write_coco(tmp_path, 1, seed=0, size=SIZE)
    rewrite(annotations, lambda content: content["images"][0].update(height=49))
    (sentence,) = problems(CocoImages(images, annotations))
    assert "000000000001.jpg is (48, 64)" in sentence
    assert "EXIF" not in sentence


def test_annotations_made_for_the_turned_picture_are_explained(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 6)).save(tmp_path / "1.jpg", exif=exif)
    entry = {"id": 1, "file_name": "1.jpg", "height": 8, "width": 6}
    (tmp_path / "a.json").write_text(json.dumps({"images": [entry], "annotations": []}))
    (sentence,) = check_coco(tmp_path, tmp_path / "a.json").problems
    assert "is (6, 8)" in sentence
    assert "as its EXIF orientation turns it, which is not applied here" in sentence


def test_a_damaged_coco_folder(tmp_path):
    images, annotations = write_coco(tmp_path, 6, seed=0, size=SIZE)
    for number in (2, 4):
        (images / f"00000000000{number}.jpg").unlink()
    picture = images / "000000000001.jpg"
    picture.write_bytes(picture.read_bytes()[:900])

    def damage(content):
        wrong_size = next(a for a in content["annotations"] if a["image_id"] == 3)
        wrong_size["segmentation"] = {"size": [9, 9], "counts": [81]}
        next(a for a in content["annotations"] if a["image_id"] == 5)["segmentation"] = []

    rewrite(annotations, damage)
    missing = f"2 of 6 pictures are missing, the first is {images / '000000000002.jpg'}."
    quick = check_coco(images, annotations, quick=True)
    assert quick.problems == [missing]
    assert quick.notes == {"annotation without a mask": 1}
    full = check_coco(images, annotations)
    assert full.problems[0] == missing
    assert [word in told for word, told in zip(("is truncated", "made for 9 x 9"), full.problems[1:], strict=True)]
    assert len(check_coco(images, annotations, limit=1).problems) == 2


def test_generated_or_partial_data_do_not_pass_for_the_released(tmp_path):
    images, annotations = write_coco(tmp_path / "coco", 1, seed=0, size=SIZE)
    (sentence,) = check_coco(images, annotations, quick=True, expected=5000).problems
    assert "holds generated images, expected the 5000 released ones" in sentence
    (tmp_path / "coco/generated.json").unlink()
    (sentence,) = check_coco(images, annotations, quick=True, expected=5000).problems
    assert sentence == f"{annotations} lists 1 images, the released file 5000."


def test_sets_of_sginw(tmp_path):
    root = write_sginw(tmp_path / "seginw", 1, seed=0, size=SIZE)
    found = check_sginw(root, expected=False)
    assert (found.summary, found.problems) == ("4 of 25 sets", [])
    (root / "Phones/valid/_annotations_min1cat.coco.json").unlink()
    lacks, generated, missing = check_sginw(root).problems
    assert lacks.startswith(f"{root} lacks 21 sets: Airplane-Parts, Bottles")
    assert "generated" in generated
    assert "Phones" in missing
    assert "does not exist" in missing
    assert "none of the 25 sets" in check_sginw(tmp_path / "absent").problems[0]


def test_detections(tmp_path):
    folder, annotations = write_coco(tmp_path / "coco", 2, seed=0, size=SIZE)
    path = write_detections(tmp_path / "boxes.json", annotations, seed=0)
    found = check_detections(path, folder, annotations)
    assert found.problems == []
    assert found.summary.endswith("detections on 2 of 2 images")
    rewrite(path, lambda content: content[0].update(score=None))
    assert check_detections(path, folder, annotations).notes == {"detection whose score is no finite number": 1}
    path.write_text("{}")
    assert "must be a JSON list" in check_detections(path, folder, annotations).problems[0]
    assert check_detections(tmp_path, folder, annotations).problems[0].endswith("is a folder, expected a file.")
    assert "cannot be checked without" in check_detections(path, folder, tmp_path / "absent.json").problems[0]


# ---- the command line


def test_an_empty_data_root_names_what_is_missing_and_how_to_get_it(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    told = capsys.readouterr().out
    for name in NEEDS:
        assert f"python -m evsam_lib.fetch data {name}\n" in told
    assert f"Image folder {tmp_path / 'coco/val2017'} does not exist." in told
    assert f"Annotation file {tmp_path / 'coco/annotations/lvis_v1_val.json'} does not exist." in told
    assert f"Detection file {tmp_path / 'coco/source_json_file/coco_yolov8.json'} does not exist." in told


def test_needs_have_the_names_of_what_can_be_fetched():
    from evsam_lib.fetch.catalog import DATA

    assert set(NEEDS) == set(DATA) - {"saco-gold", "sa-v"}  # their readers say what is wrong when they are opened


def test_the_mini_profile_whole(tmp_path, capsys):
    mini = tmp_path / "mini"
    _, coco = write_coco(mini / "coco", 1, seed=0, size=SIZE)
    _, lvis = write_lvis(mini / "lvis", 1, seed=0, size=SIZE)
    write_detections(mini / "coco/source_json_file/coco_vitdet.json", coco, seed=0)
    write_detections(mini / "lvis/source_json_file/lvis_vitdet.json", lvis, seed=0)
    write_sginw(mini / "seginw", 1, seed=0, size=SIZE)
    write_sa1b(mini / "sa1b", 1, seed=0, size=SIZE)
    assert main([str(tmp_path), "--profile", "mini"]) == 0
    assert capsys.readouterr().out.count("no problem") == len(NEEDS)
    (mini / "sa1b/images/sa_1.jpg").unlink()
    assert main([str(tmp_path), "--profile", "mini", "--need", "coco", "lvis"]) == 0
    assert main([str(tmp_path), "--profile", "mini", "--quick"]) == 1
    assert "python -m evsam_lib.run --profile mini" in capsys.readouterr().out


def test_folders_of_your_own(tmp_path, capsys):
    images, annotations = write_coco(tmp_path / "coco", 2, seed=0, size=SIZE)
    boxes = write_detections(tmp_path / "boxes.json", annotations, seed=0)
    own = ["--images", str(images), "--annotations", str(annotations), "--detections", str(boxes)]
    assert main(own) == 0
    told = capsys.readouterr().out
    assert "own: 2 images" in told
    assert "boxes.json: " in told
    (images / "000000000002.jpg").write_bytes(np.zeros(9, np.uint8).tobytes())
    assert main([*own, "--quick"]) == 0
    assert main([*own, "--limit", "1"]) == 0
    capsys.readouterr()
    assert main(own) == 1
    assert "000000000002.jpg cannot be read" in capsys.readouterr().out


def test_many_problems_are_cut_short(tmp_path, capsys):
    root = write_sa1b(tmp_path, 25, seed=0, size=(32, 32))
    for picture in (root / "images").iterdir():
        picture.write_bytes(b"")
    assert main(["--sa1b", str(root)]) == 1
    told = capsys.readouterr().out
    assert told.count("cannot be read") == 20
    assert "and 5 more problems" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "x"], "--images and --annotations belong together"),
        (["--detections", "x"], "belong together"),
        (["data", "--sa1b", "x"], "a data root, or folders of your own, not both"),
        (["data", "--limit", "0"], "--limit must be at least 1, got 0"),
    ],
)
def test_wrong_requests(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
