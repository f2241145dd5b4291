"""How the weights that ship with this library were made: the mini model, on generated scenes, in one process.

    python -m evsam_lib.training.mini --out OUT --model efficientvit-sam-mini --scenes 1200 --minutes 24

That fits two CPU cores; the commands behind the shipped files are in evsam_lib/weights/provenance.json.

The model learns to segment from nothing, by the paper's end-to-end phase (Sec. 3.2) with what a start from nothing
needs beyond it: the IoU heads are supervised, a share of the steps adds a second, corrective click with the mask fed
back, and scenes are mirrored, cropped and recolored. Given `--teacher`, the image encoder is distilled first, for
`--distil-minutes`. All scenes stay in memory, so a step costs no loading; the learning rate falls with the time that
is left. Notebooks 04 and 05 do the paper's two phases step by step, with these weights as teacher.
"""

import argparse
import csv
import json
import mmap
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evsam_lib.data.generate import scene
from evsam_lib.data.transforms import PIXEL_MEAN, PIXEL_STD
from evsam_lib.models.mask_decoder import Attention
from evsam_lib.models.prompt_encoder import prompt_tokens
from evsam_lib.models.sam import Sam
from evsam_lib.models.weights import save_weights
from evsam_lib.models.zoo import load_model
from evsam_lib.prompts import mask_box
from evsam_lib.training import losses

SIDE = 512  # of a scene in pixels, and of the prompt frame
LOW_RES = 128  # side of the decoder's masks
OBJECTS = 24  # most objects kept per scene
SEED = 2024


@dataclass(frozen=True)
class Scenes:
    """Scenes on one device: images (n, 3, 512, 512) uint8, coverage (n, 24, 128, 128) uint8, boxes (n, 24, 4) XYXY.

    Boxes of objects that do not exist are empty (all 0).
    """

    images: Tensor
    coverage: Tensor
    boxes: Tensor


