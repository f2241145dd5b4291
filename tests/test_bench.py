"""The benchmark: turns, percentiles and speed-ups from known samples; a failing gate is never timed."""

import dataclasses
import itertools
import json
import re

import pandas as pd
import pytest
import torch

from evsam_lib import bench, timing
from evsam_lib.bench import Options, main, read, table
from evsam_lib.deploy import engines
from evsam_lib.models.fast import with_encoder
from evsam_lib.models.zoo import ZOO
from evsam_lib.study import paper


def variant(seconds, log=None, name=""):
    """A variant that claims to take so long."""

    def run(calls):
        if log is not None:
            log.append((name, calls))
        return [seconds] * calls, seconds * calls, 2 * seconds * calls

    return run


class TestTiming:
    def test_turns_are_shared_out_by_time(self):
        log = []
        variants = {"slow": variant(1.0, log, "slow"), "fast": variant(0.1, log, "fast")}
        found = timing.take_turns(variants, {"slow": 1.0, "fast": 0.1}, seconds=5, gpu=False, seed=0)
        assert len(found["slow"]["samples_s"]) == 5 and len(found["fast"]["samples_s"]) == 50
        assert found["fast"]["cpu_s"] == pytest.approx([0.2] * 5)
        firsts = [name for name, _ in log[::2]]
        assert set(firsts) == {"slow", "fast"}  # nobody is always first

    def test_one_round_of_what_takes_longer_than_all_should(self):
        found = timing.take_turns({"huge": variant(60.0)}, {"huge": 60.0}, seconds=5, gpu=False, seed=0)
        assert found["huge"]["samples_s"] == [60.0]

    def test_a_hundred_runs_are_enough(self):
        found = timing.take_turns({"tiny": variant(1e-4)}, {"tiny": 1e-4}, seconds=60, gpu=False, seed=0)
        assert len(found["tiny"]["samples_s"]) == 100

    @pytest.mark.parametrize(("seconds", "steady"), [([0.1], True), ([0.1, 0.2], False)])
    def test_warm_up_ends_when_steady(self, monkeypatch, seconds, steady):
        clock, turns = [0.0], itertools.cycle(seconds)

        def run(calls):
            spent = calls * next(turns)
            clock[0] += spent
            return [spent], spent, spent

        monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
        found = timing.warm_up(run, seconds=6, gpu=False)
        assert found["steady"] is steady
        assert (clock[0] < 3) is steady  # two seconds and 20 runs, or all of the time
        assert found["pace_s"] == pytest.approx(0.1)

    def test_a_gpu_is_timed_by_its_own_clock(self, monkeypatch):
        """Events and synchronisation recorded by a fake: one wait before and one after all calls."""
        log, ticks = [], iter([0.0, 3.0, 7.0])

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = next(ticks)
                log.append("record")

            def elapsed_time(self, other):
                return other.time - self.time  # milliseconds

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
        samples, _, _ = timing.window(lambda i: log.append(f"call {i}"), gpu=True)(2)
        assert samples == [0.003, 0.004]
        assert log == ["wait", "record", "call 0", "record", "call 1", "record", "wait"]

    def test_the_ceiling_counts_two_operations_a_product(self, monkeypatch):
        monkeypatch.setattr(timing, "window", lambda call, gpu: variant(2.0))
        assert timing.gemm_ceiling("cpu", torch.float32, seconds=0) == 2048**3


def result(**runs):
    """What `bench_model` returns, of variants with known samples."""
    common = {"model": "m", "batch": 2, "transfers": False, "weights": "random", "status": "measured"}
    common |= {"embedding_error": 1e-6, "mask_iou": 1.0, "steady": True, "ready_s": 1.0}
    entries = []
    for name, samples in runs.items():
        more = {"engine": name, "precision": "fp32", "samples_s": samples, "window_s": samples, "cpu_s": samples}
        entries.append(common | more)
    return {"conditions": {"macs": 5e9, "gemm_flops": {"fp32": 40e9}}, "runs": entries}


