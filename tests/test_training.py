"""Training: samples, the shared loop, distillation and end-to-end steps, on a tiny Sam and pictures in memory."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from evsam_lib.data import transforms
from evsam_lib.models.sam import Sam
from evsam_lib.training import (
    batches,
    checkpoint,
    clock,
    distill,
    end_to_end,
    held_out,
    loop,
    samples,
    settings,
    teacher,
)
from tests.toy_training import tiny_sam

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN / "training_pieces.pt", weights_only=True)


class Pictures:
    """What training needs of a folder of images, in memory: 48 x 40 pixels, rectangles as masks."""

    def __init__(self, count: int = 5, masks: int = 3):
        self.count, self.per_image = count, masks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SimpleNamespace:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
        corner = rng.integers(0, 15, (self.per_image, 2))
        size = rng.integers(12, 24, (self.per_image, 2))
        return SimpleNamespace(image_id=index, image=image, boxes_xywh=np.concatenate([corner, size], axis=1))

    def masks(self, record: SimpleNamespace, indices: list[int]) -> np.ndarray:
        out = np.zeros((len(indices), 48, 40), dtype=bool)
        for mask, (x, y, w, h) in zip(out, record.boxes_xywh[indices], strict=True):
            mask[y : y + h, x : x + w] = True
        return out


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- samples


def test_flip_equals_the_official_one(golden):
    before, after = golden["transforms"]["in"], golden["transforms"]["flip"]
    width = before["image"].shape[-1]
    torch.testing.assert_close(samples.flip_points(before["points"], width), after["points"], rtol=0, atol=0)
    torch.testing.assert_close(samples.flip_boxes(before["bboxs"], width), after["bboxs"], rtol=0, atol=0)
    assert torch.equal(before["masks"].flip(-1), after["masks"])


def test_masks_are_resized_and_padded_as_officially(golden):
    piece = golden["transforms"]
    ours = samples.resize_and_pad(piece["flip"]["masks"], 512)
    torch.testing.assert_close(ours, piece["masks"], rtol=0, atol=1e-6)
    assert ((ours > 0) & (ours < 1)).any()  # soft edges stay


def test_boxes_are_resized_as_officially(golden):
    piece = golden["transforms"]
    x, y, w, h = (piece["resized_boxes"] * 2).unbind(-1)  # the official trainer doubles them at S = 512
    ours = samples.boxes_to_frame(piece["flip"]["bboxs"], (300, 401), image_size=512, frame_size=1024)
    torch.testing.assert_close(ours, torch.stack([x, y, x + w, y + h], -1), rtol=1e-6, atol=1e-4)


def test_points_are_resized_as_officially(golden):
    piece = golden["transforms"]
    ours = transforms.to_frame(piece["flip"]["points"], (300, 401), 512)
    torch.testing.assert_close(ours, piece["resized_points"], rtol=1e-6, atol=1e-4)


def test_image_is_resized_normalised_and_padded_as_officially(golden):
    piece = golden["transforms"]
    mean, std = (torch.tensor(v)[:, None, None] for v in (transforms.PIXEL_MEAN, transforms.PIXEL_STD))
    height, width = transforms.resized_hw(300, 401, 512)
    floats = samples.resize_and_pad(piece["flip"]["image"], 512)[:, :height, :width]
    official = piece["image"][:, :height, :width]
    torch.testing.assert_close((floats - mean) / std, official, rtol=0, atol=1e-5)
    assert not piece["image"][:, height:].any()
    # The library resizes uint8 images: two roundings, so at most one grey level (and the input's own rounding) apart.
    pixels = piece["flip"]["image"].permute(1, 2, 0).round().to(torch.uint8).numpy()
    ours = transforms.normalize_and_pad(transforms.resize_longest(pixels, 512), 512)[:, :height, :width]
    assert ((ours - official) * std).abs().max() < 1.6


@pytest.mark.parametrize(("count", "wanted"), [(100, 64), (64, 64), (10, 64), (1, 3)])
def test_official_choice_is_exact_and_even(count, wanted):
    chosen = samples.choose_masks(count, wanted, exact=True, generator=torch.Generator().manual_seed(0))
    times = torch.bincount(chosen, minlength=count)
    assert len(chosen) == wanted
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize(("count", "wanted", "expected"), [(100, 64, 64), (10, 64, 10), (0, 64, 0)])
def test_paper_choice_is_at_most_wanted_without_repeats(count, wanted, expected):
    chosen = samples.choose_masks(count, wanted, exact=False, generator=torch.Generator().manual_seed(0))
    assert len(chosen) == len(chosen.unique()) == expected


def test_sample_flips_image_masks_and_boxes_together():
    data, model = Pictures(), tiny_sam()
    plain, mirrored = (
        samples.training_sample(
            data, data[0], model=model, target_px=64, hflip=p, generator=torch.Generator().manual_seed(0)
        )
        for p in (0.0, 1.0)
    )
    assert (plain.flipped, mirrored.flipped) == (False, True)
    width = round(40 * 64 / 48)
    torch.testing.assert_close(mirrored.masks[..., :width], plain.masks[..., :width].flip(-1), rtol=0, atol=1e-5)
    assert not torch.equal(mirrored.image, plain.image)
    for sample in (plain, mirrored):
        for mask, box in zip(sample.masks, sample.boxes, strict=True):
            rows, columns = (mask > 0.5).nonzero(as_tuple=True)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # sizes are rounded at S = 32 for boxes and at 64 here, and edges at whole pixels
            assert box.tolist() == pytest.approx([float(v) for v in tight], abs=1.5)


def test_sample_repeats_masks_officially():
    data = Pictures(masks=3)
    sample = samples.training_sample(
        data, data[0], model=tiny_sam(), target_px=16, masks_per_image=8, exact=True, generator=torch.Generator()
    )
    assert sample.masks.shape == (8, 16, 16)
    assert torch.equal(sample.masks[:3], sample.masks[3:6])
    assert torch.equal(sample.boxes[:3], sample.boxes[3:6])


def test_a_model_that_stretches_its_images_is_refused():
    data, model = Pictures(), tiny_sam()
    model.frame = transforms.Stretch(64)
    with pytest.raises(ValueError, match="stretches its images"):
        samples.training_sample(data, data[0], model=model, target_px=64, generator=torch.Generator())


# ---- loop


def test_cosine_equals_the_official_schedule(golden):
    # the official scheduler's last value belongs to a step that is never taken
    assert [loop.cosine(step, 100) for step in range(101)] == pytest.approx(golden["cosine"], abs=1e-12)


@pytest.mark.parametrize("variant", ["l0", "xl0"])
def test_weight_decay_groups_equal_the_official_ones(golden, variant):
    groups = golden[f"groups_{variant}"]
    named = {name: nn.Parameter(torch.zeros(1)) for name in groups["decay"] + groups["no_decay"]}
    names = {id(parameter): name for name, parameter in named.items()}
    ours = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in loop.parameter_groups(named.items(), weight_decay=0.1)
    }
    assert ours == {0.1: set(groups["decay"]), 0.0: set(groups["no_decay"])}


def test_frozen_parameters_are_not_trained():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert [group["params"] for group in loop.parameter_groups(layer.named_parameters(), weight_decay=0.1)] == [
        [layer.bias]
    ]
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        loop.parameter_groups(layer.named_parameters(), weight_decay=0.1)


def test_generators_depend_on_their_numbers_only():
    draws = [
        torch.rand(3, generator=batches.generator_for(*numbers)).tolist()
        for numbers in [(0, 1, 2), (0, 1, 2), (0, 2, 1)]
    ]
    assert draws[0] == draws[1] != draws[2]


def test_every_image_once_per_epoch():
    steps = [batches.epoch_positions(3, 4 * step, 4 * step + 4, count=6) for step in range(3)]
    positions = [pair for step in steps for pair in step]
    assert [epoch for epoch, _ in positions] == [0] * 6 + [1] * 6
    first, second = ([i for e, i in positions if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    with pytest.raises(ValueError, match="empty"):
        batches.epoch_positions(0, 0, 1, count=0)


class Line(loop.Objective):
    """Fit y = 2x with one linear layer."""

    def forward(self, batch: SimpleNamespace, step: int, part: int) -> dict[str, torch.Tensor]:
        loss = (self.model(batch.x) - 2 * batch.x).square().mean()
        return {"loss": loss, "weight": torch.tensor(float(len(batch.x)))}


class Numbers:
    """Images of one number each."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> int:
        return index


