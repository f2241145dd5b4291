"""EfficientSAM3's released files under transformers' names: every tensor is placed, or its absence is explained.

The released files join a student to SAM3's weights, in SAM3's own names, with or without `detector.` and `tracker.`
before them. Tables of renamings lead to the names of transformers' `Sam3VideoModel` with our trunk; fused projections
are cut in three, the four point embeddings stacked. Whatever no table knows is an error, and so is whatever the model
needs and the file lacks: the official loader passes over both in silence. `Report` says what happened.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["OPTIONAL", "Report", "from_official", "is_official"]

DETECTOR, TRACKER = "detector_model.", "tracker_model."
TRUNK = "backbone.vision_backbone.trunk."

# Parts that released files are known to lack: how their names begin here, and what for they are.
OPTIONAL = {
    "tracker": ((TRACKER, "tracker_neck."), "answers points, boxes and video"),
    "geometry": ((f"{DETECTOR}geometry_encoder.",), "takes example boxes and stands in every phrase's prompt"),
}

# Left out of the model on purpose: (pattern, why).
DROPPED = (
    (
        r"geometry_encoder\.points_\w+\.",
        "point branches of the geometry encoder, which transformers' SAM3 does not have",
    ),
    (
        rf"{TRUNK}model\.backbone\.model\.(classifier|distill_head|head|norm_head)\.",
        "ImageNet classifier of the student",
    ),
    (r".*(attn_mask|freqs_cis|attention_bias_idxs)$", "tables computed from sizes"),
)  # fmt: skip
TEACHER_TOWER = (
    rf"{TRUNK}(patch_embed|pos_embed|blocks|ln_pre)\b",
    "the teacher's image tower, left beside the student",
)

_NORMS, _OUT = (r"\bnorm(\d)\b", r"layer_norm\1"), (r"\bout_proj\b", "o_proj")
_LAYER = (_OUT, (r"\blinear1\b", "mlp.fc1"), (r"\blinear2\b", "mlp.fc2"))
_PERCEPTRON = (r"\blayers\.(\d+)\.(weight|bias)$", lambda m: f"layer{int(m[1]) + 1}.{m[2]}")
_HEADS = r"output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head"
_FEED_FORWARD = (
    (r"\blayers\.0\.(weight|bias)$", r"proj_in.\1"),
    (r"\blayers\.2\.(weight|bias)$", r"proj_out.\1"),
    (r"\blayers\.1\.(weight|bias)$", r"layers.0.\1"),
)

# (what a name begins with, what it begins with here, renamings of the rest); the first row that fits counts.
PARTS: tuple[tuple[str, str, tuple], ...] = (
    (f"{TRUNK}model.head.", f"{DETECTOR}vision_encoder.backbone.head.", ()),
    *(
        (
            f"backbone.vision_backbone.{theirs}.",
            f"{ours}fpn_layers.",
            (
                (r"\bdconv_2x2(_0)?\b", "scale_layers.0"),
                (r"\bdconv_2x2_1\b", "scale_layers.2"),
                (r"\bconv_1x1\b", "proj1"),
                (r"\bconv_3x3\b", "proj2"),
            ),
        )
        for theirs, ours in (("convs", f"{DETECTOR}vision_encoder.neck."), ("sam2_convs", "tracker_neck."))
    ),
    ("backbone.language_backbone.projector.", f"{DETECTOR}text_projection.", ()),
    ("backbone.language_backbone.resizer.", f"{DETECTOR}text_projection.", ()),
    (
        "backbone.language_backbone.encoder.transformer.resblocks.",
        f"{DETECTOR}text_encoder.text_model.encoder.layers.",
        (
            (r"\bln_(\d)\b", r"layer_norm\1"),
            (r"\battn\b", "self_attn"),
            (r"\bc_fc\b", "fc1"),
            (r"\bc_proj\b", "fc2"),
        ),
    ),
    (
        "backbone.language_backbone.encoder.transformer.",
        f"{DETECTOR}text_encoder.layers.",
        (
            (r"\bpre_norm_mha\.0\b", "layer_norm1"),
            (r"\bpre_norm_mha\.1\b", "self_attn"),
            (r"\bpre_norm_ffn\.0\b", "layer_norm2"),
            (r"\bpre_norm_ffn\.1\b", "mlp.fc1"),
            (r"\bpre_norm_ffn\.4\b", "mlp.fc2"),
            (r"\bnorm\.rbr_skip\b", "reference_batchnorm"),
            (r"\bmixer\.rbr_skip\b", "mixer.batchnorm_skip"),
            (r"\bmixer\.rbr_conv\.0\.conv\b", "mixer.conv"),
            (r"\bmixer\.rbr_conv\.0\.bn\b", "mixer.batchnorm_conv"),
            (r"\bconvffn\.conv\.conv\b", "conv_feed_forward.depthwise_conv"),
            (r"\bconvffn\.conv\.bn\b", "conv_feed_forward.depthwise_batchnorm"),
            (r"\bconvffn\.", "conv_feed_forward.mlp."),
        ),
    ),
    (
        "backbone.language_backbone.encoder.",
        f"{DETECTOR}text_encoder.",
        (
            (r"^embedding_layer\b", "embeddings.token_embedding"),
            (r"^positional_embedding\.pos_embed\.pos_embed$", "embeddings.position_embedding.position_embedding"),
            (r"^projection_layer$", "projection.weight"),
            (r"^token_embedding\b", "text_model.embeddings.token_embedding"),
            (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
            (r"^ln_final\b", "text_model.final_layer_norm"),
            (r"^text_projection$", "text_projection.weight"),
        ),
    ),
    (
        "geometry_encoder.",
        f"{DETECTOR}geometry_encoder.",
        (
            (r"^encode_norm\b", "output_layer_norm"),
            (r"^img_pre_norm\b", "vision_layer_norm"),
            (r"^norm\b", "prompt_layer_norm"),
            (r"^encode\.", "layers."),
            (r"\bcross_attn_image\b", "cross_attn"),
            _NORMS,
            *_LAYER,
        ),
    ),
    (
        "transformer.encoder.",
        f"{DETECTOR}detr_encoder.",
        ((r"\bcross_attn_image\b", "cross_attn"), _NORMS, *_LAYER),
    ),
    (
        "transformer.decoder.layers.",
        f"{DETECTOR}detr_decoder.layers.",
        (
            (r"\bcross_attn\b", "vision_cross_attn"),
            (r"\bca_text\b", "text_cross_attn"),
            (r"\bcatext_norm\b", "text_cross_attn_layer_norm"),
            (r"\bnorm1\b", "vision_cross_attn_layer_norm"),
            (r"\bnorm2\b", "self_attn_layer_norm"),
            (r"\bnorm3\b", "mlp_layer_norm"),
            *_LAYER,
        ),
    ),
    (
        "transformer.decoder.",
        f"{DETECTOR}detr_decoder.",
        (
            (r"^norm\b", "output_layer_norm"),
            (r"^bbox_embed\b", "box_head"),
            (r"^boxRPB_embed_(\w)\b", r"box_rpb_embed_\1"),
            (r"^presence_token_head\b", "presence_head"),
            (r"^presence_token_out_norm\b", "presence_layer_norm"),
            _PERCEPTRON,
        ),
    ),
    (
        "segmentation_head.",
        f"{DETECTOR}mask_decoder.",
        (
            (r"^mask_predictor\.mask_embed\b", "mask_embedder"),
            (r"^cross_attend_prompt\b", "prompt_cross_attn"),
            (r"^cross_attn_norm\b", "prompt_cross_attn_norm"),
            (r"^semantic_seg_head\b", "semantic_projection"),
            (r"^instance_seg_head\b", "instance_projection"),
            *_LAYER,
        ),
    ),
    (
        "dot_prod_scoring.",
        f"{DETECTOR}dot_product_scoring.",
        (
            (r"^prompt_mlp\.out_norm\b", "text_mlp_out_norm"),
            (r"^prompt_mlp\b", "text_mlp"),
            (r"^prompt_proj\b", "text_proj"),
            (r"^hs_proj\b", "query_proj"),
            _PERCEPTRON,
        ),
    ),
    *(
        (f"tracker.{theirs}", f"{TRACKER}{ours}", rules)
        for theirs, ours, rules in (
            ("maskmem_tpos_enc", "memory_temporal_positional_encoding", ()),
            ("no_mem_embed", "no_memory_embedding", ()),
            ("no_mem_pos_enc", "no_memory_positional_encoding", ()),
            ("no_obj_ptr", "no_object_pointer", ()),
            ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter", ()),
            ("mask_downsample.", "mask_downsample.", ()),
            ("obj_ptr_tpos_proj.", "temporal_positional_encoding_projection_layer.", ()),
            ("obj_ptr_proj.", "object_pointer_proj.", _FEED_FORWARD),
            (
                "transformer.encoder.",
                "memory_attention.",
                ((r"^norm\b", "layer_norm"), _NORMS, _OUT),
            ),
            (
                "maskmem_backbone.",
                "memory_encoder.",
                (
                    (r"^mask_downsampler\.encoder\.12\b", "mask_downsampler.final_conv"),
                    (
                        r"^mask_downsampler\.encoder\.(\d+)\b",
                        lambda m: (
                            f"mask_downsampler.layers.{int(m[1]) // 3}.{('conv', 'layer_norm')[int(m[1]) % 3]}"
                        ),
                    ),
                    (r"^pix_feat_proj\b", "feature_projection"),
                    (r"^out_proj\b", "projection"),
                    (r"^fuser\b", "memory_fuser"),
                    (r"\bgamma\b", "scale"),
                    (r"\bdwconv\b", "depthwise_conv"),
                    (r"\bpwconv(\d)\b", r"pointwise_conv\1"),
                    (r"(layers\.\d+)\.norm\b", r"\1.layer_norm"),
                ),
            ),
            (
                "sam_prompt_encoder.",
                "prompt_encoder.",
                (
                    (r"^pe_layer\.positional_encoding_gaussian_matrix$", "shared_embedding.positional_embedding"),
                    (r"^mask_downscaling\.([036])\b", lambda m: f"mask_embed.conv{int(m[1]) // 3 + 1}"),
                    (r"^mask_downscaling\.([14])\b", lambda m: f"mask_embed.layer_norm{int(m[1]) // 3 + 1}"),
                ),
            ),
            (
                "sam_mask_decoder.",
                "mask_decoder.",
                (
                    _OUT,
                    _NORMS,
                    (r"\bnorm_final_attn\b", "layer_norm_final_attn"),
                    (r"\bmlp\.lin1\b", "mlp.proj_in"),
                    (r"\bmlp\.lin2\b", "mlp.proj_out"),
                    (r"^output_upscaling\.0\b", "upscale_conv1"),
                    (r"^output_upscaling\.1\b", "upscale_layer_norm"),
                    (r"^output_upscaling\.3\b", "upscale_conv2"),
                    (rf"^({_HEADS})\.layers\.0\.", r"\1.proj_in."),
                    (rf"^({_HEADS})\.layers\.2\.", r"\1.proj_out."),
                    (rf"^({_HEADS})\.layers\.1\.", r"\1.layers.0."),
                ),
            ),
        )
    ),
)  # fmt: skip


@dataclass
class Report:
    """What became of a file's tensors.

    Attributes:
        source: the file.
        renamed: how many found their place.
        dropped: name -> why it has no place.
        trimmed: sentences about what was cut to size.
        absent: parts that the file lacks and that keep their random start.
    """

    source: str
    renamed: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    trimmed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        why = Counter(self.dropped.values())
        lines = [f"{self.source}: {self.renamed} tensors placed, none missing, none unexpected"]
        lines += [f"  {count} left out: {reason}" for reason, count in why.items()] + [f"  {t}" for t in self.trimmed]
        return "\n".join(lines + [f"  no {part}: it keeps a random start" for part in self.absent])


def is_official(state: dict[str, Tensor]) -> bool:
    """Whether these are names of EfficientSAM3's or SAM3's own code, and not transformers'."""
    return any(key.removeprefix("detector.").startswith("backbone.") for key in state)


