"""Parameters and multiply-accumulates, part by part, counted without memory on the meta device (Table 1).

Two counts of work stand side by side. `macs` are those of convolutions, linear layers and all matrix products, the
usual convention. `table1_macs` follow the tool the authors used, the only rules that give all nine numbers of Table 1:
products written as einsum (SAM's relative positions) are left out, every norm with weights counts one per element, and
so does every elementwise product, the scaling of attention among them. Table 1 prints whole models' parameters, but the
image encoder's MACs, for one image at the model's native size. Notebook 01 sets the counts against the paper's.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from evsam_lib.models.zoo import ZOO

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
PRODUCTS = ("convolution", "linear", "matmul", "einsum")
TABLE_1 = ("convolution", "linear", "matmul", "norm", "mul")

# Parts of an image encoder, by the names of its modules in order of the forward pass; the first that fits counts.
ENCODER_PARTS = (
    (r"((backbone|vit)\.)?(stages|layers)\.(\d+)", r"stage\4"),
    (r"(vit\.)?(patch_embed|stem)", "stem"),
    (r"(vit\.)?blocks", "blocks"),
    (r"fuse_stage\d|(vit\.)?neck", "neck"),
    (r"norm", "norm"),
)

# Where the published code scales n x n attention scores instead of the queries; a product per element either way.
SCALES_SCORES = ("mobile-sam", "efficient-sam-ti", "efficient-sam-s")


def count_model(name: str) -> pd.DataFrame:
    """Costs of one model of the zoo.

    Args:
        name: a key of `ZOO`.

    Returns:
        Indexed by part: those of the encoder (`stem` or `stage0`, ..., `neck`, as the architecture has them), then
        `image_encoder` (all of it), `prompt_encoder`, `mask_decoder` (one box prompt), `whole`. Columns: `parameters`
        (trainable), `macs`, `table1_macs`, `output` (shape as text), then the kinds of operation they are made of:
        `convolution`, `linear`, `matmul`, `einsum`, `norm`, `mul`.

    Raises:
        ValueError: unknown name.
    """
    if name not in ZOO:
        raise ValueError(f"Unknown model {name!r}; the zoo has {', '.join(ZOO)}.")
    with torch.device("meta"):
        model = ZOO[name].build().eval()
        image = torch.zeros(1, 3, model.image_size, model.image_size)
        coords, labels = model.prompt_encoder.tokens(boxes=torch.zeros(1, 1, 4))
    ledger = Ledger(scales_scores=name in SCALES_SCORES)
    with torch.no_grad(), ledger.watching(model):
        model(image, coords, labels)
    table = ledger.table()
    table["parameters"] = _parameters(model)
    encoder = [part for part in table.index if part not in PARTS]
    table.loc["image_encoder"] = table.reindex([*encoder, "image_encoder"]).sum()  # what is in no part of it included
    table.loc["whole"] = table.reindex(PARTS).sum()
    table = table.fillna(0).astype("int64")
    table["macs"] = table[list(PRODUCTS)].sum(axis=1)
    table["table1_macs"] = table[list(TABLE_1)].sum(axis=1)
    table["output"] = [ledger.shapes.get(part, "") for part in table.index]
    table.loc["whole", "output"] = ledger.shapes["mask_decoder"]
    order = ["parameters", "macs", "table1_macs", "output", *PRODUCTS, "norm", "mul"]
    return table.loc[[*encoder, *PARTS, "whole"], order].rename_axis(index="part")


class Ledger(TorchDispatchMode):
    """Counts what runs while it is watching, by part of the model and kind of operation."""

    def __init__(self, *, scales_scores: bool = False):
        super().__init__()
        self.scales_scores = scales_scores
        self.open: list[str] = []  # parts whose modules are running, innermost last
        self.counts: dict[str, dict[str, int]] = {}
        self.shapes: dict[str, str] = {}
        self.kind: str | None = None  # of what runs inside a call that was counted by its name

    @contextmanager
    def watching(self, model: nn.Module, part_of: Callable[[str], str | None] | None = None):
        """Within it, what `model` computes is counted; `part_of` names the part of a module, those of `Sam` if None."""
        part_of = part_of or _part_of
        handles = []
        for name, module in model.named_modules():
            if part := part_of(name):
                self.counts.setdefault(part, {})
                handles.append(module.register_forward_pre_hook(lambda *_, part=part: self.open.append(part)))
                handles.append(module.register_forward_hook(self._close))
        try:
            with self, _Calls(self):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def add(self, kind: str, count: int) -> None:
        """Counts `count` operations of a kind for the part that is running."""
        if self.open:
            row = self.counts[self.open[-1]]
            row[kind] = row.get(kind, 0) + count

    def table(self) -> pd.DataFrame:
        """Parts by kinds."""
        return pd.DataFrame.from_dict(self.counts, orient="index", columns=[*PRODUCTS, "norm", "mul"])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        rule = RULES.get(func.overloadpacket)
        if rule and self.kind != "counted":
            kind, count = rule(args, out)
            self.add("einsum" if self.kind == "einsum" and kind in PRODUCTS else kind, count)
        return out

    def _close(self, module, inputs, output) -> None:
        part = self.open.pop()
        last = output[0] if isinstance(output, tuple | list) else output
        if isinstance(last, torch.Tensor):
            self.shapes[part] = " x ".join(str(n) for n in last.shape[1:])


class _Calls(TorchFunctionMode):
    """Sees calls by the names they have in the code: einsum, which one count leaves out, and fused attention."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.ledger.kind
        if func is torch.einsum:
            self.ledger.kind = "einsum"
        elif func is F.scaled_dot_product_attention:
            self._attention(*args[:3])
            self.ledger.kind = "counted"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.ledger.kind = before

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        scores = q.shape[:-1].numel() * k.shape[-2]
        self.ledger.add("matmul", scores * (q.shape[-1] + v.shape[-1]))
        self.ledger.add("mul", scores if self.ledger.scales_scores else q.numel())


def _part_of(name: str) -> str | None:
    part, _, inside = name.partition(".")
    if part == "image_encoder":
        for pattern, label in ENCODER_PARTS:
            if found := re.match(pattern, inside):
                return found.expand(label)
    return part if part in PARTS else None


def _parameters(model: nn.Module) -> pd.Series:
    found: dict[str, int] = dict.fromkeys(filter(None, (_part_of(name) for name, _ in model.named_modules())), 0)
    for name, parameter in model.named_parameters():
        found[_part_of(name) or name] += parameter.numel()
    return pd.Series(found)


def _product(args, out) -> int:
    return out.numel() * args[0].shape[-1]


aten = torch.ops.aten
RULES = {
    aten.convolution: lambda args, out: ("convolution", _convolution(args, out)),
    aten.addmm: lambda args, out: ("linear", _product(args[1:], out)),
    aten.mm: lambda args, out: ("linear", _product(args, out)),
    aten.bmm: lambda args, out: ("matmul", _product(args, out)),
    aten.baddbmm: lambda args, out: ("matmul", _product(args[1:], out)),
    aten.native_layer_norm: lambda args, out: ("norm", out[0].numel()),
    aten.native_group_norm: lambda args, out: ("norm", out[0].numel()),
    aten.native_batch_norm: lambda args, out: ("norm", out[0].numel()),
    aten.mul: lambda args, out: ("mul", out.numel()),
}


def _convolution(args, out) -> int:
    """Weight (out, in / groups, ...), or (in, out / groups, ...) where transposed: products per output or input."""
    x, weight, transposed = args[0], args[1], args[6]
    return weight[0].numel() * (x.numel() // x.shape[1] * weight.shape[0] if transposed else out.numel())
