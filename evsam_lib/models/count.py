"""Parameters and multiply-accumulates, part by part, counted without memory on the meta device (Table 1).

Table 1 mixes two conventions, both kept here: parameters are those of the whole model, multiply-accumulates those of
the image encoder alone for one image at its native size. Counted are convolutions, linear layers and matrix products;
norms, activations and resizes are not. Notebook 01 sets the counts against the paper's.
"""

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from evsam_lib.models.prompt_encoder import prompt_tokens
from evsam_lib.models.zoo import ZOO

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def count_model(name: str) -> pd.DataFrame:
    """Costs of one model of the zoo.

    Args:
        name: a key of `ZOO`.

    Returns:
        Indexed by part: the encoder's `stage0`, ... and `neck` (a ViT has neither: one row `blocks`), then
            `image_encoder`
        (their sum and the top norm), `prompt_encoder`, `mask_decoder`, `whole`. Columns: `parameters` (trainable),
        `macs` (one image, one box prompt) and `output` (shape as text).

    Raises:
        ValueError: unknown name.
    """
    if name not in ZOO:
        raise ValueError(f"Unknown model {name!r}; the zoo has {', '.join(ZOO)}.")
    with torch.device("meta"):
        model = ZOO[name].build().eval()
        image = torch.zeros(1, 3, model.image_size, model.image_size)
        coords, labels = prompt_tokens(boxes=torch.zeros(1, 1, 4))
    rows = _encoder_parts(model.image_encoder, image)
    with torch.inference_mode():
        embedding, macs = _counted(model.encode, image)
        rows["image_encoder"] = (_parameters(model.image_encoder), macs, embedding.shape)
        (low_res, _), macs = _counted(model.decode, embedding, coords, labels)
    rows["prompt_encoder"] = (_parameters(model.prompt_encoder), 0, (1, 1, 2, model.embed_dim))
    rows["mask_decoder"] = (_parameters(model.mask_decoder), macs, low_res.shape)
    rows["whole"] = (_parameters(model), rows["image_encoder"][1] + macs, low_res.shape)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["parameters", "macs", "output"])
    table["output"] = [" x ".join(map(str, tuple(shape)[1:])) for shape in table["output"]]
    return table.rename_axis(index="part")


@torch.inference_mode()
def _encoder_parts(encoder: torch.nn.Module, x: torch.Tensor) -> dict[str, tuple]:
    if not hasattr(encoder, "backbone"):
        out, macs = _counted(encoder, x)
        return {"blocks": (_parameters(encoder), macs, out.shape)}
    rows, features = {}, []
    for i, stage in enumerate(encoder.backbone.stages):
        x, macs = _counted(stage, x)
        features.append(x)
        rows[f"stage{i}"] = (_parameters(stage), macs, x.shape)
    out, macs = _counted(encoder.neck, features[:-4:-1])
    return rows | {"neck": (_parameters(encoder.neck), macs, out.shape)}


def _counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        outputs = function(*inputs)
    return outputs, counter.get_total_flops() // 2  # one multiply-accumulate is two operations


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
