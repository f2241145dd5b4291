"""The cost model, against runs and counts of the real thing at toy size."""

import pytest
import torch

from evsam_lib.training import end_to_end, plan, settings, teacher
from tests.test_training import Pictures, batch_of, run_train
from tests.toy_training import add_to_zoo, tiny_sam


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(plan.zoo, "ZOO", dict(plan.zoo.ZOO))
    add_to_zoo()


def test_steps_and_hours_by_hand(toys):
    made = plan.make_plan("end-to-end", "tiny", gpus=32, images_per_s=60.0)
    assert made.steps == 85_938  # two epochs of 11 M images at batch 256
    assert made.hours == pytest.approx(22e6 / (60 * 32) / 3600, rel=1e-4)
    assert made.gpu_hours == pytest.approx(32 * made.hours)
    with pytest.raises(ValueError, match="cannot be cut"):
        plan.make_plan("end-to-end", "tiny", gpus=3, images_per_s=60.0)
    with pytest.raises(ValueError, match="must be above 0"):
        plan.make_plan("end-to-end", "tiny", gpus=0, images_per_s=60.0)


def test_hours_agree_with_a_run(tmp_path, toys):
    log = run_train(tmp_path, tiny_sam(), steps=9, batch_size=2)
    rate = plan.rate_of_run(tmp_path)
    made = plan.make_plan(
        "end-to-end", "tiny", gpus=1, images_per_s=rate, images=5, steps=8, batch_size=2, micro_batch=2
    )
    assert 3600 * made.hours == pytest.approx(log["seconds"].iloc[1:].sum(), rel=1e-2)  # rounded in the csv
    run_train(tmp_path / "one", tiny_sam(), steps=1)
    with pytest.raises(ValueError, match="fewer than 2 steps"):
        plan.rate_of_run(tmp_path / "one")


@pytest.mark.parametrize("chunk", [0, 4])
def test_memory_is_what_a_real_step_keeps(toys, monkeypatch, chunk):
    monkeypatch.setattr(plan, "MASKS", 12)
    sam = tiny_sam().train()
    batch = batch_of(sam, [12, 12], box_probability=0.0, max_points=1, seed=3)
    wide = {name: getattr(batch, name)[:, :, :1].expand(-1, -1, 11, *[-1] * (getattr(batch, name).ndim - 3)).clone()
            for name in ("coords", "labels", "valid")}  # fmt: skip
    batch = end_to_end.replace(batch, **wide)
    real = plan.kept_bytes(lambda: end_to_end.phase2_loss(sam, batch, recipe="paper", decoder_chunk=chunk), sam)
    planned = plan.make_plan(
        "end-to-end", "tiny", gpus=1, images_per_s=1.0, batch_size=2, micro_batch=2, amp="none", decoder_chunk=chunk
    )
    parameters = sum(p.numel() for p in sam.parameters())
    assert planned.memory_gb * 1e9 - 16 * parameters == pytest.approx(
        real, rel=0.1
    )  # the real one also chooses prompts


def test_memory_of_phase_1_and_of_a_teacher(toys):
    options = {"gpus": 1, "images_per_s": 1.0, "batch_size": 2, "micro_batch": 2, "amp": "none"}
    alone = plan.make_plan("distill", "tiny", **options).memory_gb
    taught = plan.make_plan("distill", "tiny", teacher="tiny-teacher", **options).memory_gb
    weights = 4 * sum(p.numel() for p in tiny_sam("t", image_size=64).parameters()) / 1e9
    assert taught - alone == pytest.approx(weights, rel=1e-6)


def test_rate_is_measured_by_the_real_loop(toys):
    for phase, master in (("distill", "tiny-teacher"), ("distill", None), ("end-to-end", None)):
        rate = plan.measured_rate(phase, "tiny", device=torch.device("cpu"), steps=2, masks=3, teacher=master)
        assert 0 < rate < 1e6


def test_command(toys, capsys):
    assert plan.main(["--model", "tiny", "--gpus", "32", "--images-per-s", "60"]) == 0
    said = capsys.readouterr().out
    assert "85,938" in said
    size = 11e6 * teacher.bytes_per_image(16, 4, "int8") / 1e12
    assert f"{size:.2f} TB in int8" in said
    assert plan.main(["--model", "tony", "--gpus", "32"]) == 1
    assert "unknown model 'tony'" in capsys.readouterr().err
    assert settings.EndToEnd().complete(model="tiny", images=len(Pictures())).steps == 1
