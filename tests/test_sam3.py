"""EfficientSAM3's models: sizes, names of released files, the same bits after saving, the official code's outputs.

`golden/sam3_names.json.gz` holds names and shapes of the official code's state dicts (EfficientSAM3 c1f0b02,
built on a CPU with interactivity): what all models share, nine students' trunks and SAM3's, three texts and SAM3's.
`golden/sam3_es_ev_s.npz` is our own measurement of that code for ES-EV-S with MobileCLIP-S0 and context 16: weights
from `golden/fill.py` (seed 0, kinds as `kind` below), `fill.reference_image()` through its `Sam3Processor`, the phrase
"a red striped disc", then one example box, then `predict_inst` with a point, a box, both. Kept are slices.
"""

import gzip
import importlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from evsam_lib.sam3 import Sam3Processor, load_sam3
from evsam_lib.sam3.files import from_official
from evsam_lib.sam3.load import save_sam3
from evsam_lib.sam3.trunk import StudentTrunk, StudentTrunkConfig
from evsam_lib.sam3.zoo import IMAGES, MODELS, TEXTS, configuration
from tests.golden import fill

GOLDEN = Path(__file__).parent / "golden"
TRUNK, TEXT = "backbone.vision_backbone.trunk.", "backbone.language_backbone."

# facts of the official code, measured: backbone, head, trunk and neck, detector with MobileCLIP-S0 at context 16; M
SIZES = {
    "ES-EV-S": (0.683, 9.571, 18.056, 93.2),
    "ES-EV-M": (4.644, 9.702, 22.148, 97.3),
    "ES-EV-L": (14.977, 9.833, 32.613, 107.8),
    "ES-RV-S": (4.718, 9.833, 22.353, 97.5),
    "ES-RV-M": (7.775, 9.965, 25.542, 100.7),
    "ES-RV-L": (22.404, 10.096, 40.302, 115.5),
    "ES-TV-S": (5.071, 9.768, 22.641, 97.8),
    "ES-TV-M": (10.547, 9.899, 28.248, 103.4),
    "ES-TV-L": (20.620, 10.030, 38.453, 113.6),
}
TEXT_SIZES = {
    "ES-MC-S": (42.541, 42.550, 42.573),
    "ES-MC-M": (63.528, 63.536, 63.559),
    "ES-MC-L": (123.800, 123.813, 123.847),
}
POINT_BRANCHES = 132_352  # of the official geometry encoder, which transformers' does not have
CLASS_POSITION = 1024  # of SAM3's tower, which transformers leaves out


@cache
def meta_model(name, text=None, context=None):
    from transformers import Sam3VideoModel

    with torch.device("meta"):
        return Sam3VideoModel(configuration(name, text, context=context))


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@cache
def official_names():
    return json.loads(gzip.decompress((GOLDEN / "sam3_names.json.gz").read_bytes()))


def official_shapes(image, text):
    """Names and shapes of an official file of the full scale."""
    names = official_names()
    trunk = {TRUNK + key: shape for key, shape in names["images"][image].items()}
    return names["common"] | trunk | {TEXT + key: shape for key, shape in names["texts"][text].items()}


def kind(name, shape):
    """Of `fill.tensor_for`."""
    last = name.rsplit(".", 1)[-1]
    if last in ("num_batches_tracked", "running_mean", "running_var"):
        return last.replace("num_batches_tracked", "count")
    if last in ("bias", "in_proj_bias"):
        return "bias"
    if last in ("layer_scale", "gamma") or (last == "weight" and len(shape) == 1):
        return "norm_weight"
    if re.search(r"dconv_2x2|output_upscaling\.[03]", name):
        return "transposed"
    layer = re.search(r"bbox_embed|boxRPB|mask_embed|patch_embed|presence_token_head", name)
    table = re.search(r"embed|token|tpos|no_mem|no_obj|gaussian", name)
    return "unit" if table and not layer else "weight"


