"""Evaluation as a whole, ours against a plain loop: same weights, same images, same machine, object by object.

    python -m tests.benchmarks.evaluation [--model efficientvit-sam-l0] [--limit 4] [--clicks 5] [--threads 1]
        [--weights FILE] [--images FOLDER --annotations FILE]

The plain loop does what evaluation scripts in the style of SamPredictor do: one image, one object, one prompt at a
time, SAM's textbook decoder, all three masks brought to the image's size before one is chosen, clicks by a distance
transform of the whole image. Its annotations are indexed by image as ours are. Without --images it works on generated
scenes. Reported: CPU seconds of each, their ratio, the part of each that is the clicks themselves, and the share of
objects whose IoU agrees within 1e-4 (percent points). A random start serves for speed; agreement means more with
weights.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from evsam_lib.data.coco import CocoImages
from evsam_lib.data.write import write_coco
from evsam_lib.evaluate import batch, evaluate
from evsam_lib.models.prompt_encoder import prompt_tokens
from evsam_lib.models.sam import Sam
from evsam_lib.models.zoo import load_model
from tests.benchmarks.clicks import cv2, whole_image_click
from tests.plain_decoder import plain_decode


class PlainPredictor:
    """One image, one prompt: three masks and their predicted IoUs."""

    def __init__(self, model: Sam):
        self.model = model

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        self.features = self.model.encode(self.model.preprocess(image)[None])
        self.size = image.shape[:2]

    @torch.inference_mode()
    def predict(self, points=None, labels=None, box=None) -> tuple[np.ndarray, np.ndarray]:
        prompts = [None if x is None else self.model.to_frame(np.asarray(x), self.size)[None] for x in (points, box)]
        codes = None if labels is None else torch.tensor(labels)[None]
        tokens = prompt_tokens(prompts[0], codes, prompts[1])
        low_res, iou = plain_decode(self.model, self.features, *tokens)
        masks = self.model.upscale(low_res, self.size)[0] > self.model.mask_threshold
        return masks.numpy(), iou[0].numpy()

    def best(self, **prompt) -> np.ndarray:
        masks, iou = self.predict(**prompt)
        return masks[iou.argmax()]


def plain_loop(model: Sam, images: CocoImages, limit: int, clicks: int) -> tuple[list[float], float]:
    """IoUs (percent) of all objects of the first images, and the seconds that clicking took."""
    predictor, ious, clicking = PlainPredictor(model), [], 0.0
    for record in [record for record in images if record.annotations][:limit]:
        predictor.set_image(images.read(record))
        for annotation in record.annotations:
            if annotation["area"] < 1:
                continue
            gt = images.mask(annotation)
            pred, points, labels, open_map = np.zeros_like(gt), [], [], np.ones_like(gt)
            for _ in range(clicks):
                start = time.process_time()
                x, y, label = whole_image_click(gt, pred, open_map, distance)
                open_map[y, x] = False
                clicking += time.process_time() - start
                points, labels = [*points, (x, y)], [*labels, label]
                pred = predictor.best(points=points, labels=labels)
            if not clicks:
                x, y, w, h = annotation["bbox"]
                pred = predictor.best(box=[x, y, x + w, y + h])
            ious.append((pred & gt).sum() / ((pred | gt).sum() + 1e-7) * 100)
    return ious, clicking


def distance(wrong: np.ndarray) -> np.ndarray:
    """Exact distances (H, W) to the outside, by OpenCV where it is installed, as officially."""
    if cv2 is None:
        return distance_transform_edt(wrong)
    return cv2.distanceTransform(wrong.astype(np.uint8), cv2.DIST_L2, 0)


@contextlib.contextmanager
def stopwatch(module, name: str) -> Iterator[list[float]]:
    """CPU seconds that a function of a module takes while this is open."""
    function: Callable = getattr(module, name)
    seconds = [0.0]

    def timed(*args, **kwargs):
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[0] += time.process_time() - start

    setattr(module, name, timed)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


def compare(model: Sam, images: CocoImages, limit: int, clicks: int) -> None:
    """Runs both ways and prints a line about each."""
    prompt = {"prompt": "points", "clicks": clicks} if clicks else {"prompt": "gt-box"}
    evaluate(model, images, limit=1)  # warms up
    start = time.process_time()
    with stopwatch(batch, "next_clicks") as clicking:
        ours = evaluate(model, images, limit=limit, **prompt)["objects"]
    seconds = time.process_time() - start
    start = time.process_time()
    plain, plain_clicking = plain_loop(model, images, limit, clicks)
    plain_seconds = time.process_time() - start
    apart = np.abs([record["iou"] for record in ours] - np.array(plain))
    print(f"{prompt}, {len(ours)} objects, CPU seconds")
    print(f"  ours {seconds:7.2f}, plain loop {plain_seconds:7.2f}: {plain_seconds / seconds:.2f} x")
    if clicks:
        print(f"  clicking {clicking[0]:.3f}, plain {plain_clicking:.3f}: {plain_clicking / clicking[0]:.1f} x")
    print(f"  IoU within 1e-4: {(apart < 1e-4).mean():.2%} of objects, within 0.01: {(apart < 0.01).mean():.2%}")
    for i in np.flatnonzero(apart >= 1e-4)[:10]:
        print(f"    annotation {ours[i]['ann_id']}, area {ours[i]['area']:.0f}: {ours[i]['iou']:.4f} | {plain[i]:.4f}")


def main() -> None:
    """Compares ground-truth boxes and clicks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientvit-sam-l0")
    parser.add_argument("--weights", help="a file or 'mini'; a random start without it")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--clicks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = load_model(options.model, options.weights)
    engine = f"OpenCV {cv2.__version__}" if cv2 else "SciPy"
    print(f"{options.model}, weights {options.weights}, {options.threads} threads, torch {torch.__version__}, {engine}")
    with tempfile.TemporaryDirectory() as folder:
        given = (options.images, options.annotations)
        images = CocoImages(*(given if all(given) else write_coco(folder, options.limit, seed=0, size=(480, 640))))
        for clicks in (0, options.clicks):
            compare(model, images, options.limit, clicks)


if __name__ == "__main__":
    main()
