"""One file of the mini teacher from the parts that were trained one after the other, small enough to ship.

    python -m evsam_lib.sam3.ship OUT DETECTOR [TRACKER MEMORY ...] [--beside SHIPPED]

The first file is a whole model; each further one holds only what its training changed and lays it over. Of the table of
49,408 token vectors, which would be most of the file, only the rows of words that generated phrases use are kept; the
others are zeros when the file is read, so words that were never learnt all read alike. Numbers are stored in half
precision, large tensors above the trunk as whole numbers of 8 bits with a scale a row. `--beside` leaves out what
another shipped file holds as well.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from evsam_lib.data.concepts import vocabulary
from evsam_lib.models.weights import read_state_dict, sha256
from evsam_lib.sam3.tokens import tokenize

__all__ = ["join", "packed", "unpacked"]

TABLE, ROWS = "token_embedding.weight", "token_embedding.rows"
SCALE, LARGE = ".row_scale", 1 << 14  # numbers of a tensor from which on it is stored in 8 bits
TRUNK = "vision_encoder.backbone."


def join(whole: dict[str, Tensor], parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Lays parts over a whole model.

    Args:
        whole: all names of the model.
        parts: each some names; no two the same.

    Raises:
        ValueError: a name that the model does not have, another shape, or one that two parts hold.
    """
    joined, taken = dict(whole), set()
    for part in parts:
        odd = sorted(set(part) - set(whole)) or [k for k in part if part[k].shape != whole[k].shape]
        if odd:
            raise ValueError(f"{len(odd)} tensors of a part do not fit the model, first {odd[0]}.")
        if both := sorted(taken & set(part)):
            raise ValueError(f"Two parts hold {len(both)} tensors, first {both[0]}; expected each once.")
        joined |= part
        taken |= set(part)
    return joined


def packed(state: dict[str, Tensor], phrases: Sequence[str]) -> dict[str, Tensor]:
    """Small: see the module's text. Random Fourier matrices stay whole, of the tokens the phrases' remain."""
    ids, _ = tokenize(list(phrases), 77)
    rows = ids.unique()
    found = {}
    for key, value in state.items():
        if key.endswith(TABLE):
            found[key], found[key.replace(TABLE, ROWS)] = value[rows].half(), rows.int()
        elif value.is_floating_point() and value.numel() >= LARGE and TRUNK not in key:
            flat = value.float().flatten(1)
            scale = flat.abs().amax(1).clamp(min=1e-12) / 127
            found[key] = (flat / scale[:, None]).round().to(torch.int8).view_as(value)
            found[key + SCALE] = scale
        else:
            exact = not value.is_floating_point() or "positional_embedding" in key
            found[key] = value if exact else value.half()
    return {key: value.contiguous().clone() for key, value in found.items()}


def unpacked(state: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Tensors as the model has them; a file that was not packed stays as it is.

    Args:
        state: of a file.
        length: rows of the table.
    """
    found = {key: value for key, value in state.items() if not key.endswith((ROWS, SCALE))}
    for key, scale in state.items():
        if key.endswith(SCALE):
            whole = state[key.removesuffix(SCALE)].float()
            found[key.removesuffix(SCALE)] = (whole.flatten(1) * scale[:, None]).view_as(whole)
    for key, rows in state.items():
        if key.endswith(ROWS):
            name = key.replace(ROWS, TABLE)
            table = torch.zeros(length, state[name].shape[1])
            table[rows.long()] = state[name].float()
            found[name] = table
    return found


def main() -> None:
    """Joins and packs files; prints size and sha256."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+", help="a whole model, then parts")
    parser.add_argument("--beside", type=Path, help="a packed file: what is equal in it is left out")
    options = parser.parse_args()
    whole, *parts = (read_state_dict(path) for path in options.files)
    partial = options.out.with_name(options.out.name + ".partial")
    made = packed(join(whole, parts), vocabulary())
    known = read_state_dict(options.beside) if options.beside else {}
    save_file({k: v for k, v in made.items() if k not in known or not torch.equal(v, known[k])}, partial)
    partial.replace(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, sha256 {sha256(options.out)}")


if __name__ == "__main__":
    main()