@pytest.mark.parametrize("name", SIZES)
def test_image_students_have_the_official_sizes(name):
    backbone, head, vision, whole = SIZES[name]
    detector = meta_model(name).detector_model
    trunk = detector.vision_encoder.backbone
    assert millions(trunk.net) == pytest.approx(backbone, abs=5e-4)
    assert millions(trunk.head) == pytest.approx(head, abs=5e-4)
    assert millions(detector.vision_encoder) == pytest.approx(vision, abs=5e-4)
    assert millions(detector) == pytest.approx(whole, abs=0.05)
    assert trunk.net.feature_info.channels() == [IMAGES[name].width]
    assert trunk.net.feature_info.reduction() == [32]


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_text_students_have_the_official_sizes(name):
    from transformers import AutoModel

    for context, size in zip((16, 32, 77), TEXT_SIZES[name], strict=True):
        config = configuration("ES-EV-S", name, context=context).detector_config.text_config
        with torch.device("meta"):
            encoder = AutoModel.from_config(config)
        projection = config.hidden_size * 256 + 256
        assert millions(encoder) + projection / 1e6 == pytest.approx(size, abs=5e-4)


def test_teacher_and_litetext_have_the_official_sizes():
    teacher = meta_model("SAM3")
    assert millions(teacher.detector_model) == pytest.approx(840.4, abs=0.05)
    assert millions(teacher.detector_model.vision_encoder.backbone) == pytest.approx(446.24, abs=5e-3)
    assert millions(teacher.tracker_neck) == pytest.approx(7.80, abs=5e-3)
    assert millions(teacher.tracker_model) == pytest.approx(11.74, abs=5e-3)
    for text, size in {"ES-MC-S": 529.2, "ES-MC-M": 550.2, "ES-MC-L": 610.5}.items():
        assert millions(meta_model("LiteText", text).detector_model) == pytest.approx(size, abs=0.05)


@pytest.mark.parametrize(
    ("image", "text", "context"),
    [(image, "ES-MC-S", 16) for image in IMAGES] + [("ES-EV-S", t, 77) for t in ("ES-MC-M", "ES-MC-L")] +
    [("ES-EV-S", "SAM3", None), ("SAM3", "SAM3", None)],
)  # fmt: skip
def test_every_official_name_is_placed_or_explained(image, text, context):
    model = meta_model(image, text, context)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    start = "detector_model.vision_encoder.backbone.net."
    trunk = [key.removeprefix(start) for key in own if key.startswith(start)]
    shapes = official_shapes(image, text)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    family = IMAGES[image].official[0] if image in IMAGES else None
    placed, report = from_official(state, trunk, family=family, context=context or 32, source="a file")
    assert {key: tuple(value.shape) for key, value in placed.items()} == own
    assert report.renamed + len(report.dropped) == len(shapes)
    trained = [n for n in report.dropped if "freqs_cis" not in n]
    assert sum(state[key].numel() for key in trained) == POINT_BRANCHES
    # parameters agree to the last one: nothing was forgotten by both sides
    counted = sum(v.numel() for k, v in state.items() if not re.search(r"running|num_batches|freqs_cis|gaussian", k))
    extra = CLASS_POSITION if image == "SAM3" else 0
    theirs = counted - POINT_BRANCHES - extra
    assert theirs == sum(p.numel() for n, p in model.named_parameters() if "positional_embedding" not in n)


@cache
def places(name, text):
    """{official name: (shape, names it becomes)} for one model."""
    start = "detector_model.vision_encoder.backbone.net."
    trunk = [key.removeprefix(start) for key in meta_model(name, text).state_dict() if key.startswith(start)]
    family = IMAGES[name].official[0] if name in IMAGES else None
    found = {}
    for key, shape in official_shapes(name, text).items():
        key = re.sub(r"(encoder\.transformer)\.5\.", r"\1.2.", key)  # the small ES-MC-S has three layers, not six
        one = {key: torch.empty(shape, device="meta")}
        found[key] = shape, list(from_official(one, trunk, family=family, context=16, source="a file")[0])
    return found


