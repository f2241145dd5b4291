"""Training: samples, the shared loop, distillation and end-to-end steps, on a tiny Sam and pictures in memory."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evsam_lib.data import transforms
from evsam_lib.models.sam import Sam, build_sam
from evsam_lib.training import distill, end_to_end, loop, samples

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN / "training_pieces.pt", weights_only=True)


def tiny_sam(name: str = "tiny", *, image_size: int = 32, seed: int = 0, embed_dim: int = 16) -> Sam:
    """A real Sam around an encoder of two convolutions: 4 x 4 cells, 16 x 16 masks, a frame of 64."""
    torch.manual_seed(seed)
    side = image_size // 4
    encoder = nn.Sequential()
    encoder.add_module("conv", nn.Conv2d(3, embed_dim, side, stride=side, bias=False))
    encoder.add_module("norm", nn.BatchNorm2d(embed_dim))
    encoder.add_module("out", nn.Conv2d(embed_dim, embed_dim, 1))
    options = {"embed_dim": embed_dim, "grid": 4, "mlp_hidden": 16, "iou_hidden": 16, "mask_channels": 4}
    return build_sam(encoder, name=name, frame=transforms.LongestSide(image_size, 64), **options).eval()


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
        torch.rand(3, generator=loop.generator_for(*numbers)).tolist() for numbers in [(0, 1, 2), (0, 1, 2), (0, 2, 1)]
    ]
    assert draws[0] == draws[1] != draws[2]


def test_every_image_once_per_epoch():
    steps = [loop.epoch_positions(3, step, batch_size=4, count=6) for step in range(3)]
    positions = [pair for step in steps for pair in step]
    assert [epoch for epoch, _ in positions] == [0] * 6 + [1] * 6
    first, second = ([i for e, i in positions if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    with pytest.raises(ValueError, match="empty"):
        loop.epoch_positions(0, 0, batch_size=1, count=0)


def fit_line(folder: Path, model: nn.Module, **options) -> pd.DataFrame:
    """Fit y = 2x with one linear layer through the loop."""

    def batch(step: int) -> torch.Tensor:
        return torch.randn(8, 1, generator=loop.generator_for(0, step))

    def loss_of(x: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        return {"loss": (model(x) - 2 * x).square().mean()}

    defaults = {"steps": 30, "lr": 0.1, "images_per_step": 8, "settings": {}, "log_csv": folder / "log.csv"}
    return loop.fit(model, batch, loss_of=loss_of, **{**defaults, **options})


def test_loop_learns_and_logs(tmp_path):
    log = fit_line(tmp_path, nn.Linear(1, 1))
    assert log.loss.iloc[-1] < 0.1 * log.loss.iloc[0]
    assert log.step.tolist() == list(range(1, 31))
    assert log.lr.iloc[0] == 0.1
    assert 0 < log.lr.iloc[-1] < 1e-3
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log.csv"), log)


def test_clipping_by_value_bounds_each_gradient(tmp_path):
    model = nn.Linear(1, 1)
    seen = []
    step = torch.optim.AdamW.step

    def spy(optimizer, *args):
        seen.append(max(p.grad.abs().max().item() for group in optimizer.param_groups for p in group["params"]))
        return step(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        fit_line(tmp_path, model, steps=2, clip_value=1e-3)
        fit_line(tmp_path, model, steps=2)
    assert max(seen[:2]) == pytest.approx(1e-3)
    assert min(seen[2:]) > 0.1


def test_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(float("inf"))
    bias = model.bias.clone()
    with pytest.raises(FloatingPointError, match="step 1"):
        fit_line(tmp_path, model)
    assert torch.equal(model.bias, bias)


def test_checkpoint_is_whole_and_alone(tmp_path):
    model = nn.Linear(1, 1)
    fit_line(tmp_path, model, steps=6, checkpoint=tmp_path / "c", checkpoint_every=4, settings={"seed": 1})
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_00000006"]
    assert same(load_file(tmp_path / "c/step_00000006/weights.safetensors"), state(model))


def test_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    model = nn.Linear(1, 1)
    fit_line(tmp_path, model, steps=4, checkpoint=tmp_path / "c")
    saved = state(model)
    monkeypatch.setattr(loop.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        loop._save(tmp_path / "c", nn.Linear(1, 1), torch.optim.AdamW(model.parameters()), 8, {})
    assert same(load_file(tmp_path / "c/step_00000004/weights.safetensors"), saved)
    assert not (tmp_path / "c/step_00000008").exists()


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    options = {"steps": 4, "checkpoint": tmp_path / "c"}
    fit_line(tmp_path, nn.Linear(1, 1), **options, settings={"recipe": "paper"})
    with pytest.raises(ValueError, match=r"recipe 'paper' \(now 'official'\)"):
        fit_line(tmp_path, nn.Linear(1, 1), **options, settings={"recipe": "official"}, resume=True)
    with pytest.raises(ValueError, match="checkpoint=None"):
        fit_line(tmp_path, nn.Linear(1, 1), resume=True)


def test_fresh_run_clears_an_old_checkpoint_and_log(tmp_path):
    fit_line(tmp_path, nn.Linear(1, 1), steps=9, checkpoint=tmp_path / "c")
    fit_line(tmp_path, nn.Linear(1, 1), steps=3, checkpoint=tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_00000003"]
    assert len(pd.read_csv(tmp_path / "log.csv")) == 3


# ---- phase 1


def run_distill(folder: Path, student: Sam, **options) -> pd.DataFrame:
    defaults = {"steps": 6, "batch_size": 2, "lr": 1e-2, "seed": 0, "log_csv": folder / "log.csv"}
    teacher = tiny_sam("tiny-teacher", image_size=64, seed=1)
    return distill.distill(student, teacher, Pictures(), **{**defaults, **options})


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
    images = [Pictures(20)[i].image for i in range(10, 14)]
    before, at_start = state(student), distill.embedding_metrics(student, teacher, images)
    log = run_distill(tmp_path, student, steps=40)
    after, at_end = state(student), distill.embedding_metrics(student, teacher, images)
    assert at_end["l2"] < at_start["l2"]
    assert at_end["cosine"] > at_start["cosine"]
    assert {"step", "loss", "l2", "cosine", "lr", "seconds", "images_per_s"} == set(log.columns)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"image_encoder"}
    assert not torch.equal(before["image_encoder.norm.running_mean"], after["image_encoder.norm.running_mean"])
    assert not student.training


def test_cached_embeddings_train_like_those_computed_online(tmp_path):
    online, cached = tiny_sam(), tiny_sam()
    online_log = run_distill(tmp_path, online, hflip=0.0)
    cached_log = run_distill(tmp_path, cached, hflip=0.0, cache=tmp_path / "teacher.npy")
    stored = np.load(tmp_path / "teacher.npy", mmap_mode="r")
    assert (stored.shape, stored.dtype) == ((5, 16, 4, 4), np.float16)
    # fp16 rounds the targets by up to 2^-11 of their value
    assert cached_log.l2.tolist() == pytest.approx(online_log.l2.tolist(), rel=1e-2)
    assert cached_log.l2.iloc[0] != online_log.l2.iloc[0]


def test_cache_of_another_teacher_is_refused(tmp_path):
    teacher = tiny_sam("tiny-teacher", seed=1)
    distill.cache_embeddings(teacher, Pictures(), tmp_path / "teacher.npy")
    with torch.no_grad():
        teacher.image_encoder.out.bias += 1
    with pytest.raises(ValueError, match="holds embeddings of"):
        distill.cache_embeddings(teacher, Pictures(), tmp_path / "teacher.npy")


def test_cache_and_flip_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="expected hflip=0"):
        run_distill(tmp_path, tiny_sam(), cache=tmp_path / "teacher.npy")


def test_student_adopts_the_teachers_decoder():
    student, teacher = tiny_sam(), tiny_sam("tiny-teacher", image_size=64, seed=1)
    encoder = state(student.image_encoder)
    distill.adopt_decoder(student, teacher)
    assert same(state(student.mask_decoder), state(teacher.mask_decoder))
    assert same(state(student.prompt_encoder), state(teacher.prompt_encoder))
    assert same(state(student.image_encoder), encoder)
    with pytest.raises(ValueError, match="does not fit tiny"):
        distill.adopt_decoder(student, tiny_sam("wide", embed_dim=32))


# ---- phase 2


def batch_of(model: Sam, counts: list[int], *, recipe: str = "paper", seed: int = 0, target_px: int = 16, **options):
    masks = [torch.zeros(count, target_px, target_px) for count in counts]
    for m in masks:
        m[:, 4:12, 4:12] = 1.0
    boxes = [torch.tensor([16.0, 16.0, 48.0, 48.0]).expand(count, 4) for count in counts]
    images = torch.randn(len(counts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    generators = [loop.generator_for(seed, i) for i in range(len(counts))]
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
    mixed = end_to_end.phase2_loss(model, batch, recipe="paper", amp=torch.bfloat16)
    assert mixed["loss"].dtype == torch.float32
    assert mixed["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)  # bfloat16 has 8 bits


def test_frozen_batchnorm_keeps_its_statistics():
    model = tiny_sam()
    for freeze, moved in ((True, False), (False, True)):
        before = model.image_encoder.norm.running_mean.clone()
        end_to_end.train_mode(model, freeze_batchnorm=freeze)
        model.encode(torch.randn(2, 3, 32, 32))
        assert model.mask_decoder.training
        assert (not torch.equal(before, model.image_encoder.norm.running_mean)) == moved


def run_train(folder: Path, model: Sam, **options) -> pd.DataFrame:
    defaults = {"steps": 6, "batch_size": 2, "lr": 1e-3, "seed": 0, "log_csv": folder / "log.csv", "masks_per_image": 4}
    return end_to_end.train(model, Pictures(), **{**defaults, **options})


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_training_lowers_the_loss(tmp_path, recipe):
    log = run_train(tmp_path, tiny_sam(), recipe=recipe, steps=16, lr=1e-2)
    assert log.loss.iloc[-5:].mean() < log.loss.iloc[:5].mean()
    assert {"step", "loss", "pixel", "dice", "iou", "iou_error", "lr", "seconds", "images_per_s"} == set(log.columns)


def test_official_recipe_tosses_a_coin_per_step(tmp_path, monkeypatch):
    tossed, real = [], end_to_end.phase2_loss

    def spy(*args, multimask, **options):
        tossed.append(multimask)
        return real(*args, multimask=multimask, **options)

    monkeypatch.setattr(end_to_end, "phase2_loss", spy)
    run_train(tmp_path, tiny_sam(), recipe="official", steps=10)
    assert set(tossed) == {True, False}
    tossed.clear()
    run_train(tmp_path, tiny_sam(), recipe="paper", steps=4)
    assert tossed == [True] * 4


def test_unknown_recipe(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'sam'"):
        run_train(tmp_path, tiny_sam(), recipe="sam")


# ---- exact resume


class Stop(Exception):
    """Stands for a killed process."""


def stop_after(steps: int):
    def wrap(batches):
        for done, item in enumerate(batches):
            if done == steps:
                raise Stop
            yield item

    return wrap


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (run_distill, {}),
        (run_train, {"recipe": "paper"}),
        (run_train, {"recipe": "official"}),
    ],
    ids=["distill", "paper", "official"],
)
def test_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path, run, options):
    straight, broken, resumed = tiny_sam(), tiny_sam(), tiny_sam(seed=9)
    run(tmp_path, straight, **options)
    whole = pd.read_csv(tmp_path / "log.csv")
    options = {**options, "checkpoint": tmp_path / "c", "checkpoint_every": 3}
    with pytest.raises(Stop):
        run(tmp_path, broken, **options, progress=stop_after(5))  # two steps after the checkpoint are lost
    assert len(pd.read_csv(tmp_path / "log.csv")) == 5
    log = run(tmp_path, resumed, **options, resume=True)
    assert same(state(straight), state(resumed))
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert log.loss.tolist() == whole.loss.tolist()
    assert pd.read_csv(tmp_path / "log.csv").step.tolist() == [1, 2, 3, 4, 5, 6]


def test_workers_do_not_change_the_result(tmp_path):
    alone, helped = tiny_sam(), tiny_sam()
    run_train(tmp_path, alone, steps=3)
    run_train(tmp_path, helped, steps=3, workers=1)
    assert same(state(alone), state(helped))


def test_resuming_a_finished_run_returns_its_log(tmp_path):
    first = run_train(tmp_path, tiny_sam(), steps=3, checkpoint=tmp_path / "c")
    again = run_train(tmp_path, tiny_sam(seed=9), steps=3, checkpoint=tmp_path / "c", resume=True)
    pd.testing.assert_frame_equal(first, again)
