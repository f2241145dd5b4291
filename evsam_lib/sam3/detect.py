"""The detector with many phrases on few images: what stage 3 trains on, and what scores a phrase.

transformers' `Sam3Model.forward` takes one phrase an image and keeps the last layer's answer. Here trunk and neck run
once an image, the rest once a phrase, every layer of the decoder answers, and masks are decoded only where asked for.
Same modules, same numbers (a test holds them equal). Notebook 19 uses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evsam_lib.sam3.tokens import tokenize

__all__ = ["Found", "detect", "encode_coarsely", "mixed", "phrase_features"]


@dataclass
class Found:
    """Answers of the detector to P phrases, from each of the L layers of its decoder; Q queries.

    Attributes:
        logits: (L, P, Q), how well a query fits its phrase.
        boxes: (L, P, Q, 4), centre, width and height, parts of the image.
        presence: (L, P) logits: the phrase names something in the image.
        masks: (R, Q, 4h, 4w) logits of the last layer, for the phrases in `masked`.
        together: (R, 1, 4h, 4w) logits of everything the phrase names, which SAM3's training has and its answers lack.
        masked: (R,) which phrases those are.
        cells: (P, h * w, C) the encoder's view of the image.
    """

    logits: Tensor
    boxes: Tensor
    presence: Tensor
    masks: Tensor
    together: Tensor
    masked: Tensor
    cells: Tensor


def encode_coarsely(model, frames: Tensor):
    """What `detector_model.vision_encoder(frames)` gives, without the neck's finer levels, which only masks need.

    Args:
        model: of `load_sam3`.
        frames: (B, 3, S, S) float, of `processor.pixels`.
    """
    from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

    encoder = model.detector_model.vision_encoder
    tokens = encoder.backbone(frames).last_hidden_state  # (B, T, C)
    side = frames.shape[-1] // encoder.config.backbone_config.patch_size
    coarse = encoder.neck.fpn_layers[encoder.config.scale_factors.index(1.0)]
    level = coarse(tokens.transpose(1, 2).unflatten(2, (side, side)))
    code = encoder.neck.position_encoding(level.shape, level.device, level.dtype)
    # The last level of all is left out by the detector: any stands in for it.
    return Sam3VisionEncoderOutput(
        last_hidden_state=tokens, fpn_hidden_states=(level, level), fpn_position_encoding=(code, code)
    )


def phrase_features(model, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Features of phrases, each computed once; filling is cut off behind the longest.

    Args:
        model: of `load_sam3`.
        phrases: P noun phrases; repeated ones share.

    Returns:
        (P, T, C) features and (P, T) bool, what is not filling.

    Raises:
        ValueError: a phrase that is empty or too long for the model.
    """
    detector, study = model.detector_model, model.config.study
    unique = list(dict.fromkeys(phrases))
    ids, mask = tokenize(unique, detector.config.text_config.max_position_embeddings)
    ids, mask = ids.to(model.device), mask.to(model.device)
    # The students see the filling, as in the code they were trained by; the detector does not.
    seen = detector.get_text_features(ids, attention_mask=mask if study["text"] == "SAM3" else None).pooler_output
    length = int(mask.sum(1).max())
    order = torch.tensor([unique.index(phrase) for phrase in phrases], device=model.device)
    return seen[:, :length][order], mask[:, :length].bool()[order]


