"""Data at scale: tars, targets from run lengths, corrupt images, litdata chunks and their resume."""

import importlib.util
import json
import pickle
import re
import shutil
import sys
import tarfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from evsam_lib.data import stream, transforms
from evsam_lib.data.runs import read_runs
from evsam_lib.data.sa1b import Sa1bFolder
from evsam_lib.data.skip import Skipped, Skipping, guarded
from evsam_lib.data.tars import tar_index
from evsam_lib.data.write import write_sa1b
from evsam_lib.training import batches, samples

SIZE = (90, 130)
COUNT = 12

needs_litdata = pytest.mark.skipif(importlib.util.find_spec("litdata") is None, reason="litdata is not installed")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_sa1b(tmp_path_factory.mktemp("data") / "sa", COUNT, seed=8, size=SIZE)


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "sa")


def pack(root, tar, ids) -> None:
    """A tar as SA-1B's: JPEG and JSON of an image one after the other."""
    tar.parent.mkdir(exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for image_id in ids:
            for kind, folder in (("jpg", "images"), ("json", "masks")):
                file = root / folder / f"sa_{image_id}.{kind}"
                if file.is_file():
                    archive.add(file, f"./{file.name}")


@pytest.fixture
def tars(written, tmp_path):
    """Two tars: images 7 to 12 in no order, then 1 to 6."""
    pack(written, tmp_path / "tars/sa_000000.tar", [9, 8, 7, 10, 12, 11])
    pack(written, tmp_path / "tars/sa_000001.tar", range(1, 7))
    return tmp_path / "tars"


def same(one, other) -> None:
    assert one.image_id == other.image_id
    assert one.rles == other.rles
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.boxes_xywh, other.boxes_xywh)


def encode(masks) -> list[dict]:
    rles = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"size": list(mask.shape), "counts": rle["counts"].decode()} for mask, rle in zip(masks, rles, strict=True)]


# ---- tars


def test_tars_equal_the_folder(written, tars):
    folder, packed = Sa1bFolder(written), Sa1bFolder(tars)
    assert packed.image_ids.tolist() == [7, 8, 9, 10, 11, 12, 1, 2, 3, 4, 5, 6]
    for index, record in enumerate(packed):
        same(record, folder[(index + 6) % 12])
    np.testing.assert_array_equal(packed.masks(8, [1, 0]), folder.masks(2, [1, 0]))
    one = Sa1bFolder(tars / "sa_000001.tar", split="train")
    assert one.image_ids.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        packed[12]


def test_index_is_made_once_and_anew_for_another_tar(written, tars, tmp_path, monkeypatch):
    tar, file = tars / "sa_000001.tar", tars / "sa_000001.tar.index.npy"
    first = tar_index(tar)
    assert sorted(path.name for path in tars.iterdir()) == ["sa_000000.tar", "sa_000001.tar", file.name]
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)
        np.testing.assert_array_equal(tar_index(tar), first)
    pack(written, tar, [3])
    assert tar_index(tar)["id"].tolist() == [3]
    file.write_bytes(b"damaged")
    assert tar_index(tar)["id"].tolist() == [3]
    tar_index(tar, cache=tmp_path / "cache")
    assert (tmp_path / "cache" / file.name).is_file()


def test_index_that_cannot_be_kept(tars, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="name a cache folder"):
        assert len(tar_index(tars / "sa_000001.tar", cache=tmp_path / "file")) == 6


def test_tars_are_read_by_many_processes(tars):
    data = Sa1bFolder(tars)
    data[0]
    loader = DataLoader(data, batch_size=None, sampler=[5, 0, 11, 6], num_workers=2, collate_fn=lambda record: record)
    for index, record in zip([5, 0, 11, 6], loader, strict=True):
        same(record, data[index])
    same(pickle.loads(pickle.dumps(data))[3], data[3])


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is no plain tar"), (b"text" * 500, "is no plain tar"), (None, "holds no SA-1B")]
)
def test_file_that_is_no_tar_of_images(tmp_path, content, message):
    tar = tmp_path / "sa.tar"
    tarfile.open(tar, "w").close() if content is None else tar.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Sa1bFolder(tar)


def test_tar_cut_off_and_member_without_partner(root, tars):
    tar = tars / "sa_000001.tar"
    (root / "masks/sa_3.json").unlink()
    (root / "images/sa_4.jpg").unlink()
    pack(root, tar, range(1, 7))
    tar.write_bytes(tar.read_bytes()[: tar_index(tar)["json_at"][-1] - 600])
    with pytest.warns(UserWarning, match="cut off: 6 images"):
        data = Sa1bFolder(tar)
    for index, message in ((2, r"sa_3\.json does not exist"), (3, r"sa_4\.jpg does not exist")):
        with pytest.raises(FileNotFoundError, match=message):
            data[index]
    with pytest.raises((FileNotFoundError, ValueError), match=r"sa_6\.jpg is cut off|sa_6\.json does not exist"):
        data[5]


