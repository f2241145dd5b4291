"""`load_sam3`, the way to every model of the table: random, from a file of ours, from a released one, from the hub.

A file is read whole or not at all. What it holds is told by its names, so the wrong student's is refused in words. The
official loader places what fits and passes over the rest; the model's `report` accounts for every tensor.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evsam_lib.models.weights import SHIPPED, load_strictly, read_state_dict, save_weights, weights_root
from evsam_lib.sam3.files import OPTIONAL, Report, from_official, is_official
from evsam_lib.sam3.ship import unpacked
from evsam_lib.sam3.zoo import IMAGES, LITETEXT, SCALES, TEACHER, TEXTS, VOCABULARY, configuration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["contents", "load_sam3", "save_sam3"]


SAM3_FILE = "sam3.pt"  # as facebook/sam3 names it

MINI = ("mini", "mini-video")  # what ships with this library


def load_sam3(
    name: str,
    weights: str | Path | None = None,
    *,
    text: str | None = None,
    context: int | None = None,
    scale: str = "full",
    image_size: int | None = None,
    taps: Sequence[int] = (32,),
    head_width: int | None = None,
    memory: str = "full",
    tokens: int | None = None,
    windows: int | None = None,
    without: tuple[str, ...] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """A model of the table, in evaluation mode; its `report` says how its weights came in.

    Args:
        name: one of `MODELS`, such as "ES-EV-S".
        weights: None for a random start (torch's global generator decides it), a file of EfficientSAM3 or SAM3, a file
            of `save_sam3`, "official" for the released weights: a file under `weights_root()`; where SAM3's is not
            there, facebook/sam3 on Hugging Face, which asks for access; or "mini" for the small SAM3 that ships with
            this library, which is of scale "mini"; or "mini-video" for the same with a tracker that learned clips, not
            clicks.
        text: "SAM3" or a key of `TEXTS`; None is "ES-MC-S", for SAM3 its own.
        context: tokens of a phrase; None is 16, for SAM3's text 32.
        scale: "full" or "mini".
        image_size: side of the input, pixels; None is the scale's.
        taps: stages of the image student, by pixels a cell: (32,) as the official code has it, (16,), or (16, 32).
        head_width: channels within the student's head; None is the official width, that of SAM3's trunk.
        memory: of the tracker, a key of `evsam_lib.sam3.memory.MEMORIES`: "full", "perceiver" or "edgetam".
        tokens: a compact memory's tokens a frame; None is its own number (64 for "perceiver").
        windows: tokens of it that keep their place; None is its own number (0 for "perceiver").
        without: parts, "tracker" or "geometry", that the file may lack; they keep a random start, and prompts that
            would use them are refused.
        device: where the model lives.
        dtype: of its parameters.

    Returns:
        transformers' `Sam3VideoModel`: `detector_model`, `tracker_model`, `tracker_neck`.

    Raises:
        ValueError: an unknown name, or weights that do not fit: the message says whose they are or what is missing.
        FileNotFoundError: there is no such file.
        PermissionError: facebook/sam3 has not been granted to this machine's Hugging Face account.
    """
    from transformers import Sam3VideoModel

    scale = "mini" if weights in MINI else scale
    trunk, remembers = (
        {"taps": taps, "head_width": head_width},
        {"memory": memory, "tokens": tokens, "windows": windows},
    )
    config = configuration(name, text, context=context, scale=scale, image_size=image_size, **trunk, **remembers)
    without = (without,) if isinstance(without, str) else tuple(without)
    if unknown := [part for part in without if part not in OPTIONAL]:
        raise ValueError(f"Unknown part {unknown[0]!r} to do without; there are {', '.join(OPTIONAL)}.")
    if name == TEACHER and weights == "official" and not (weights_root() / SAM3_FILE).is_file():
        if memory != "full":
            raise ValueError(f"facebook/sam3 has the full memory, not {memory!r}, which has to be trained.")
        model = _from_hub("facebook/sam3", config)
    else:
        path = _weights_path(name, weights, config.study["text"])
        state = None if path is None else unpacked(_read(path), VOCABULARY)
        # Not on the meta device: it would lose the tables that no file holds (TinyViT's offsets, rotary angles).
        model: Any = Sam3VideoModel(config)
        model.report = _random_start(model) if path is None or state is None else _fill(model, state, path, without)
    return model.to(device=device, dtype=dtype).eval()


def save_sam3(model: "PreTrainedModel", path: str | Path) -> Path:
    """Writes a model's weights as one safetensors file, which `load_sam3` reads back bit for bit."""
    return save_weights(model, path)


def contents(state: dict[str, torch.Tensor]) -> dict[str, str | None]:
    """Which encoders and which scale a file holds, told by a few names and shapes, in either naming.

    Args:
        state: names to tensors.

    Returns:
        "image", "text", "scale", and of a student "taps" and "head"; None where it cannot be told. LiteText's image
        encoder is SAM3's.
    """
    image = trunk = taps = width = None
    if head := _first(state, r"(trunk\.(\w+\.)?model|vision_encoder\.backbone)\.head\.0\.weight$"):
        family = next((name for name, sign in _SIGNS.items() if _first(state, sign)), None)
        taps, (width, channels) = _taps_of(state), head[1].shape[:2]
        rows = ((n, (row.official[0], row.width if 32 in taps else row.finer)) for n, row in IMAGES.items())
        image = next((name for name, found in rows if found == (family, channels)), None)
        trunk = state[head[0].replace(".head.0.", ".head.3.")].shape[0]
    elif tower := _first(state, r"(trunk\.patch_embed\.proj|vision_encoder\..*patch_embeddings\.projection)\.weight$"):
        image, trunk = TEACHER, tower[1].shape[0]
    scale = next((name for name, scale in SCALES.items() if scale.trunk[0] == trunk), None)
    student = {"taps": str(taps), "head": str(width)} if head else {"taps": None, "head": None}
    return {"image": image, "text": _text_of(state, scale), "scale": scale} | student


def _taps_of(state: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """Files in the official naming have but the last stage's."""
    if _first(state, r"backbone\.lateral\.0\.weight$"):
        return (16, 32)
    own = _first(state, r"backbone\.net\.stages_")
    return (16,) if own and not _first(state, r"backbone\.net\.stages_3\.") else (32,)


_SIGNS = {
    "efficientvit": r"stem_in_conv|input_stem",
    "repvit": r"\.features\.0\.|\.stem\.conv1",
    "tinyvit": r"patch_embed\.(seq|conv1)",
}


def _first(state: dict[str, torch.Tensor], pattern: str) -> tuple[str, torch.Tensor] | None:
    return next(((key, value) for key, value in state.items() if re.search(pattern, key)), None)


def _text_of(state: dict[str, torch.Tensor], scale: str | None) -> str | None:
    """By the kind of names; the students by convolutions in them and by their width."""
    text = {key: value for key, value in state.items() if "language_backbone" in key or "text_encoder" in key}
    if _first(text, "resblocks|text_model"):
        return TEACHER
    table = _first(text, r"(embedding_layer|token_embedding)\.weight$")
    if table is None or scale is None:
        return None
    mixed, share = _first(text, "token_mixer") is not None, SCALES[scale].text_share
    rows = ((name, (row.repmixer, int(row.width * share))) for name, row in TEXTS.items())
    return next((name for name, found in rows if found == (mixed, table[1].shape[1])), None)


def _random_start(model) -> Report:
    """transformers draws the tracker's position code twice, for prompts and for the image; there is but one."""
    tracker = model.tracker_model
    tracker.prompt_encoder.shared_embedding.load_state_dict(tracker.shared_image_embedding.state_dict())
    return Report("random start")


def _read(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors; "mini-video" holds only what it does not share with "mini"."""
    state = read_state_dict(path)
    return (
        state if path != SHIPPED / "sam3-mini-video.safetensors" else _read(SHIPPED / "sam3-mini.safetensors") | state
    )


def _weights_path(name: str, weights: str | Path | None, text: str) -> Path | None:
    if weights is None:
        return None
    if weights in MINI:
        if name != TEACHER:
            raise ValueError(f"Only SAM3 ships with mini weights, not {name}; notebook 17 trains a student of it.")
        return SHIPPED / f"sam3-{weights}.safetensors"
    if weights != "official":
        if not Path(weights).is_file():
            raise FileNotFoundError(f"No weight file at {weights}; give a path, 'mini', 'official' or None.")
        return Path(weights)
    if name not in (TEACHER, *IMAGES) and text not in LITETEXT:
        raise ValueError(f"{name} with the text encoder {text} has no released file; give the path of one.")
    path = weights_root() / (
        SAM3_FILE if name == TEACHER else IMAGES[name].file_name if name in IMAGES else LITETEXT[text]
    )
    if not path.is_file():
        asked = name if name in IMAGES else f"{name}-{text[-1]}"
        raise FileNotFoundError(
            f"No checkpoint at {path}; get it by `python -m evsam_lib.fetch weights {asked}` "
            "(EVSAM_WEIGHTS_ROOT names the folder)."
        )
    return path


def _fill(model, state: dict[str, torch.Tensor], path: Path, without: tuple[str, ...]) -> Report:
    """Loads what a file holds, all of it or nothing."""
    study = model.config.study
    report = Report(str(path), renamed=len(state))
    _check_contents(state, model.config, str(path))
    own = model.state_dict()
    _check_memory(state, own, str(path))
    if is_official(state):
        row = IMAGES.get(study["name"])
        start = "detector_model.vision_encoder.backbone.net."
        trunk = [key.removeprefix(start) for key in own if key.startswith(start)]
        rows = model.config.detector_config.text_config.max_position_embeddings
        family = row.official[0] if row else None
        state, report = from_official(state, trunk, family=family, context=rows, source=str(path))
    else:
        _check_positions(state, own, str(path))
    for part, (prefixes, uses) in OPTIONAL.items():
        names = [key for key in own if key.startswith(prefixes)]
        if any(key in state for key in names):
            continue
        if part not in without:
            raise ValueError(f"{path} holds no {part}, which {uses}; without=({part!r},) loads the rest.")
        state |= {key: own[key] for key in names}
        report.absent.append(part)
    load_strictly(model, state, source=str(path))
    return report


def _check_contents(state: dict[str, torch.Tensor], config, source: str) -> None:
    """Whose weights these are is said in the users' words, before any name is compared."""
    found, study, trunk = contents(state), config.study, config.detector_config.vision_config.backbone_config
    if found["image"] is None and found["text"] is None:
        first = next(iter(state), "nothing")
        raise ValueError(f"{source} holds no encoder of SAM3 or EfficientSAM3: its first name is {first!r}.")
    image = TEACHER if study["name"] == "LiteText" else study["name"]
    wanted = {"image": image, "text": study["text"], "scale": study["scale"]}
    if study["name"] in IMAGES:
        width = trunk.head_width or trunk.hidden_size
        wanted |= {"taps": str(tuple(trunk.taps)), "head": str(width)}
    names = {
        "image": "image encoder",
        "text": "text encoder",
        "scale": "scale",
        "taps": "taps",
        "head": "head of width",
    }
    for part, value in wanted.items():
        if found[part] not in (None, value):
            raise ValueError(f"{source} holds the {names[part]} {found[part]}, the model asked for has {value}.")


def _check_memory(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], source: str) -> None:
    """A compact memory's latents tell how many tokens it keeps."""
    if not any("memory_attention" in key for key in state):
        return  # no tracker at all, which is said elsewhere

    def kept(names: dict[str, torch.Tensor]) -> str:
        counts = [len(names.get(f"tracker_model.perceiver.latents_{n}d", ())) for n in (1, 2)]
        return f"a compact memory (tokens={counts[0]}, windows={counts[1]})" if any(counts) else "the full memory"

    if kept(state) != kept(own):
        raise ValueError(f"{source} holds {kept(state)}, the model asked for has {kept(own)}.")


def _check_positions(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], source: str) -> None:
    for key in own:
        if "position_embedding" in key and "text_encoder" in key and key in state:
            rows, wanted = state[key].shape[-2], own[key].shape[-2]
            if rows != wanted:
                raise ValueError(
                    f"{source} was saved with a context of {rows} tokens, the model asks for {wanted}; "
                    f"load it with context={rows}."
                )


def _from_hub(repository: str, config):
    """SAM3 as transformers publishes it; every key must fit."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    from transformers import Sam3VideoModel

    try:
        loaded: Any = Sam3VideoModel.from_pretrained(repository, output_loading_info=True)
    except (GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        gated = isinstance(error, GatedRepoError)
        why = "its owners have not admitted this account" if gated else "no network, or no access"
        raise PermissionError(
            f"{repository} cannot be read ({why}): ask for access at https://huggingface.co/{repository}, then set "
            "HF_TOKEN or run `hf auth login`; or give a file's path, or use LiteText or a student."
        ) from error
    model, info = loaded
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{repository} does not fit transformers' Sam3VideoModel: {wrong}.")
    model.config.study = config.study
    model.report = Report(repository, renamed=len(model.state_dict()))
    return model