def draw(index: int, generator: torch.Generator) -> tuple[int, torch.Tensor]:
    return index, torch.randn(1, generator=generator)


def stack(drawn: list) -> SimpleNamespace:
    ids, values = zip(*drawn, strict=True)
    return SimpleNamespace(image_ids=torch.tensor(ids), x=torch.stack(values))


def fit_line(out: Path, model: nn.Module, *, record=None, clip=None, resume=False, make=draw, **options):
    defaults = {"steps": 30, "lr": 0.1, "batch_size": 8, "weight_decay": 0.0}
    objective = Line(model)
    objective.clip_value = clip
    source = batches.Batches(Numbers(), make, stack)
    run = settings.Settings(**{**defaults, **options})
    return loop.fit(objective, source, run, out=out, record=record or {}, resume=resume)


def test_loop_learns_and_logs(tmp_path):
    log = fit_line(tmp_path, nn.Linear(1, 1))
    assert log.loss.iloc[-1] < 0.1 * log.loss.iloc[0]
    assert log.step.tolist() == list(range(1, 31))
    assert log.lr.iloc[0] == 0.1
    assert 0 < log.lr.iloc[-1] < 1e-3
    parts = log[[f"{part}_s" for part in clock.PARTS]]
    assert (parts.sum(axis=1) <= log.seconds + 1e-4).all()
    assert (log.images_per_s > 0).all()
    assert (log.memory_gb > 0).all()