def officially_named(model):
    """A small model's tensors under official names, `detector.` and `tracker.` before them as in released files."""
    study, own, state = model.config.study, model.state_dict(), {}
    for name, (shape, ours) in places(study["name"], study["text"]).items():
        if not set(ours) <= set(own):  # a layer that the small scale does not have
            continue
        value = (
            torch.cat([own[key] for key in ours]) if len(ours) == 3 else own[ours[0]] if ours else torch.empty(shape)
        )
        if point := re.search(r"point_embeddings\.(\d)", name):
            value = value[int(point[1])][None]
        if name.endswith("projection_layer"):
            value = value.T
        if name.startswith("inst_interactive_predictor.model."):
            state[f"tracker.{name.removeprefix('inst_interactive_predictor.model.')}"] = value.contiguous()
        else:
            state[f"detector.{name}"] = value.contiguous()
    return state


def mini(name="ES-EV-S", weights=None, **options):
    torch.manual_seed(0)
    return load_sam3(name, weights, scale="mini", image_size=112, **options)


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    "name", ["ES-EV-S", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ES-RV-M", "ES-TV-S"))]
)
def test_official_files_load_whole(name, tmp_path):
    model = mini(name)
    torch.save({"model": officially_named(model)}, tmp_path / "official.pt")
    torch.manual_seed(1)
    loaded = load_sam3(name, tmp_path / "official.pt", scale="mini", image_size=112)
    assert same(model, loaded)
    assert set(loaded.report.dropped.values()) == {
        "point branches of the geometry encoder, which transformers' SAM3 does not have"
    }
    assert "none missing, none unexpected" in str(loaded.report)


def test_longer_tables_of_positions_are_cut_and_shorter_ones_refused(tmp_path):
    model = mini(context=77)
    torch.save(officially_named(model), tmp_path / "official.pt")
    loaded = load_sam3("ES-EV-S", tmp_path / "official.pt", scale="mini", image_size=112, context=16)
    ours, theirs = (m.detector_model.text_encoder.embeddings.position_embedding for m in (loaded, model))
    assert torch.equal(ours.position_embedding, theirs.position_embedding[:, :, :16])
    assert loaded.report.trimmed == ["positions cut from 77 to the first 16, as the official code does"]
    torch.save(officially_named(mini(context=16)), tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"positions for phrases of 16 tokens, the model asks for 32; .*context=16"):
        mini(weights=tmp_path / "short.pt", context=32)


def test_what_released_files_leave_out_must_be_allowed(tmp_path):
    state = {k: v for k, v in officially_named(mini()).items() if "geometry" not in k and "sam2_convs" not in k}
    state = {key: value for key, value in state.items() if not key.startswith("tracker.")}
    state["detector." + TRUNK + "blocks.0.norm1.weight"] = torch.ones(1024)  # the teacher's tower is still in some
    torch.save(state, tmp_path / "detector.pt")
    with pytest.raises(ValueError, match=r"holds no tracker, which .*without=\('tracker',\)"):
        mini(weights=tmp_path / "detector.pt")
    loaded = mini(weights=tmp_path / "detector.pt", without=("tracker", "geometry"))
    assert loaded.report.absent == ["tracker", "geometry"]
    assert "the teacher's image tower, left beside the student" in loaded.report.dropped.values()
    processor = Sam3Processor(loaded)
    seen = processor.set_image(fill.reference_image())
    with pytest.raises(ValueError, match="held no tracker, so this model takes no points and boxes"):
        processor.add_point((5, 5), seen)
    with pytest.raises(ValueError, match="held no geometry, so this model takes no example boxes"):
        processor.add_example([0, 0, 9, 9], seen)
    assert 0 < processor.set_text_prompt("red disc", seen).presence < 1  # phrases work without either


