"""The fast PyTorch path: the same function without batch norms, the given model untouched."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from evsam_lib import Predictor, load_model
from evsam_lib.models.fast import FastEncoder, compiled, fused, with_encoder
from evsam_lib.models.prompt_encoder import prompt_tokens
from tests.plain_decoder import plain_decode


def with_lively_norms(name: str):
    """A model at random whose batch norms have statistics; the plain start's mean of 0 and variance of 1 hide slips."""
    torch.manual_seed(0)
    model = load_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.3, 1.2),
                (module.bias.data, -0.2, 0.2),
            ):
                values.uniform_(low, high)
    return model


@pytest.fixture(scope="module")
def mini():
    return with_lively_norms("efficientvit-sam-mini")


@torch.inference_mode()
def error(ours, theirs, size: int = 256) -> float:
    """Relative error of the embedding of one random image."""
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    found, expected = ours.encode(images), theirs.encode(images)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["efficientvit-sam-mini", "mobile-sam", "edge-sam"])
def test_folding_leaves_the_function_and_no_norm(name):
    model = with_lively_norms(name)
    fast = fused(model)
    assert error(fast, model) < 1e-5
    assert not [module for module in fast.image_encoder.modules() if isinstance(module, nn.BatchNorm2d)]


def test_half_precision_stays_within_its_rounding(mini):
    assert 1e-4 < error(fused(mini, dtype=torch.bfloat16), mini) < 2e-2  # bf16 rounds at 4e-3


def test_the_given_model_is_untouched(mini):
    before = copy.deepcopy(mini.state_dict())
    fast = fused(mini, dtype=torch.bfloat16)
    after = mini.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert fast.mask_decoder is mini.mask_decoder and fast.image_encoder is not mini.image_encoder


def test_a_fused_peer_still_has_a_state_dict():
    fast = fused(load_model("edge-sam"))
    assert not [name for name in fast.state_dict() if ".bn." in name]


def test_a_model_in_training_mode_is_refused(mini):
    with pytest.raises(ValueError, match=r"is in training mode; folding needs model\.eval\(\)"):
        fused(copy.deepcopy(mini).train())


def test_prompts_share_the_image(mini):
    """Products of the decoder for eight boxes: predict_batch against the textbook arrangement. A count, not a time."""
    predictor = Predictor(mini)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    boxes = np.tile([5.0, 5.0, 60.0, 60.0], (8, 1))
    with FlopCounterMode(display=False) as ours:
        predictor.predict_batch(boxes=boxes, chunk=8)
    coords, labels = prompt_tokens(boxes=mini.to_frame(boxes, predictor.original_size))
    with torch.inference_mode(), FlopCounterMode(display=False) as textbook:
        plain_decode(mini, predictor.features, coords, labels)
    assert 0 < 2 * ours.get_total_flops() < textbook.get_total_flops()


@pytest.mark.slow
def test_compiled(mini):
    """Of a small encoder: that of the model takes a minute to compile."""
    small = with_encoder(mini, FastEncoder(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()), dtype=torch.float32))
    assert error(compiled(small), small) < 1e-5
