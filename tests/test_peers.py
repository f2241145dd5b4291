"""The other models of the paper: parity with the official code, names, precision, and EfficientSAM's own rules.

`golden/<model>.json` and `.npz` hold the official image encoders' names and outputs for a fixed noise input.
`golden/<model>_chain.npz` is our own measurement of what follows the encoder: the official packages (MobileSAM 34bbbfd,
EdgeSAM b53372c, EfficientSAM d525f62) on a CPU with one thread, weights from `golden/fill.py` (seed 0) loaded strictly
and `.eval()` called after that. `pixels_slice` = their preprocessing of `fill.reference_image()`, `[:, ::64, ::64]`.
Their decoder then got their embedding of the noise input, as if it were that of the reference image, and five prompts
in its pixels (coordinates in the file); MobileSAM and EdgeSAM through `SamPredictor.predict`, EfficientSAM through
`predict_masks` with a box as two points labelled 2 and 3. Kept of each: `low_res_slice` = `[:, ::32, ::32]`, `iou`,
`full_slice` = `[:, ::64, ::64]` of the logits at original size, `area` (pixels above 0); for the box the single mask
too, for EdgeSAM the stability scores that `use_stability_score=True` gives. EdgeSAM imports mmdet, mmengine, kornia,
loralib, yacs and EfficientDet for its training; empty stand-ins took their place.
"""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from evsam_lib import Predictor, load_model
from evsam_lib.data.transforms import LongestSide, Stretch
from evsam_lib.models.peers import WindowAttention
from evsam_lib.models.sam import stability_score
from evsam_lib.models.zoo import ZOO, state_shapes
from tests.golden import fill

GOLDEN = Path(__file__).parent / "golden"
QUICK = {"mobile_sam": "mobile-sam", "edge_sam": "edge-sam", "efficient_sam_ti": "efficient-sam-ti"}
LARGE = {"efficient_sam_s": "efficient-sam-s", "sam_vit_b": "sam-vit-b"}  # seconds each, the same code at other widths
EVERY = QUICK | LARGE
PEERS = tuple(QUICK.values())
ENCODERS = [*QUICK, *(pytest.param(golden, marks=pytest.mark.slow) for golden in LARGE)]
DECODERS = ENCODERS[:-1]  # SAM's decoder is held to the official one by sam_tiny, in test_models.py
CHAINS = ("point", "points", "negative", "box", "points_box")

# fp32 on a CPU, relative to the largest value; the official encoders themselves repeat to about 5e-6.
EMBEDDING_RTOL, LOGITS_ATOL, IOU_ATOL = 2e-5, 1e-4, 1e-5


def noise_input():
    return torch.from_numpy(np.random.Generator(np.random.PCG64(99)).standard_normal((1, 3, 1024, 1024), np.float32))


@pytest.fixture(scope="module")
def peer(request, tmp_path_factory):
    """Name of the golden files, and our model's predictor with the same weights and the noise input encoded."""
    record = json.loads((GOLDEN / f"{request.param}.json").read_text())
    path = tmp_path_factory.mktemp("weights") / "official.pt"
    state = fill.state_dict(record["keys"])
    torch.save({"model": state} if "efficient" in request.param else state, path)
    predictor = Predictor(load_model(EVERY[request.param], path))
    with torch.inference_mode():
        predictor.features = predictor.model.encode(noise_input())
    predictor.original_size = fill.reference_image().shape[:2]
    return request.param, predictor


def golden_chain(name):
    return np.load(GOLDEN / f"{name}_chain.npz")


def prompt_of(arrays, kind):
    names = {"point_coords": "points", "point_labels": "labels", "box": "box"}
    return {name: arrays[f"{kind}_{key}"] for name, key in names.items() if f"{kind}_{key}" in arrays}


