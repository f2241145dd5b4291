"""Every reader of files and parameters, on damaged input: taken, or refused in one sentence, and never anything else.

Quick and always the same here. For longer, at random:

    EVSAM_FUZZ=20000 python -m pytest tests/test_fuzz.py --timeout 0      # examples of each test
"""

import copy
import io
import json
import math
import os
import pickle
import tarfile

import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from evsam_lib import run as runner
from evsam_lib.data import check, files
from evsam_lib.data.coco import CocoImages
from evsam_lib.data.detections import Detections
from evsam_lib.data.rle import encode_masks
from evsam_lib.data.runs import read_runs
from evsam_lib.data.sa1b import Sa1bFolder
from evsam_lib.data.write import write_coco, write_detections, write_lvis, write_sa1b
from evsam_lib.evaluate import merge, parts
from evsam_lib.models import weights
from evsam_lib.study import begin, build_report, params
from evsam_lib.training import checkpoint, loop
from evsam_lib.widgets.pictures import to_rgb
from tests.damage import ODD, Trap, broken, damaged, json_files, kept, little_memory, to_json

EXAMPLES = int(os.environ.get("EVSAM_FUZZ", 0))
SHAPE = (32, 48)
fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    deadline=20_000,  # ms an example: no reader hangs on a few kilobytes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module", autouse=True)
def memory():
    with little_memory():
        yield


# ---- masks


@st.composite
def small_masks(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.lists(st.booleans(), min_size=height * width, max_size=height * width), max_size=3))
    return np.array(bits, dtype=bool).reshape(len(bits), height, width)


@fuzz
@given(small_masks())
def test_masks_come_back_from_every_form_of_run_lengths(masks):
    height, width = masks.shape[1:]
    texts = encode_masks(masks)
    listed = [{"size": [height, width], "counts": _listed(mask)} for mask in masks]
    for form in (texts, listed):
        for mask, segmentation in zip(masks, form, strict=True):
            assert (files.decode_segmentation(segmentation, height, width, where="x") == mask).all()
        runs = read_runs(form, height, width, where="x")
        assert (runs.ends - runs.starts).sum() == masks.sum()
    assert all((coco_mask.decode(text) == mask).all() for text, mask in zip(texts, masks, strict=True))


def _listed(mask):
    """Run lengths counted pixel by pixel, zeros first."""
    counts = [0]
    for value in mask.T.reshape(-1):
        if value != (len(counts) % 2 == 0):
            counts.append(0)
        counts[-1] += 1
    return counts


def segmentations():
    pixel = SHAPE[0] * SHAPE[1]
    mask = np.zeros((1, *SHAPE), bool)
    mask[0, 4:20, 7:31] = True
    listed = {"size": list(SHAPE), "counts": [40, 500, pixel - 540]}
    text = encode_masks(mask)[0]
    polygons = [[3.0, 4.0, 20.5, 4.0, 20.5, 30.0], [30, 3, 40, 3, 40, 20, 30, 20]]
    letters = st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=30)
    counts = st.lists(st.integers(-3, 2000), max_size=8) | letters
    return (
        st.sampled_from([listed, text, polygons]).flatmap(broken)
        | st.builds(lambda c: {"size": list(SHAPE), "counts": c}, counts)
        | st.integers(0, len(text["counts"])).map(lambda n: text | {"counts": text["counts"][:n] + "3"})
    )


@fuzz
@given(segmentations())
def test_segmentations(segmentation):
    """Both readers agree on what is a mask, and on the mask; where it is one, so does pycocotools."""
    found = runs = None
    with kept("annotation 0 of x.json"):
        found = files.decode_segmentation(segmentation, *SHAPE, where="annotation 0 of x.json")
    with kept("x.json"):
        runs = read_runs([segmentation], *SHAPE, where="x.json")
    with kept("x.json"):
        files.check_segmentation(segmentation, *SHAPE, where="x.json")
    assert (found is None) == (runs is None)
    if found is None:
        return
    mine = np.zeros(SHAPE[0] * SHAPE[1], np.uint8)
    for start, end in zip(runs.starts, runs.ends, strict=True):
        mine[start:end] = 1
    assert (found == mine.reshape(SHAPE[::-1]).T).all()
    theirs = coco_mask.frPyObjects(segmentation, *SHAPE) if not _packed(segmentation) else segmentation
    theirs = coco_mask.decode(theirs)
    assert (found == (theirs.max(axis=2) if theirs.ndim == 3 else theirs)).all()