# ---- targets from run lengths


def decoded(masks, size, *, flip=False) -> np.ndarray:
    """The official way, on masks that are there already."""
    maps = torch.from_numpy(np.stack(masks).astype(np.float32))
    maps = maps.flip(-1) if flip else maps
    return np.stack([samples.resize_and_pad(one[None], size)[0].numpy() for one in maps])


def shapes(height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(height)
    yy, xx = np.mgrid[:height, :width]
    edge = (xx == width - 1) | (yy == height - 1) | (xx == 0)
    corner = (xx == width - 1) & (yy == height - 1)
    disc = (xx - width / 3) ** 2 + (yy - height / 2) ** 2 < (height / 4) ** 2
    return [disc, ~disc, edge, corner, xx >= 0, xx < 0, rng.random((height, width)) < 0.5, (xx + yy) % 2 == 0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("hw", "size"), [((150, 201), 64), ((61, 40), 128), ((64, 64), 64), ((7, 100), 32), ((96, 64), 24), ((1, 1), 4)]
)
def test_targets_equal_the_official_ones(hw, size, flip):
    masks = shapes(*hw)
    runs = read_runs(encode(masks), *hw, where="the test")
    ours, theirs = runs.soft(size, flip=flip), decoded(masks, size, flip=flip)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)  # theirs rounds positions to float32
    np.testing.assert_array_equal(ours > 0, theirs > 0)  # where the official recipe may click
    assert ours.dtype == np.float32
    assert ours.max() <= 1


def test_area_is_kept():
    # where the size is a whole multiple and the mask far from the borders, the weights of a source pixel sum to 1/16
    mask = np.zeros((256, 256), bool)
    mask[60:141, 70:121] = True
    assert read_runs(encode([mask]), 256, 256, where="x").soft(64).sum() == pytest.approx(mask.sum() / 16, rel=1e-6)


def test_runs_of_every_spelling():
    mask = shapes(20, 30)[0]
    (text,) = encode([mask])
    flat = np.concatenate([[0], mask.T.reshape(-1), [0]])
    ends = np.flatnonzero(np.diff(flat))
    listed = np.diff([0, *ends, mask.size]).tolist()
    spelled = [text, {**text, "counts": text["counts"].encode()}, {**text, "counts": listed}]
    runs = read_runs([*spelled, [[2, 3, 12, 3, 12, 9, 2, 9]]], 20, 30, where="x")
    assert (runs.count, runs.soft(30)[3].sum()) == (4, 60)
    for target in runs.soft(30)[:3]:
        np.testing.assert_array_equal(target[:20], mask)
    assert read_runs([], 20, 30, where="x").soft(16).shape == (0, 16, 16)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [20, 30], "counts": "PP"}, "counts sum to"),
        ({"size": [20, 30], "counts": "o"}, "counts sum to"),
        ({"size": [20, 30], "counts": ""}, "counts sum to 0"),
        ({"size": [20, 30], "counts": "ooooooooooooooooooooo0"}, "does not end"),
        ({"size": [20, 30], "counts": "! "}, "does not occur"),
        ({"size": [30, 20], "counts": "PP"}, "made for 30 x 20 pixels"),
        (None, "cannot be decoded"),
    ],
)
def test_malformed_runs_are_named(segmentation, message):
    (good,) = encode([shapes(20, 30)[0]])
    with pytest.raises(ValueError, match=f"annotation 1 of image 5 .*{message}"):
        read_runs([good, segmentation, good], 20, 30, where="image 5")


def test_shrunk_masks():
    masks = [*shapes(150, 201), np.eye(150, 201, dtype=bool)]  # the last is thinner than half a new pixel
    rles = read_runs(encode(masks), 150, 201, where="x").shrink(64)
    small = coco_mask.decode([{**rle, "counts": rle["counts"].encode()} for rle in rles]).transpose(2, 0, 1)
    assert small.shape == (9, 48, 64)
    soft = decoded(masks, 64)[:, :48, :64]
    level = soft.max(axis=(1, 2), keepdims=True) / 2
    clear = abs(soft - level) > 1e-4
    np.testing.assert_array_equal(small[clear], (soft > level)[clear])
    assert small[-1].sum() >= 48  # the diagonal is whole
    assert [mask.any() for mask in small] == [mask.any() for mask in masks]
    again = read_runs(rles, 48, 64, where="x").soft(64)
    np.testing.assert_array_equal(again[:, :48], small)


