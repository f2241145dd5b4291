"""figures: drawings stand where they should, in the image's pixels, and say what is wrong with a bad shape."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb, to_rgba

from evsam_lib import figures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return figures.show_image(np.zeros((20, 30, 3), np.uint8))


def rendered(ax, x, y):
    """RGB 0-255 of what is on screen at image position (x, y)."""
    figure = ax.figure
    figure.canvas.draw()
    column, row = np.round(ax.transData.transform((x, y))).astype(int)
    screen = np.asarray(figure.canvas.buffer_rgba())
    return screen[screen.shape[0] - 1 - row, column, :3].astype(float)


def test_style_is_gone_after_the_block():
    before = dict(plt.rcParams)
    with figures.style():
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == list(figures.PALETTE)
    assert dict(plt.rcParams) == before


def test_no_font_is_missed_whatever_the_user_has_set(tmp_path, caplog, monkeypatch):
    """matplotlib warns for every text of every drawing; a figure is drawn after the block, where it is saved."""
    monkeypatch.setitem(plt.rcParams, "font.family", ["No Such Font"])
    with figures.style():
        figure, ax = plt.subplots(figsize=(2, 2))
        ax.plot([0, 1], label="y – ü")
        ax.set(title="It rises", xlabel="x")
        ax.legend()
    ax.set_xlim(0, 1000)
    figure.savefig(tmp_path / "a.png")
    plt.close(figure)
    assert not [record for record in caplog.records if "findfont" in record.message]


def test_image_keeps_its_pixels_and_has_no_axes(ax):
    assert ax.get_xlim() == (-0.5, 29.5)
    assert ax.get_ylim() == (19.5, -0.5)
    assert not len(ax.get_xticks())


def test_mask_colours_its_pixels_only(ax):
    mask = np.zeros((20, 30), bool)
    mask[5:15, 0:10] = True  # touches the border
    figures.show_masks(ax, mask, alpha=0.5)
    assert rendered(ax, 4, 10) == pytest.approx(127.5 * np.array(to_rgb(figures.PALETTE[0])), abs=2)  # half over black
    assert rendered(ax, 20, 10) == pytest.approx(np.zeros(3), abs=1)
    assert ax.get_xlim() == (-0.5, 29.5)  # outlines have not moved the view


def test_small_mask_is_seen_within_a_large_one(ax):
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 9:12, 14:17] = True
    masks[1] = True
    figures.show_masks(ax, masks, alpha=1.0, outline=0)
    assert rendered(ax, 15, 10) == pytest.approx(255 * np.array(to_rgb(figures.PALETTE[0])), abs=2)
    assert rendered(ax, 3, 3) == pytest.approx(255 * np.array(to_rgb(figures.PALETTE[1])), abs=2)


def test_no_mask_and_an_empty_mask_draw_nothing(ax):
    drawn = len(ax.get_children())
    figures.show_masks(ax, np.zeros((0, 20, 30), bool))
    figures.show_masks(ax, np.zeros((20, 30), bool))
    assert len(ax.get_children()) == drawn


def test_points_differ_in_colour_and_shape(ax):
    figures.show_points(ax, np.array([[3, 4], [5, 6], [7, 8]]), np.array([1, 0, 1]))
    positive, _, negative, _ = ax.collections
    assert positive.get_offsets().tolist() == [[3, 4], [7, 8]]
    assert negative.get_offsets().tolist() == [[5, 6]]
    assert positive.get_facecolor()[0] != pytest.approx(negative.get_facecolor()[0])
    assert positive.get_paths()[0].vertices.shape != negative.get_paths()[0].vertices.shape


def test_boxes_take_one_or_many_and_the_masks_colours(ax):
    figures.show_boxes(ax, np.array([2, 3, 12, 9]))
    figures.show_boxes(ax, np.array([[0, 0, 4, 4], [5, 5, 9, 8]]))
    assert [patch.get_bbox().extents.tolist() for patch in ax.patches] == [[2, 3, 12, 9], [0, 0, 4, 4], [5, 5, 9, 8]]
    assert ax.patches[2].get_edgecolor() == to_rgba(figures.PALETTE[1])


def test_panel_fills_rows_and_removes_spare_places():
    images = [np.zeros((10, 10, 3), np.uint8)] * 5
    figure, axes = figures.panel(images, ["a", "b", "c", "d", "e"], 3)
    assert len(axes) == len(figure.axes) == 5
    assert [ax.get_title() for ax in axes] == ["a", "b", "c", "d", "e"]
    _, axes = figures.panel(images[:2])
    assert len(axes) == 2


def test_curve_draws_the_running_median():
    _, ax = plt.subplots()
    frame = pd.DataFrame({"step": range(5), "train_loss": [3.0, 2.0, 99.0, 1.0, 0.0]})
    figures.curve(ax, frame, "step", "train_loss", window=3)
    assert ax.lines[0].get_ydata().tolist() == [2.5, 3.0, 2.0, 1.0, 0.5]
    assert ax.get_ylabel() == "train loss"
    assert ax.get_legend_handles_labels()[1] == ["train_loss"]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda ax: figures.show_image(np.zeros((3, 20, 30)), ax), r"image has shape \(3, 20, 30\)"),
        (lambda ax: figures.show_masks(ax, np.zeros((1, 3, 20, 30))), "masks have shape"),
        (lambda ax: figures.show_points(ax, np.zeros((2, 2)), np.zeros(3)), r"labels \(3,\)"),
        (lambda ax: figures.show_boxes(ax, np.zeros((2, 3))), "boxes have shape"),
        (lambda ax: figures.panel([np.zeros((4, 4))] * 2, ["one"]), "2 images and 1 titles"),
        (lambda ax: figures.panel([]), "0 images"),
    ],
)
def test_bad_shapes_are_named(ax, draw, words):
    with pytest.raises(ValueError, match=words):
        draw(ax)


def test_split_bar_has_a_piece_for_every_part():
    with figures.style():
        fig, ax = plt.subplots()
        figures.split_bar(ax, {"data": 1.0, "student": 3.0})
    assert [piece.get_width() for piece in ax.patches] == [1.0, 3.0]
    assert [piece.get_x() for piece in ax.patches] == [0.0, 1.0]
    assert [text.get_text() for text in ax.texts] == ["25%", "75%"]
    plt.close(fig)