def _packed(segmentation):
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)


# ---- data sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", params=["coco", "lvis"])
def annotated(request, folder):
    """Folder of pictures, the annotation file's content, and a file to write it to."""
    if request.param == "coco":
        images, path = write_coco(folder / "coco", 3, seed=0, size=SHAPE)
    else:
        images, path = write_lvis(folder / "lvis", 3, seed=0, size=SHAPE)
    content = json.loads(path.read_text())
    content["categories"] = [c for c in content["categories"] if c["id"] < 5]
    return images, content, path.with_name("damaged.json")


@fuzz
@given(data=st.data())
def test_annotation_files(annotated, data):
    folder, content, path = annotated
    path.write_bytes(data.draw(json_files(content)))
    with kept("damaged.json"):
        images = CocoImages(folder, path)
        for image in images:
            for annotation in image.annotations:
                with kept("damaged.json"):
                    images.mask(annotation)
    check._open.cache_clear()
    for sentence in check.check_coco(folder, path).problems:
        assert "damaged.json" in sentence or str(folder) in sentence
        assert "\n" not in sentence


@pytest.fixture(scope="module")
def detected(annotated):
    """Images, and the content of a file of detections for them."""
    folder, content, path = annotated
    whole = path.with_name("whole.json")
    whole.write_bytes(to_json(content))
    written = write_detections(path.with_name("detected.json"), whole, seed=0)
    return CocoImages(folder, whole), json.loads(written.read_text())[:6]


@fuzz
@given(data=st.data())
def test_detection_files(folder, detected, data):
    images, records = detected
    path = folder / "boxes.json"
    path.write_bytes(data.draw(json_files(records)))
    with kept("boxes.json"):
        detections = Detections(path, images, max_per_image=2)
        assert len(detections) == sum(len(found) for found in detections.by_image.values())
        for image in images:
            boxes, scores, _ = detections.of(image.image_id)
            assert np.isfinite(boxes).all()
            assert np.isfinite(scores).all()


@pytest.fixture(scope="module")
def sa1b(folder):
    """A folder of SA-1B, and one annotation file and one picture of it."""
    root = write_sa1b(folder / "sa1b", 2, seed=0, size=SHAPE)
    return root, json.loads((root / "masks/sa_1.json").read_text()), (root / "images/sa_1.jpg").read_bytes()


@fuzz
@given(data=st.data())
def test_sa1b_annotations(sa1b, data):
    root, content, picture = sa1b
    (root / "images/sa_1.jpg").write_bytes(picture)
    (root / "masks/sa_1.json").write_bytes(data.draw(json_files(content)))
    _read_all(Sa1bFolder(root), "sa_1", "image 1 in")


@fuzz
@given(data=st.data())
def test_pictures(sa1b, data):
    root, content, picture = sa1b
    (root / "masks/sa_1.json").write_bytes(to_json(content))
    form = data.draw(st.sampled_from(["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM"]))
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(buffer, form)
    content = data.draw(damaged(buffer.getvalue()))
    (root / "images/sa_1.jpg").write_bytes(content)
    with kept(""):
        assert to_rgb(content).shape[2] == 3  # as the widget takes it from a browser
    _read_all(Sa1bFolder(root), "sa_1", "image 1 in")
    for sentence in check.check_sa1b(root).problems:
        assert "sa_1" in sentence or "image 1 in" in sentence


def _read_all(data, *names):
    for index in range(len(data)):
        try:
            with kept(""):
                record = data[index]
                assert np.isfinite(record.boxes_xywh).all()
                chosen = range(len(record.rles))
                decoded = data.masks(record, chosen)
                runs = data.runs(record, chosen)
                assert (runs.ends - runs.starts).sum() == decoded.sum()
        except ValueError as error:
            assert any(name in str(error) for name in names), error


@fuzz
@given(ids=damaged(b"1\n2\n3\n"))
def test_id_lists(folder, ids):
    root = folder / "listed"
    root.mkdir(exist_ok=True)
    (root / "sa_images_ids.txt").write_bytes(ids)
    with kept("listed"):
        Sa1bFolder(root)