@pytest.mark.parametrize("peer", ENCODERS, indirect=True, scope="module")
class TestOfficialEncoder:
    def test_embedding(self, peer):
        name, predictor = peer
        expected = np.load(GOLDEN / f"{name}.npz")["embedding_slice"]
        error = np.abs(predictor.features[0, ::16, ::4, ::4].numpy() - expected).max() / np.abs(expected).max()
        assert error < EMBEDDING_RTOL

    def test_many_prompts_equal_one_by_one(self, peer):
        _, predictor = peer
        boxes = np.array([[390, 55, 600, 352], [20, 30, 300, 400], [100, 100, 140, 120]], dtype=float)
        points = np.array([[[450, 200], [500, 300]], [[210, 190], [50, 390]], [[120, 110], [300, 20]]], dtype=float)
        labels = np.array([[1, 0], [1, 1], [1, 0]])
        _, iou, low_res = predictor.predict_batch(boxes=boxes, points=points, labels=labels)
        best_masks, _, best_low_res = predictor.predict_batch(boxes=boxes, points=points, labels=labels, select="best")
        assert best_masks.shape == (3, 423, 637)
        for i in range(3):
            _, one_iou, one = predictor.predict(points[i], labels[i], box=boxes[i])
            np.testing.assert_allclose(low_res[i], one, atol=LOGITS_ATOL, rtol=0)
            np.testing.assert_allclose(iou[i], one_iou, atol=IOU_ATOL, rtol=0)
            quality = predictor.model.quality(torch.from_numpy(low_res[i]), torch.from_numpy(iou[i]))
            np.testing.assert_array_equal(best_low_res[i], low_res[i, quality.argmax()])


@pytest.mark.parametrize("peer", DECODERS, indirect=True, scope="module")
class TestOfficialChain:
    def test_preprocessed_pixels(self, peer):
        name, predictor = peer
        expected = golden_chain(name)["pixels_slice"]
        pixels = predictor.model.preprocess(fill.reference_image())[:, ::64, ::64]
        # PIL resizes exactly; torch's bilinear filter (EfficientSAM) depends on the number of threads in the last digit
        atol = 1e-6 if name.startswith("efficient_sam") else 0
        np.testing.assert_allclose(pixels, expected, atol=atol, rtol=0)

    @pytest.mark.parametrize("kind", CHAINS)
    def test_masks(self, peer, kind):
        name, predictor = peer
        arrays = golden_chain(name)
        logits, iou, low_res = predictor.predict(**prompt_of(arrays, kind), return_logits=True)
        np.testing.assert_allclose(low_res[:, ::32, ::32], arrays[f"{kind}_low_res_slice"], atol=LOGITS_ATOL, rtol=0)
        np.testing.assert_allclose(iou, arrays[f"{kind}_iou"], atol=IOU_ATOL, rtol=0)
        np.testing.assert_allclose(logits[:, ::64, ::64], arrays[f"{kind}_full_slice"], atol=LOGITS_ATOL, rtol=0)
        areas = (logits > 0).sum(axis=(1, 2))
        assert np.abs(areas - arrays[f"{kind}_area"]).max() <= 3  # pixels whose logit is about 0
        if name == "edge_sam":
            quality = predictor.model.quality(torch.from_numpy(low_res), torch.from_numpy(iou))
            np.testing.assert_allclose(quality, arrays[f"{kind}_stability"], atol=1e-4, rtol=0)  # a pixel is about 3e-5

    def test_single_mask(self, peer):
        name, predictor = peer
        arrays = golden_chain(name)
        _, iou, low_res = predictor.predict(box=arrays["box_box"], multimask_output=False)
        expected = arrays["box_single_low_res_slice"]
        np.testing.assert_allclose(low_res[:, ::32, ::32], expected, atol=LOGITS_ATOL, rtol=0)
        np.testing.assert_allclose(iou, arrays["box_single_iou"], atol=IOU_ATOL, rtol=0)


@pytest.mark.parametrize("golden", EVERY)
def test_state_dict_has_the_official_names_and_shapes(golden):
    record = json.loads((GOLDEN / f"{golden}.json").read_text())
    ours = state_shapes()[EVERY[golden]]
    assert ours == {name: tuple(shape) for name, shape, *_ in record["keys"]}


def test_edge_sams_rule_makes_a_difference():
    arrays = golden_chain("edge_sam")
    assert any(arrays[f"{kind}_iou"].argmax() != arrays[f"{kind}_stability"].argmax() for kind in CHAINS)


def test_stability_by_hand():
    logits = torch.full((4, 4), -5.0)
    logits[0] = torch.tensor([3.0, 1.5, 0.5, -0.5])  # two pixels above 1, four above -1
    empty = torch.full((4, 4), -5.0)
    one = empty.clone()
    one[2, 2] = 9.0
    assert stability_score(torch.stack([logits, empty, one])).tolist() == [0.5, 0.0, 1.0]


NAMES = (
    *(f"efficientvit-sam-{variant}" for variant in ("mini", "l0", "l1", "l2", "xl0", "xl1")),
    *(f"sam-vit-{variant}" for variant in ("mini", "b", "l", "h")),
    *("mobile-sam", "edge-sam", "efficient-sam-ti", "efficient-sam-s"),
)
# trainable parameters of the whole model, as the official packages count them; MobileSAM without its unused head
PARAMETERS = {
    "sam-vit-b": 93_735_472,
    "sam-vit-l": 312_342_832,
    "sam-vit-h": 641_090_608,
    "mobile-sam": 9_808_452,
    "edge-sam": 9_582_112,
    "efficient-sam-ti": 10_223_204,
    "efficient-sam-s": 26_413_028,
}