MODEL = SimpleNamespace(
    name="toy", frame=transforms.LongestSide(64, 128), image_size=64, frame_size=128,
    preprocess=transforms.LongestSide(64, 128).preprocess,
)  # fmt: skip


def sample(data, record, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return samples.training_sample(data, record, model=MODEL, target_px=64, generator=generator, **options)


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_samples_of_both_ways_are_the_same(written, hflip):
    data = Sa1bFolder(written)
    for exact in (False, True):
        ours, theirs = (sample(data, data[1], hflip=hflip, exact=exact, how=how) for how in samples.TARGETS)
        assert torch.equal(ours.boxes, theirs.boxes)
        torch.testing.assert_close(ours.masks, theirs.masks, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="expected one of sampled, official"):
        sample(data, data[1], how="nearest")


# ---- corrupt images


def damage(root) -> list[int]:
    """Breaks five of the twelve images, each in its way; returns their ids."""
    picture = root / "images/sa_2.jpg"
    picture.write_bytes(picture.read_bytes()[:500])
    (root / "masks/sa_3.json").write_text('{"annotations": [')
    content = json.loads((root / "masks/sa_5.json").read_text())
    content["annotations"][-1]["segmentation"]["size"] = [5, 5]
    (root / "masks/sa_5.json").write_text(json.dumps(content))
    (root / "masks/sa_7.json").unlink()
    (root / "images/sa_12.jpg").unlink()
    return [2, 3, 5, 7, 12]


REASONS = [r"sa_2\.jpg cannot be read", "not valid JSON", "made for 5 x 5", r"sa_7\.json", r"sa_12\.jpg"]


def test_corrupt_images_are_skipped_counted_and_listed(root, tmp_path):
    broken = damage(root)
    data = guarded(Sa1bFolder(root), on_error="skip", log=tmp_path / "log/skipped.txt")
    found = [data[index].image_id for index in range(len(data))]
    assert found == [1, 4, 4, 4, 6, 6, 8, 8, 9, 10, 11, 1]
    skipped = data.skipped.read()
    assert [index + 1 for index in skipped] == broken
    for reason, expected in zip(skipped.values(), REASONS, strict=True):
        assert re.search(expected, reason)
    assert data.summary().startswith("5 of 12 images were skipped:\n  Image")
    assert Skipped.summary({}, 12) == "All 12 images could be read."
    assert guarded(data, on_error="raise") is data
    with pytest.raises(ValueError, match="'skip' or 'raise', got 'ignore'"):
        guarded(data, on_error="ignore")


def test_skipping_in_workers_fills_one_list(root, tmp_path):
    broken = damage(root)
    data = Skipping(Sa1bFolder(root), log=tmp_path / "skipped.txt")
    loader = DataLoader(data, batch_size=None, num_workers=2, collate_fn=lambda record: record.image_id)
    assert len(list(loader)) == 12
    assert [index + 1 for index in data.skipped.read()] == broken
    assert len(sample(data, data[4]).masks) == len(data[5].rles)


def test_nothing_readable_is_an_error(root):
    shutil.rmtree(root / "masks")
    with pytest.raises(ValueError, match="12 images in a row cannot be read"):
        Skipping(Sa1bFolder(root))[0]


# ---- chunks


@pytest.fixture(scope="module")
def chunks(written, tmp_path_factory):
    if importlib.util.find_spec("litdata") is None:
        pytest.skip("litdata is not installed")
    out = tmp_path_factory.mktemp("chunks") / "out"
    stream.optimise([written], out, image_size=64, target_size=64, image_format="png", workers=2, chunk_mb=0)
    return out


def test_missing_litdata_is_named(tmp_path, monkeypatch, capsys, written):
    monkeypatch.setitem(sys.modules, "litdata", None)
    arguments = ["optimise", str(written), "--out", str(tmp_path / "o"), "--image-size", "64", "--target-size", "64"]
    assert stream.main(arguments) == 1
    assert "pip install 'evsam[stream]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_litdata
def test_chunks_hold_what_was_written(written, chunks):
    folder, data = Sa1bFolder(written), stream.Sa1bStream(chunks)
    assert len(data) == COUNT
    by_id = {record.image_id: record for record in folder}
    for index in range(COUNT):
        record = data[index]
        original = by_id[record.image_id]
        np.testing.assert_array_equal(record.image, transforms.resize_longest(original.image, 64))
        assert len(record.rles) == len(original.rles)
        ours, theirs = sample(data, record, 3, hflip=1.0), sample(folder, original, 3, hflip=1.0)
        assert ours.flipped
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=1e-4)
        # hard pixels for soft ones: half a pixel of rim at most, and the image is mirrored after its resize, not before
        assert (ours.masks - theirs.masks).abs().max() <= 0.75
        assert (ours.masks - theirs.masks).abs().mean() < 0.02
        assert (ours.image - theirs.image).abs().mean() < 0.02
        np.testing.assert_array_equal(sample(data, record, 3, how="official").masks, sample(data, record, 3).masks)
    with pytest.raises(IndexError):
        data[COUNT]
    same(pickle.loads(pickle.dumps(data))[2], data[2])


