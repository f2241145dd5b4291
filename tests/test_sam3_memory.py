"""Stage 2: clips, videos on disk, J and F, the compact memory, and a memory that learns from another."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evsam_lib.data.clips import PLOTS, clip
from evsam_lib.data.rle import encode_masks
from evsam_lib.data.videos import read_videos, write_videos
from evsam_lib.evaluate.video import boundary_f, fates, mean_jf, region_j, score_video
from evsam_lib.sam3 import VideoPredictor, load_sam3, stage2
from evsam_lib.sam3.load import save_sam3
from evsam_lib.sam3.memory import Perceiver
from evsam_lib.sam3.processor import pixels
from evsam_lib.sam3.propagation import Seen, Tracks, first_masks, follow, video_maps
from evsam_lib.sam3.teach_memory import start_memory

SIZE = (112, 112)
COMPACT = {"memory": "perceiver", "tokens": 5, "windows": 16}


def make(**memory):
    """A small model with weights that let the tracker see something everywhere."""
    torch.manual_seed(0)
    model = load_sam3("SAM3", scale="mini", image_size=112, **memory)
    start_memory(model)
    for name, parameter in (*model.tracker_model.named_parameters(), *model.tracker_neck.named_parameters()):
        if "positional" in name or "embed" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim > 1 and ("mask_decoder" in name or "fpn_layers" in name):
            torch.nn.init.orthogonal_(parameter)
    model.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def full():
    return make()


@pytest.fixture(scope="module")
def compact():
    return make(**COMPACT)


@pytest.fixture(scope="module")
def clips():
    return [clip(0, i, size=SIZE, frames=5, objects=2) for i in range(3)]


# Clips


def test_a_clip_is_a_function_of_its_number():
    one, again, other = clip(3, 5, size=(80, 96)), clip(3, 5, size=(80, 96)), clip(3, 6, size=(80, 96))
    np.testing.assert_array_equal(one.frames, again.frames)
    assert one.frames.shape == (8, 80, 96, 3) and one.frames.dtype == np.uint8
    assert one.masks.shape == (len(one.plots), 8, 80, 96)
    assert other.frames.shape == one.frames.shape and not np.array_equal(one.frames, other.frames)


def test_clips_hold_what_they_are_made_for():
    made = [clip(1, i, size=SIZE) for i in range(30)]
    for one in made:
        assert one.masks[:, 0].any((1, 2)).all()  # everything is seen at first
        assert one.masks.sum(0).max() <= 1
    lot = [(plot, fate) for one in made for plot, fate in zip(one.plots, fates(one.masks), strict=True)]
    assert {plot for plot, _ in lot} == set(PLOTS)
    assert all(fate[-1] == "gone" for plot, fate in lot if plot == "leave")
    returned = ["back" in fate for plot, fate in lot if plot == "return"]
    assert np.mean(returned) > 0.7
    assert any("partly hidden" in fate for plot, fate in lot if plot == "cross")
    assert np.concatenate([c.twins for c in made]).mean() > 0.3


@pytest.mark.parametrize("bad", [{"seed": -1}, {"frames": 1}, {"objects": 0}, {"size": (32, 112)}])
def test_clips_that_cannot_be(bad):
    arguments = {"seed": 0, "index": 0, "size": SIZE, "frames": 4} | bad
    with pytest.raises(ValueError, match="a clip needs seed and index"):
        clip(arguments.pop("seed"), arguments.pop("index"), **arguments)


# Videos on disk


@pytest.mark.parametrize("layout", ["sav", "davis"])
def test_written_videos_are_read_back(layout, tmp_path):
    root = write_videos(tmp_path / "set", 2, seed=4, size=(64, 80), frames=3, layout=layout)
    videos, made = read_videos(root), [clip(4, i, size=(64, 80), frames=3) for i in range(2)]
    assert [video.name for video in videos] == ["clip_000000", "clip_000001"]
    for video, one in zip(videos, made, strict=True):
        np.testing.assert_array_equal(video.masks, one.masks)
        assert video.annotated == [0, 1, 2] and video.first == [0] * len(one.masks)
        assert np.abs(np.stack(video.frames).astype(int) - one.frames).mean() < 3  # jpg


def test_run_lengths_of_sa_vs_training_set(tmp_path):
    root = write_videos(tmp_path / "set", 1, seed=4, size=(64, 80), frames=9)
    one = clip(4, 0, size=(64, 80), frames=9)
    masklets = [encode_masks(np.ascontiguousarray(one.masks[:, t])) for t in (0, 4, 8)]
    ids = list(range(len(one.masks)))
    record = {"masklet": masklets, "masklet_id": ids, "video_height": 64.0, "video_width": 80.0}
    (root / "clip_000000_manual.json").write_text(json.dumps(record))
    (video,) = read_videos(root)
    assert video.annotated == [0, 4, 8]
    np.testing.assert_array_equal(video.masks[:, ::4], one.masks[:, ::4])
    assert not video.masks[:, 1].any()


def test_broken_videos_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither JPEGImages_24fps \(SA-V\) nor"):
        read_videos(tmp_path)
    root = write_videos(tmp_path / "set", 1, seed=4, size=(64, 80), frames=3)
    Image.new("RGB", (70, 64)).save(root / "JPEGImages_24fps/clip_000000/00001.jpg")
    with pytest.raises(ValueError, match=r"00001.jpg is 70 x 64 pixels, the first frame is 80 x 64; all frames"):
        list(read_videos(root)[0].frames)
    (root / "JPEGImages_24fps/clip_000000/00001.jpg").unlink()
    with pytest.raises(ValueError, match=r"000/00001.png belongs to no frame of"):
        read_videos(root)


# J and F


def test_j_and_f_are_daviss():
    """Recorded with davis2017-evaluation on these clips and these spoilt predictions."""
    recorded = json.loads((Path(__file__).parent / "golden/davis_jf.json").read_text())
    for number in range(4):
        rows = [row for row in recorded if row["clip"] == number]
        true = clip(7, number, size=tuple(rows[0]["size"]), frames=8).masks
        predicted = np.roll(true, ((number + 1) % 4, -((number + 1) % 3)), axis=(2, 3)).copy()
        predicted[:, 3], predicted[:, 4, :60], predicted[0, 5] = False, False, true[-1, 5]
        scores = score_video(predicted, true)
        for row in rows:
            found = scores[scores.object == row["object"]]
            np.testing.assert_allclose(found.J, row["J"], atol=1e-8)
            np.testing.assert_allclose(found.F, row["F"], atol=1e-8)


def test_j_and_f_by_hand():
    empty, dot, left = np.zeros((10, 10), bool), np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    dot[4, 4], left[:, :5] = True, True
    assert region_j(empty, empty) == boundary_f(empty, empty) == 1
    assert region_j(empty, dot) == boundary_f(dot, empty) == boundary_f(empty, dot) == 0
    assert region_j(dot, dot) == boundary_f(dot, dot) == 1
    assert region_j(left, ~left) == 0 and boundary_f(left, ~left) == 1  # the same outline from both sides
    rows = score_video(np.stack([left, dot, left, left])[None], np.stack([left, left, left, left])[None])
    assert rows.frame.tolist() == [1, 2] and rows.J.tolist() == [1 / 50, 1.0]
    assert mean_jf(rows)["J"] == pytest.approx(51.0)
    with pytest.raises(ValueError, match="2 frames leave none to score"):
        score_video(left[None, None].repeat(2, 1), left[None, None].repeat(2, 1))


def test_fates_by_hand():
    areas = [4, 9, 4, 0, 0, 1, 8]
    masks = np.zeros((1, len(areas), 3, 3), bool)
    for mask, area in zip(masks[0], areas, strict=True):
        mask.flat[:area] = True
    assert fates(masks)[0].tolist() == ["partly hidden", "seen", "partly hidden", "gone", "gone", "back", "back"]


# The memory


def test_a_compact_memory_travels_bit_exact(compact, tmp_path):
    path = save_sam3(compact, tmp_path / "model.safetensors")
    again = load_sam3("SAM3", path, scale="mini", image_size=112, **COMPACT)
    ours, theirs = compact.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ValueError, match=r"holds a compact memory \(tokens=5, windows=16\), .* has the full memory"):
        load_sam3("SAM3", path, scale="mini", image_size=112)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"memory": "perciever"}, "Unknown memory 'perciever'; there are full, perceiver, edgetam"),
        ({"memory": "perceiver", "tokens": 0}, "keeps at least one token a frame, got tokens=0, windows=0"),
        (
            {"memory": "perceiver", "windows": 9},
            "9 windows do not tile a map of 8 x 8 cells; there can be 1, 4, 16, 64",
        ),
        ({"tokens": 8}, "The full memory keeps every cell of a frame"),
    ],
)
def test_memories_that_cannot_be(memory, words):
    with pytest.raises(ValueError, match=words):
        load_sam3("SAM3", scale="mini", image_size=112, **memory)


@pytest.mark.parametrize("kind", ["full", "compact"])
def test_many_objects_at_once_as_transformers_one_by_one(kind, request):
    model, one = request.getfixturevalue(kind), clip(0, 1, size=SIZE, frames=9)
    tracker, count = model.tracker_model, len(one.masks)  # frame 8 reads a pointer of frame 1, and no longer its map
    frames = torch.stack([pixels(frame, 112) for frame in one.frames])
    with torch.no_grad():
        maps = video_maps(model, frames[None])
        theirs = _session(tracker, frames, maps, one.masks[:, 0])
        tracks = Tracks(tracker, maps, torch.zeros(count, dtype=torch.long))
        seen = tracks.start(first_masks(one.masks[:, 0], 112))
        for t in range(9):
            if t:
                seen = tracks.see(t)
                tracks.remember(t, seen)
            spread = seen.low_res.std().item()
            torch.testing.assert_close(
                seen.low_res, theirs[t].view_as(seen.low_res), rtol=0, atol=1e-3 * spread
            )  # rounding adds up from frame to frame


def _session(tracker, frames, maps, masks):
    """Low-resolution masks (N, 1, h, w) of all frames from transformers' own session, with the maps handed to it."""
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

    session = Sam3TrackerVideoInferenceSession(frames, 112, 112, dtype=torch.float32)
    for t in range(len(frames)):
        known = {"vision_feats": [x[0, t].flatten(1).T[:, None] for x in maps.levels]}
        session.cache.max_vision_features_cache_size = len(frames)
        session.cache.cache_vision_features(t, known | {"vision_pos_embeds": [maps.position] * 3})
    for n, mask in enumerate(masks):
        session.add_mask_inputs(session.obj_id_to_idx(n), 0, torch.from_numpy(mask)[None, None].float())
    session.obj_with_new_inputs = list(range(len(masks)))
    return [tracker(session, frame_idx=t).pred_masks.clone() for t in range(len(frames))]