class TestZoo:
    def test_all_models_are_there(self):
        assert tuple(ZOO) == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_builds_and_decodes_on_the_meta_device(self, name):
        entry = ZOO[name]
        with torch.device("meta"):
            model = entry.build().eval()
            coords, labels = model.prompt_encoder.tokens(torch.zeros(2, 3, 4, 2), torch.ones(2, 3, 4))
            low_res, iou = model.decode(torch.zeros(2, model.embed_dim, model.grid, model.grid), coords, labels)
        assert (model.name, model.frame, model.image_size) == (name, entry.frame, entry.image_size)
        assert model.best_by == ("stability" if name == "edge-sam" else "predicted_iou")
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.is_meta for tensor in tensors)
        saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        assert saved == {id(tensor) for tensor in tensors}  # loading onto meta would leave an unsaved one behind
        if name in PARAMETERS:
            assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
        side = 4 * model.grid
        assert (low_res.shape, iou.shape) == ((2, 3, 3, side, side), (2, 3, 3))
        assert model.upscale(low_res[0], (45, 60)).shape == (3, 3, 45, 60)

    def test_frames_and_licences(self):
        stretched = {name for name, entry in ZOO.items() if isinstance(entry.frame, Stretch)}
        assert stretched == {"efficient-sam-ti", "efficient-sam-s"}
        assert {name for name, entry in ZOO.items() if entry.licence != "Apache-2.0"} == {"edge-sam"}
        assert "non-commercial" in ZOO["edge-sam"].licence

    def test_released_files_have_different_names(self):
        files = [entry.file_name for entry in ZOO.values() if entry.checkpoint]
        assert len(set(files)) == len(files) == 12
        assert all(entry.sha256 is None or len(entry.sha256) == 64 for entry in ZOO.values())


class TestFrames:
    def test_stretch_scales_each_axis(self):
        coords = Stretch(1024).to_frame(np.array([[0.0, 0.0, 637.0, 423.0]]), (423, 637))
        torch.testing.assert_close(coords, torch.tensor([[0.0, 0.0, 1024.0, 1024.0]]))

    @pytest.mark.parametrize("frame", [Stretch(64), LongestSide(64, 64)])
    def test_a_flat_mask_stays_flat(self, frame):
        logits = frame.upscale(torch.full((1, 2, 16, 16), 2.5, dtype=torch.bfloat16), (30, 41))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, torch.full((1, 2, 30, 41), 2.5))

    @pytest.mark.parametrize("frame", [Stretch(64), LongestSide(64, 64)])
    def test_slivers_and_bad_images(self, frame):
        for shape in ((1, 1, 3), (1, 300, 3), (300, 1, 3)):
            assert frame.preprocess(np.zeros(shape, np.uint8)).shape == (3, 64, 64)
            assert frame.upscale(torch.zeros(1, 1, 16, 16), shape[:2]).shape == (1, 1, *shape[:2])
        with pytest.raises(ValueError, match="uint8 RGB"):
            frame.preprocess(np.zeros((5, 5), np.uint8))


def lively(name):
    """A model with a random start in which no layer is silent: biases of TinyViT, last norms of RepViT and TinyViT."""
    torch.manual_seed(0)
    model = load_model(name)
    for module in model.image_encoder.modules():
        if isinstance(module, WindowAttention):
            torch.nn.init.normal_(module.attention_biases)
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            torch.nn.init.constant_(module.weight, 0.3)
    return model


SMALL = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))  # windows of 7 and 14 are padded


