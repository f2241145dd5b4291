"""Models: parity with the official implementations on weights that are a function of their names, dtypes, batching."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evsam_lib import Predictor, load_model
from evsam_lib.data.transforms import LongestSide
from evsam_lib.models.efficientvit import relu_linear_attention
from evsam_lib.models.peers import SamVit, VitSpec
from evsam_lib.models.prompt_encoder import prompt_tokens
from evsam_lib.models.sam import build_sam
from evsam_lib.models.zoo import ZOO
from tests.golden import fill
from tests.plain_decoder import plain_decode

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("l0", "l1", "l2", "xl0", "xl1")

# fp32 on a CPU; logits are of the order of 17. A wrong norm eps or GELU costs 1e-5 to 2e-3, so 1e-3 would hide it.
EMBEDDING_ATOL, LOGITS_ATOL, IOU_ATOL = 2e-5, 1e-4, 1e-4


LARGE = ("l2", "xl0", "xl1")  # twenty seconds for weights alone


@pytest.fixture(
    scope="module", params=[pytest.param(v, marks=pytest.mark.slow if v in LARGE else ()) for v in VARIANTS]
)
def golden(request, tmp_path_factory):
    """The official outputs of one variant, and our model with the same weights and the reference image set."""
    record = json.loads((GOLDEN / f"efficientvit_sam_{request.param}.json").read_text())
    path = tmp_path_factory.mktemp("weights") / "official.pt"
    torch.save({"state_dict": fill.state_dict(record["keys"])}, path)
    predictor = Predictor(load_model(f"efficientvit-sam-{request.param}", path))
    predictor.set_image(fill.reference_image())
    return record, np.load(GOLDEN / f"efficientvit_sam_{request.param}.npz"), predictor


def prompt_of(arrays, kind):
    names = {"point_coords": "point_coords", "point_labels": "point_labels", "box": "box"}
    return {name: arrays[f"{kind}_{key}"] for name, key in names.items() if f"{kind}_{key}" in arrays}


class TestOfficialParity:
    def test_state_dict_has_the_official_names_shapes_and_order(self, golden):
        record, _, predictor = golden
        ours = [(name, list(value.shape)) for name, value in predictor.model.state_dict().items()]
        assert ours == [(name, shape) for name, shape, _, _ in record["keys"]]

    def test_preprocessed_pixels_are_identical(self, golden):
        _, arrays, predictor = golden
        pixels = predictor.model.preprocess(fill.reference_image())
        np.testing.assert_array_equal(pixels[:, ::32, ::32], arrays["pixels_slice"])

    def test_embedding(self, golden):
        _, arrays, predictor = golden
        ours = predictor.features[0, ::16, ::4, ::4]
        np.testing.assert_allclose(ours, arrays["embedding_slice"], atol=EMBEDDING_ATOL, rtol=0)

    @pytest.mark.parametrize("size", [128, 256])
    def test_small_inputs(self, golden, size):
        _, arrays, predictor = golden
        with torch.inference_mode():
            ours = predictor.model.encode(torch.from_numpy(fill.small_input(0, size)))[0, ::16, ::4, ::4]
        np.testing.assert_allclose(ours, arrays[f"small{size}_embedding_slice"], atol=EMBEDDING_ATOL, rtol=0)

    @pytest.mark.parametrize("kind", ["point", "box", "points_box"])
    def test_masks(self, golden, kind):
        _, arrays, predictor = golden
        for output in ("multi", "single"):
            if f"{kind}_iou_{output}" not in arrays:
                continue
            options = {"multimask_output": output == "multi", "return_logits": True}
            logits, iou, low_res = predictor.predict(**prompt_of(arrays, kind), **options)
            expected = arrays[f"{kind}_low_res_{output}_slice"]
            np.testing.assert_allclose(low_res[:, ::4, ::4], expected, atol=LOGITS_ATOL, rtol=0)
            np.testing.assert_allclose(iou, arrays[f"{kind}_iou_{output}"], atol=IOU_ATOL, rtol=0)
            if output == "multi":
                expected = arrays[f"{kind}_full_multi_slice"]
                np.testing.assert_allclose(logits[:, ::16, ::16], expected, atol=LOGITS_ATOL, rtol=0)
                areas = (logits > 0).sum(axis=(1, 2))
                assert np.abs(areas - arrays[f"{kind}_full_multi_area"]).max() <= 3  # pixels whose logit is about 0


@pytest.fixture(scope="module")
def tiny():
    """The official SAM at toy size (image 256, decoder width 32) behind its own embedding, and 9 prompts' outputs."""
    cases = torch.load(GOLDEN / "sam_tiny" / "cases.pt", weights_only=True)
    state = torch.load(GOLDEN / "sam_tiny" / "state_dict.pt", weights_only=True)
    model = build_sam(
        torch.nn.Identity(),
        name="sam-tiny",
        frame=LongestSide(256, 256),
        embed_dim=32,
        grid=16,
        norm_eps=1e-5,
        mlp_hidden=64,
        heads=4,
        iou_hidden=24,
        mask_channels=8,
    )
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("image_encoder.")})
    predictor = Predictor(model.eval())
    predictor.features, predictor.original_size = cases["embedding"], tuple(cases["original_size"])
    return cases, predictor


