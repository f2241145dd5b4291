"""A whole training from flat parameters: in this process, or on as many as torchrun starts.

    python -m evsam_lib.training distill --model efficientvit-sam-l0 --init random --teacher sam-vit-h ...
    torchrun --nproc_per_node 8 -m evsam_lib.training end-to-end --model efficientvit-sam-l0 --init FILE ...
    start("end-to-end", {"model": "efficientvit-sam-l0", "init": "...", ...}, out=folder)

The three are the same; the last is what notebooks and ablations call. Paper: Sec. 3.2; notebooks 04 and 05.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from evsam_lib.models import weights as weight_files
from evsam_lib.models import zoo
from evsam_lib.models.sam import Sam
from evsam_lib.study.provenance import provenance
from evsam_lib.training import checkpoint, distill, end_to_end
from evsam_lib.training.held_out import HeldOut
from evsam_lib.training.loop import read_log
from evsam_lib.training.ranks import Ranks, process_group
from evsam_lib.training.settings import Distillation, EndToEnd, checked, option, unknown
from evsam_lib.training.sources import open_data

__all__ = ["PHASES", "main", "start"]

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class Job:
    """Model, data and machine of a training; `EndToEnd` or `Distillation` says how it learns."""

    model: str = option(REQUIRED, "name in the zoo of the model that learns")
    init: str = option(REQUIRED, "its start: a weight file, 'mini', 'official' or 'random'")
    data: str = option(REQUIRED, "SA-1B folder, tar, folder of tars or of chunks; or pictures, with --annotations")
    annotations: str = option("", "JSON in COCO's form, of the pictures in --data")
    split: str = option("train", "of SA-1B: the first 99 %% or all", ("train", "all"))
    images: int = option(0, "only the first so many; 0: all")
    on_error: str = option("skip", "what to do about an image that cannot be read", ("skip", "raise"))
    held_out: str = option("", "held-out images, as --data; left out, the last 1 %% of SA-1B")
    held_out_annotations: str = option("", "JSON in COCO's form, of the pictures in --held-out")
    held_out_images: int = option(8, "how many of them are measured on")
    device: str = option("auto", "cpu, cuda or auto")
    threads: int = option(0, "CPU threads of each process; 0: torch's choice")


@dataclass(frozen=True, kw_only=True)
class DistillJob(Job):
    """The same, with a teacher."""

    teacher: str = option(REQUIRED, "name in the zoo of the model that is imitated")
    teacher_weights: str = option(REQUIRED, "a weight file, 'mini' or 'official'")
    cache_folder: str = option("", "where embeddings are kept; left out, in the run's folder")


PHASES = {"distill": (DistillJob, Distillation), "end-to-end": (Job, EndToEnd)}


def start(
    phase: str,
    parameters: Mapping[str, Any],
    *,
    out: str | Path,
    processes: int = 0,
    resume: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> pd.DataFrame:
    """Runs a training and returns its log.

    Args:
        phase: "distill" or "end-to-end".
        parameters: fields of `DistillJob` and `Distillation`, or of `Job` and `EndToEnd`, by name.
        out: folder of logs, checkpoints, weights.safetensors (and ema.safetensors) and run.json.
        processes: torchrun starts so many on this machine; 0 trains here.
        resume: go on from the last checkpoint in `out`.
        progress: wraps the step iterator when it trains here, for example `tqdm`.

    Returns:
        The log, see `loop.read_log`.

    Raises:
        ValueError: unknown phase or parameter, values that cannot be, or see `loop.fit`.
        FileNotFoundError: no such data or weights.
        FloatingPointError, OSError: see `loop.fit`.
        RuntimeError: a process that torchrun started failed; the message ends with what it said.
    """
    job, settings = _split(phase, parameters)
    if processes:
        return _launch(phase, parameters, Path(out), processes, resume)
    ranks = Ranks.of_torchrun()
    if job.threads:
        torch.set_num_threads(job.threads)
    device = ranks.device(job.device)
    with process_group(ranks, device):
        return _train(_Task(phase, dict(parameters), job, settings, Path(out), resume, progress), ranks, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 stopped, 2 a wrong request."""
    options = vars(_parser().parse_args(arguments))
    phase, out, resume = options.pop("phase"), options.pop("out"), options.pop("resume")
    ranks = Ranks.of_torchrun()
    try:
        log = start(phase, options, out=out, resume=resume, progress=_progress)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if ranks.first or not (getattr(error, "heard", False) or isinstance(error, FloatingPointError)):
            print(f"evsam_lib.training: {error}", file=sys.stderr)
        return 1
    if ranks.first:
        print(f"{len(log)} steps, loss {log.loss.iloc[-1]:.4g}, {log.images_per_s.median():.1f} images/s: {out}")
    return 0


def _split(phase: str, parameters: Mapping[str, Any]) -> tuple[Any, Any]:
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: expected one of {', '.join(PHASES)}")
    kinds = PHASES[phase]
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    for name in parameters:
        if not any(name in known for known in names):
            raise ValueError(unknown(name, sorted(names[0] | names[1])))
    parts = [{n: v for n, v in parameters.items() if n in known} for known in names]
    return tuple(checked(kind, part) for kind, part in zip(kinds, parts, strict=True))