def test_accumulation_changes_only_the_order_of_a_sum(tmp_path):
    models = {micro: nn.Linear(1, 1) for micro in (0, 4, 1)}
    logs = {}
    for micro, model in models.items():
        model.load_state_dict(models[0].state_dict() if micro else model.state_dict())
    for micro, model in models.items():
        logs[micro] = fit_line(tmp_path / str(micro), model, micro_batch=micro)
    for micro in (4, 1):  # sums of 8 float32 numbers in another order
        assert logs[micro].loss.tolist() == pytest.approx(logs[0].loss.tolist(), rel=1e-4, abs=1e-9)
        assert models[micro].weight.item() == pytest.approx(models[0].weight.item(), rel=1e-5)
    with pytest.raises(ValueError, match="batch_size 8 cannot be cut into forward passes of 3"):
        fit_line(tmp_path, nn.Linear(1, 1), micro_batch=3)


def test_clipping_by_value_bounds_each_gradient(tmp_path):
    model = nn.Linear(1, 1)
    seen = []
    step = torch.optim.AdamW.step

    def spy(optimizer, *args):
        seen.append(max(p.grad.abs().max().item() for group in optimizer.param_groups for p in group["params"]))
        return step(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        fit_line(tmp_path, model, steps=2, clip=1e-3)
        fit_line(tmp_path, model, steps=2)
    assert max(seen[:2]) == pytest.approx(1e-3)
    assert min(seen[2:]) > 0.1


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, what):
    model = nn.Linear(1, 1)
    fit_line(tmp_path, model, steps=3)
    with torch.no_grad():
        model.weight.fill_(float("inf") if what == "weight" else 0.0)
    if what == "gradient":
        model.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"step 1 has loss .*its images are") as caught:
        fit_line(tmp_path / "other", model, batch_size=20, micro_batch=5)
    assert same(before, state(model))
    order = [index for _, index in batches.epoch_positions(0, 0, 20, count=32)]
    assert f"its images are {', '.join(map(str, order[:16]))} and 4 more" in str(caught.value)
    assert checkpoint.checkpoints(tmp_path)


def test_running_average_by_hand(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    average, decay = model.weight.item(), 0.5
    for steps in (1, 2, 3):  # the schedule has three steps each time: it is stopped, not shortened
        fresh = nn.Linear(1, 1, bias=False)
        fresh.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError):
            fit_line(tmp_path, fresh, steps=4, ema=decay, checkpoint_every=1, make=stops_at(8 * steps))
        average = decay * average + (1 - decay) * fresh.weight.item()
        kept = load_file(tmp_path / f"checkpoints/step_{steps:08d}/ema.safetensors")
        assert kept["weight"].item() == pytest.approx(average, rel=1e-6)


def stops_at(sample: int):
    """A maker of samples that fails at its so-manieth: what comes before is whole."""
    made = iter(range(10**6))

    def make(index: int, generator: torch.Generator) -> tuple[int, torch.Tensor]:
        if next(made) >= sample:
            raise RuntimeError("stopped")
        return draw(index, generator)

    return make


# ---- the folder of a run