@fuzz
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Tar .* is cut off")
def test_tars_and_their_indices(folder, sa1b, data):
    root, path = sa1b[0], folder / "damaged.tar"
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    ) as tar:
        for kind in ("images/sa_2.jpg", "masks/sa_2.json"):
            info = tarfile.TarInfo(("x" * 120 + "/") * data.draw(st.booleans()) + kind)
            content = (root / kind).read_bytes()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = data.draw(st.booleans())
    index = path.with_name("damaged.tar.index.npy")
    index.unlink(missing_ok=True)
    path.write_bytes(buffer.getvalue() if whole else data.draw(damaged(buffer.getvalue())))
    with kept("damaged.tar"):
        _read_all(Sa1bFolder(path), "damaged.tar")
        index.write_bytes(data.draw(damaged(index.read_bytes())))
        again = Sa1bFolder(path)  # a damaged index is made again
        if whole:
            assert list(again.image_ids) == [2]
        _read_all(again, "damaged.tar")


# ---- weights and checkpoints


class Tiny(nn.Module):
    """One tensor of each kind that real models have."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)


ODD_TENSORS = [
    torch.zeros(2, 3, dtype=torch.int8),
    torch.zeros(2, 3, dtype=torch.complex64),
    torch.zeros(2, 3, dtype=torch.float64),
    torch.zeros(2, 3, dtype=torch.bool),
    torch.zeros(2, 3).to_sparse(),
    torch.zeros(2, 3, device="meta"),
    torch.zeros(1).expand(10**6, 10**6),
    torch.zeros(0),
    torch.tensor(1.0),
    *(None, 1, "x", [1], {"a": torch.zeros(1)}),
]


@fuzz
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it meets in a damaged file
def test_weight_files(folder, data):
    state, path = dict(Tiny().state_dict()), folder / f"tiny.{data.draw(st.sampled_from(['pt', 'safetensors']))}"
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        wrapped = data.draw(st.sampled_from([state, {"model": state}, {"state_dict": state}]))
        torch.save(wrapped, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
        content = data.draw(damaged(buffer.getvalue()))
    else:
        content = data.draw(damaged(safetensors.torch.save(state)) | _headers(safetensors.torch.save(state)))
    path.write_bytes(content)
    _load(path)


@fuzz
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Sparse")
def test_weight_files_of_other_content(folder, data):
    state, path = dict(Tiny().state_dict()), folder / "other.pt"
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(state, key=str)))
        value = data.draw(st.sampled_from([*ODD_TENSORS, Trap(), state[name]]))
        state[data.draw(st.sampled_from([name, name, 7, None, "new", "model", b"x"]))] = value
        if data.draw(st.booleans()):
            del state[name]
    if data.draw(st.booleans()):
        path.write_bytes(pickle.dumps(data.draw(st.sampled_from([state, Trap(), [Trap()], {"a": Trap()}]))))
    else:
        torch.save(data.draw(st.sampled_from([state, {"model": state}, list(state), Trap()])), path)
    _load(path)


def _headers(content):
    """safetensors files whose header is broken JSON of the right length."""
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    types = st.sampled_from(["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I8", "U64", "BOOL", "C64", "X"])

    def other_type(pair):
        name, dtype = pair
        changed = copy.deepcopy(header)
        changed[name]["dtype"] = dtype
        return changed

    values = broken(header) | st.tuples(st.sampled_from(sorted(header)), types).map(other_type)
    return values.map(to_json).map(lambda text: len(text).to_bytes(8, "little") + text + rest)


def _load(path):
    with kept(path.name):
        model = Tiny()
        weights.load_strictly(model, weights.read_state_dict(path), source=str(path), known=lambda: {"it": {}})
        assert all(
            value.dtype == other.dtype
            for value, other in zip(model.state_dict().values(), Tiny().state_dict().values(), strict=True)
        )


@pytest.fixture(scope="module")
def trained(folder):
    """A checkpoint's files."""
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm(model.linear(torch.ones(4, 3))).sum().backward()
    optimizer.step()
    out = folder / "training"
    out.mkdir()
    (out / "log.csv").write_text("step,loss\n1,0.5\n")
    random = {"0.cpu": torch.get_rng_state()}
    options = {"settings": {"lr": 0.1, "steps": 3}, "random": random, "sampler": [None]}
    path = checkpoint.save(out, model, optimizer, step=1, **options)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    again = Tiny()
    found = checkpoint.load(path, again, torch.optim.AdamW(again.parameters()))
    assert (found["step"], found["settings"], found["sampler"]) == (1, options["settings"], [None])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    return path, before