def test_the_memory_has_as_many_tokens_as_asked_for(full, compact, clips):
    frames = torch.stack([pixels(frame, 112) for frame in clips[0].frames])
    for model, tokens in ((full, 64), (compact, 21)):
        with torch.no_grad():
            tracks = Tracks(model.tracker_model, video_maps(model, frames[None]), torch.zeros(2, dtype=torch.long))
            tracks.start(first_masks(clips[0].masks[[0, 0], 0], 112))
        memory, places, pointers = tracks._memory(1)
        assert memory.shape == places.shape == (tokens + pointers, 2, 64) and pointers == 2


def test_with_one_head_and_one_object_the_perceiver_is_transformers(compact):
    from transformers.models.edgetam_video.modeling_edgetam_video import EdgeTamVideoPerceiverResampler

    config = copy.deepcopy(compact.tracker_model.config)
    config.perceiver_resampler_num_attention_heads, config.perceiver_resampler_attention_head_dim = 1, 64
    ours, theirs = Perceiver(config), EdgeTamVideoPerceiverResampler(config)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 1, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mine, official in zip(ours(*maps), theirs(*maps), strict=True):
            assert mine.shape == (1, 21, 64)
            torch.testing.assert_close(mine[:, :5], official[:, :5])
            torch.testing.assert_close(mine, official, rtol=1e-4, atol=1e-4)