def test_last_checkpoints_are_kept_and_whole(tmp_path):
    model = nn.Linear(1, 1)
    fit_line(tmp_path, model, steps=7, checkpoint_every=2, keep=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000006", "step_00000007"]
    assert same(load_file(tmp_path / "checkpoints/step_00000007/weights.safetensors"), state(model))
    assert (tmp_path / "checkpoints/step_00000007/log.csv").read_bytes() == (tmp_path / "log.csv").read_bytes()


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    fit_line(tmp_path, nn.Linear(1, 1), steps=2, ema=0.9)
    kinds = {path.suffix for path in checkpoint.checkpoints(tmp_path)[-1].iterdir()}
    assert kinds == {".safetensors", ".json", ".csv"}


def test_full_disk_is_said_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    fit_line(tmp_path, nn.Linear(1, 1), steps=2)
    before = [path.read_bytes() for path in sorted(checkpoint.checkpoints(tmp_path)[0].iterdir())]
    model, real = nn.Linear(1, 1), checkpoint.save_file

    def full(tensors, path, **options):
        if path.name == "optimizer.safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    words = "the checkpoint of step 9 cannot be written.*No space left on device; the last checkpoint, step_00000002"
    with pytest.raises(OSError, match=words):
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.save(tmp_path, model, optimizer, step=9, settings={}, random={}, sampler=[])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert [path.read_bytes() for path in sorted(checkpoint.checkpoints(tmp_path)[0].iterdir())] == before


def test_full_disk_under_the_log(tmp_path):
    (tmp_path / "run").mkdir()
    curve = checkpoint.Curve(tmp_path / "run/log.csv", ["step"])
    curve.path = Path("/dev/full")
    if not curve.path.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError, match=r"the log cannot be written.*there is no checkpoint yet"):
        loop._write(tmp_path / "run", (curve, curve), {"step": 1}, {"all": 1.0}, clock.Clock(torch.device("cpu")), 1)


def test_damaged_checkpoint_is_named(tmp_path):
    fit_line(tmp_path, nn.Linear(1, 1), steps=4, checkpoint_every=2)
    last = checkpoint.checkpoints(tmp_path)[-1]
    (last / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step_00000004 is damaged .*remove that folder to go on from the one before"):
        fit_line(tmp_path, nn.Linear(1, 1), steps=4, checkpoint_every=2, resume=True)
    shutil.rmtree(last)
    assert len(fit_line(tmp_path, nn.Linear(1, 1), steps=4, checkpoint_every=2, resume=True)) == 4


def test_two_runs_in_one_folder(tmp_path):
    with checkpoint.locked(tmp_path), pytest.raises(ValueError, match=r"is in use by process \d+ on .*name another"):
        fit_line(tmp_path, nn.Linear(1, 1))
    fit_line(tmp_path, nn.Linear(1, 1), steps=1)  # free again


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    fit_line(tmp_path, nn.Linear(1, 1), steps=4, record={"recipe": "paper"})
    with pytest.raises(ValueError, match=r"lr 0.1 \(now 0.2\), recipe 'paper' \(now 'official'\)"):
        fit_line(tmp_path, nn.Linear(1, 1), steps=4, record={"recipe": "official"}, lr=0.2, resume=True)


def test_fresh_run_clears_old_checkpoints_and_log(tmp_path):
    fit_line(tmp_path, nn.Linear(1, 1), steps=9)
    fit_line(tmp_path, nn.Linear(1, 1), steps=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    assert len(pd.read_csv(tmp_path / "log.csv")) == 3


# ---- settings


def test_settings_are_checked():
    for bad, words in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"amp": "fp16"}, "amp must be one of none, bf16"),
        ({"hflip": 1.5}, "hflip must be"),
        ({"recipe": "sam"}, "recipe must be one of paper, official"),
        ({"decoder_chunks": 2}, "did you mean decoder_chunk"),
    ]:
        with pytest.raises(ValueError, match=words):
            settings.checked(settings.EndToEnd, bad)


@pytest.mark.parametrize(
    ("recipe", "model", "batch", "lr", "steps"),
    [
        ("paper", "efficientvit-sam-l0", 256, 2e-6, 85_938),
        ("paper", "efficientvit-sam-xl1", 256, 1e-6, 85_938),
        ("official", "efficientvit-sam-l0", 128, 2.56e-5, 171_875),
        ("official", "efficientvit-sam-xl0", 128, 1.28e-5, 171_875),
    ],
)
def test_recipes_are_complete(recipe, model, batch, lr, steps):
    made = settings.EndToEnd(recipe=recipe).complete(model=model, images=11_000_000)
    assert (made.batch_size, made.steps) == (batch, steps)
    assert made.lr == pytest.approx(lr)  # official: base rate x 32 GPUs (facts of configs/*.yaml)


# ---- phase 1


def run_distill(out: Path, student: Sam, *, teacher=None, data=None, resume=False, held_out=None, **options):
    made = {"steps": 6, "batch_size": 2, "lr": 1e-2} | options
    teacher = teacher or tiny_sam("tiny-teacher", image_size=64, seed=1)
    run = settings.Distillation(**made)
    return distill.distill(student, teacher, data or Pictures(), run, out=out, resume=resume, held_out=held_out)


