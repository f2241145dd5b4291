"""Weights: strict names, clear refusals, safe reading, round trips."""

import pickle

import pytest
import torch

from evsam_lib import load_model
from evsam_lib.models import weights as weight_files
from evsam_lib.models.zoo import ZOO


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    return load_model("efficientvit-sam-mini")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_round_trip(mini, tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": mini.state_dict()}, path)
    else:
        weight_files.save_weights(mini, path)
    again = load_model("efficientvit-sam-mini", path)
    for name, value in mini.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)
    assert list(tmp_path.iterdir()) == [path]  # no half file left beside it


def test_half_precision_storage_keeps_the_position_encoding_exact(mini, tmp_path):
    path = weight_files.save_weights(mini, tmp_path / "w.safetensors", dtype=torch.float16)
    again = load_model("efficientvit-sam-mini", path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    exact = mini.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert torch.equal(again.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, exact)
    assert path.stat().st_size < 0.6 * sum(4 * p.numel() for p in mini.parameters())


def test_sam_vit_round_trip(tmp_path):
    teacher = load_model("sam-vit-mini")
    assert "image_encoder.blocks.0.mlp.lin1.weight" in teacher.state_dict()
    path = weight_files.save_weights(teacher, tmp_path / "t.safetensors")
    again = load_model("sam-vit-mini", path)
    image = torch.randn(1, 3, 512, 512)
    with torch.inference_mode():
        torch.testing.assert_close(again.encode(image), teacher.encode(image), atol=0, rtol=0)


def test_dtype(mini, tmp_path):
    path = weight_files.save_weights(mini, tmp_path / "w.safetensors")
    assert load_model("efficientvit-sam-mini", path, dtype=torch.bfloat16).dtype == torch.bfloat16


def broken(state, how):
    state = dict(state)
    name = "image_encoder.norm.weight"
    if how == "missing":
        del state[name]
    elif how == "unexpected":
        state["image_encoder.extra"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing \(image_encoder\.norm\.weight\)"),
        ("unexpected", r"1 unexpected \(image_encoder\.extra\)"),
        ("shape", r"1 of another shape \(image_encoder\.norm\.weight \(3,\) instead of \(128,\)\)"),
    ],
)
def test_names_and_shapes_must_fit(mini, tmp_path, how, message):
    path = tmp_path / "w.pt"
    torch.save(broken(mini.state_dict(), how), path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model("efficientvit-sam-mini", path)
    assert "efficientvit-sam-mini" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_variants_weights(mini, tmp_path):
    path = weight_files.save_weights(mini, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="do not fit efficientvit-sam-l0"):
        load_model("efficientvit-sam-l0", path)


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickled_objects_are_refused(tmp_path, capsys):
    path = tmp_path / "w.pt"
    with path.open("wb") as file:
        pickle.dump({"model": Malicious()}, file)
    with pytest.raises(ValueError, match=r"w\.pt"):
        load_model("efficientvit-sam-mini", path)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=name):
        load_model("efficientvit-sam-mini", path)


def test_not_a_state_dict(tmp_path):
    path = tmp_path / "w.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="it holds list"):
        load_model("efficientvit-sam-mini", path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_model("efficientvit-sam-mini", tmp_path / "nowhere.pt")


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'efficientvit-sam-xl1'"):
        load_model("efficientvit-sam-xl11")


def test_official_checkpoint_says_what_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv("EVSAM_WEIGHTS_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"efficientvit_sam_l0\.pt; get https://"):
        load_model("efficientvit-sam-l0", "official")


def test_official_checkpoint_with_a_wrong_sum(tmp_path, monkeypatch):
    monkeypatch.setenv("EVSAM_WEIGHTS_ROOT", str(tmp_path))
    (tmp_path / "efficientvit_sam_l0.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match="sha256"):
        load_model("efficientvit-sam-l0", "official")


def test_mini_has_no_official_weights_and_l0_no_shipped_ones():
    with pytest.raises(ValueError, match="use weights='mini'"):
        load_model("efficientvit-sam-mini", "official")
    with pytest.raises(ValueError, match="No weights ship for efficientvit-sam-l0"):
        load_model("efficientvit-sam-l0", "mini")


def test_every_released_checkpoint_of_the_family_has_a_sum():
    assert all(len(entry.sha256) == 64 for name, entry in ZOO.items() if name.startswith("efficientvit-sam-l"))