def main() -> None:
    """Trains, measures on held-out scenes, and writes weights, logs and report.json."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    scenes = make_scenes(options.scenes, device=options.device)
    held_out = make_scenes(64, start=10_000_000, device=options.device)
    model = load_model(options.model, options.start, device=options.device)
    if options.start is None:
        align_positions(model)
    report: dict = {name: str(value) for name, value in vars(options).items() if name != "out"} | {"seed": SEED}
    if options.teacher:
        teacher = load_model(options.teacher, "mini", device=options.device)
        for part in ("prompt_encoder", "mask_decoder"):
            getattr(model, part).load_state_dict(getattr(teacher, part).state_dict())
        report["distil"] = fit(model, scenes, distil_step(teacher), options, "distil", options.distil_minutes)
        report["distilled_mIoU"] = mean_iou(model, held_out)
    report["masks"] = fit(model, scenes, masks_step, options, "masks", options.minutes)
    report["mIoU"] = mean_iou(model, held_out)
    save_weights(model, options.out / f"{model.name}.safetensors", dtype=torch.float16)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


@torch.no_grad()
def align_positions(model: Sam) -> None:
    """A kinder random start: cross attentions compare positions from the first step on, instead of learning to.

    Queries and keys carry the same position code; with equal projections their product is large where places agree.
    """
    for attention in model.mask_decoder.modules():
        if isinstance(attention, Attention) and attention.q_proj.out_features < attention.q_proj.in_features:
            attention.q_proj.weight.mul_(2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def make_scenes(count: int, *, start: int = 0, device: str = "cpu") -> Scenes:
    """Generates scenes `start` ... `start + count - 1` in parallel processes and puts them on the device."""
    shapes = ((count, 3, SIDE, SIDE), (count, OBJECTS, LOW_RES, LOW_RES), (count, OBJECTS, 4))
    types = (np.uint8, np.uint8, np.float32)
    arrays = [_shared(shape, kind) for shape, kind in zip(shapes, types, strict=True)]
    began = time.time()
    with multiprocessing.get_context("fork").Pool(initializer=_adopt, initargs=(arrays, start)) as pool:
        for _ in pool.imap_unordered(_fill, range(count), chunksize=16):
            pass
    print(f"{count} scenes in {time.time() - began:.0f} s", flush=True)
    return Scenes(*(torch.from_numpy(array).to(device) for array in arrays))


def fit(model: Sam, scenes: Scenes, step_loss, options: argparse.Namespace, name: str, minutes: float) -> dict:
    """Trains for some minutes: AdamW, short warm-up, cosine to 0 over the time; leaves the running average in place."""
    trained = [p for n, p in model.named_parameters() if name != "distil" or n.startswith("image_encoder.")]
    decayed, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=False
    )
    model.train()
    began, step, saved = time.time(), 0, 0.0
    with (options.out / f"{name}.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "seconds", "lr", "loss", "metric"])
        while (elapsed := time.time() - began) < 60 * minutes:
            done = elapsed / (60 * minutes)
            rate = options.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                loss, metric = step_loss(model, sample(scenes, options.batch, prompts=options.prompts), done)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            average.update_parameters(model)
            if step % 20 == 0:
                log.writerow([step, round(elapsed, 1), f"{rate:.2e}", round(loss.item(), 4), round(metric.item(), 4)])
                file.flush()
            if elapsed - saved > 300:  # what there is so far, should the machine stop
                saved = elapsed
                save_weights(average.module, options.out / f"{name}.part.safetensors", dtype=torch.float16)
            step += 1
    model.load_state_dict(average.module.state_dict() | _statistics(model))
    model.eval()
    return {"steps": step, "seconds": round(time.time() - began, 1)}


@dataclass(frozen=True)
class Sample:
    """A batch: images (B, 3, 512, 512) in [0, 255], targets (B, N, 128, 128) in [0, 1], boxes (B, N, 4) XYXY."""

    images: Tensor
    targets: Tensor
    boxes: Tensor


def sample(scenes: Scenes, batch: int, *, prompts: int = 16) -> Sample:
    """Random scenes, each with `prompts` of its objects, mirrored, turned, cropped, recoloured."""
    device = scenes.images.device
    picked = torch.randint(len(scenes.images), (batch,), device=device)
    boxes = scenes.boxes[picked]  # (B, 24, 4)
    exists = (boxes[..., 2] > boxes[..., 0]).float()
    chosen = torch.multinomial(exists + 1e-6, prompts)  # (B, N) without repetition while there are enough objects
    boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    targets = scenes.coverage[picked[:, None], chosen].float() / 255
    images = scenes.images[picked].float()
    images, targets, boxes = _turned(images, targets, boxes)
    images, targets, boxes = _cropped(images, targets, boxes)
    return Sample(_recoloured(images), targets, boxes)


def masks_step(model: Sam, data: Sample, done: float) -> tuple[Tensor, Tensor]:
    """Loss of masks from boxes or clicks, sometimes followed by a corrective click with the mask fed back.

    `done` is the share of the time that is over.
    """
    embedding = model.encode(model_input(model, data.images))
    valid = data.targets.amax((-1, -2)) > 0.3  # an object that the crop cut away asks for nothing
    points = labels = boxes = None
    if torch.rand(()) < 0.5:
        boxes = data.boxes
        if torch.rand(()) < 0.5:
            boxes = _jittered(boxes)
    else:
        points, labels = random_points(data.targets, int(torch.randint(1, 6, ())))
    coords, codes = prompt_tokens(points, labels, boxes)
    low_res, iou = model.decode(embedding, coords, codes)
    loss, metric, best = _loss(low_res, iou, data.targets, valid, done)
    if torch.rand(()) < 0.2:
        mask = low_res.detach().take_along_dim(best[..., None, None, None], 2)  # (B, N, 1, 128, 128)
        click, label = corrective_points(mask[:, :, 0].float(), data.targets)
        points = click if points is None else torch.cat([points, click], 2)
        labels = label if labels is None else torch.cat([labels, label], 2)
        coords, codes = prompt_tokens(points, labels, boxes)
        fed_back = mask if torch.rand(()) < 0.5 else None
        three = bool(torch.rand(()) < 0.5)
        low_res, iou = model.decode(embedding, coords, codes, mask_input=fed_back, multimask_output=three)
        second, _, _ = _loss(low_res, iou, data.targets, valid, done)
        loss = loss + second
    return loss, metric


def distil_step(teacher: Sam):
    """Phase 1: mean squared error between the two image embeddings; the metric is their cosine similarity."""

    def step(student: Sam, data: Sample, done: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = teacher.encode(model_input(teacher, data.images)).float()
        given = student.encode(model_input(student, data.images)).float()
        return F.mse_loss(given, wanted), F.cosine_similarity(given, wanted, dim=1).mean()

    return step


def model_input(model: Sam, images: Tensor) -> Tensor:
    """(B, 3, 512, 512) in [0, 255], padding marked by NaN -> the encoder's input, padding zero after normalising."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    normalised = ((images - mean) / std).nan_to_num(0.0)
    if model.image_size == SIDE:
        return normalised
    size = (model.image_size, model.image_size)
    return F.interpolate(normalised, size, mode="bilinear", antialias=True)