def test_phase1_loss_by_hand():
    student, images = tiny_sam(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embedding = student.encode(images).detach()
    parts = distill.phase1_loss(student, images, embedding + 2)
    assert parts["loss"].item() == pytest.approx(4.0, rel=1e-5)
    assert distill.phase1_loss(student, images, embedding * 3)["cosine"].item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="embed alike"):
        distill.phase1_loss(student, images, embedding[:, :8])


def test_distillation_lowers_the_error_and_trains_the_encoder_only(tmp_path):
    student, teacher = tiny_sam(), tiny_sam("tiny-teacher", image_size=64, seed=1)
    pictures = [Pictures(20)[i].image for i in range(10, 14)]
    before, at_start = state(student), held_out.embedding_metrics(student, teacher, pictures)
    log = run_distill(tmp_path, student, steps=40)
    after, at_end = state(student), held_out.embedding_metrics(student, teacher, pictures)
    assert at_end["l2"] < at_start["l2"]
    assert at_end["cosine"] > at_start["cosine"]
    assert {"step", "loss", "l2", "cosine", "grad_norm", "lr", "seconds", "teacher_s", "images_per_s"} < set(
        log.columns
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"image_encoder"}
    assert not torch.equal(before["image_encoder.norm.running_mean"], after["image_encoder.norm.running_mean"])
    assert not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_held_out_images_are_measured_while_training(tmp_path):
    student, teacher = tiny_sam(), tiny_sam("tiny-teacher", image_size=64, seed=1)
    measure = held_out.HeldOut(student, Pictures(3), images=2, teacher=teacher)
    log = run_distill(tmp_path, student, teacher=teacher, held_out=measure, held_out_every=2, steps=5)
    measured = log[log.held_out_l2.notna()]
    assert measured.step.tolist() == [2, 4, 5]
    last = held_out.embedding_metrics(student, teacher, [Pictures(3)[i].image for i in range(2)])
    assert measured.held_out_l2.iloc[-1] == pytest.approx(last["l2"], rel=1e-6)
    assert measured.held_out_cka.iloc[-1] == pytest.approx(last["cka"], rel=1e-6)
    assert measured.held_out_iou.between(0, 1).all()