@needs_litdata
def test_chunks_can_keep_the_run_lengths_and_limit(written, tmp_path):
    folder = Sa1bFolder(written)
    done = stream.optimise([written], tmp_path / "o", image_size=64, target_size=0, limit=3, image_format="png")
    assert (done["images"], done["skipped"]) == (3, {})
    data = stream.Sa1bStream(tmp_path / "o")
    for index in range(3):
        assert data[index].rles == folder[index].rles
        assert torch.equal(sample(data, data[index]).masks, sample(folder, folder[index]).masks)
    assert json.loads((tmp_path / "o/stream.json").read_text())["images"] == 3


def seeded(seed: int, data, record, epoch: int) -> tuple[int, int, bool, float]:
    """What a training would make: draws that depend on seed, epoch and image alone."""
    generator = batches.generator_for(seed, batches.SAMPLE, epoch, record.image_id)
    made = samples.training_sample(data, record, model=MODEL, target_px=32, generator=generator)
    return made.image_id, epoch, made.flipped, made.masks.sum().item()


@needs_litdata
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_stream_goes_on_with_the_same_samples(chunks, workers):
    data = stream.Sa1bStream(chunks)
    make = partial(seeded, 5, data)

    def loader():
        return data.loader(2, make=make, workers=workers, seed=1)

    whole = loader()
    epochs = [list(whole), list(whole)]
    for epoch in epochs:
        assert sorted(number for batch in epoch for number, *_ in batch) == list(range(1, COUNT + 1))
    assert epochs[0] != epochs[1]
    first = loader()
    list(first)
    seen = [batch for batch, _ in zip(first, range(2), strict=False)]
    state = json.loads(json.dumps(first.state_dict()))
    # zip asks for a third batch before it sees that the range has ended
    assert seen == epochs[1][:2]
    second = loader()
    second.load_state_dict(state)
    assert list(second) == epochs[1][3:]
    assert list(second) == list(whole)  # the third epoch


@needs_litdata
def test_ranks_share_the_images(chunks, monkeypatch):
    data = stream.Sa1bStream(chunks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        seen.append([record.image_id for batch in data.loader(2, seed=1) for record in batch])
    assert len(seen[0]) == len(seen[1]) == COUNT // 2
    assert sorted(seen[0] + seen[1]) == list(range(1, COUNT + 1))
    assert len(data) == COUNT


@needs_litdata
@pytest.mark.parametrize("workers", [1, 2])
def test_corrupt_images_are_left_out_of_the_chunks(root, tmp_path, capsys, workers):
    broken = damage(root)
    out = tmp_path / "o"
    arguments = ["optimise", str(root), "--out", str(out), "--image-size", "32", "--target-size", "16"]
    assert stream.main([*arguments, "--workers", str(workers)]) == 0
    told = capsys.readouterr().out
    assert "5 of 12 images were skipped:" in told
    assert "7 images" in told
    assert [index + 1 for index in Skipped(out / "skipped.txt").read()] == broken
    data = stream.Sa1bStream(out)
    assert sorted(data[index].image_id for index in range(len(data))) == [1, 4, 6, 8, 9, 10, 11]
    assert stream.main(arguments) == 1
    assert "is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "sa"]


@needs_litdata
def test_optimising_can_stop_at_the_first_corrupt_image(root, tmp_path):
    damage(root)
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read.*sa_2\.jpg"):
        stream.optimise([root], tmp_path / "o", image_size=32, target_size=16, on_error="raise")
    shutil.rmtree(root / "masks")
    with pytest.raises(ValueError, match="12 of 12 images cannot be read"):
        stream.optimise([root], tmp_path / "o", image_size=32, target_size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["sa"]


@needs_litdata
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "sizes must be positive"),
        ({"quality": 101}, "quality 1 to 100"),
        ({"image_format": "webp"}, "one of jpeg, png, got 'webp'"),
        ({"on_error": "ignore"}, "'skip' or 'raise'"),
    ],
)
def test_bad_settings(written, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        stream.optimise([written], tmp_path / "o", **{"image_size": 32, "target_size": 16, **options})


@needs_litdata
def test_folder_without_chunks(tmp_path):
    with pytest.raises(ValueError, match=r"holds no chunks: expected index\.json"):
        stream.Sa1bStream(tmp_path)