TINY_PROMPTS = ("one_point", "points_both_labels", "box", "box_and_point", "box_single_mask", "negative_only")


class TestSamParity:
    @pytest.mark.parametrize("kind", TINY_PROMPTS)
    def test_prompts(self, tiny, kind):
        cases, predictor = tiny
        prompt = {name: np.array(value) for name, value in cases[kind]["prompt"].items() if name != "multimask_output"}
        multi = cases[kind]["prompt"].get("multimask_output", True)
        self.check(predictor.predict(**prompt, multimask_output=multi, return_logits=True), cases[kind])

    def test_mask_fed_back(self, tiny):
        cases, predictor = tiny
        mask = cases["one_point"]["low_res"][:1].numpy()
        points, labels = np.array([[60.3, 67.5], [140.7, 105.0]]), np.array([1, 0])
        ours = predictor.predict(points, labels, mask_input=mask, return_logits=True)
        self.check(ours, cases["mask_fed_back"])

    def test_batch_of_boxes(self, tiny):
        cases, predictor = tiny
        expected = cases["two_boxes_one_batch"]
        coords, labels = prompt_tokens(boxes=expected["boxes_in_model_frame"][None])
        with torch.inference_mode():
            low_res, iou = predictor.model.decode(predictor.features, coords, labels)
        torch.testing.assert_close(low_res[0], expected["low_res"], atol=1e-5, rtol=0)
        torch.testing.assert_close(iou[0], expected["iou"], atol=1e-5, rtol=0)

    def test_sparse_embedding_of_a_point(self, tiny):
        cases, predictor = tiny
        coords, labels = prompt_tokens(torch.tensor([[[[10.0, 20.0]]]]), torch.ones(1, 1, 1))
        with torch.inference_mode():
            sparse, _ = predictor.model.prompt_encoder(coords, labels)
        torch.testing.assert_close(sparse[0], cases["sparse_of_a_point_without_box"], atol=1e-6, rtol=0)

    def test_dense_position(self, tiny):
        cases, predictor = tiny
        ours = predictor.model.prompt_encoder.dense_position()
        torch.testing.assert_close(ours, cases["dense_pe"][0], atol=1e-6, rtol=0)

    @staticmethod
    def check(ours, expected):
        for mine, name in zip(ours, ("logits", "iou", "low_res"), strict=True):
            np.testing.assert_allclose(mine, expected[name], atol=1e-5, rtol=0)


def test_sam_vit_encoder_matches_the_official_one():
    cases = torch.load(GOLDEN / "sam_tiny" / "cases.pt", weights_only=True)
    state = torch.load(GOLDEN / "sam_tiny" / "state_dict.pt", weights_only=True)
    encoder = SamVit(VitSpec(48, 3, 4, (2,), window=7, image_size=256, channels=32, mlp_ratio=2)).eval()
    encoder.load_state_dict(
        {name.removeprefix("image_encoder."): v for name, v in state.items() if name.startswith("image_encoder.")}
    )
    frame = LongestSide(256, 256)
    model = build_sam(encoder, name="t", frame=frame, embed_dim=32, grid=16, norm_eps=1e-5, mlp_hidden=64)
    with torch.inference_mode():
        embedding = model.encode(model.preprocess(cases["image"].numpy())[None])
    torch.testing.assert_close(embedding, cases["embedding"], atol=EMBEDDING_ATOL, rtol=0)


def test_sam_vit_names_are_the_official_ones():
    record = json.loads((GOLDEN / "sam_vit_b.json").read_text())
    with torch.device("meta"):
        names = set(ZOO["sam-vit-b"].build().state_dict())
    assert names >= {name for name, *_ in record["keys"]}


class TestLinearAttention:
    def test_equals_quadratic_attention(self):
        q, k, v = torch.randn(3, 2, 8, 50, generator=torch.Generator().manual_seed(0))
        weights = q.relu().transpose(-1, -2) @ k.relu()  # (2, n queries, n keys), the O(n^2) form
        expected = v @ (weights / weights.sum(-1, keepdim=True)).transpose(-1, -2)
        torch.testing.assert_close(relu_linear_attention(q, k, v), expected, atol=1e-5, rtol=1e-5)

    def test_half_precision_does_not_overflow(self):
        big = torch.full((1, 8, 4096), 60.0, dtype=torch.float16)  # the sums reach 1e8, fp16 ends at 65504
        assert relu_linear_attention(big, big, big).isfinite().all()


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    model = load_model("efficientvit-sam-mini")
    with torch.no_grad():  # the official start zeroes the last norms; without them every layer takes part
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
    return model


