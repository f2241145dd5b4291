"""The ledger of SAM3 and its students, against what was measured on the official and transformers' code."""

import pytest

from evsam_lib.sam3.count import CLICK, IMAGE, PARTS, PHRASE, count_sam3, part_of
from evsam_lib.sam3.zoo import TEXTS

# GMACs at 1008 pixels, measured with torch's flop counter and eager attention: backbone, head
STUDENTS = {
    "ES-EV-S": (1.86, 9.80),
    "ES-EV-M": (10.16, 9.93),
    "ES-EV-L": (31.45, 10.07),
    "ES-RV-S": (16.59, 10.07),
    "ES-RV-M": (27.20, 10.20),
    "ES-RV-L": (91.68, 10.33),
    "ES-TV-S": (26.59, 10.00),
    "ES-TV-M": (43.34, 10.13),
    "ES-TV-L": (91.02, 10.27),
}
QUICK = ("ES-EV-S",)
# side -> whole, trunk, neck, encoder, masks: ES-EV-S with ES-MC-S at context 16; the trunk of SAM3
SIZES = {336: (31.3, 1.4, 11.9, 6.0, 8.0), 504: (69.2, 2.9, 26.9, 16.4, 17.9), 672: (127.5, 5.0, 47.8, 36.4, 31.9)}
SIZES[1008] = (329.1, 11.7, 107.4, 127.7, 71.6)
TEACHER = {336: 278, 672: 1145, 1008: 2699}


def giga(table, part):
    return table.macs[part] / 1e9


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STUDENTS])
def test_students(name):
    table = count_sam3(name)
    for part, printed in zip(("backbone", "head"), STUDENTS[name], strict=True):
        assert giga(table, part) == pytest.approx(printed, abs=0.005)
    assert giga(table, "neck") == pytest.approx(107.4, abs=0.05)
    assert giga(table, "tracker neck") == giga(table, "neck")


@pytest.mark.parametrize("side", [336, *(pytest.param(side, marks=pytest.mark.slow) for side in (504, 672, 1008))])
def test_sizes_of_the_image(side):
    table = count_sam3("ES-EV-S", image_size=side)
    parts = ("detector", "trunk", "neck", "detr encoder", "mask decoder")
    for part, printed in zip(parts, SIZES[side], strict=True):
        assert giga(table, part) == pytest.approx(printed, abs=0.06)


@pytest.mark.parametrize("side", [pytest.param(336, marks=pytest.mark.slow), 1008])
def test_teacher(side):
    table = count_sam3("SAM3", image_size=side)
    assert giga(table, "trunk") == pytest.approx(TEACHER[side], abs=0.5)
    assert giga(table, "text") == pytest.approx(9.72, abs=0.005)
    if side == 1008:
        assert giga(table, "detector") == pytest.approx(3026, abs=1)
        assert table.parameters["detector"] / 1e6 == pytest.approx(840.4, abs=0.05)


@pytest.mark.slow
def test_texts():
    for name, gmacs in zip(TEXTS, (0.27, 0.61, 1.36), strict=True):
        assert giga(count_sam3("ES-EV-S", name, image_size=336), "text") == pytest.approx(gmacs, abs=0.01)
    assert giga(count_sam3("LiteText"), "detector") == pytest.approx(3017, abs=1)


def test_parts_add_up():
    table = count_sam3("ES-EV-S", image_size=336)
    for column in ("parameters", "macs"):
        assert table[column][[*IMAGE]].sum() == table[column]["vision"]
        assert table[column][[*PHRASE]].sum() == table[column]["phrase"]
        assert table[column]["vision"] + table[column]["phrase"] == table[column]["detector"]
    assert set(IMAGE) | set(PHRASE) | set(CLICK) | {"memory"} == set(PARTS)
    assert part_of("detector_model.vision_encoder.backbone.head.0") == "head"
    assert part_of("detector_model.vision_encoder.backbone.net.stem") == "backbone"
    assert part_of("tracker_model.memory_encoder") == "memory"
    assert part_of("detector_model") is None


def test_a_size_the_window_does_not_fit():
    with pytest.raises(ValueError, match="SAM3 takes images whose side is a multiple of 336 pixels, not 504"):
        count_sam3("SAM3", image_size=504)