@fuzz
@given(data=st.data())
def test_checkpoints(trained, data):
    path, whole = trained
    for name, content in whole.items():
        (path / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(whole)))
    if name == "state.json":
        content = data.draw(json_files(json.loads(whole[name])))
    else:
        content = data.draw(damaged(whole[name]) | (_headers(whole[name]) if "safetensors" in name else st.nothing()))
    (path / name).write_bytes(content)
    if data.draw(st.integers(0, 9)) == 0:
        (path / name).unlink()
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    with kept("step_00000001"):
        checkpoint.refuse_other(path, {"lr": 0.1, "steps": 3})
        found = checkpoint.load(path, model, optimizer)
        assert type(found["step"]) is int
        model.norm(model.linear(torch.ones(4, 3))).sum().backward()
        optimizer.step()  # what was loaded is of use
        loop._set_random(found["random"], 0)
    with kept("log.csv"):
        checkpoint.Curve(path.parents[1] / "log.csv", ["step", "loss"], keep=1, source=path / "log.csv")


# ---- evaluations


HEADER = {
    "jobs": 2,
    "shard": [1, 1],
    "image_ids": None,
    "twice": [7],
    "settings": {"prompt": "points", "clicks": 1, "noted": {}, "device": "cpu", "rules": {"inclusive_sizes": True}},
}


def lines():
    objects = [
        {"image_id": 7, "ann_id": 1, "area": 50.0, "iou": 90.0, "iou_after_click": [90.0], "clicks": [[1, 2, 1]]}
    ]
    line = {"position": 0, "seconds": 0.5, "noted": ["odd"], "objects": objects}
    return [HEADER, line, line | {"position": 1}]


@fuzz
@given(data=st.data())
def test_part_files(folder, data):
    path = parts.part_path(folder / "eval.json")
    values = lines()
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, 2))
        values[place] = data.draw(broken(values[place]))
        content = b"".join(to_json(value) + b"\n" for value in values)
    else:
        content = data.draw(damaged(b"".join(to_json(value) + b"\n" for value in values)))
    path.write_bytes(content)
    with kept(path.name):
        files = parts.finished(folder / "eval.json", HEADER)
        if files:
            found = merge(files)["summary"]
            assert found["mIoU"]["all"] is None or math.isfinite(found["mIoU"]["all"])
    with kept(path.name):
        merge([path])
    with kept(path.name):
        done, part = parts.open_part(path, HEADER, resume=True)
        with part:
            parts.append(part, [line for line in lines()[1:] if line["position"] not in done])
        assert merge([path])["summary"]["counts"]["all"] >= 0


# ---- parameters


TYPES = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "str": st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    "list[int]": st.lists(st.integers(-9, 9), max_size=3),
    "int | None": st.none() | st.integers(0, 9),
}


@fuzz
@given(annotation=st.sampled_from(sorted(TYPES)), data=st.data())
def test_parameters_come_back(folder, annotation, data):
    value = data.draw(TYPES[annotation])
    declared = {"01_one": {"n": params.Parameter("n", annotation, None)}}
    options = {"folder": folder / "params", "profile": "mini"}
    (folder / "params").mkdir(exist_ok=True)
    file = folder / "params/local.yaml"
    file.write_text(yaml.safe_dump({"n": value}), encoding="utf-8")
    assert params.merge(declared, declared, command_line={}, **options) == {"01_one": {"n": value}}
    file.unlink()
    typed = value if isinstance(value, str) else json.dumps(value)
    assert params.merge(declared, declared, command_line={"n": typed}, **options) == {"01_one": {"n": value}}


YAMLS = [
    b"n: 3\nrate: 2e-6\nsizes: [1, 2]\nname: a\n",
    b"n: 2024-13-45\n", b"n: 0x_\n", b"n: =\n", b"? [1]\n: 2\n", b"n: !!python/object/apply:os._exit [86]\n",
    b"n: .nan\n", b"n: !!bool x\n", b"n: !!timestamp x\n", b"0\n", b"[]\n",
    b"n: &a [*a]\n", b"n: 9:99:99\n", b"null: 1\n", b"1: 2\n", b"rate: .inf\n", b"- n\n", b"n", b"n: \"\\0\"\n",
    b"a: &a [1,1,1,1,1,1,1,1]\nn: [" + b"*a," * 8 + b"]\n", b"n: !!binary xx\n", b"n: !!set {a}\n",
    b"n: " + b"9" * 5000, b"rate: 0x" + b"f" * 400, b"n: {a: 1}\n", b"--- 1\n--- 2\n", b"n: 1\nn: 2\n",
]  # fmt: skip