def test_eight_heads_and_many_objects_as_torchs_attention(compact):
    """transformers' class mixes up heads and tokens here."""
    ours = compact.tracker_model.perceiver.layers[0].cross_attention
    theirs = torch.nn.MultiheadAttention(64, 8, bias=False, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]).detach()
    theirs.out_proj.weight.data = ours.o_proj.weight.detach()
    query, cells = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        torch.testing.assert_close(ours(query, cells, cells), theirs(query, cells, cells)[0])


def test_window_latents_are_turned_to_the_middle_of_their_windows(compact):
    attention = compact.tracker_model.memory_attention.layers[0].cross_attn_image
    cos, sin = attention._angles(torch.zeros(1, 1, 2 * 21 + 3, 128), 3)
    assert cos.shape == (45, 128)
    for still in (slice(0, 5), slice(21, 26), slice(42, 45)):
        assert (cos[still] == 1).all() and (sin[still] == 0).all()
    # Windows are 2 x 2 cells; the first half of the numbers turns with the column, the second with the row.
    assert cos[[5, 6, 9], 0].tolist() == pytest.approx([np.cos(0.5), np.cos(2.5), np.cos(0.5)])
    assert cos[[5, 6, 9], 64].tolist() == pytest.approx([np.cos(0.5), np.cos(0.5), np.cos(2.5)])
    torch.testing.assert_close(cos[5:21], cos[26:42])