def test_names_without_a_place_and_missing_ones_are_errors(tmp_path):
    state = officially_named(mini())
    torch.save(state | {"detector.transformer.third.weight": torch.ones(3)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"1 tensors that have no place in this model: detector\.transformer\.third"):
        mini(weights=tmp_path / "more.pt")
    torch.save({k: v for k, v in state.items() if "semantic_seg_head" not in k}, tmp_path / "fewer.pt")
    with pytest.raises(ValueError, match=r"2 missing \(detector_model\.mask_decoder\.semantic_projection"):
        mini(weights=tmp_path / "fewer.pt")


@pytest.mark.parametrize("official", [True, False], ids=["official names", "our names"])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "ES-RV-S"}, "holds the image encoder ES-EV-L, the model asked for has ES-RV-S"),
        ({"name": "ES-EV-S"}, "holds the image encoder ES-EV-L, the model asked for has ES-EV-S"),
        ({"name": "LiteText"}, "holds the image encoder ES-EV-L, the model asked for has SAM3"),
        ({"name": "ES-EV-L", "text": "ES-MC-M"}, "holds the text encoder ES-MC-S, the model asked for has ES-MC-M"),
        ({"name": "ES-EV-L", "text": "SAM3"}, "holds the text encoder ES-MC-S, the model asked for has SAM3"),
    ],
)
def test_another_students_weights_are_named(asked, words, official, ev_l_files):
    with pytest.raises(ValueError, match=words):
        mini(weights=ev_l_files[official], **asked)


@pytest.fixture(scope="module")
def ev_l_files(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("files"), mini("ES-EV-L")
    torch.save(officially_named(model), folder / "official.pt")
    return {True: folder / "official.pt", False: save_sam3(model, folder / "ours.safetensors")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ES-TV-S", "ES-MC-S"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ES-RV-S", "SAM3"), ("SAM3", None))),
    ],
)
def test_saved_and_loaded_bit_for_bit(name, text, tmp_path):
    from transformers import Sam3VideoModel

    model = mini(name, text=text)
    ours = mini(name, save_sam3(model, tmp_path / "m.safetensors"), text=text)
    model.save_pretrained(tmp_path / "theirs")
    theirs = Sam3VideoModel.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.config.study == model.config.study
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = [m.detector_model.get_vision_features(image).fpn_hidden_states[0] for m in (model, ours, theirs)]
    for loaded, seen in zip((ours, theirs), features[1:], strict=True):
        assert same(model, loaded)
        tables = dict(loaded.named_buffers())  # also those that no file holds
        assert all(torch.equal(value, tables[key]) for key, value in model.named_buffers())
        torch.testing.assert_close(features[0], seen, rtol=1e-5, atol=1e-7)  # kernels may differ with the alignment


def test_a_file_of_another_context_is_refused(tmp_path):
    path = save_sam3(mini(context=16), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"saved with a context of 16 tokens, the model asks for 77; .*context=16"):
        mini(weights=path, context=77)


def test_a_missing_extra_is_named(monkeypatch):
    import evsam_lib.sam3

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"needs transformers and open_clip: pip install .*'\.\[sam3\]'"):
            importlib.reload(evsam_lib.sam3)
    importlib.reload(evsam_lib.sam3)


def test_a_trunk_on_the_meta_device_gets_its_tables_back(tmp_path):
    trunk = StudentTrunk(StudentTrunkConfig(backbone="tiny_vit_5m_224", hidden_size=64, image_size=112)).eval()
    trunk.save_pretrained(tmp_path)
    loaded = StudentTrunk.from_pretrained(tmp_path).eval()
    tables = {key: value for key, value in trunk.named_buffers() if "bias_idxs" in key}
    assert tables and all(torch.equal(value, dict(loaded.named_buffers())[key]) for key, value in tables.items())


def test_the_trunk_serves_transformers_tracker():
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    small = {"hidden_size": 128, "num_attention_heads": 4, "mlp_dim": 128, "iou_head_hidden_dim": 64}
    vision = configuration("ES-EV-S", scale="mini", image_size=112).detector_config.vision_config
    prompts = {"hidden_size": 128, "image_size": 112}
    config = Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=small)
    tracker = Sam3TrackerModel(config).eval()
    with torch.inference_mode():
        out = tracker(pixel_values=torch.zeros(1, 3, 112, 112), input_points=torch.tensor([[[[50.0, 60.0]]]]))
    assert isinstance(tracker.vision_encoder.backbone, StudentTrunk)
    assert out.pred_masks.shape == (1, 1, 3, 32, 32)