def test_table_by_hand():
    rows = table([result(eager=[1.0, 2.0, 3.0], fused=[0.5, 0.8, 1.0])]).set_index("engine")
    fused = rows.loc["fused"]
    assert fused["images_per_s"] == pytest.approx(2 / 0.8)
    assert fused["p50_ms"] == 800 and fused["min_ms"] == 500 and fused["p99_ms"] == pytest.approx(996)
    assert fused["tflops"] == pytest.approx(2 * 5e9 * 2 / 0.8 / 1e12)
    assert rows.loc["eager", "percent_of_gemm"] == pytest.approx(100 * 2 * 5e9 * 2 / 2.0 / 40e9)
    assert fused["speed_up_min"] == 2 and fused["speed_up_paired"] == pytest.approx(2.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run of three engines: one is right, one is wrong, one is missing."""
    folder = tmp_path_factory.mktemp("bench")
    broken = dataclasses.replace(
        engines.ENGINES["fused"],
        name="broken",
        build=lambda model, precision, cache: with_encoder(model, _Doubled(model.image_encoder)),
    )
    absent = dataclasses.replace(engines.ENGINES["fused"], name="absent", packages=("no_such_package",), remedy="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines.ENGINES, "broken", broken)
        patch.setitem(engines.ENGINES, "absent", absent)
        command = ["--models", "efficientvit-sam-mini", "--weights", "mini"]
        command += ["--engines", "eager,fused,broken,absent"]
        command += ["--precision", "fp32", "--seconds", "0.05", "--check-images", "1", "--out", str(folder)]
        assert main(command) == 1  # one failed
    return folder


class TestCommand:
    def test_accuracy_stands_beside_every_speed(self, folder):
        rows = pd.read_csv(folder / "table.csv").set_index("engine")
        assert rows.loc["fused", "embedding_error"] < 1e-5 and rows.loc["fused", "mask_iou"] > 0.999
        assert (rows.loc[["eager", "fused"], "images_per_s"] > 0).all()
        assert 0 < rows.loc["eager", "percent_of_gemm"] < 110

    def test_what_is_wrong_or_missing_is_not_timed(self, folder):
        rows = pd.read_csv(folder / "table.csv").set_index("engine")
        assert rows.loc["broken", "status"].startswith("failed: embedding error 1 is above")
        assert rows.loc["absent", "status"] == "not run: no_such_package missing; x"
        assert rows.loc[["broken", "absent"], "images_per_s"].isna().all()

    def test_the_table_is_made_from_the_samples(self, folder):
        before = (folder / "table.csv").read_text()
        (folder / "table.csv").unlink()
        assert main(["--table", str(folder)]) == 0
        assert (folder / "table.csv").read_text() == before
        (kept,) = read(folder)
        assert kept["conditions"]["versions"]["torch"] and kept["conditions"]["gemm_flops"]["fp32"] > 1e9
        assert all(run["samples_s"] for run in kept["runs"] if run["status"] == "measured")
        assert json.loads((folder / "efficientvit-sam-mini.json").read_text()) == kept


def test_what_does_not_fit_is_said_and_the_others_go_on():
    class Large:
        image_size, device = 32, torch.device("cpu")

        def encode(self, images):
            raise torch.OutOfMemoryError("no room")

    class Small(Large):
        def encode(self, images):
            return images

    ready = {("fused", "fp32"): (Large(), {"model": "m"}), ("eager", "fp32"): (Small(), {"model": "m"})}
    fits, large = bench._time(ready, 256, Options(seconds=0.001), 0.0, lambda line: None)
    assert large["status"] == "failed: out of memory" and "samples_s" not in large
    assert len(fits["samples_s"]) >= 5


class _Doubled(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return 2 * self.encoder(images)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--models", "sam-vit-x"], "Unknown model 'sam-vit-x'"),
        (["--engines", "eager,turbo"], "Unknown 'turbo'; engines are eager, fused"),
        (["--precision", "fp31"], "Unknown 'fp31'"),
        (["--batch", "4,0"], "batch must be above 0, got 0"),
        (["--seconds", "-1"], "seconds must be above 0, got -1"),
        (["--transfers"], "no transfers on a CPU"),
        (["--table", "nowhere"], r"No samples \(\*.json\) in nowhere"),
    ],
)
def test_wrong_requests(command, words, capsys):
    assert main(command) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"runs": [], "conditions": {}}', '{"runs": [{}]}', "[" * 3000]
)
def test_damaged_samples(tmp_path, capsys, content):
    (tmp_path / "x.json").write_text(content)
    assert main(["--table", str(tmp_path)]) == 2
    assert "x.json holds no samples of a benchmark, or is damaged" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()


def test_where_nothing_can_be_written_nothing_is_timed(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "bench_model", lambda *arguments, **options: pytest.fail("timed"))
    assert main(["--models", "efficientvit-sam-mini", "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Device 'cuda' needs a CUDA GPU"):
        Options(device="cuda")


def test_the_papers_rows_are_all_there():
    cells = paper("table1")
    assert list(bench.TABLE_1) == list(dict.fromkeys(cells["row"]))
    assert set(bench.TABLE_1.values()) <= set(ZOO)