def test_following_and_its_bad_input(compact, clips):
    found = follow(compact, clips[0].frames, clips[0].masks[:, 0])
    assert found.shape == clips[0].masks.shape and found.dtype == bool
    np.testing.assert_array_equal(found[:, 0], clips[0].masks[:, 0])
    with pytest.raises(ValueError, match="Frame 1 is 100 x 112 pixels, the first is 112 x 112; all frames of a video"):
        follow(compact, [clips[0].frames[0], clips[0].frames[1][:, :100]], clips[0].masks[:, 0])
    with pytest.raises(
        ValueError, match=r"Masks of the first frame must be \(N, 112, 112\), N > 0; got \(0, 112, 112\)"
    ):
        follow(compact, clips[0].frames, clips[0].masks[:0, 0])


def test_the_phrase_predictor_runs_on_a_compact_memory(compact, clips):
    predictor = VideoPredictor(compact)
    predictor.set_video(list(clips[0].frames))
    predictor.add_phrase("red disc")
    compact.score_threshold_detection, before = 0.0, compact.score_threshold_detection
    compact.new_det_thresh, new_before = 0.0, compact.new_det_thresh
    objects = list(predictor.propagate())
    compact.score_threshold_detection, compact.new_det_thresh = before, new_before
    assert [o.frame for o in objects] == [0, 1, 2, 3, 4] and len(objects[0].ids)


# Stage 2


def test_conditioned_loss_by_hand():
    teacher = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    student = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    error, cosine = stage2.conditioned_loss(student, teacher)
    assert error == pytest.approx(1 / 12.5) and cosine == pytest.approx(24 / 25)


def test_true_masks_loss_by_hand():
    """Two objects, one pixel of four is theirs; the second is gone."""
    masks = torch.zeros(2, 8, 8)
    masks[0, :4, :4] = 1  # one of 2 x 2 cells
    logits = torch.full((2, 1, 2, 2), -20.0)
    logits[0, 0, 0, 0] = 20.0
    right = torch.ones(2, 1), torch.tensor([20.0, -20.0]).view(2, 1, 1)

    def loss(logits, score, **ways):
        seen = Seen(None, None, score, None, conditioned=None, logits=logits, ious=right[0])
        return stage2.true_masks_loss(seen, masks, **ways).item()

    assert loss(logits, right[1]) == pytest.approx(0, abs=1e-5)
    assert loss(logits, -right[1]) == pytest.approx(20)  # sees what is gone, and not what is there
    nothing, half = loss(logits * 0 - 20, right[1]), loss(logits * 0 - 20, right[1], even=0.5)
    # focal: a quarter of the pixels by 20 nats and alpha 1/4, then weight 20; dice 1 - 1/2; IoU predicted 1, is 0
    assert nothing == pytest.approx(20 * 20 * 0.25 * 0.25 + 0.5 + 1, rel=1e-4)
    assert half == pytest.approx(0.5 * (25 + 0.5) + 0.5 * (20 + 0.5) + 1, rel=1e-4)