def detect(
    model, vision, image_of: Tensor, text: Tensor, mask: Tensor, *, masked: Tensor | None = None, examples=None
) -> Found:
    """Runs phrases on encoded images.

    Args:
        model: of `load_sam3`.
        vision: `detector_model.vision_encoder(pixels)` of B images.
        image_of: (P,) int64, the image each phrase is asked on.
        text: (P, T, C), of `phrase_features`.
        mask: (P, T) bool, likewise.
        masked: (R,) int64, the phrases that get masks; None for all.
        examples: (P, 4) centre, width and height of one example box a phrase, parts of the image; None for none.

    Returns:
        Answers of all layers.
    """
    detector, maps = model.detector_model, vision.fpn_hidden_states[:-1]
    encoded, text, mask = mixed(model, vision, image_of, text, mask, examples=examples)
    decoded = detector.detr_decoder(
        vision_features=encoded.last_hidden_state,
        text_features=encoded.text_features,
        vision_pos_encoding=encoded.pos_embeds_flattened,
        text_mask=mask,
        spatial_shapes=encoded.spatial_shapes,
    )
    queries = decoded.intermediate_hidden_states  # (L, P, Q, C)
    before = decoded.reference_boxes.float().clamp(1e-3, 1 - 1e-3).logit()
    logits = detector.dot_product_scoring(queries, encoded.text_features, text_mask=mask).squeeze(-1)
    masked = torch.arange(len(text), device=text.device) if masked is None else masked
    masks, together = _masks(detector, maps, image_of, queries[-1], encoded.last_hidden_state, text, mask, masked)
    return Found(
        logits=logits,
        boxes=(before + detector.detr_decoder.box_head(queries)).sigmoid(),
        presence=decoded.presence_logits.squeeze(-1),
        masks=masks,
        together=together,
        masked=masked,
        cells=encoded.last_hidden_state,
    )


def mixed(model, vision, image_of: Tensor, text: Tensor, mask: Tensor, *, examples: Tensor | None = None) -> tuple:
    """Images and phrases mixed by the detector's encoder: its output, and features and mask of text and examples.

    Arguments are those of `detect`.
    """
    detector = model.detector_model
    maps, codes = vision.fpn_hidden_states[:-1], vision.fpn_position_encoding[:-1]
    coarse, code = maps[-1][image_of], codes[-1].expand(len(maps[-1]), -1, -1, -1)[image_of]
    if "geometry" not in model.report.absent:
        shown = _geometry(detector, maps, codes, image_of, examples)
        text, mask = torch.cat([text, shown[0]], 1), torch.cat([mask, shown[1]], 1)
    return detector.detr_encoder([coarse], text, [code], text_mask=mask), text, mask


def _geometry(detector, maps, codes, image_of: Tensor, examples: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of example boxes and their mask. Without a box there is one token, the same for an image's phrases."""
    if examples is None:
        boxes, labels = torch.zeros(len(maps[-1]), 1, 4, device=image_of.device), torch.zeros(1, device=image_of.device)
        valid = torch.zeros(len(boxes), 1, dtype=torch.bool, device=image_of.device)
        images = torch.arange(len(boxes), device=image_of.device)
    else:
        boxes, labels, images = examples[:, None], torch.ones(1, device=image_of.device), image_of
        valid = torch.ones(len(boxes), 1, dtype=torch.bool, device=image_of.device)
    kind = detector.dtype
    with torch.autocast(image_of.device.type, enabled=False):  # torchvision pools boxes in float32 only
        shown = detector.geometry_encoder(
            box_embeddings=boxes.to(kind),
            box_mask=valid,
            box_labels=labels.long().expand(len(boxes), 1),
            img_feats=[x[images].to(kind) for x in maps[-1:]],
            img_pos_embeds=[x.expand(len(maps[-1]), -1, -1, -1)[images].to(kind) for x in codes[-1:]],
        )
    tokens, seen = shown.last_hidden_state, shown.attention_mask.bool()
    return (tokens, seen) if examples is not None else (tokens[image_of, :1], seen[image_of, :1])


def _masks(detector, maps, image_of, queries, cells, text, mask, masked) -> tuple[Tensor, Tensor]:
    if not len(masked):
        side = maps[0].shape[-2:]
        return queries.new_zeros(0, queries.shape[1], *side), queries.new_zeros(0, 1, *side)
    made = detector.mask_decoder(
        decoder_queries=queries[masked],
        backbone_features=[x[image_of[masked]] for x in maps],
        encoder_hidden_states=cells[masked],
        prompt_features=text[masked],
        prompt_mask=mask[masked],
    )
    return made.pred_masks, made.semantic_seg
