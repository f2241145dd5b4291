"""How the mini teacher's own memory was made, and the decoder that goes with it: `load_sam3("SAM3", "mini-video")`.

    python -m evsam_lib.sam3.teach_memory --start TEACHER --out OUT --clips 100 --steps 300 --frames 4 --decoder 1
    python -m evsam_lib.sam3.teach_memory --start TEACHER --memory OUT/memory.safetensors --out MORE \\
        --clips 160 --steps 420 --frames 5 --decoder 1
    python -m evsam_lib.sam3.ship sam3-mini-video.safetensors TEACHER MORE/memory.safetensors

SAM3's full memory learns from nothing but the true masks of generated clips. Trunk and neck are frozen and run once,
before. The memory's start is kinder than transformers' (`start_memory`), and the first half of the steps leads over
from a loss that does not drown objects in background. TEACHER is the teacher before its clicks are trained: on a
tracker that has learned clicks alone, memories of all objects stayed alike for as long as was tried (its neck's maps
had grown a hundred times beyond what a mask adds to them), so clicks and clips have a tracker each, on one trunk.
`memory.safetensors` holds what was trained, `report.json` says how well it follows clips that it never saw.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from evsam_lib.data.clips import clip
from evsam_lib.evaluate.video import mean_jf
from evsam_lib.models.weights import read_state_dict
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.stage2 import DECODER, MEMORY, ClipSet, MemoryStage, memory_weights, train_memory, video_scores

__all__ = ["main", "start_memory"]

SEED = 2028
NEARNESS = 1.5  # of biases: places 3 cells apart then weigh about a tenth
HELD_OUT = 10_000_000  # number of the first clip that training never sees


def main() -> None:
    """Trains, measures on held-out clips, and writes the memory's weights and a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="the teacher so far, with a trained trunk")
    parser.add_argument("--out", type=Path, required=True, help="folder of logs, checkpoints, weights and report.json")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4, help="clips a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--frames", type=int, default=5, help="of a clip, the first one with its mask")
    parser.add_argument("--memory", type=Path, help="go on from this memory.safetensors")
    parser.add_argument("--decoder", type=int, default=0, help="1: the mask decoder learns too, and is written too")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = load_sam3("SAM3", options.start, scale="mini")
    if options.memory is None:
        start_memory(model)
    elif odd := model.load_state_dict(read_state_dict(options.memory), strict=False).unexpected_keys:
        raise ValueError(f"{options.memory} holds {len(odd)} tensors that are none of this model, first {odd[0]}.")
    side = model.config.image_size
    clips = ClipSet(model, [clip(SEED, i, size=(side, side)) for i in range(options.clips)])
    settings = MemoryStage(
        steps=options.steps, batch_size=options.batch, lr=options.lr, frames=options.frames, seed=SEED, keep=1,
        warmup_steps=20, clip_norm=1.0, weight_decay=0.02, checkpoint_every=100, decoder=options.decoder,
        even=0.5 if options.memory is None else 0.0,
    )  # fmt: skip
    log = train_memory(model, clips, settings, out=options.out / "memory", resume=options.resume)
    held_out = [clip(SEED, HELD_OUT + i, size=(side, side)) for i in range(24)]
    report = {name: str(value) for name, value in vars(options).items() if name != "out"}
    report |= {"seed": SEED, "loss": float(log.loss.tail(50).mean()), **mean_jf(video_scores(model, held_out))}
    state = memory_weights(model)
    if options.decoder:
        state |= {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith(DECODER)}
    save_file(state, options.out / "memory.safetensors")
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


@torch.no_grad()
def start_memory(model) -> None:
    """A random start for everything of `MEMORY`, by torch's own rules, layer by layer; codes of time start at 0.

    transformers draws weights so small that for long nothing is told apart. And attention to memories begins by looking
    at the same place in earlier frames: equal biases of queries and keys, which the rotary code turns by their places,
    have their largest product where the places agree.
    """
    for name, module in model.named_modules():
        if name.startswith(MEMORY) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tracker = model.tracker_model
    for layer in tracker.memory_encoder.memory_fuser.layers:
        nn.init.constant_(layer.scale, 0.1)  # instead of 0, which hides what mask and picture say together
    for layer in tracker.memory_attention.layers:
        for projection in (layer.cross_attn_image.q_proj, layer.cross_attn_image.k_proj):
            nn.init.constant_(projection.bias, NEARNESS)


if __name__ == "__main__":
    main()