def test_attention_to_memories_starts_near(full):
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import rotate_pairwise

    attention = full.tracker_model.memory_attention
    cos, sin = (x[0] for x in attention.rotary_emb(torch.zeros(1), attention.position_ids))
    bias = attention.layers[0].cross_attn_image.q_proj.bias
    turned = bias * cos + rotate_pairwise(bias.expand_as(cos)) * sin  # (64, 128)
    weight = (turned @ turned[0] / 128**0.5).softmax(0).view(8, 8)
    assert weight.argmax() == 0 and weight[0, 3] < 0.2 * weight[0, 0]


def test_a_compact_memory_learns_from_the_full_one(full, clips, tmp_path):
    student = load_sam3("SAM3", scale="mini", image_size=112, **COMPACT)
    own = stage2.adopt_memory(student, full)
    assert own and all("perceiver" in name for name in own)
    perceiver = student.tracker_model.perceiver
    with torch.no_grad():
        perceiver.latents_1d.zero_()
        perceiver.latents_2d.zero_()
        flat = perceiver(torch.ones(1, 64, 8, 8) * torch.arange(64.0).view(1, -1, 1, 1))[0]
        wanted = torch.nn.functional.layer_norm(torch.arange(64.0), (64,))
    torch.testing.assert_close(flat, wanted.expand_as(flat), rtol=1e-3, atol=1e-3)  # the mean of what all cells say
    perceiver.latents_2d.data.normal_(std=0.1)
    data = stage2.ClipSet(full, clips)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    settings = stage2.MemoryStage(steps=6, batch_size=2, lr=3e-3, frames=3, objects=1, masks_weight=0.0)
    log = stage2.train_memory(student, data, settings, out=tmp_path / "run", teacher=full)
    assert log.features.iloc[-2:].mean() < log.features.iloc[:2].mean()
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(name.startswith(stage2.MEMORY) for name in changed)
    assert any("perceiver" in name for name in changed) and any("memory_encoder" in name for name in changed)


def test_maps_that_are_not_kept_are_made_in_every_step(full, clips, tmp_path):
    settings = stage2.MemoryStage(steps=1, batch_size=2, lr=1e-3, frames=2)
    state, losses = {k: v.clone() for k, v in full.state_dict().items()}, []
    for kept in (True, False):
        data = stage2.ClipSet(full, clips, kept=kept)
        assert bool(data.nbytes) == kept
        losses.append(stage2.train_memory(full, data, settings, out=tmp_path / str(kept)).loss[0])
        full.load_state_dict(state)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # half precision


def test_gradients_reach_earlier_memories_but_not_their_masks(compact, clips):
    frames = torch.stack([pixels(frame, 112) for frame in clips[0].frames])
    with torch.no_grad():
        maps = video_maps(compact, frames[None])
    tracks = Tracks(compact.tracker_model, maps, torch.zeros(1, dtype=torch.long))
    tracks.start(first_masks(clips[0].masks[:1, 0], 112))
    early = tracks.see(1)
    early.logits.retain_grad()
    tracks.remember(1, early)
    tracks.see(2).logits.sum().backward()
    assert early.logits.grad is None
    assert compact.tracker_model.perceiver.latents_1d.grad.abs().sum() > 0
    compact.zero_grad(set_to_none=True)


def test_the_full_memory_learns_from_true_masks_alone(full, clips, tmp_path):
    data = stage2.ClipSet(full, clips)
    settings = stage2.MemoryStage(steps=2, batch_size=2, lr=1e-3, frames=3, features_weight=0.0, decoder=1)
    log = stage2.train_memory(full, data, settings, out=tmp_path / "run")
    assert (log.masks > 0).all() and (log.features == 0).all()
    with pytest.raises(ValueError, match="Without a teacher the true masks are all there is to learn from"):
        only = stage2.MemoryStage(steps=2, batch_size=2, lr=1e-3, masks_weight=0.0)
        stage2.train_memory(full, data, only, out=tmp_path / "other")
    with pytest.raises(ValueError, match="No clip has the 9 frames that `frames` asks for"):
        stage2.train_memory(full, data, stage2.MemoryStage(steps=2, batch_size=2, frames=9), out=tmp_path / "third")
    with pytest.raises(ValueError, match=r"truth_share 0 to 1, got 5, 2 and 2\.0"):
        stage2.MemoryStage(truth_share=2.0)