def from_official(
    state: dict[str, Tensor], trunk: list[str], *, family: str | None, context: int, source: str
) -> tuple[dict[str, Tensor], Report]:
    """Tensors under transformers' names.

    Args:
        state: an official file's tensors.
        trunk: names of the backbone's entries in timm, for RepViT, whose blocks are numbered through.
        family: "efficientvit", "repvit" or "tinyvit", or None for SAM3's own tower.
        context: tokens of a phrase in the model; a longer table of positions is cut to its first rows, as the official
            code does, a shorter one is an error.
        source: the file, for messages.

    Returns:
        names to tensors, and what happened.

    Raises:
        ValueError: names that no table knows, or positions for a shorter context; one sentence.
    """
    report, placed, unknown = Report(source), {}, []
    points: dict[int, Tensor] = {}
    student = _trunk_rules(family, trunk)
    dropped = (*DROPPED, TEACHER_TOWER) if family else DROPPED
    for key, value in state.items():
        name = _plain(key)
        if reason := next((why for pattern, why in dropped if re.match(pattern, name)), None):
            report.dropped[key] = reason
        elif point := re.fullmatch(r"tracker\.sam_prompt_encoder\.point_embeddings\.(\d)\.weight", name):
            points[int(point[1])] = value
        elif (ours := _rename(name, student)) is None:
            unknown.append(key)
        else:
            placed |= _pieces(ours, value)
    if unknown:
        few = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(f"{source} holds {len(unknown)} tensors that have no place in this model: {few}.")
    if points:
        placed[f"{TRACKER}prompt_encoder.point_embed.weight"] = torch.cat([points[i] for i in sorted(points)])
    _fit_positions(placed, context, report)
    report.renamed = len(state) - len(report.dropped)
    return placed, report