def random_points(targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` positive points inside each mask: (B, N, count, 2) frame pixels, and their labels."""
    inside = torch.where(targets > 0.5, 1.0, 0.0) + 1e-4 * targets + 1e-9  # thin objects fill no cell by half
    return _draw(inside, count), torch.ones(*targets.shape[:2], count, device=targets.device, dtype=torch.long)


def corrective_points(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One point in each mask's error region: (B, N, 1, 2) frame pixels; label 1 where the object was missed, else 0."""
    wrong = ((logits > 0) != (targets > 0.5)).float() + 1e-9
    points = _draw(wrong, 1)
    cells = (points * LOW_RES / SIDE).long().clamp(0, LOW_RES - 1)
    flat = (cells[..., 1] * LOW_RES + cells[..., 0]).flatten(2)  # (B, N, 1)
    return points, (targets.flatten(2).gather(2, flat) > 0.5).long()


@torch.no_grad()
def mean_iou(model: Sam, scenes: Scenes) -> dict[str, float]:
    """Mean IoU in percent at 128 pixels over held-out scenes, mask of highest predicted IoU: boxes, and one click."""
    model.eval()
    totals: dict[str, list[Tensor]] = {"box": [], "one_click": []}
    for start in range(0, len(scenes.images), 4):
        part = slice(start, start + 4)
        targets, boxes = scenes.coverage[part].float() / 255, scenes.boxes[part]
        embedding = model.encode(model_input(model, scenes.images[part].float()))
        exists = boxes[..., 2] > boxes[..., 0]
        for name, prompt in (("box", (None, None, boxes)), ("one_click", (*random_points(targets, 1), None))):
            low_res, iou = model.decode(embedding, *prompt_tokens(*prompt))
            best = low_res.take_along_dim(iou.argmax(-1)[..., None, None, None], 2)[exists]
            totals[name].append(losses.mask_iou(best, targets[exists])[:, 0])
    return {name: round(100 * torch.cat(values).mean().item(), 2) for name, values in totals.items()}


def _loss(low_res: Tensor, iou: Tensor, targets: Tensor, valid: Tensor, done: float) -> tuple[Tensor, Tensor, Tensor]:
    """Paper's mask loss plus the IoU heads' error; mean IoU of the winners; index (B, N) of the predicted best.

    From a random start the paper's loss first learns that most pixels are background, and takes long to leave that. A
    cross entropy in which object and background weigh the same leads past it, and hands over within the first half.
    """
    logits, wanted = low_res[valid].float(), targets[valid]
    mask = losses.mask_loss(logits, wanted, recipe="paper")
    actual = losses.mask_iou(logits.detach(), wanted)
    loss = mask.total
    if done < 0.5:
        truth = wanted[:, None].expand_as(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        inside = (entropy * truth).sum((-1, -2)) / truth.sum((-1, -2)).clamp(min=1)
        outside = (entropy * (1 - truth)).sum((-1, -2)) / (1 - truth).sum((-1, -2)).clamp(min=1)
        dice = losses.dice_loss(logits.flatten(2), truth.flatten(2))
        loss = 2 * done * loss + (1 - 2 * done) * (inside + outside + dice).mean()
    loss = loss + losses.iou_loss(iou[valid], actual)
    return loss, actual.gather(1, mask.best[:, None]).mean(), iou.detach().argmax(-1)


def _draw(weights: Tensor, count: int) -> Tensor:
    """Draws cells of (B, N, h, w) by weight and a place inside each: (B, N, count, 2) XY frame pixels."""
    flat = weights.flatten(0, 1).flatten(1)
    cells = torch.multinomial(flat, count, replacement=True).unflatten(0, weights.shape[:2])  # (B, N, count)
    scale, width = SIDE / LOW_RES, weights.shape[-1]
    x, y = cells % width, cells // width
    corner = torch.stack([x, y], -1).float()
    return (corner + torch.rand_like(corner)) * scale - 0.5


def _jittered(boxes: Tensor) -> Tensor:
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    return boxes + (0.1 * sides * torch.randn_like(boxes)).clamp(-10, 10)


def _turned(images: Tensor, targets: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One of the eight symmetries of the square for the whole batch."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    if torch.rand(()) < 0.5:
        images, targets, (x0, x1) = images.flip(-1), targets.flip(-1), (SIDE - x1, SIDE - x0)
    if torch.rand(()) < 0.25:
        images, targets, (y0, y1) = images.flip(-2), targets.flip(-2), (SIDE - y1, SIDE - y0)
    if torch.rand(()) < 0.25:
        images, targets, (x0, y0, x1, y1) = images.mT, targets.mT, (y0, x0, y1, x1)
    return images, targets, torch.stack([x0, y0, x1, y1], -1)


def _cropped(images: Tensor, targets: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sometimes a closer look (crop and enlarge), sometimes a strip of padding, as in an image that is not square."""
    cell = SIDE // LOW_RES
    if torch.rand(()) < 0.4:
        side = int(torch.randint(LOW_RES // 2, LOW_RES, ()))
        x, y = (int(torch.randint(0, LOW_RES - side + 1, ())) for _ in range(2))
        window = images[..., cell * y : cell * (y + side), cell * x : cell * (x + side)]
        images = F.interpolate(window, (SIDE, SIDE), mode="bilinear")
        targets = F.interpolate(targets[..., y : y + side, x : x + side], (LOW_RES, LOW_RES), mode="bilinear")
        corner = torch.tensor([x, y, x, y], device=boxes.device) * cell
        boxes = ((boxes - corner) * (LOW_RES / side)).clamp(0, SIDE)
    if torch.rand(()) < 0.6:
        kept = int(torch.randint(LOW_RES // 2, LOW_RES, ()))
        images, targets, boxes = images.clone(), targets.clone(), boxes.clone()
        if torch.rand(()) < 0.7:  # landscape: padding below
            images[..., cell * kept :, :], targets[..., kept:, :] = torch.nan, 0
            boxes[..., 1::2].clamp_(max=cell * kept)
        else:
            images[..., cell * kept :], targets[..., kept:] = torch.nan, 0
            boxes[..., 0::2].clamp_(max=cell * kept)
    return images, targets, boxes


def _recoloured(images: Tensor) -> Tensor:
    """Random gain, offset and saturation per image, channels in random order; NaN stays."""
    kwargs = {"device": images.device}
    images = images[:, torch.randperm(3, **kwargs)]
    grey = images.mean(1, keepdim=True)
    saturation = 1.3 * torch.rand(len(images), 1, 1, 1, **kwargs)
    gain = 0.7 + 0.6 * torch.rand(len(images), 3, 1, 1, **kwargs)
    offset = 40 * torch.rand(len(images), 1, 1, 1, **kwargs) - 20
    noise = 6 * torch.rand(len(images), 1, 1, 1, **kwargs) * torch.randn_like(images)
    return ((grey + saturation * (images - grey)) * gain + offset + noise).clamp(0, 255)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's running statistics, which are averages already."""
    return {name: value for name, value in model.state_dict().items() if "running_" in name or "num_batches" in name}


def _shared(shape: tuple[int, ...], kind: type) -> np.ndarray:
    memory = mmap.mmap(-1, int(np.prod(shape)) * np.dtype(kind).itemsize)  # anonymous: shared with forked processes
    return np.frombuffer(memory, dtype=kind).reshape(shape)


# Of a process that makes scenes: the memory it shares with the others, and the first scene's number.
_ARRAYS: list[np.ndarray]
_START: int


def _adopt(arrays: list[np.ndarray], start: int) -> None:
    global _ARRAYS, _START
    _ARRAYS, _START = arrays, start


def _fill(i: int) -> None:
    made = scene(SEED, _START + i, size=(SIDE, SIDE))
    images, coverage, boxes = _ARRAYS
    images[i] = made.image.transpose(2, 0, 1)
    order = np.random.default_rng(i).permutation(len(made.masks))[:OBJECTS]
    cell = SIDE // LOW_RES
    for slot, mask in enumerate(made.masks[order]):
        coverage[i, slot] = mask.reshape(LOW_RES, cell, LOW_RES, cell).mean((1, 3)) * 255
        boxes[i, slot] = mask_box(mask)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.training.mini", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, logs and report.json")
    parser.add_argument("--model", default="efficientvit-sam-mini", help="model of the zoo with a prompt frame of 512")
    parser.add_argument("--start", type=Path, help="weights to start from; a random start if left out")
    parser.add_argument("--teacher", help="model whose shipped weights teach the image encoder first")
    parser.add_argument("--distil-minutes", type=float, default=10)
    parser.add_argument("--minutes", type=float, default=35, help="of end-to-end training")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes to train on, 1.2 MB of memory each")
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--prompts", type=int, default=6, help="objects per image")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