@fuzz
@given(st.sampled_from(YAMLS).flatmap(damaged) | st.sampled_from(YAMLS))
def test_parameter_files(folder, content):
    declared = {
        "01_one": {
            n: params.Parameter(n, t, None)
            for n, t in (("n", "int"), ("rate", "float | None"), ("sizes", "list[int]"), ("name", "str"))
        }
    }
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad/local.yaml").write_bytes(content)
    with kept("local.yaml", params.UsageError):
        found = params.merge(declared, declared, folder=folder / "bad", profile="mini", command_line={})
        json.dumps(found, allow_nan=False)


@fuzz
@given(
    annotation=st.sampled_from([*TYPES, "list", "float | None", "list[float]", "x", "list[", "dict[str, int]"]),
    text=st.sampled_from([str(value) for value in ODD[:-12]] + [y.decode() for y in YAMLS]) | st.text(max_size=20),
)
def test_typed_values(folder, annotation, text):
    declared = {"01_one": {"n": params.Parameter("n", annotation, None)}}
    with kept("-p: n ", params.UsageError):
        found = params.merge(declared, declared, folder=folder / "none", profile="mini", command_line={"n": text})
        json.dumps(found, allow_nan=False)


def notebook():
    cell = new_code_cell(
        'profile: str = "mini"  # p\nn: int = 3  # n\nrate: float = 0.5  # r', metadata={"tags": ["parameters"]}
    )
    book = new_notebook(cells=[cell, new_code_cell("n")])
    book.metadata["evsam"] = {"needs": ["02_two"]}
    return json.loads(nbformat.writes(book))


SOURCES = [
    "n = 3", "n: int", "n: int = m", "n: int = {[]: 1}", "n: int = 3 +", "n: int = '\\", "n: int = " + "(" * 300,
    "x.n: int = 3", "n: int = 3\0", "n: int = " + "-" * 5000 + "1", "n: int = " + "9" * 5000, "n: float = 1e999",
    "n: int = [1, 2", "\tn: int = 3",
]  # fmt: skip


@fuzz
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_notebooks(folder, data):
    books = folder / "books"
    books.mkdir(exist_ok=True)
    content = notebook()
    if data.draw(st.booleans()):
        content["cells"][0]["source"] = data.draw(st.sampled_from(SOURCES))
    (books / "01_one.ipynb").write_bytes(data.draw(json_files(content) | st.just(to_json(content))))
    with kept("01_one.ipynb", params.UsageError):
        for found in runner._notebooks(books):
            assert all(isinstance(name, str) for name in found.needs)
            params.merge({"01_one": params.declared(found.path)}, {}, folder=folder, profile="mini", command_line={})


# ---- results


@pytest.fixture(scope="module")
def result(folder):
    """A result of a notebook, as files."""
    from matplotlib import pyplot as plt

    study = begin("01_one", results_root=str(folder / "results"), data_root=str(folder))
    study.table("table1", {"EfficientViT-SAM-L0": {"params": 34.8, "MACs": None}}, unit="M", n=3, spread=0.1)
    study.metric("train_s", 1.5)
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.set_title("It rises")
    study.figure(figure, "rise")
    study.save()
    nbformat.write(nbformat.from_dict(notebook()), study.folder / "run.ipynb")
    return {file: file.read_bytes() for file in study.folder.rglob("*") if file.is_file()}


@settings(fuzz, max_examples=EXAMPLES or 25)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_results(folder, result, data):
    for file, content in result.items():
        file.write_bytes(content)
    file = data.draw(st.sampled_from(sorted(result)))
    valid = json.loads(result[file]) if file.suffix in (".json", ".ipynb") else None
    strategy = damaged(result[file]) | _tables(result[file]) if file.suffix == ".csv" else damaged(result[file])
    file.write_bytes(data.draw(strategy if valid is None else json_files(valid)))
    with kept(file.name):
        build_report(folder / "results")
    with kept(file.name):
        begin("02_two", results_root=str(folder / "results")).result("01_one")
    assert (folder / "results/mini/01_one/table.md").exists()


def _tables(content):
    """csv files with cells and columns broken."""
    frame = pd.read_csv(io.BytesIO(content), dtype=str)
    cells = st.tuples(st.sampled_from(list(frame.columns)), st.sampled_from([str(value) for value in ODD[:-14]]))

    def change(cell):
        return frame.assign(**{cell[0]: cell[1]}).to_csv(index=False).encode("utf-8", "surrogatepass")

    drop = st.sampled_from(list(frame.columns)).map(lambda name: frame.drop(columns=name).to_csv(index=False).encode())
    return cells.map(change) | drop
