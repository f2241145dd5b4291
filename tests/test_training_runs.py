"""Whole trainings by command: killed and resumed, on one process and two, and what they say when something is wrong."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from evsam_lib.data.write import write_coco, write_sa1b
from evsam_lib.models import weights
from evsam_lib.training import command, sources
from tests.toy_training import add_to_zoo, tiny_sam

ROOT = Path(__file__).parents[1]
PHASE2 = {"model": "tiny", "init": "random", "split": "all", "lr": 1e-3, "masks_per_image": 4, "device": "cpu"}
PHASE2 |= {"steps": 8, "batch_size": 4, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory) -> str:
    return str(write_sa1b(tmp_path_factory.mktemp("data") / "sa", 10, seed=3, size=(72, 96)))


@pytest.fixture
def toys(monkeypatch):
    before = dict(command.zoo.ZOO)
    add_to_zoo()
    yield
    command.zoo.ZOO.clear()
    command.zoo.ZOO.update(before)


def run_processes(
    folder: Path, runs: list[dict] | list[list[dict]], world: int = 1
) -> list[subprocess.CompletedProcess]:
    """Starts `world` processes that do these runs; a list of lists gives each its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(world):
        own = runs[rank] if isinstance(runs[0], list) else runs
        file = folder / f"runs{rank}.json"
        file.write_text(json.dumps(own))
        place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        here = env | ({name: str(value) for name, value in place.items()} if world > 1 else {})
        command_line = [sys.executable, "-m", "tests.toy_training", str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command_line, cwd=ROOT, env=here, **pipes))
    done = []
    for process in started:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits: loss curve, weights, optimizer."""
    files = ["log.csv", "weights.safetensors"]
    files += [f"checkpoints/step_00000008/{name}.safetensors" for name in ("weights", "optimizer", "random")]
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def largest_difference(a: Path, b: Path) -> float:
    one, other = load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors")
    learned = [name for name in one if "running_" not in name and "num_batches" not in name]
    return max((one[name] - other[name]).abs().max().item() for name in learned)


@pytest.mark.parametrize("data", ["folder", pytest.param("chunks", marks=pytest.mark.slow)])
def test_killed_and_resumed_run_ends_with_the_same_bits(sa1b, tmp_path, data):
    path = sa1b
    if data == "chunks":
        if importlib.util.find_spec("litdata") is None:
            pytest.skip("litdata is not installed")
        from evsam_lib.data.stream import optimise

        path = str(tmp_path / "chunks")
        optimise([sa1b], path, image_size=64, target_size=32, chunk_mb=1)
    run = {"phase": "end-to-end", "parameters": PHASE2 | {"data": path, "recipe": "official", "ema": 0.9}}
    a, b = {"out": str(tmp_path / "a")}, {"out": str(tmp_path / "b")}
    if data == "folder":
        (killed,) = run_processes(tmp_path, [run | a, run | b | {"kill": 4 * 6 + 3}])  # in step 7
    else:  # chunks are read by litdata's own code: the run is stopped between two steps of its log
        (killed,) = run_processes(tmp_path, [run | a, run | b | {"kill_after_rows": 7}])
    assert killed.returncode == -9, killed.stderr
    assert len(pd.read_csv(tmp_path / "b/log.csv")) in (6, 7)
    assert not (tmp_path / "b/weights.safetensors").exists()
    (resumed,) = run_processes(tmp_path, [run | b | {"resume": True}])
    assert resumed.returncode == 0, resumed.stderr
    assert same_run(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def shared(sa1b, tmp_path_factory) -> Path:
    """On two processes: a whole run, the same one killed and resumed, one with synchronised BatchNorm; on one: both."""
    folder = tmp_path_factory.mktemp("shared")
    frozen, sync = {"batchnorm": "frozen"}, {"batchnorm": "sync", "steps": 3}
    runs = {
        "whole": frozen,
        "killed": frozen,
        "sync": sync,
        "halves": frozen | {"micro_batch": 2},
        "plain": {"steps": 3},
    }
    runs = {
        name: {"phase": "end-to-end", "parameters": PHASE2 | {"data": sa1b} | own, "out": str(folder / name)}
        for name, own in runs.items()
    }
    deadly = runs["killed"] | {"kill": 2 * 6 + 1}  # the second process, in step 7
    both = [runs["whole"], runs["sync"]]
    killed = run_processes(folder, [[*both, runs["killed"]], [*both, deadly]], world=2)
    assert killed[1].returncode == -9, killed[1].stderr
    assert killed[0].returncode != 0  # it lost its partner
    assert not (folder / "killed/weights.safetensors").exists()
    done = run_processes(folder, [runs["killed"] | {"resume": True}], world=2)
    done += run_processes(folder, [runs["halves"], runs["plain"]])
    assert [process.returncode for process in done] == [0, 0, 0], [process.stderr for process in done]
    return folder


def test_killed_and_resumed_on_two_processes_ends_with_the_same_bits(shared):
    assert same_run(shared / "whole", shared / "killed")


def test_one_process_with_two_passes_does_what_two_processes_do(shared):
    logs = [pd.read_csv(shared / name / "log.csv") for name in ("whole", "halves")]
    assert logs[0].loss.tolist() == pytest.approx(logs[1].loss.tolist(), rel=1e-5)
    # Adam divides by the root of a squared gradient: where both are near 0, rounding becomes a whole step of lr 1e-3.
    assert largest_difference(shared / "whole", shared / "halves") < 1e-4


def test_synchronised_batchnorm_is_that_of_the_whole_batch(shared):
    one, other = (load_file(shared / name / "weights.safetensors") for name in ("sync", "plain"))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(
            one[f"image_encoder.norm.{name}"], other[f"image_encoder.norm.{name}"], rtol=1e-4, atol=1e-5
        )
    losses = [pd.read_csv(shared / name / "log.csv").loss.tolist() for name in ("sync", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_torchrun_trains_both_phases(sa1b, tmp_path):
    """The real launcher with a real model of the zoo, the smallest."""
    mini = "efficientvit-sam-mini"
    common = {"model": mini, "data": sa1b, "split": "all", "steps": 2, "batch_size": 2, "threads": 1, "device": "cpu"}
    first = common | {"init": "random", "teacher": mini, "teacher_weights": "mini", "cache": "int8", "hflip": 0.0}
    first |= {"held_out_every": 1, "held_out_images": 1, "held_out": sa1b}
    log = command.start("distill", first, out=tmp_path / "one", processes=2)
    assert {"held_out_l2", "held_out_cka", "held_out_iou"} < set(log.columns)
    second = common | {"init": str(tmp_path / "one/weights.safetensors"), "masks_per_image": 2, "amp": "bf16"}
    assert len(command.start("end-to-end", second, out=tmp_path / "two", processes=2)) == 2
    note = json.loads((tmp_path / "two/run.json").read_text())[-1]
    assert note["processes"] == 2
    assert note["inputs"][0]["sha256"] == weights.sha256(tmp_path / "one/weights.safetensors")
    with pytest.raises(RuntimeError, match=r"failed: evsam_lib.training: .*made with other settings: lr"):
        command.start("end-to-end", second | {"lr": 0.5}, out=tmp_path / "two", processes=2, resume=True)


# ---- by command, in this process


def test_a_dict_of_parameters_trains_both_phases(sa1b, tmp_path, toys):
    teacher = tiny_sam("tiny-teacher", image_size=64, seed=1)
    weights.save_weights(teacher, tmp_path / "teacher.safetensors")
    first = {"model": "tiny", "init": "random", "teacher": "tiny-teacher", "data": sa1b, "steps": 3, "batch_size": 2}
    first |= {"teacher_weights": str(tmp_path / "teacher.safetensors"), "device": "cpu", "held_out_every": 2}
    log = command.start("distill", first, out=tmp_path / "one")
    assert log[log.held_out_cka.notna()].step.tolist() == [2, 3]
    second = PHASE2 | {"data": sa1b, "init": str(tmp_path / "one/weights.safetensors"), "ema": 0.5}
    log = command.start("end-to-end", second, out=tmp_path / "two")
    assert len(log) == 8
    assert {path.name for path in (tmp_path / "two").iterdir()} >= {
        "weights.safetensors",
        "ema.safetensors",
        "run.json",
    }
    note = json.loads((tmp_path / "two/run.json").read_text())
    assert note[0]["parameters"]["ema"] == 0.5
    assert command.start("end-to-end", second, out=tmp_path / "two", resume=True).equals(log)
    assert len(json.loads((tmp_path / "two/run.json").read_text())) == 2


def test_own_images_in_coco_form_train(tmp_path, toys):
    pictures, annotations = write_coco(tmp_path / "coco", 4, seed=5, size=(64, 96))
    data = sources.CocoRecords(sources.CocoImages(pictures, annotations))
    content = json.loads(annotations.read_text())
    kept = [a for a in content["annotations"] if not a["iscrowd"]]
    assert sum(len(data[i].rles) for i in range(len(data))) == len(kept)
    record = data[0]
    masks = data.runs(record, range(len(record.rles))).soft(96)[:, : record.image.shape[0], : record.image.shape[1]]
    truth = [data.images.mask(a) for a in kept if a["image_id"] == record.image_id]
    for mask, true in zip(masks, truth, strict=True):
        assert (torch.from_numpy(mask > 0.5) == torch.from_numpy(true)).all() or record.image.shape[1] != 96
    own = PHASE2 | {"data": str(pictures), "annotations": str(annotations), "steps": 2}
    with pytest.raises(ValueError, match="held_out_every without held_out"):
        command.start("end-to-end", own | {"held_out_every": 1}, out=tmp_path / "run")
    assert len(command.start("end-to-end", own, out=tmp_path / "run")) == 2
    (pictures / "000000000001.jpg").write_bytes(b"no picture")
    command.start("end-to-end", own | {"batch_size": 8}, out=tmp_path / "skip")
    assert "000000000001.jpg" in (tmp_path / "skip/skipped.txt").read_text()
    assert json.loads((tmp_path / "skip/run.json").read_text())[0]["skipped"] == 1
    with pytest.raises(ValueError, match=r"000000000001.jpg cannot be read"):
        command.start("end-to-end", own | {"batch_size": 8, "on_error": "raise"}, out=tmp_path / "stop")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": "nowhere.pt"}, "No weight file at nowhere.pt"),
        ({"init": "official"}, "tiny has no official weights"),
        ({"data": "nowhere"}, "SA-1B folder nowhere does not exist"),
        ({"model": "tinny"}, "Did you mean 'tiny'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"micro_batch": 3}, "batch_size 4 cannot be cut into forward passes of 3 images on 1 processes"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used here"),
    ],
)
def test_bad_requests_are_one_sentence(sa1b, tmp_path, toys, capsys, change, words):
    wanted = PHASE2 | {"data": sa1b} | change
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    assert command.main(["end-to-end", f"--out={tmp_path / 'run'}", *flags]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_a_missing_teacher_and_one_of_another_shape(sa1b, tmp_path, toys):
    first = {"model": "tiny", "init": "random", "teacher": "tiny-teacher", "data": sa1b, "steps": 1, "batch_size": 2}
    first |= {"device": "cpu", "split": "all"}
    with pytest.raises(ValueError, match="teacher_weights missing"):
        command.start("distill", first, out=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No weight file at teacher\.pt"):
        command.start("distill", first | {"teacher_weights": "teacher.pt"}, out=tmp_path)
    other = {"teacher": "efficientvit-sam-mini", "teacher_weights": "mini"}
    with pytest.raises(ValueError, match="of efficientvit-sam-mini does not fit tiny"):
        command.start("distill", first | other, out=tmp_path)
    with pytest.raises(ValueError, match="unknown parameter 'teachers'; did you mean teacher"):
        command.start("distill", first | {"teachers": "x"}, out=tmp_path)
    with pytest.raises(ValueError, match="unknown phase 'both'"):
        command.start("both", first, out=tmp_path)
