"""The one table of SAM3-like models: name -> image trunk and text encoder, and their configurations.

Names are EfficientSAM3's: ES-{RV,TV,EV}-{S,M,L} for the nine image students, ES-MC-{S,M,L} for the three text students,
LiteText for SAM3's own image tower with a student's text, SAM3 for the teacher. A model is transformers'
`Sam3VideoModel`: a detector for phrases (`Sam3LiteTextModel`, or `Sam3Model` with the teacher's text), a tracker for
points, boxes and video, and a neck for each. `scale="mini"` keeps the image students and shrinks everything else, so
that it runs on a CPU in seconds. Notebook 16 counts every row.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Sam3VideoConfig

__all__ = [
    "CONTEXTS",
    "FINE_TUNED",
    "IMAGES",
    "LITETEXT",
    "MODELS",
    "SCALES",
    "TEACHER",
    "TEXTS",
    "ImageRow",
    "Scale",
    "TextRow",
    "configuration",
]

VOCABULARY = 49_408  # CLIP's byte pairs


@dataclass(frozen=True)
class ImageRow:
    """An image student.

    Attributes:
        backbone: its name in timm.
        width: channels of its last stage, by which a file is recognised.
        finer: channels of the stage before, likewise.
        official: `backbone_type` and `model_name` of EfficientSAM3's builder.
        file_name: of the released stage 1 weights.
    """

    backbone: str
    width: int
    finer: int
    official: tuple[str, str]
    file_name: str


@dataclass(frozen=True)
class TextRow:
    """A text student.

    Attributes:
        official: its name in EfficientSAM3's builder.
        width: channels.
        heads: of the attention.
        layers: in all.
        repmixer: the first and the last layer are convolutions along the phrase.
    """

    official: str
    width: int
    heads: int
    layers: int
    repmixer: bool = False


@dataclass(frozen=True)
class Scale:
    """Sizes of the parts that come from SAM3.

    Attributes:
        image_size: side of the input, pixels.
        trunk: width, feed-forward width, depth and heads of SAM3's image tower, window side in cells, global layers.
        width: channels of necks, detector and tracker.
        heads: of detector and tracker.
        layers: of the detector's encoder and decoder.
        geometry_layers: of the encoder of example boxes.
        queries: objects the detector looks for.
        mlp: feed-forward width of detector and tracker.
        text: width, depth and heads of SAM3's text tower.
        memory: layers of the attention to memories.
        text_share: what is left of a text student's width and heads.
    """

    image_size: int
    trunk: tuple[int, int, int, int, int, tuple[int, ...]]
    width: int
    heads: int
    layers: int
    geometry_layers: int
    queries: int
    mlp: int
    text: tuple[int, int, int]
    memory: int
    text_share: float = 1.0


# Family, short name, then for S, M, L: the variant in EfficientSAM3's builder, the name in timm, the last channels and
# those before.
_FAMILIES = (
    ("efficientvit", "EV", ("b0", "b1", "b2"), "efficientvit_{}", (128, 256, 384), (64, 128, 192)),
    ("repvit", "RV", ("m0.9", "m1.1", "m2.3"), "repvit_{}", (384, 512, 640), (192, 256, 320)),
    ("tinyvit", "TV", ("5m", "11m", "21m"), "tiny_vit_{}_224", (320, 448, 576), (160, 256, 384)),
)
IMAGES: dict[str, ImageRow] = {
    f"ES-{short}-{size}": ImageRow(
        timm.format(variant.replace(".", "_")),
        width,
        finer,
        (family, variant),
        f"efficient_sam3_{family}_{size.lower()}.pt",
    )
    for family, short, variants, timm, widths, before in _FAMILIES
    for size, variant, width, finer in zip("SML", variants, widths, before, strict=True)
}
TEXTS: dict[str, TextRow] = {
    "ES-MC-S": TextRow("MobileCLIP-S0", 512, 8, 6, repmixer=True),
    "ES-MC-M": TextRow("MobileCLIP-S1", 512, 8, 12),
    "ES-MC-L": TextRow("MobileCLIP2-L", 768, 12, 12),
}
# Other released files: students fine-tuned by clicks and boxes; SAM3's image tower with a student's text of 16 tokens.
FINE_TUNED: dict[str, str] = {
    name: IMAGES[name].file_name.replace(".pt", "_geo_ft.pt") for name in ("ES-EV-M", "ES-RV-M", "ES-TV-M")
}
LITETEXT: dict[str, str] = {
    text: f"efficient_sam3_image_encoder_{size}_ctx16.pt"
    for text, size in zip(TEXTS, ("mobileclip_s0", "mobileclip_s1", "mobileclip2_l"), strict=True)
}
TEACHER = "SAM3"
MODELS: tuple[str, ...] = (TEACHER, "LiteText", *IMAGES)
CONTEXTS = (16, 32, 77)  # tokens of a phrase that the released text students were made for
TEACHER_CONTEXT = 32
SCALES: dict[str, Scale] = {
    "full": Scale(
        1008, (1024, 4736, 32, 16, 24, (7, 15, 23, 31)), 256, 8, 6, 3, 200, 2048, (1024, 24, 16), 4
    ),  # transformers' defaults are SAM3's
    # width: transformers cuts an object's pointer into pieces of 64, and fails where there is but one
    "mini": Scale(168, (128, 384, 4, 4, 4, (1, 2, 3)), 128, 4, 2, 1, 36, 256, (64, 2, 4), 1, text_share=0.125),
}
PATCH = 14


def configuration(
    name: str,
    text: str | None = None,
    *,
    context: int | None = None,
    scale: str = "full",
    image_size: int | None = None,
    taps: Sequence[int] = (32,),
    head_width: int | None = None,
    memory: str = "full",
    tokens: int | None = None,
    windows: int | None = None,
) -> "Sam3VideoConfig":
    """transformers' configuration of a model; the detector's and the tracker's parts are inside.

    Args:
        name: one of `MODELS`.
        text: "SAM3" or a key of `TEXTS`; None is "ES-MC-S", for SAM3 its own.
        context: tokens of a phrase; None is 16, for SAM3's text 32, the only one it has.
        scale: "full" or "mini".
        image_size: side of the input in pixels, a multiple of 14, for SAM3's image tower of 14 times its window (336,
            mini 56); None is the scale's (1008, mini 168).
        taps: stages of the image student, by pixels a cell: (32,) as the official code has it, (16,), or (16, 32).
        head_width: channels within its head; None is the official width, that of SAM3's trunk.
        memory: a key of `evsam_lib.sam3.memory.MEMORIES`: SAM3's own ("full") or a compact one.
        tokens: a compact memory's tokens a frame; None is the memory's own number.
        windows: tokens of it that keep their place; None is the memory's own number.

    Raises:
        ValueError: an unknown name, text, scale or memory; a context, an image size, taps, a head or tokens that it
            cannot have.
    """
    from transformers import Sam3VideoConfig

    text = checked_text(name, text)
    scale = _chosen(scale, SCALES, "scale")
    size = SCALES[scale].image_size if image_size is None else image_size
    vision = _vision(name, SCALES[scale], size, _taps(name, taps, head_width), head_width)
    detector = _detector(vision, text, _context(text, context), SCALES[scale])
    small: dict[str, Any] = {} if scale == "full" else {"fill_hole_area": 0}
    config = Sam3VideoConfig(
        detector_config=detector,
        tracker_config=_tracker(vision, SCALES[scale], size, memory, tokens, windows),
        low_res_mask_size=4 * size // PATCH,
        **small,
    )
    config.study = {"name": name, "text": text, "scale": scale, "memory": memory}  # travels with saved files
    return config


def checked_text(name: str, text: str | None) -> str:
    """The text encoder that goes with an image model.

    Raises:
        ValueError: an unknown name or text.
    """
    _chosen(name, MODELS, "model")
    if text is None:
        return TEACHER if name == TEACHER else "ES-MC-S"
    if name == TEACHER and text != TEACHER:
        raise ValueError(f"SAM3 with the text encoder {text!r} is called 'LiteText'; ask for that name.")
    return _chosen(text, (TEACHER, *TEXTS), "text encoder")


def _chosen(value: str, among, what: str) -> str:
    if value not in among:
        near = difflib.get_close_matches(str(value).upper(), among, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown {what} {value!r}; there are {', '.join(among)}.{hint}")
    return value


def _context(text: str, context: int | None) -> int:
    if text == TEACHER:
        if context not in (None, TEACHER_CONTEXT):
            raise ValueError(f"SAM3's text encoder takes phrases of {TEACHER_CONTEXT} tokens, not {context}.")
        return TEACHER_CONTEXT
    if context is not None and not 3 <= context <= 77:
        raise ValueError(f"A context has 3 to 77 tokens, as the tables of positions have; got {context}.")
    return CONTEXTS[0] if context is None else context


def _taps(name: str, taps: Sequence[int], head_width: int | None) -> tuple[int, ...]:
    from evsam_lib.sam3.trunk import TAPS

    if tuple(taps) not in TAPS:
        raise ValueError(f"taps must be one of {', '.join(map(str, TAPS))}, in pixels a cell; got {tuple(taps)}.")
    if head_width is not None and head_width < 1:
        raise ValueError(f"head_width must be at least 1 channel, got {head_width}.")
    if name not in IMAGES and (tuple(taps) != TAPS[0] or head_width is not None):
        raise ValueError(f"{name} keeps SAM3's image tower, which has no taps and no head; choose an ES- student.")
    return tuple(taps)


def _vision(name: str, scale: Scale, size: int, taps: tuple[int, ...], head_width: int | None):
    from transformers import Sam3VisionConfig, Sam3ViTConfig

    from evsam_lib.sam3.trunk import StudentTrunkConfig

    width, mlp, depth, heads, window, global_layers = scale.trunk
    step = PATCH if name in IMAGES else PATCH * window
    if size < step or size % step:
        raise ValueError(f"{name} takes images whose side is a multiple of {step} pixels, not {size}.")
    if name in IMAGES:
        trunk = StudentTrunkConfig(
            backbone=IMAGES[name].backbone, hidden_size=width, image_size=size, taps=taps, head_width=head_width
        )
    else:
        trunk = Sam3ViTConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            window_size=window,
            global_attn_indexes=list(global_layers),
            pretrain_image_size=PATCH * window,
            image_size=size,
        )
    return Sam3VisionConfig(
        backbone_config=trunk,
        fpn_hidden_size=scale.width,
        backbone_feature_sizes=[[n * size // PATCH] * 2 for n in (4, 2, 1)],
    )


def _detector(vision, text: str, context: int, scale: Scale):
    from transformers import Sam3Config, Sam3LiteTextConfig

    part = {"hidden_size": scale.width, "num_attention_heads": scale.heads}
    deep = part | {"intermediate_size": scale.mlp}
    kind, encoder = (Sam3Config, _teacher_text(scale)) if text == TEACHER else (Sam3LiteTextConfig, _text(text, scale))
    encoder["max_position_embeddings"] = context
    return kind(
        vision_config=vision,
        text_config=encoder,
        geometry_encoder_config=deep | {"num_layers": scale.geometry_layers},
        detr_encoder_config=deep | {"num_layers": scale.layers},
        detr_decoder_config=deep | {"num_layers": scale.layers, "num_queries": scale.queries},
        mask_decoder_config=part,
    )


def _text(text: str, scale: Scale) -> dict[str, Any]:
    row = TEXTS[text]
    width, layers = int(row.width * scale.text_share), row.layers if scale.text_share == 1 else row.layers // 2
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": row.heads if scale.text_share == 1 else row.heads // 2,
        "use_repmixer_blocks": row.repmixer,
    }


def _teacher_text(scale: Scale) -> dict[str, Any]:
    width, layers, heads = scale.text
    return {
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
    }


def _tracker(vision, scale: Scale, size: int, memory: str, tokens: int | None, windows: int | None):
    from transformers import Sam3TrackerVideoConfig

    from evsam_lib.sam3.memory import MEMORIES, PerceiverTrackerConfig, memory_options

    kind, row = Sam3TrackerVideoConfig, MEMORIES[_chosen(memory, MEMORIES, "memory")]
    options: dict[str, Any] = {"memory_attention_num_layers": scale.memory}
    options["memory_attention_feed_forward_hidden_size"] = scale.mlp
    if row is not None:
        kind, options = PerceiverTrackerConfig, memory_options(row, tokens, windows, scale, size // PATCH)
    elif tokens is not None or windows is not None:
        raise ValueError("The full memory keeps every cell of a frame; tokens and windows belong to a compact memory.")
    return kind(
        vision_config=vision.to_dict(),
        prompt_encoder_config={"hidden_size": scale.width, "image_size": size},
        mask_decoder_config={
            "hidden_size": scale.width,
            "mlp_dim": scale.mlp,
            "num_attention_heads": scale.heads,
            "iou_head_hidden_dim": scale.width,
        },
        memory_attention_hidden_size=scale.width,
        memory_encoder_hidden_size=scale.width,
        memory_encoder_output_channels=64,  # as transformers' attention to memories expects at every width
        mask_downsampler_embed_dim=scale.width,
        memory_fuser_embed_dim=scale.width,
        memory_fuser_intermediate_dim=4 * scale.width,
        image_size=size,  # pyrefly: ignore[unexpected-keyword]: its __post_init__ takes it
        **options,
    )