class TestTinyViT:
    def test_attention_is_timms(self):
        from timm.models.tiny_vit import Attention

        theirs = Attention(64, 16, num_heads=4, attn_ratio=1, resolution=(7, 7))
        torch.nn.init.normal_(theirs.attention_biases)
        ours = WindowAttention(64, 4, 7)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 49, 64)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)

    def test_biases_never_go_stale(self):
        """The official model and timm's keep a copy of the biases in evaluation mode; loading does not renew it."""
        model, other = lively("mobile-sam"), lively("mobile-sam")
        for module in other.modules():
            if isinstance(module, WindowAttention):
                torch.nn.init.normal_(module.attention_biases)
        with torch.inference_mode():
            before, expected = model.encode(SMALL), other.encode(SMALL)
            model.load_state_dict(other.state_dict())
            torch.testing.assert_close(model.encode(SMALL), expected, atol=0, rtol=0)
            assert (before - expected).abs().max() > 1e-3  # or the line above would prove nothing
            copied = copy.deepcopy(other)
            model.image_encoder.stages[1].blocks[0].attn.attention_biases.add_(1.0)
            torch.testing.assert_close(copied.encode(SMALL), expected, atol=0, rtol=0)
            other.double()
            torch.testing.assert_close(other.encode(SMALL.double()).float(), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other.float().encode(SMALL), expected, atol=0, rtol=0)

    def test_the_unused_classifier_is_kept_but_not_counted(self, tmp_path):
        model = lively("mobile-sam")
        model.image_encoder.head_weight.fill_(0.25)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        again = load_model("mobile-sam", tmp_path / "w.pt")
        assert (again.state_dict()["image_encoder.head.weight"] == 0.25).all()
        assert len(again.state_dict()) == 439
        assert not any("head_weight" in name for name, _ in again.named_parameters())


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision(name, dtype, tolerance):
    model = lively(name)
    points, labels = torch.tensor([[[[300.0, 400.0], [700.0, 100.0]]]]), torch.tensor([[[1, 0]]])
    coords, codes = model.prompt_encoder.tokens(points, labels)
    with torch.inference_mode():
        embedding = model.encode(SMALL)
        with torch.autocast("cpu", dtype):
            mixed = model.encode(SMALL)
        half = copy.deepcopy(model).to(dtype)
        ours = half.encode(SMALL.to(dtype))
        features = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(3))
        expected, _ = model.decode(features, coords, codes)
        low_res, iou = half.decode(features.to(dtype), coords, codes)
    assert ours.dtype == low_res.dtype == iou.dtype == dtype
    for value in (ours, mixed):
        assert (value.float() - embedding).norm() / embedding.norm() < tolerance
    assert (low_res.float() - expected).norm() / expected.norm() < 3 * tolerance
    assert iou.isfinite().all()


@pytest.mark.parametrize("name", PEERS)
def test_copies_and_processes(name):
    model = lively(name)
    with torch.inference_mode():
        expected = model.encode(SMALL)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(again.state_dict()) == list(model.state_dict())
            torch.testing.assert_close(again.encode(SMALL), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", PEERS)
def test_trains(name):
    model = lively(name).train()
    coords, labels = model.prompt_encoder.tokens(boxes=torch.tensor([[[100.0, 100.0, 600.0, 500.0]]]))
    embedding = model.encode(SMALL.repeat(2, 1, 1, 1))
    low_res, iou = model.decode(torch.nn.functional.interpolate(embedding[:1], (64, 64)), coords, labels)
    (low_res.mean() + iou.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.image_encoder.parameters())


class TestEfficientSamPrompts:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return load_model("efficient-sam-ti")

    EMBEDDING = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(3))

    def decode(self, model, coords, labels, **options):
        with torch.inference_mode():
            return model.decode(self.EMBEDDING, torch.tensor(coords)[None, None], torch.tensor([[labels]]), **options)

    def test_empty_slots_may_be_written_out(self, model):
        expected, _ = self.decode(model, [[200.0, 300.0]], [1])
        for padding in ([-1.0, -1.0], [0.0, 0.0]):  # EfficientSAM's own, and SAM's
            ours, _ = self.decode(model, [[200.0, 300.0], padding], [1, -1])
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)

    def test_hidden_tokens_are_empty_slots(self, model):
        expected, _ = self.decode(model, [[200.0, 300.0]], [1])
        ours, _ = self.decode(model, [[200.0, 300.0], [7.0, 9.0]], [1, 0], valid=torch.tensor([[[True, False]]]))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)

    def test_six_slots_and_no_more(self, model):
        predictor = Predictor(model)
        predictor.features, predictor.original_size = self.EMBEDDING, (423, 637)
        points, labels = np.arange(12.0).reshape(6, 2) * 20, np.ones(6)
        assert predictor.predict(points, labels)[0].shape == (3, 423, 637)
        with pytest.raises(ValueError, match=r"6 slots .* got 8"):
            predictor.predict(points, labels, box=np.array([1.0, 2.0, 300.0, 200.0]))

    def test_no_mask_prompts(self, model):
        predictor = Predictor(model)
        predictor.features, predictor.original_size = self.EMBEDDING, (423, 637)
        with pytest.raises(ValueError, match="no mask prompts"):
            predictor.predict(np.ones((1, 2)), np.ones(1), mask_input=np.zeros((1, 256, 256)))
