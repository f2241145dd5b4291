"""Phrases to token ids: CLIP's byte pairs, which open_clip ships, so nothing is downloaded.

Ids begin with 49406, end with 49407 and are filled up with zeros, as SAM3's and EfficientSAM3's code has them. The
tokenizer of transformers fills up with 49407 and always to 32; the first and the last layer of ES-MC-S are convolutions
along the phrase and see the filling, so the choice matters.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["tokenize"]


def tokenize(phrases: list[str], context: int) -> tuple[Tensor, Tensor]:
    """Token ids of phrases.

    Args:
        phrases: noun phrases, such as "red striped disc".
        context: tokens a phrase has room for, begin and end among them.

    Returns:
        ids (B, context) int64, and (B, context) int64 mask: 1 for a token, 0 for filling.

    Raises:
        ValueError: an empty phrase, or one that needs more tokens than there is room for.
    """
    tokenizer, ids = _tokenizer(), torch.zeros(len(phrases), context, dtype=torch.long)
    for row, phrase in zip(ids, phrases, strict=True):
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"A phrase must name something, such as 'red disc'; got {phrase!r}.")
        codes = [tokenizer.sot_token_id, *tokenizer.encode(phrase), tokenizer.eot_token_id]
        if len(codes) > context:
            raise ValueError(f"{phrase!r} takes {len(codes)} tokens, this model has room for {context}; shorten it.")
        row[: len(codes)] = torch.tensor(codes)
    return ids, (ids != 0).long()


@cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