def _plain(key: str) -> str:
    name = re.sub(r"^(tracker|inst_interactive_predictor)\.model\.", "tracker.", key.removeprefix("detector."))
    return name.replace("student_trunk.", "")


def _rename(name: str, student: tuple) -> str | None:
    for theirs, ours, rules in (*student, *PARTS):
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            for pattern, replacement in rules:
                rest = re.sub(pattern, replacement, rest)
            return ours + rest
    return None


def _pieces(name: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of theirs as ours: fused projections in three, products from the right turned."""
    if fused := re.fullmatch(r"(.*\.)(?:in_proj_|qkv_proj\.)(weight|bias)", name):
        return {f"{fused[1]}{p}_proj.{fused[2]}": part for p, part in zip("qkv", value.chunk(3), strict=True)}
    if name in (f"{DETECTOR}text_encoder.projection.weight", f"{DETECTOR}text_encoder.text_projection.weight"):
        return {name: value.T.contiguous()}
    if name.endswith("embeddings.position_embeddings"):
        return {name: value[:, 1:].contiguous()}  # the first is that of a class token which SAM3 does not have
    if name == f"{TRACKER}prompt_encoder.shared_embedding.positional_embedding":
        return {name: value, f"{TRACKER}shared_image_embedding.positional_embedding": value.clone()}
    return {name: value}


def _fit_positions(placed: dict[str, Tensor], context: int, report: Report) -> None:
    name = f"{DETECTOR}text_encoder.embeddings.position_embedding.position_embedding"
    if name not in placed:
        return
    rows = placed[name].shape[2]
    if rows < context:
        raise ValueError(
            f"{report.source} holds positions for phrases of {rows} tokens, the model asks for {context}; "
            f"load it with context={rows} or less."
        )
    if rows > context:
        placed[name] = placed[name][:, :, :context].contiguous()
        report.trimmed.append(f"positions cut from {rows} to the first {context}, as the official code does")


def _trunk_rules(family: str | None, trunk: list[str]) -> tuple:
    theirs, ours = f"{TRUNK}model.backbone.model.", f"{DETECTOR}vision_encoder.backbone.net."
    if family == "efficientvit":
        rules: tuple = (
            (r"^input_stem\.op_list\.0\b", "stem_in_conv"),
            (r"^input_stem\.op_list\.(\d+)", lambda m: f"stem_res{int(m[1]) - 1}"),
            (r"^stages\.(\d+)\.op_list\b", r"stages_\1.blocks"),
        )
    elif family == "tinyvit":
        rules = (
            (r"^patch_embed\.seq\.([02])\b", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}"),
            (r"^layers\.(\d+)\.blocks\b", r"stages_\1.blocks"),
            (r"^layers\.(\d+)\.downsample\b", lambda m: f"stages_{int(m[1]) + 1}.downsample"),
            (r"\.c\.", ".conv."),
        )
    elif family == "repvit":
        rules = _repvit_rules(trunk)
    else:  # SAM3's own tower
        theirs, ours = TRUNK, f"{DETECTOR}vision_encoder.backbone."
        rules = (
            (r"^pos_embed$", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj\b", "embeddings.patch_embeddings.projection"),
            (r"^ln_pre\b", "layer_norm"),
            (r"^blocks\b", "layers"),
            _NORMS,
            (r"\battn\.qkv\b", "attention.qkv_proj"),
            (r"\battn\.proj\b", "attention.o_proj"),
        )
    return ((theirs, ours, rules),)


def _repvit_rules(trunk: list[str]) -> tuple:
    """Their blocks are numbered through; in timm a stage has a block before its downsampling, then its blocks."""
    blocks = sorted({m[0] for m in (re.match(r"stages_(\d)\.blocks\.(\d+)", key) for key in trunk) if m})
    depth = Counter(name[len("stages_")] for name in blocks)
    homes = ["stem"]
    for stage in sorted(depth):
        if stage != "0":
            homes += [f"stages_{stage}.downsample.pre_block", f"stages_{stage}.downsample"]
        homes += [f"stages_{stage}.blocks.{i}" for i in range(depth[stage])]
    return (
        (r"^features\.0\.([02])\b", lambda m: f"stem.conv{int(m[1]) // 2 + 1}"),
        (r"^features\.(\d+)\.", lambda m: f"{homes[int(m[1])]}." if int(m[1]) < len(homes) else m[0]),
        (r"downsample\.token_mixer\.0\b", "downsample.spatial_downsample"),
        (r"downsample\.token_mixer\.2\b", "downsample.channel_downsample"),
        (r"downsample\.channel_mixer\b", "downsample.ffn"),
        (r"token_mixer\.0\.", "token_mixer."),
        (r"token_mixer\.1\.", "se."),
        (r"\.m\.([02])\b", lambda m: f".conv{int(m[1]) // 2 + 1}"),
    )