def random_prompts(images=2, prompts=3, points=2):
    generator = torch.Generator().manual_seed(1)
    coords = 512 * torch.rand(images, prompts, points, 2, generator=generator)
    return prompt_tokens(coords, torch.ones(images, prompts, points))


class TestBatching:
    def test_images_and_prompts_do_not_mix(self, mini):
        images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(2))
        coords, labels = random_prompts()
        with torch.inference_mode():
            low_res, iou = mini(images, coords, labels)
            for b in range(2):
                for n in range(3):
                    one, score = mini(images[b : b + 1], coords[b : b + 1, n : n + 1], labels[b : b + 1, n : n + 1])
                    torch.testing.assert_close(one[0, 0], low_res[b, n], atol=1e-4, rtol=1e-4)
                    torch.testing.assert_close(score[0, 0], iou[b, n], atol=1e-5, rtol=1e-4)

    def test_invalid_tokens_do_not_exist(self, mini):
        coords, labels = random_prompts(1, 2, 2)
        embedding = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(3))
        more = torch.cat([coords, torch.full((1, 2, 2, 2), 77.0)], dim=2)
        codes = torch.cat([labels, torch.ones(1, 2, 2, dtype=torch.long)], dim=2)
        valid = torch.arange(5).expand(1, 2, 5) < 3
        with torch.inference_mode():
            expected = mini.decode(embedding, coords, labels)
            ours = mini.decode(embedding, more, codes, valid=valid)
            without_mask = mini.decode(embedding, more, codes)
        torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-4)
        assert (without_mask[0] - expected[0]).abs().max() > 1e-3  # or the test above would prove nothing

    def test_strips_and_moved_projections_change_nothing(self, mini, monkeypatch):
        monkeypatch.setattr("evsam_lib.models.mask_decoder.STRIP", 300)  # 1024 tokens: three strips and a rest
        coords, labels = random_prompts(1, 3, 2)
        embedding = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            low_res, iou = mini.decode(embedding, coords, labels)
            expected, scores = plain_decode(mini, embedding, coords[0], labels[0])
        torch.testing.assert_close(low_res[0], expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
        torch.testing.assert_close(iou[0], scores, atol=1e-5, rtol=1e-4)

    def test_mask_prompts_differ_per_prompt(self, mini):
        coords, labels = random_prompts(1, 2, 1)
        embedding = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(3))
        masks = 5 * torch.randn(1, 2, 1, 128, 128, generator=torch.Generator().manual_seed(4))
        with torch.inference_mode():
            both, _ = mini.decode(embedding, coords, labels, mask_input=masks)
            one, _ = mini.decode(embedding, coords[:, 1:], labels[:, 1:], mask_input=masks[:, 1:])
        torch.testing.assert_close(both[:, 1:], one, atol=1e-4, rtol=1e-4)


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
    @pytest.mark.parametrize("how", ["to", "autocast"])
    def test_half(self, mini, dtype, tolerance, how):
        image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
        coords, labels = random_prompts(1)
        with torch.inference_mode():
            expected = mini.encode(image)
            masks, _ = mini.decode(expected, coords, labels)
            if how == "to":
                half = load_model("efficientvit-sam-mini")
                half.load_state_dict(mini.state_dict())
                half = half.to(dtype)
                embedding = half.encode(image.to(dtype))
                low_res, iou = half.decode(embedding, coords, labels)
                assert embedding.dtype == low_res.dtype == iou.dtype == dtype
            else:
                with torch.autocast("cpu", dtype):
                    embedding = mini.encode(image)
                    low_res, iou = mini.decode(embedding, coords, labels)
        error = (embedding.float() - expected).norm() / expected.norm()
        assert error < tolerance
        assert (low_res.float() - masks).norm() / masks.norm() < 3 * tolerance
        assert iou.isfinite().all()

    def test_position_encoding_stays_exact_in_half(self, mini):
        exact = mini.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.clone()
        half = load_model("efficientvit-sam-mini")
        half.load_state_dict(mini.state_dict())
        moved = half.half().prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        assert moved.dtype == torch.float32
        torch.testing.assert_close(moved, exact, atol=0, rtol=0)

    def test_channels_last(self, mini):
        image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            expected = mini.encode(image)
            mini.to(memory_format=torch.channels_last)
            ours = mini.encode(image.to(memory_format=torch.channels_last))
            mini.to(memory_format=torch.contiguous_format)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_compiles_into_one_graph(mini):
    """`fullgraph=True` refuses data-dependent control flow; the code-generating backend takes minutes on a laptop."""
    coords, labels = random_prompts(1)
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = mini(image, coords, labels)
        ours = torch.compile(mini, fullgraph=True, backend="aot_eager")(image, coords, labels)
    torch.testing.assert_close(ours[0], expected[0], atol=1e-4, rtol=1e-4)