@dataclass(frozen=True)
class _Task:
    """What `start` was asked for, checked."""

    phase: str
    parameters: dict[str, Any]
    job: Any
    settings: Any
    out: Path
    resume: bool
    progress: Callable[[Iterable], Iterable] | None


def _train(task: _Task, ranks: Ranks, device: torch.device) -> pd.DataFrame:
    job, settings, out = task.job, task.settings, task.out
    began = datetime.now(UTC)
    files = [zoo.weights_path(job.model, None if job.init == "random" else job.init)]
    if task.phase == "distill":
        files.append(zoo.weights_path(job.teacher, job.teacher_weights))
    options = {"annotations": job.annotations, "split": job.split, "images": job.images, "on_error": job.on_error}
    data = open_data(job.data, log=out / "skipped.txt", **options)
    model = _model(job.model, job.init, settings.seed, device)
    inputs = [{"path": str(path), "sha256": weight_files.sha256(path)} for path in files if path is not None]
    more: dict[str, Any] = {"out": out, "resume": task.resume, "progress": task.progress}
    more["record"] = {"data": job.data, "annotations": job.annotations, "split": job.split, "init": job.init}
    if task.phase == "distill":
        teacher = zoo.load_model(job.teacher, job.teacher_weights, device=device)
        distill.adopt_decoder(model, teacher)
        more |= {"cache": job.cache_folder or None, "held_out": _held_out(job, settings, data, model, teacher)}
        more["record"]["teacher_weights"] = job.teacher_weights
        log = distill.distill(model, teacher, data, settings, **more)
    else:
        log = end_to_end.train(model, data, settings, held_out=_held_out(job, settings, data, model, None), **more)
    if ranks.first:
        if settings.ema:
            last = checkpoint.checkpoints(out)[-1] / "ema.safetensors"
            (out / "ema.safetensors").write_bytes(last.read_bytes())
        weight_files.save_weights(model, out / "weights.safetensors")
        skipped = len(data.skipped.read()) if hasattr(data, "skipped") else 0
        found = {"processes": ranks.world, "images": len(data), "skipped": skipped}
        _note(task, found, began=began, device=device, inputs=inputs)
    return log


def _model(name: str, init: str, seed: int, device: torch.device) -> Sam:
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return zoo.load_model(name, device=device)
    return zoo.load_model(name, init, device=device)


def _held_out(job: Any, settings: Any, data: Any, model: Sam, teacher: Sam | None) -> HeldOut | None:
    if not settings.held_out_every:
        return None
    if not job.held_out and (job.annotations or hasattr(data, "loader")):
        raise ValueError("held_out_every without held_out: expected images to measure on; only SA-1B has its last 1 %")
    split = "all" if job.held_out else "val"
    others = open_data(job.held_out or job.data, annotations=job.held_out_annotations or None, split=split)
    return HeldOut(model, others, images=job.held_out_images, teacher=teacher)


def _note(task: _Task, found: dict, *, began: datetime, device: torch.device, inputs: list[dict]) -> None:
    """run.json: where the run came from; a resumed one adds to what is there."""
    note = provenance(
        notebook=f"evsam_lib.training {task.phase}", run_id=f"{began:%Y%m%dT%H%M%S}", started=began,
        parameters=task.parameters | {"seed": task.settings.seed}, device=str(device), inputs=inputs,
    )  # fmt: skip
    file = task.out / "run.json"
    before = json.loads(file.read_text()) if task.resume and file.is_file() else []
    file.write_text(json.dumps([*before, note | found], indent=1, default=str) + "\n")


def _launch(phase: str, parameters: Mapping[str, Any], out: Path, processes: int, resume: bool) -> pd.DataFrame:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items() if value is not None]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "evsam_lib.training", phase, f"--out={out}", *flags, *(["--resume"] if resume else [])]
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("evsam_lib.training: ")]
        raise RuntimeError(f"the training on {processes} processes failed: {said[0] if said else done.stderr[-2000:]}")
    return read_log(out)


def _progress(steps: Iterable) -> Iterable:
    """A bar where somebody looks, else a line a minute."""
    return tqdm(steps, mininterval=0.5 if sys.stderr.isatty() else 60, unit="step")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"evsam_lib.training: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m evsam_lib.training", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="phase", metavar="|".join(PHASES))
    for phase, kinds in PHASES.items():
        text = {"distill": "phase 1: imitate a teacher's embedding", "end-to-end": "phase 2: masks from prompts"}
        command = commands.add_parser(phase, help=text[phase], description=text[phase])
        command.add_argument("--out", required=True, help="folder of the run, seen by all machines")
        command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
        for field in (field for kind in kinds for field in dataclasses.fields(kind)):
            _add(command, field)
    return parser


def _add(command: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    kind = next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))
    options: dict[str, Any] = {"type": kind, "choices": field.metadata["choices"], "help": field.metadata["help"]}
    if field.default is REQUIRED:
        options |= {"required": True}
    else:
        options |= {"default": field.default}
    command.add_argument(f"--{field.name.replace('_', '-')}", **options)
