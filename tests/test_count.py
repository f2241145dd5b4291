"""Counts: Table 1's parameters and MACs, exactly as printed, and where they sit."""

import pandas as pd
import pytest

from evsam_lib.models.count import PARTS, count_model

# trainable parameters of the whole model; GMACs of the image encoder; as printed in Table 1
TABLE_1 = {
    "l0": (34_792_784, 34.8, 35),
    "l1": (47_650_128, 47.7, 49),
    "l2": (61_328_592, 61.3, 69),
    "xl0": (116_957_904, 117.0, 185),
    "xl1": (203_346_128, 203.3, 322),
}


@pytest.mark.parametrize("variant", TABLE_1)
def test_counts_are_those_of_table_1(variant):
    parameters, printed_parameters, printed_gmacs = TABLE_1[variant]
    table = count_model(f"efficientvit-sam-{variant}")
    assert table.parameters["whole"] == parameters
    assert round(table.parameters["whole"] / 1e6, 1) == printed_parameters
    assert round(table.macs["image_encoder"] / 1e9) == printed_gmacs


def test_parts_add_up():
    table = count_model("efficientvit-sam-l0")
    stages = [part for part in table.index if part.startswith("stage")]
    assert table.macs[[*stages, "neck"]].sum() == table.macs["image_encoder"]
    top_norm = 2 * 256
    assert table.parameters[[*stages, "neck"]].sum() + top_norm == table.parameters["image_encoder"]
    assert table.parameters[list(PARTS)].sum() == table.parameters["whole"]
    assert table.output["image_encoder"] == "256 x 64 x 64"
    # SAM's arrangement of the same decoder takes 1.81 G for one box; ours projects no image token
    assert table.macs["mask_decoder"] / 1e9 == pytest.approx(1.02, abs=0.01)


def test_a_vit_has_its_own_rows():
    table = count_model("sam-vit-mini")
    assert isinstance(table, pd.DataFrame)
    assert "blocks" in table.index
    assert "neck" not in table.index


def test_unknown_model():
    with pytest.raises(ValueError, match="Unknown model 'l9'"):
        count_model("l9")