def test_linear_cka_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 3, 4, generator=generator), torch.randn(2, 6, 3, 4, generator=generator)
    likeness = held_out.Likeness()
    for i in range(2):
        likeness.add(x[i : i + 1], y[i : i + 1])
    a, b = (maps.movedim(1, -1).reshape(-1, 6).double() for maps in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    k, m = a @ a.T, b @ b.T  # the definition by kernels of cells
    assert likeness.result()["cka"] == pytest.approx((k * m).sum().item() / (k.norm() * m.norm()).item(), rel=1e-9)
    turned = held_out.Likeness()
    turned.add(x, 3 * torch.einsum("ij,bjhw->bihw", torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q, x))
    assert turned.result()["cka"] == pytest.approx(1.0, abs=1e-9)


def test_held_out_iou_by_hand():
    class Perfect(SimpleNamespace):
        """Answers a box with two masks: nothing, and what lies in the box; a click with the whole image and nothing."""

        def encode(self, images):
            return images

        def quality(self, low_res, predicted):
            return predicted

        def decode(self, embedding, coords, labels):
            low_res = torch.full((1, coords.shape[1], 2, 16, 16), -1.0)
            for i, ((x0, y0), (x1, y1)) in enumerate((coords[0] / 4).round().int().tolist()):
                if labels[0, i, 1] == 3:
                    low_res[0, i, 1, y0:y1, x0:x1] = 1.0
                else:
                    low_res[0, i, 0] = 1.0
                    clicked.append((x0, y0))
            return low_res, torch.tensor([0.0, 1.0]).expand(1, coords.shape[1], 2)

    clicked = []
    measure = held_out.HeldOut(tiny_sam(), Pictures(2), images=2)
    assert measure.names == ["held_out_iou", "held_out_click_iou"]
    found = measure(Perfect(device="cpu"))
    assert found["held_out_iou"] > 0.85  # rectangles, but for rounding at 16 x 16
    assert found["held_out_click_iou"] == 0.0  # the mask of higher predicted IoU is the empty one
    assert len(clicked) == 6
    assert all(measure.items[0].masks[i, y, x] > 0.5 for i, (x, y) in enumerate(clicked[:3]))
    with pytest.raises(ValueError, match="no held-out images"):
        held_out.HeldOut(tiny_sam(), Pictures(0), images=2)


@pytest.mark.parametrize(("kind", "error"), [("fp16", 1e-3), ("int8", 2e-2)])
def test_cached_embeddings_train_like_those_computed_online(tmp_path, kind, error):
    online_log = run_distill(tmp_path / "online", tiny_sam(), hflip=0.0)
    cached_log = run_distill(tmp_path / "cached", tiny_sam(), hflip=0.0, cache=kind)
    stored = teacher.Cache(tmp_path / "cached/teacher")
    assert 0 < stored.note["error"] < error  # 11 bits; 7 bits of a channel's largest value
    master = tiny_sam("tiny-teacher", image_size=64, seed=1)
    exact = teacher.teacher_embedding(master, master.preprocess(Pictures()[3].image)[None])[0]
    relative = ((stored[3] - exact).norm() / exact.norm()).item()
    assert relative < error
    assert cached_log.l2.tolist() == pytest.approx(online_log.l2.tolist(), rel=10 * error)
    assert cached_log.l2.iloc[0] != online_log.l2.iloc[0]
    names = ("values", "scales") if kind == "int8" else ("values",)
    sizes = [np.load(tmp_path / f"cached/teacher/{name}.npy", mmap_mode="r").nbytes for name in names]
    assert sum(sizes) == 5 * teacher.bytes_per_image(16, 4, kind)
    with pytest.raises(ValueError, match="has no embedding of image 77"):
        stored[77]


def test_cache_of_another_teacher_is_refused(tmp_path):
    other = tiny_sam("tiny-teacher", seed=1)
    teacher.cache_embeddings(other, Pictures(), tmp_path)
    with torch.no_grad():
        other.image_encoder.out.bias += 1
    with pytest.raises(ValueError, match="holds embeddings of"):
        teacher.cache_embeddings(other, Pictures(), tmp_path)
    with pytest.raises(ValueError, match="no images to cache"):
        teacher.cache_embeddings(other, Pictures(0), tmp_path)


def test_cache_and_flip_exclude_each_other():
    with pytest.raises(ValueError, match="expected hflip=0"):
        settings.Distillation(cache="fp16")


def test_student_adopts_the_teachers_decoder(tmp_path):
    student, master = tiny_sam(), tiny_sam("tiny-teacher", image_size=64, seed=1)
    encoder = state(student.image_encoder)
    distill.adopt_decoder(student, master)
    assert same(state(student.mask_decoder), state(master.mask_decoder))
    assert same(state(student.prompt_encoder), state(master.prompt_encoder))
    assert same(state(student.image_encoder), encoder)
    with pytest.raises(ValueError, match="does not fit tiny"):
        distill.adopt_decoder(student, tiny_sam("wide", embed_dim=32))
    with pytest.raises(ValueError, match=r"embed alike, got \(16, 4, 4\) of tiny and \(32, 4, 4\) of wide"):
        run_distill(tmp_path, student, teacher=tiny_sam("wide", embed_dim=32))


# ---- phase 2


def batch_of(model: Sam, counts: list[int], *, recipe: str = "paper", seed: int = 0, target_px: int = 16, **options):
    masks = [torch.zeros(count, target_px, target_px) for count in counts]
    for m in masks:
        m[:, 4:12, 4:12] = 1.0
    boxes = [torch.tensor([16.0, 16.0, 48.0, 48.0]).expand(count, 4) for count in counts]
    images = torch.randn(len(counts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    generators = [batches.generator_for(seed, i) for i in range(len(counts))]
    return end_to_end.collate(images, masks, boxes, recipe=recipe, frame_size=64, generators=generators, **options)


def test_boxes_and_points_reach_the_frame():
    boxes = batch_of(tiny_sam(), [2], box_probability=1.0)
    assert boxes.labels[0].tolist() == [[2, 3], [2, 3]]
    assert boxes.coords[0, 0].tolist() == [[16.0, 16.0], [48.0, 48.0]]
    for recipe, low, high in (("paper", 17.5, 45.5), ("official", 16.0, 44.0)):  # pixels 4..11 of 16, frame 64
        points = batch_of(tiny_sam(), [2], recipe=recipe, box_probability=0.0)
        clicks = points.coords[0][points.labels[0] == 1]
        assert clicks.min() >= low
        assert clicks.max() <= high
        assert (points.labels[0, :, -1] == -1).all()  # SAM's padding point, since there is no box


def test_points_avoid_the_soft_rim_in_the_papers_recipe():
    soft = torch.zeros(2, 16, 16)
    soft[0, 4:12, 4:12], soft[0, 6:10, 6:10] = 0.2, 1.0
    soft[1, 4:12, 4:12] = 0.2  # nothing but rim
    drawn = {}
    for recipe in ("paper", "official"):
        batch = end_to_end.collate(
            torch.zeros(1, 3, 32, 32),
            [soft],
            [torch.tensor([16.0, 16.0, 48.0, 48.0]).expand(2, 4)],
            recipe=recipe,
            frame_size=64,
            generators=[torch.Generator().manual_seed(0)],
            box_probability=0.0,
        )
        pixels = (batch.coords[0][:, batch.labels[0, 0] == 1] / 4).long()  # (2, P, 2) XY of the targets
        drawn[recipe] = [soft[i, xy[:, 1], xy[:, 0]].min().item() for i, xy in enumerate(pixels)]
    assert drawn["paper"] == pytest.approx([1.0, 0.2])
    assert drawn["official"] == pytest.approx([0.2, 0.2])


def test_padding_of_a_batch_changes_nothing():
    # three images of different numbers of prompts and tokens together, against each alone
    model = tiny_sam()
    together = batch_of(model, [3, 0, 1], seed=2)
    assert together.kept.sum(1).tolist() == [3, 0, 1]
    with torch.no_grad():
        embedding = model.encode(together.images)
        logits, _ = model.decode(embedding, together.coords, together.labels, valid=together.valid)
        for i in (0, 2):
            tokens, prompts = together.valid[i, 0], together.kept[i]
            alone, _ = model.decode(
                embedding[i : i + 1],
                together.coords[i : i + 1, prompts][:, :, tokens],
                together.labels[i : i + 1, prompts][:, :, tokens],
            )
            torch.testing.assert_close(logits[i, prompts], alone[0], rtol=1e-4, atol=1e-5)


def test_loss_of_a_mixed_batch_is_the_mean_over_its_prompts():
    model = tiny_sam()
    batch = batch_of(model, [3, 0, 1], seed=0)
    assert (batch.labels[0, 0] == 2).any() != (batch.labels[2, 0] == 2).any()  # boxes and points together
    together = end_to_end.phase2_loss(model, batch, recipe="paper", iou_weight=1.0)
    alone = []
    for i in (0, 2):
        parts = {name: value[i : i + 1] for name, value in vars(batch).items()}
        for name in ("coords", "labels", "valid"):
            parts[name] = parts[name][:, batch.kept[i]][:, :, batch.valid[i, 0]]
        parts["targets"], parts["kept"] = parts["targets"][:, batch.kept[i]], parts["kept"][:, batch.kept[i]]
        alone.append(end_to_end.phase2_loss(model, end_to_end.Batch(**parts), recipe="paper", iou_weight=1.0))
    assert together.pop("weight").item() == 4
    for name, value in together.items():
        assert value.item() == pytest.approx((3 * alone[0][name].item() + alone[1][name].item()) / 4, rel=1e-4)


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_step_has_a_gradient_everywhere_but_in_the_iou_head(recipe):
    model = tiny_sam().train()
    batch = batch_of(model, [3, 2], recipe=recipe, box_probability=0.5)
    end_to_end.phase2_loss(model, batch, recipe=recipe, generator=torch.Generator().manual_seed(0))["loss"].backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert any(name.startswith("mask_decoder.iou_prediction_head") for name in missing)
    assert not any(name.startswith("image_encoder") for name in missing)
    model.zero_grad()
    end_to_end.phase2_loss(model, batch, recipe=recipe, iou_weight=1.0)["loss"].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "iou_prediction_head" in name)


def test_step_without_any_mask_is_harmless():
    model = tiny_sam().train()
    parts = end_to_end.phase2_loss(model, batch_of(model, [0, 0]), recipe="paper", iou_weight=1.0)
    parts["loss"].backward()
    assert parts["loss"].item() == 0.0


def test_step_in_mixed_precision_keeps_the_loss_in_float32():
    model = tiny_sam().train()
    batch = batch_of(model, [2])
    exact = end_to_end.phase2_loss(model, batch, recipe="paper")
    mixed = end_to_end.phase2_loss(model, batch, recipe="paper", amp="bf16")
    assert mixed["loss"].dtype == torch.float32
    assert mixed["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize("chunk", [1, 2])
def test_decoding_in_chunks_keeps_less_and_gives_the_same(chunk):
    found, kept = {}, {}
    for size in (0, chunk):
        model, bytes_kept = tiny_sam().train(), []

        def keep(tensor, bytes_kept=bytes_kept):
            bytes_kept.append(tensor.nbytes)
            return tensor

        batch = batch_of(model, [3, 2], seed=1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = end_to_end.phase2_loss(model, batch, recipe="paper", iou_weight=1.0, decoder_chunk=size)["loss"]
        kept[size] = sum(bytes_kept)
        loss.backward()
        found[size] = [loss.item(), *(p.grad for p in model.parameters())]
    assert kept[chunk] < 0.5 * kept[0]
    assert found[chunk][0] == pytest.approx(found[0][0], rel=1e-6)
    for ours, whole in zip(found[chunk][1:], found[0][1:], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-6)  # sums over prompts in another order


def run_train(out: Path, model: Sam, *, data=None, resume=False, **options) -> pd.DataFrame:
    made = {"steps": 6, "batch_size": 2, "lr": 1e-3, "masks_per_image": 4} | options
    return end_to_end.train(model, data or Pictures(), settings.EndToEnd(**made), out=out, resume=resume)


@pytest.mark.parametrize(("how", "moved"), [("frozen", False), ("train", True), ("sync", True)])
def test_batchnorm_follows_or_stays(tmp_path, how, moved):
    model = tiny_sam()
    before = model.image_encoder.norm.running_mean.clone()
    run_train(tmp_path, model, steps=1, batchnorm=how)
    assert (not torch.equal(before, model.image_encoder.norm.running_mean)) == moved
    assert type(model.image_encoder.norm) is nn.BatchNorm2d
    assert not model.training


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("all", {"image_encoder", "prompt_encoder", "mask_decoder"}),
        ("encoder", {"image_encoder"}),
        ("decoder", {"prompt_encoder", "mask_decoder"}),
    ],
)
def test_parts_can_be_left_alone(tmp_path, train, parts):
    model = tiny_sam()
    before = state(model)
    run_train(tmp_path, model, steps=2, train=train)
    after = state(model)
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == parts


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_training_lowers_the_loss(tmp_path, recipe):
    log = run_train(tmp_path, tiny_sam(), recipe=recipe, steps=16, lr=1e-2)
    assert log.loss.iloc[-5:].mean() < log.loss.iloc[:5].mean()
    assert {"step", "loss", "pixel", "dice", "iou", "iou_error", "lr", "decoder_s", "loss_s"} < set(log.columns)


def test_official_recipe_tosses_a_coin_per_pass(tmp_path, monkeypatch):
    tossed, real = [], end_to_end.phase2_loss

    def spy(*args, multimask, **options):
        tossed.append(multimask)
        return real(*args, multimask=multimask, **options)

    monkeypatch.setattr(end_to_end, "phase2_loss", spy)
    run_train(tmp_path, tiny_sam(), recipe="official", steps=5, micro_batch=1)
    assert len(tossed) == 10
    assert set(tossed) == {True, False}
    tossed.clear()
    run_train(tmp_path, tiny_sam(), recipe="paper", steps=4)
    assert tossed == [True] * 4


# ---- exact resume in one process; tests/test_training_runs.py kills processes


class Stop(Exception):
    """Stands for a killed process."""


class Stopping(Pictures):
    """Fails at its so-manieth image."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def __getitem__(self, index: int) -> SimpleNamespace:
        self.left -= 1
        if self.left < 0:
            raise Stop
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (run_distill, {}),
        (run_train, {"recipe": "paper", "ema": 0.9}),
        (run_train, {"recipe": "official", "micro_batch": 1, "decoder_chunk": 2}),
    ],
    ids=["distill", "paper", "official"],
)
def test_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path, run, options):
    straight, broken, resumed = tiny_sam(), tiny_sam(), tiny_sam(seed=9)
    options = {**options, "checkpoint_every": 3}
    run(tmp_path / "a", straight, **options)
    with pytest.raises(Stop):
        run(tmp_path / "b", broken, **options, data=Stopping(11))  # in step 6: two steps after the checkpoint are lost
    assert len(pd.read_csv(tmp_path / "b/log.csv")) == 5
    log = run(tmp_path / "b", resumed, **options, resume=True)
    assert same(state(straight), state(resumed))
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("log.csv", *(["checkpoints/step_00000006/ema.safetensors"] if "ema" in options else [])):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_workers_do_not_change_the_result(tmp_path):
    alone, helped = tiny_sam(), tiny_sam()
    run_train(tmp_path, alone, steps=3)
    run_train(tmp_path, helped, steps=3, workers=1)
    assert same(state(alone), state(helped))


def test_resuming_a_finished_run_returns_its_log(tmp_path):
    first = run_train(tmp_path, tiny_sam(), steps=3)
    again = run_train(tmp_path, tiny_sam(seed=9), steps=3, resume=True)
    pd.testing.assert_frame_equal(first, again)