def test_unknown_names_texts_contexts_and_sizes():
    with pytest.raises(ValueError, match=r"Unknown model 'es-ev-s'.*Did you mean 'ES-EV-S'"):
        configuration("es-ev-s")
    with pytest.raises(ValueError, match=r"Unknown text encoder 'MobileCLIP-S0'; there are SAM3, ES-MC-S"):
        configuration("ES-EV-S", "MobileCLIP-S0")
    with pytest.raises(ValueError, match="called 'LiteText'"):
        configuration("SAM3", "ES-MC-S")
    with pytest.raises(ValueError, match="phrases of 32 tokens, not 16"):
        configuration("SAM3", context=16)
    with pytest.raises(ValueError, match=r"3 to 77 tokens.*got 100"):
        configuration("ES-EV-S", context=100)
    with pytest.raises(ValueError, match="multiple of 336 pixels, not 1024"):
        configuration("LiteText", image_size=1024)
    assert configuration("ES-EV-S", image_size=504).image_size == 504  # a student has no window
    assert set(MODELS) == {"SAM3", "LiteText", *IMAGES}
    assert len(IMAGES) == 9 and len(TEXTS) == 3


def test_weights_that_are_not_there():
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*efficient_sam3_efficientvit_s\.pt; get it by"):
        mini(weights="official")
    with pytest.raises(FileNotFoundError, match=r"No weight file at nowhere\.pt"):
        mini(weights="nowhere.pt")


def test_gated_weights_without_access(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError
    from transformers import Sam3VideoModel

    def refused(*args, **kwargs):
        request = httpx.Request("GET", "https://huggingface.co")
        raise GatedRepoError("403", response=httpx.Response(403, request=request))

    monkeypatch.setattr(Sam3VideoModel, "from_pretrained", refused)
    with pytest.raises(
        PermissionError, match=r"facebook/sam3 cannot be read \(.*\): ask for access at .*, then set HF_TOKEN"
    ):
        load_sam3("SAM3", "official")


@pytest.mark.slow
def test_outputs_are_those_of_the_official_code(tmp_path):
    golden = np.load(GOLDEN / "sam3_es_ev_s.npz")
    shapes = official_shapes("ES-EV-S", "ES-MC-S")
    state = {k: torch.from_numpy(np.asarray(fill.tensor_for(0, k, s, kind(k, s)))) for k, s in shapes.items()}
    torch.save({"model": state}, tmp_path / "official.pt")
    processor = Sam3Processor(load_sam3("ES-EV-S", tmp_path / "official.pt"))
    seen = processor.set_image(fill.reference_image())
    for i, step in enumerate((36, 18, 9)):
        close(seen.features.fpn_hidden_states[i][0, ::32, ::step, ::step], golden[f"fpn{i}"])
    seen.phrase = "a red striped disc"
    out = processor.outputs(seen)
    close(out.pred_logits[0], golden["pred_logits"])
    close(out.presence_logits[0], golden["presence"])
    x, y, w, h = golden["boxes"].T
    close(out.pred_boxes[0], np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1))
    close(out.pred_masks[0, ::40, ::16, ::16], golden["masks"])
    point = {"point_coords": np.array([[210.0, 190.0]]), "point_labels": np.array([1])}
    box = {"box": np.array([400.0, 60.0, 590.0, 350.0])}
    both = box | {"point_coords": np.array([[480.0, 200.0], [300.0, 100.0]]), "point_labels": np.array([1, 0])}
    for name, prompt in {"point": point, "box": box | {"multimask_output": False}, "both": both}.items():
        answer = processor.predict(seen, **prompt)
        close(answer.scores, golden[f"{name}_iou"])
        close(answer.low_res[:, ::16, ::16], golden[f"{name}_low"], rtol=5e-3)  # random weights: steep products


def close(ours, theirs, rtol=3e-4):
    """Within a part of the largest value, which is what float32 keeps of a sum over a thousand channels."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= rtol * np.abs(theirs).max()
