"""Which stages a student uses: what that costs, saving and loading, and files that are not taken for each other."""

import pytest
import torch
import torch.nn.functional as F

from evsam_lib.sam3 import load_sam3
from evsam_lib.sam3.count import count_sam3
from evsam_lib.sam3.load import save_sam3
from evsam_lib.sam3.trunk import TAPS, StudentTrunk
from evsam_lib.sam3.zoo import IMAGES, configuration


def student(name="ES-EV-S", weights=None, **options):
    torch.manual_seed(0)
    return load_sam3(name, weights, scale="mini", image_size=112, **options)


def trunk_of(model):
    return model.detector_model.vision_encoder.backbone


@pytest.mark.parametrize("taps", TAPS, ids=str)
def test_saved_and_loaded_bit_for_bit(taps, tmp_path):
    model = student(taps=taps, head_width=24)
    loaded = student(weights=save_sam3(model, tmp_path / "m.safetensors"), taps=taps, head_width=24)
    for (name, value), (key, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == key and torch.equal(value, other)
    assert trunk_of(loaded).net.feature_info.reduction() == list(taps)
    seen = trunk_of(loaded)(torch.zeros(1, 3, 112, 112)).last_hidden_state
    assert seen.shape == (1, 64, model.config.detector_config.vision_config.backbone_config.hidden_size)
    assert torch.isfinite(seen).all()


@pytest.mark.parametrize("name", [n if "EV" in n else pytest.param(n, marks=pytest.mark.slow) for n in IMAGES])
def test_files_are_recognised_by_their_channels(name):
    config = configuration(name, taps=(16, 32)).detector_config.vision_config.backbone_config
    with torch.device("meta"):
        trunk = StudentTrunk(config)
    assert trunk.net.feature_info.channels() == [IMAGES[name].finer, IMAGES[name].width]


def test_a_file_of_other_taps_is_refused(tmp_path):
    files = {taps: save_sam3(student(taps=taps), tmp_path / f"{len(taps)}{taps[0]}.safetensors") for taps in TAPS}
    for taps, path in files.items():
        for asked in set(TAPS) - {taps}:
            words = f"holds the taps \\({', ?'.join(map(str, taps))},?\\), the model asked for has \\({asked[0]}"
            with pytest.raises(ValueError, match=words):
                student(weights=path, taps=asked)
    with pytest.raises(ValueError, match="holds the head of width 128, the model asked for has 16"):
        student(weights=files[32,], head_width=16)
    with pytest.raises(ValueError, match="holds the image encoder ES-EV-S, the model asked for has ES-EV-M"):
        student("ES-EV-M", files[16,], taps=(16,))


def test_summed_taps_are_one_convolution_over_all_of_them():
    trunk = trunk_of(student(taps=(16, 32)))
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fine, coarse = trunk.net(pixels)
        together = torch.cat([fine, F.interpolate(coarse, fine.shape[-2:], mode="bilinear")], 1)
        weight = torch.cat([trunk.lateral[0].weight, trunk.head[0].weight], 1)
        by_hand = trunk.head[1:](F.conv2d(together, weight))
        by_hand = F.interpolate(by_hand, (8, 8), mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(trunk(pixels).last_hidden_state, by_hand, rtol=1e-4, atol=1e-5)  # order of sums


def test_a_fused_student_of_the_official_ones_cost():
    official = count_sam3("ES-EV-S")
    finer, fused = (count_sam3("ES-EV-S", taps=taps, head_width=256) for taps in ((16,), (16, 32)))
    assert fused.macs["backbone"] == official.macs["backbone"] and finer.macs["backbone"] < official.macs["backbone"]
    cells = 63 * 63
    by_hand = cells * 256 * (64 + 9 * 1024) + 32 * 32 * 128 * 256
    assert fused.macs["head"] == by_hand
    assert fused.macs["trunk"] < official.macs["trunk"]
    assert fused.parameters["trunk"] < official.parameters["trunk"] / 3
    assert fused.macs["neck"] == official.macs["neck"]


def test_taps_and_heads_that_cannot_be():
    with pytest.raises(ValueError, match=r"taps must be one of \(32,\), \(16,\), \(16, 32\), in pixels.*got \(8,\)"):
        configuration("ES-EV-S", taps=(8,))
    with pytest.raises(ValueError, match="head_width must be at least 1 channel, got 0"):
        configuration("ES-EV-S", head_width=0)
    with pytest.raises(ValueError, match="LiteText keeps SAM3's image tower, which has no taps"):
        configuration("LiteText", taps=(16,))
