"""Segmenter and PromptWidget without a browser: what is clicked is what the model was asked, and nothing is lost."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from evsam_lib import Predictor, load_model
from evsam_lib.data.generate import scene
from evsam_lib.widgets import PromptWidget, Segmenter
from evsam_lib.widgets.pictures import SAMPLES, mask_png, sample, to_rgb

PICTURE = scene(11, 7, size=(96, 128)).image
CLICK, OTHER = (30, 40), (100, 20)


@pytest.fixture(scope="module")
def model():
    return load_model("efficientvit-sam-mini", "mini")


@pytest.fixture
def act(model):
    made = Segmenter(model)
    made.set_image(PICTURE, name="scene.png")
    return made


@pytest.fixture
def widget(model):
    return PromptWidget(model, PICTURE)


def told(widget, **message):
    widget.receive({"id": "1", **message})
    assert widget.reply == "1"
    return widget.status


class TestSegmenter:
    def test_same_masks_as_the_predictor(self, act, model):
        predictor = Predictor(model)
        predictor.set_image(PICTURE)
        act.add_point(*CLICK)
        act.add_point(*OTHER, 0)
        item = act.set_box(90, 70, 10, 5)  # corners in any order
        assert item.box == (10, 5, 90, 70)
        points, labels = np.array([CLICK, OTHER]), np.array([1, 0])
        masks, iou, _ = predictor.predict(points, labels, np.array(item.box))
        assert np.array_equal(act.masks(), masks[iou.argmax()][None])
        np.testing.assert_allclose(item.answer.iou, iou, rtol=1e-6)
        for k in range(3):
            act.choose(k)
            assert np.array_equal(act.masks()[0], masks[k])

    def test_the_last_mask_is_fed_back_if_wished(self, act, model):
        first = act.add_point(*CLICK)
        act.choose(1)
        act.feed_back = True
        act.add_point(*OTHER, 0)
        predictor = Predictor(model)
        predictor.set_image(PICTURE)
        points, labels = np.array([CLICK, OTHER]), np.array([1, 0])
        low_res = first.answer.low_res[1:2].numpy()
        masks, iou, _ = predictor.predict(points, labels, mask_input=low_res)
        assert np.array_equal(act.masks()[0], masks[iou.argmax()])

    def test_undo_and_redo_compute_nothing(self, act, monkeypatch):
        act.add_point(*CLICK)
        act.add_point(*OTHER, 0)
        act.next_object()
        act.set_box(5, 5, 60, 60)
        act.choose(2)
        states, after = [act.items], act.masks()
        monkeypatch.setattr(act.predictor, "predict_low_res", None)  # whoever asks, fails
        while act.undo():
            states.append(act.items)
        assert [len([i for i in items if i.answer]) for items in states] == [2, 2, 1, 1, 0]
        assert act.undo() is False
        while act.redo():
            pass
        assert act.redo() is False
        assert np.array_equal(act.masks(), after)

    def test_a_new_step_ends_what_could_be_redone(self, act):
        act.add_point(*CLICK)
        act.undo()
        act.add_point(*OTHER)
        assert not act.can_redo
        assert act.current.points == ((*OTHER, 1),)

    def test_objects_keep_number_and_color(self, act):
        for x in (20, 60, 100):
            act.add_point(x, 40)
            act.next_object()
        colors = [item.color for item in act.items]
        act.remove(2)
        assert [item.number for item in act.masked()] == [1, 3]
        assert act.items[1].color == colors[2]
        act.select(1)
        assert act.current.number == 1
        assert act.next_object() is act.next_object()  # an empty object is used, no second one is made
        act.remove(act.current.number)
        act.clear()
        assert act.masks().shape == (0, 96, 128)
        act.undo()
        assert len(act.masked()) == 2

    def test_a_preview_is_a_click_without_traces(self, act):
        answer = act.preview(*CLICK)
        assert act.masked() == [] and not act.can_undo and act.decode_ms == []
        item = act.add_point(*CLICK)
        assert np.array_equal(answer.mask(answer.best, act.size_hw), item.mask(act.size_hw))

    def test_times(self, act):
        assert act.encode_ms > 0
        act.add_point(*CLICK)
        act.set_box(0, 0, 50, 50)
        assert len(act.decode_ms) == 2 and min(act.decode_ms) > 0
        act.set_image(PICTURE[:50])
        assert act.decode_ms == [] and act.masked() == [] and not act.can_undo

    @pytest.mark.parametrize(
        ("step", "words"),
        [
            (lambda act: act.add_point(128, 10), "outside the picture, which has 128 x 96"),
            (lambda act: act.add_point(-1, 10), "outside"),
            (lambda act: act.add_point(float("nan"), 10), "outside"),
            (lambda act: act.add_point(10, 10, 2), "1 .this. or 0"),
            (lambda act: act.set_box(10, 10, 10, 50), "no area"),
            (lambda act: act.set_box(200, 10, 300, 50), "no area inside"),
            (lambda act: act.set_box(0, 0, float("inf"), 50), "four numbers"),
            (lambda act: act.choose(3), "0, 1, 2 or None"),
            (lambda act: act.select(9), "no object 9; there are 1"),
            (lambda act: act.remove(9), "no object 9"),
            (lambda act: act.preview(500, 0), "outside"),
            (lambda act: act.set_image(np.zeros((4, 4, 7))), "shape"),
            (lambda act: act.set_image("nowhere.png"), "does not exist"),
            (lambda act: act.set_image(b"no picture"), "cannot be read"),
            (lambda act: act.encoded(".gif"), "Exports are"),
        ],
    )
    def test_what_is_wrong_is_said_and_changes_nothing(self, act, step, words):
        act.add_point(*CLICK)
        before = (act.items, act.current, act.image, act.encode_ms, len(act.decode_ms))
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            step(act)
        assert before == (act.items, act.current, act.image, act.encode_ms, len(act.decode_ms))

    def test_without_a_picture(self, model):
        act = Segmenter(model)
        for step in (lambda: act.add_point(0, 0), lambda: act.masks(), lambda: act.encoded(".png")):
            with pytest.raises(ValueError, match="no picture yet"):
                step()
        act.set_model(model)  # nothing to encode

    @pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3)])
    def test_tiny_pictures(self, act, shape):
        act.set_image(np.full((*shape, 3), 7, np.uint8))
        act.add_point(0, 0)
        act.set_box(0, 0, shape[1], shape[0])
        assert act.masks().shape == (1, *shape)

    def test_large_pictures_are_shown_smaller_and_exported_whole(self, act, model):
        picture = np.kron(PICTURE, np.ones((20, 20, 1), np.uint8))  # 1920 x 2560
        act.set_image(picture)
        assert act.view_hw == (1536, 2048)
        act.add_point(CLICK[0] * 20, CLICK[1] * 20)
        predictor = Predictor(model)
        predictor.set_image(picture)
        masks, iou, _ = predictor.predict(np.array([CLICK]) * 20, np.array([1]))
        assert np.array_equal(act.masks()[0], masks[iou.argmax()])
        act.show()

    def test_another_model_answers_the_same_prompts(self, act):
        act.add_point(*CLICK)
        act.next_object()
        other = load_model("efficientvit-sam-mini")  # a random start
        act.set_model(other)
        predictor = Predictor(other)
        predictor.set_image(PICTURE)
        masks, iou, _ = predictor.predict(np.array([CLICK]), np.array([1]))
        assert np.array_equal(act.masks()[0], masks[iou.argmax()])
        assert not act.can_undo and len(act.items) == 2


class TestExports:
    @pytest.fixture
    def done(self, act):
        act.set_box(0, 0, 70, 90)
        act.next_object()
        act.add_point(*OTHER)
        act.next_object()
        return act

    def test_all_three_hold_the_same_masks(self, done, tmp_path):
        masks = done.masks()
        coco = COCO(done.save(tmp_path / "a.json"))
        for mask, annotation in zip(masks, coco.loadAnns(coco.getAnnIds()), strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
        with np.load(done.save(tmp_path / "a.npz")) as arrays:
            assert np.array_equal(arrays["masks"], masks)
            assert arrays["numbers"].tolist() == [1, 2]
        labels = np.array(Image.open(done.save(tmp_path / "a.PNG")))
        assert labels.dtype == np.uint8
        assert np.array_equal(labels > 0, masks.any(axis=0))
        small = min((0, 1), key=lambda k: masks[k].sum())
        assert (labels[masks[small]] == small + 1).all()

    def test_the_library_reads_its_own_coco(self, done, tmp_path):
        from evsam_lib.data.coco import CocoImages

        Image.fromarray(PICTURE).save(tmp_path / "scene.png")
        images = CocoImages(tmp_path, done.save(tmp_path / "a.json"))
        annotations = next(iter(images)).annotations
        assert np.array_equal(np.stack([images.mask(a) for a in annotations]).astype(bool), done.masks())

    def test_nothing_to_export(self, act):
        with pytest.raises(ValueError, match="no mask to export"):
            act.encoded(".png")


class TestPictures:
    def test_kinds_of_arrays(self):
        grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
        assert np.array_equal(to_rgb(grey), np.stack([grey] * 3, axis=-1))
        assert np.array_equal(to_rgb(grey[..., None]), to_rgb(grey))
        deep = np.array([[1000, 2000], [3000, 5080]], np.uint16)
        assert to_rgb(deep)[..., 0].tolist() == [[0, 63], [125, 255]]
        assert to_rgb(np.array([[True, False]]))[..., 0].tolist() == [[255, 0]]
        assert (to_rgb(np.full((2, 2), 0.5)) == 0).all()  # nothing to stretch
        see_through = np.zeros((1, 2, 4), np.uint8)
        see_through[0, 1, 3] = 255
        assert to_rgb(see_through)[..., 0].tolist() == [[255, 0]]  # white shows where nothing is

    @pytest.mark.parametrize("bad", [np.zeros((0, 3, 3)), np.zeros(5), np.full((2, 2), np.nan), np.array([["a"]])])
    def test_what_is_no_picture(self, bad):
        with pytest.raises(ValueError, match=r"picture"):
            to_rgb(bad)

    def test_files_are_turned_as_their_exif_says(self, tmp_path):
        picture = Image.fromarray(PICTURE)
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(tmp_path / "turned.png", exif=exif)
        assert np.array_equal(to_rgb(tmp_path / "turned.png"), np.rot90(PICTURE, -1))
        Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "deep.png")
        assert to_rgb(str(tmp_path / "deep.png"))[..., 0].tolist() == [[0, 255]]

    def test_samples(self):
        for name in SAMPLES:
            assert sample(name).dtype == np.uint8 and sample(name).shape[2] == 3
        with pytest.raises(ValueError, match="no sample 'Moon'"):
            sample("Moon")

    def test_masks_travel_in_one_bit_a_pixel(self):
        mask = np.random.default_rng(0).random((37, 51)) > 0.5
        file = mask_png(mask, "#E69F00")
        assert len(file) < 37 * 51 / 8 + 300
        picture = np.array(Image.open(io.BytesIO(file)).convert("RGBA"))
        assert np.array_equal(picture[..., 3] == 255, mask)
        assert np.array_equal(picture[..., 3] == 0, ~mask)
        assert (picture[mask][:, :3] == (0xE6, 0x9F, 0x00)).all()


class TestWidget:
    def test_messages_do_what_the_segmenter_does(self, widget, act):
        assert not told(widget, do="point", x=30, y=40, label=1)["error"]
        told(widget, do="point", x=100, y=20, label=0)
        told(widget, do="next")
        told(widget, do="box", box=[10, 5, 90, 70])
        told(widget, do="choose", choice=1)
        act.add_point(*CLICK)
        act.add_point(*OTHER, 0)
        act.next_object()
        act.set_box(10, 5, 90, 70)
        act.choose(1)
        assert np.array_equal(widget.segmenter.masks(), act.masks())
        for number, mask in zip("12", act.masks(), strict=True):
            seen = np.array(Image.open(io.BytesIO(widget.masks[number])).convert("RGBA"))[..., 3] > 0
            assert np.array_equal(seen, mask)
        assert "yours" in widget.status["text"]
        told(widget, do="undo")
        told(widget, do="undo")
        assert list(widget.masks) == ["1"] and widget.scene["can"]["redo"]
        told(widget, do="redo")
        assert list(widget.masks) == ["1", "2"]
        told(widget, do="select", number=1)
        told(widget, do="remove", number=2)
        told(widget, do="clear")
        assert widget.masks == {} and [item["number"] for item in widget.scene["items"]] == [1]
        told(widget, do="feed back", on=True)
        assert widget.segmenter.feed_back and widget.scene["feed_back"]

    @pytest.mark.parametrize(
        ("message", "words"),
        [
            ({"do": "point", "x": 999, "y": 1, "label": 1}, "outside the picture"),
            ({"do": "box", "box": [5, 5, 5, 9]}, "no area"),
            ({"do": "hover", "x": -1, "y": 0}, "outside"),
            ({"do": "point", "x": None, "y": 1, "label": 1}, "did not work"),
            ({"do": "model", "name": "efficientvit-sam-xxl"}, "no weights"),
            ({"do": "engine", "name": "warp"}, "no engine 'warp' here; there are eager, fused"),
            ({"do": "sample", "name": "Moon"}, "no sample"),
            ({"do": "export", "suffix": ".gif"}, "Exports are"),
            ({"do": "dance"}, "Not understood"),
            ({}, "Not understood"),
        ],
    )
    def test_errors_become_the_status_line(self, widget, message, words, capsys):
        told(widget, do="point", x=30, y=40, label=1)
        masks, scene_before = widget.masks, widget.scene
        status = told(widget, **message)
        assert status["error"] and words in status["text"] and isinstance(widget.error, Exception)
        assert widget.masks == masks and widget.scene == scene_before
        assert capsys.readouterr() == ("", "")
        assert not told(widget, do="point", x=31, y=41, label=1)["error"]  # life goes on

    def test_another_engine_gives_the_same_masks_and_stays_with_another_model(self, widget):
        told(widget, do="point", x=30, y=40, label=1)
        before = widget.segmenter.masks()
        assert widget.scene["engines"][:2] == ["eager", "fused"]
        assert not {"compile", "aoti"} & {*widget.scene["engines"]}
        assert "in fused" in told(widget, do="engine", name="fused")["text"]
        assert widget.scene["engine"] == "fused" and (widget.segmenter.masks() == before).mean() > 0.999
        told(widget, do="model", name="sam-vit-mini")
        assert widget.scene["engine"] == "fused" and widget.segmenter.model.name == "sam-vit-mini"
        told(widget, do="model", name="efficientvit-sam-mini")
        fused = widget.segmenter.model
        told(widget, do="engine", name="eager")
        assert (widget.segmenter.masks() == before).all()
        told(widget, do="engine", name="fused")
        assert widget.segmenter.model is fused  # prepared once

    def test_the_picture_travels_once_and_masks_are_small(self, widget):
        sent = []
        widget.observe(lambda change: sent.append(change.name), names=["picture"])
        for x in (30, 60, 90):
            told(widget, do="point", x=x, y=40, label=1)
        assert sent == []
        assert all(len(png) < 1000 for png in widget.masks.values())
        told(widget, do="sample", name="Coins")
        assert sent == ["picture"] and widget.masks == {} and widget.scene["size"] == [384, 303]

    def test_upload_in_parts(self, widget):
        file = io.BytesIO()
        Image.fromarray(PICTURE[:50]).save(file, "PNG")
        data = file.getvalue()
        for part, piece in enumerate((data[:99], data[99:500], data[500:])):
            widget.receive({"do": "upload", "name": "mine.png", "part": part, "parts": 3}, [memoryview(piece)])
        assert np.array_equal(widget.segmenter.image, PICTURE[:50]) and widget.scene["name"] == "mine.png"
        widget.receive({"do": "upload", "name": "lost.png", "part": 1, "parts": 3}, [b"x"])  # its start never came
        assert widget.status["error"] and widget.scene["name"] == "mine.png"

    def test_hover_and_export_go_by_message(self, widget, monkeypatch):
        sent = []
        monkeypatch.setattr(widget, "send", lambda content, buffers: sent.append((content, buffers)))
        told(widget, do="hover", x=30, y=40)
        assert widget.masks == {} and sent[0][0]["kind"] == "hover"
        told(widget, do="point", x=30, y=40, label=1)
        assert sent[0][1][0] == widget.masks["1"]  # the preview showed what the click gave
        told(widget, do="export", suffix=".json")
        assert sent[1][0]["kind"] == "file"
        assert json.loads(sent[1][1][0]) == widget.segmenter.coco()

    def test_two_widgets_on_one_model(self, widget, model):
        other = PromptWidget(model, "Coins")
        told(other, do="point", x=50, y=60, label=1)
        told(widget, do="point", x=30, y=40, label=1)
        alone = PromptWidget(model, "Coins")
        told(alone, do="point", x=50, y=60, label=1)
        assert np.array_equal(other.segmenter.masks(), alone.segmenter.masks())

    def test_by_name_and_without_a_picture(self):
        widget = PromptWidget("efficientvit-sam-mini", None)
        assert widget.picture == b"" and "image/png" not in widget._repr_mimebundle_()[0]
        assert told(widget, do="point", x=1, y=1, label=1)["error"]
        told(widget, do="sample", name="Generated scene")
        assert not told(widget, do="point", x=1, y=1, label=1)["error"]
        with pytest.raises(ValueError, match="no weights for 'nobody'"):
            PromptWidget("nobody")

    def test_a_still_picture_where_no_browser_is(self, widget, monkeypatch):
        told(widget, do="point", x=30, y=40, label=1)
        data, _ = widget._repr_mimebundle_()
        assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} == set(data)
        assert Image.open(io.BytesIO(widget.static_png())).width > 400
        monkeypatch.setenv("EVSAM_RUNNING", "14_interactive_demo")
        assert "application/vnd.jupyter.widget-view+json" not in widget._repr_mimebundle_()[0]

    def test_the_front_end_is_one_module_that_loads_nothing(self, widget):
        assert "export default" in widget._esm
        assert "import " not in widget._esm and "http" not in widget._esm + widget._css
