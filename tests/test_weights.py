"""Weights: strict names, clear refusals, safe reading, round trips."""

import argparse
import pickle
import zipfile

import pytest
import torch

from evsam_lib import load_model
from evsam_lib.models import weights as weight_files
from evsam_lib.models.zoo import ZOO, state_shapes


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


def zeros_like(name):
    """A file's worth of tensors with the names and shapes of a model, which takes no memory to speak of."""
    return {key: torch.zeros(()).expand(shape) for key, shape in state_shapes()[name].items()}


@pytest.mark.parametrize("theirs", ["sam-vit-b", "mobile-sam", "efficient-sam-ti", "efficientvit-sam-l0"])
def test_another_models_weights_are_recognised(theirs):
    with torch.device("meta"):
        model = ZOO["edge-sam"].build()
    with pytest.raises(ValueError, match=rf"do not fit edge-sam: .* they are those of {theirs} \(exactly\)\.$"):
        weight_files.load_strictly(model, zeros_like(theirs), source="w.pt", known=state_shapes)
    assert next(model.parameters()).is_meta


def test_nearly_another_models_weights():
    state = zeros_like("efficient-sam-s") | {"extra": torch.zeros(1)}
    sentence = weight_files.whose_weights(state, state_shapes())
    assert sentence == "By names and shapes they are those of efficient-sam-s (278 of 279)."


def test_weights_of_no_known_model(mini, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected \(fc\.weight\)\.$"):
        load_model("mobile-sam", path)


def test_names_of_a_wrapped_model_are_not_stripped_but_explained(mini, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({f"module.{key}": value for key, value in mini.state_dict().items()}, path)
    with pytest.raises(
        ValueError, match=r"begins with 'module\.'; without that they are those of efficientvit-sam-mini"
    ):
        load_model("efficientvit-sam-mini", path)


@pytest.mark.parametrize("name", ["mobile-sam", "edge-sam", "efficient-sam-ti"])
def test_half_precision_files_under_model(name, tmp_path):
    torch.manual_seed(0)
    model = load_model(name)
    path = tmp_path / "w.pt"
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, path)
    again = load_model(name, path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for key, value in again.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key


def test_a_zip_with_the_one_file(mini, tmp_path):
    torch.save({"model": mini.state_dict()}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "w.pt", "w.pt")
        archive.writestr("__MACOSX/._w.pt", b"resource fork")
    again = load_model("efficientvit-sam-mini", tmp_path / "w.pt.zip")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in mini.state_dict().items())
    with zipfile.ZipFile(tmp_path / "w.pt.zip", "a") as archive:
        archive.writestr("readme.txt", b"more")
    with pytest.raises(ValueError, match="a zip archive with 2 files"):
        load_model("efficientvit-sam-mini", tmp_path / "w.pt.zip")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(mini, tmp_path, kept, legacy):
    path = tmp_path / "w.pt"
    torch.save(mini.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    message = "it is empty" if not kept else "" if legacy else "its end is missing"
    with pytest.raises(ValueError, match=rf"w\.pt is not a readable weight file: {message}") as caught:
        load_model("efficientvit-sam-mini", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    ],
)
def test_what_servers_send_instead(tmp_path, content, message):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model("efficientvit-sam-mini", path)


def test_files_with_more_than_tensors_say_what(mini, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"model": mini.state_dict(), "args": argparse.Namespace(lr=1.0)}, path)
    with pytest.raises(ValueError, match=r"is refused: it holds argparse\.Namespace, and only tensors are read"):
        load_model("efficientvit-sam-mini", path)
    torch.save(mini.state_dict() | {"epoch": 3}, path)
    with pytest.raises(ValueError, match="it holds also 'epoch': int"):
        load_model("efficientvit-sam-mini", path)


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
    with pytest.raises(
        FileNotFoundError,
        match=r"efficientvit_sam_l0\.pt; get it by `python -m evsam_lib.fetch weights efficientvit-sam-l0`",
    ):
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
