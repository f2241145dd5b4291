"""Seconds of every part of SAM3, LiteText and the students, where the ledger of `sam3.count` has MACs.

    python -m evsam_lib.sam3.bench --models ES-EV-S,SAM3 --image-size 1008 --out results/cpu-NAME/sam3 --resume
    python -m evsam_lib.sam3.bench --table results/cpu-NAME/sam3     # the table again, from the samples kept there

A pass is what a user does by `Sam3Processor`: an image, then a phrase, then a box. Inside each of the three steps the
parts are timed as their modules are entered and left, so that parts and step belong to the same seconds; `rest` is
what lies between them, such as resizing the photograph. On a CPU the processor's own seconds are taken as well: with
one thread (`--threads 1`) they are what a quiet machine would take, even if this one is not quiet. Weights are random,
which changes no time: the masks of a phrase are not cut out here. One file of samples a row (model, text, size),
written when it is done; with `--resume` a row that is there is not timed again. Notebook 16 shows the table.
"""

import argparse
import gc
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from evsam_lib import bench
from evsam_lib.bench import rounded, surroundings
from evsam_lib.data.generate import scene
from evsam_lib.sam3.count import PARTS, count_sam3, part_of
from evsam_lib.sam3.load import load_sam3
from evsam_lib.sam3.processor import Sam3Processor
from evsam_lib.sam3.trunk import StudentTrunk
from evsam_lib.sam3.zoo import MODELS, checked_text
from evsam_lib.study.paths import write_text
from evsam_lib.study.provenance import provenance
from evsam_lib.study.tables import pipes
from evsam_lib.timing import gemm_ceiling

__all__ = ["STEPS", "Options", "bench_sam3", "main", "read", "table", "write_table"]

STEPS = ("image", "phrase", "box")  # of a pass; the first box of an image pays the tracker's neck as well
CLOCKS, SAMPLES = ("s", "cpu_s"), ("samples_s", "cpu_samples_s")  # of the wall's clock, of the processor's
PHRASE, PHOTOGRAPH = "red striped disc", (640, 480)  # COCO's usual size, (H, W)


@dataclass(frozen=True)
class Options:
    """How a row is timed.

    Attributes:
        text: the text encoder, as in `load_sam3`; None is each model's own.
        context: tokens of a phrase, as in `load_sam3`.
        image_size: side of the model's input, pixels.
        scale: "full", or "mini" for a trial.
        device: "cpu" or "cuda".
        warm_up: passes before the first that counts.
        passes: that count.
        seed: of the photograph and the random weights.
    """

    text: str | None = None
    context: int | None = None
    image_size: int = 1008
    scale: str = "full"
    device: str = "cpu"
    warm_up: int = 1
    passes: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.passes < 1 or self.warm_up < 0:
            raise ValueError(f"passes must be 1 or more and warm-up 0 or more, got {self.passes} and {self.warm_up}.")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"Device {self.device!r} needs a CUDA GPU, and torch {torch.__version__} sees none here.")


def bench_sam3(name: str, options: Options, *, say: Callable[[str], object] = lambda line: None) -> dict:
    """Times one model, part by part.

    Args:
        name: one of `evsam_lib.sam3.zoo.MODELS`.
        options: see there.
        say: takes lines of progress.

    Returns:
        conditions (machine, versions, ceilings before and after, parameters and MACs of the parts); passes: seconds and
        CPU seconds of each, warm-up first; runs: an entry for each step and part, its samples in seconds, one a pass.

    Raises:
        ValueError: an unknown model or text, or a size that the model cannot take.
    """
    started = datetime.now(UTC)
    shape = {"text": options.text, "context": options.context, "image_size": options.image_size}
    ledger = count_sam3(name, **shape, scale=options.scale)
    torch.manual_seed(options.seed)
    model = load_sam3(name, **shape, scale=options.scale, device=options.device)
    alone = options.device == "cpu" and torch.get_num_threads() == 1  # then the processor's seconds count
    ceilings = [gemm_ceiling(options.device, torch.float32, cpu_time=alone)]
    image = scene(options.seed, 0, size=PHOTOGRAPH).image
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    passes = []
    with _watching(model, gpu=options.device != "cpu") as watch:
        for number in range(options.warm_up + options.passes):
            seconds = _pass(model, image, watch)
            both = np.sum(list(seconds.values()), axis=0).tolist()
            passes.append(dict(zip(CLOCKS, both, strict=True)))
            say(f"{name} {options.image_size} px, pass {number + 1}: {both[0]:.2f} s, of the processor {both[1]:.2f}")
            if number >= options.warm_up:
                for key, value in seconds.items():
                    found.setdefault(key, []).append(value)
    ceilings.append(gemm_ceiling(options.device, torch.float32, cpu_time=alone))
    conditions = _conditions(name, options, ceilings, ledger, Sam3Processor(model).context, started)
    runs = [
        {"step": step, "part": part, **dict(zip(SAMPLES, map(list, zip(*both, strict=True)), strict=True))}
        for (step, part), both in found.items()
    ]
    return {"conditions": conditions, "passes": passes, "runs": runs}


def _pass(model: nn.Module, image: np.ndarray, watch: "_Watch") -> dict[tuple[str, str], tuple[float, float]]:
    """Image, phrase, box; seconds by step and part, by both clocks. `Sam3Processor` is new: it knows no phrase yet."""
    processor, (height, width) = Sam3Processor(model), image.shape[:2]
    with watch.step("image"):
        state = processor.set_image(image)
    with watch.step("phrase"):
        state.phrase = PHRASE
        processor.outputs(state)
    with watch.step("box"):
        processor.predict(state, box=np.array([0, 0, width // 2, height // 2]), multimask_output=False)
    return watch.seconds()


# ---------------------------------------------------------------- the clock


class _Watch:
    """Marks in time, nested as the modules are: what a mark holds is its own time, without that of marks inside."""

    def __init__(self, *, gpu: bool):
        self.gpu, self.marks, self.open = gpu, [], []

    def enter(self, part: str) -> None:
        self.open.append(len(self.marks))
        self.marks.append([part, self.open[-2] if len(self.open) > 1 else None, self._now(), None])

    def leave(self) -> None:
        self.marks[self.open.pop()][3] = self._now()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    def seconds(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Own time of every part in every step since the last call, by both clocks; a step's own is its `rest`."""
        if self.gpu:
            torch.cuda.synchronize()
        marks, self.marks = self.marks, []
        own = [self._between(begin, end) for _, _, begin, end in marks]
        steps, found = [], {}
        for part, outer, begin, end in marks:
            steps.append(part if outer is None else steps[outer])
            if outer is not None:
                own[outer] = own[outer] - self._between(begin, end)
        for i, (part, outer, _, _) in enumerate(marks):
            key = steps[i], "rest" if outer is None else part
            found[key] = found.get(key, 0.0) + own[i]
        return {key: tuple(both.tolist()) for key, both in found.items()}

    def _now(self):
        if not self.gpu:
            return np.array([time.perf_counter(), time.process_time()])
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end) -> np.ndarray:
        return np.array([begin.elapsed_time(end) / 1e3, np.nan]) if self.gpu else end - begin


@contextmanager
def _watching(model: nn.Module, *, gpu: bool) -> Iterator[_Watch]:
    """Listens where a part of the ledger begins: at its outermost modules."""
    watch, handles, parts = _Watch(gpu=gpu), [], {"": None}
    for name, module in model.named_modules():
        outer = parts[name.rpartition(".")[0]]
        # The enlarging of the student's map to SAM3's grid is done by the trunk itself, and goes with the head.
        part = parts[name] = "head" if isinstance(module, StudentTrunk) else part_of(name)
        if part is not None and part != outer:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: watch.enter(part)))
            handles.append(module.register_forward_hook(lambda *_: watch.leave()))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _conditions(
    name: str, options: Options, ceilings: list[float], ledger: pd.DataFrame, context: int, started: datetime
) -> dict:
    given = asdict(options) | {"model": name, "text": checked_text(name, options.text), "weights": "random"}
    given["context"] = context
    origin = provenance(
        notebook="evsam_lib.sam3.bench",
        run_id=f"{started:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        started=started,
        parameters={"profile": "bench", **given},
        device=options.device,
        inputs=[],
    )
    costs = {
        f"{column}_of_parts": {part: int(ledger[column][part]) for part in PARTS} for column in ("parameters", "macs")
    }
    speed = {"gemm_flops": max(ceilings), "gemm_flops_before_and_after": ceilings}
    return origin | {"scope": "one image, one phrase, one box"} | speed | costs | surroundings()


# ---------------------------------------------------------------- the table


def table(results: Iterable[dict]) -> pd.DataFrame:
    """The table of what `bench_sam3` returned: a row for each part, and one for each step, its `whole`.

    Columns: model, text, context, image_size, step, part, weights, p50_ms, min_ms, max_ms, cpu_ms (the least), gmacs,
    gmacs_per_s and percent_of_gemm (by the least time, for one thread by its CPU time), n.
    """
    rows = []
    for result in results:
        for step in STEPS:
            own = [run for run in result["runs"] if run["step"] == step]
            whole = {"part": "whole", **{key: np.sum([run[key] for run in own], axis=0) for key in SAMPLES}}
            parts = [run["part"] for run in own]
            rows += [_row(run, step, [run["part"]], result["conditions"]) for run in own]
            rows.append(_row(whole, step, parts, result["conditions"]))
    return pd.DataFrame(rows)


def _row(run: dict, step: str, parts: list[str], conditions: dict) -> dict:
    given, (samples, cpu) = conditions["parameters"], (np.asarray(run[key], float) for key in SAMPLES)
    macs = sum(conditions["macs_of_parts"].get(name, 0) for name in parts)
    speed = macs / (cpu if conditions["threads"] == 1 and conditions["device"] == "cpu" else samples).min()
    which = {key: given[key] for key in ("model", "text", "context", "image_size")}
    which |= {"step": step, "part": run["part"], "weights": given["weights"]}
    return which | {
        **{f"{key}_ms": 1e3 * f(samples) for key, f in (("p50", np.median), ("min", np.min), ("max", np.max))},
        "cpu_ms": 1e3 * cpu.min(),
        "gmacs": macs / 1e9,
        "gmacs_per_s": speed / 1e9 if macs else np.nan,
        "percent_of_gemm": 100 * 2 * speed / conditions["gemm_flops"] if macs else np.nan,
        "n": len(samples),
    }


def read(folder: str | Path) -> list[dict]:
    """What runs left in a folder, row by row.

    Raises:
        FileNotFoundError: it holds no samples.
        ValueError: a file in it is damaged, or is no file of samples.
    """
    return bench.read(folder, shown=lambda one: (table([one]), _machine(one["conditions"])), by="evsam_lib.sam3.bench")


def write_table(folder: str | Path) -> pd.DataFrame:
    """Writes table.csv and table.md from the samples in a folder, and returns the table.

    Raises:
        FileNotFoundError: the folder holds no samples.
    """
    folder, results = Path(folder), read(folder)
    rows = table(results)
    write_text(folder / "table.csv", rows.to_csv(index=False))
    machines = sorted({_machine(result["conditions"]) for result in results})
    write_text(folder / "table.md", "\n\n".join([*machines, pipes(rounded(_by_part(rows)))]) + "\n")
    return rows


def _by_part(rows: pd.DataFrame) -> pd.DataFrame:
    """Least milliseconds (of a CPU's own), a model down and its parts across, the three steps' wholes last."""
    rows = rows.assign(column=rows["part"].where(rows["part"] != "whole", "whole " + rows["step"]))
    order = [part for part in (*PARTS, *(f"whole {step}" for step in STEPS)) if part in set(rows["column"])]
    index = ["model", "text", "image_size"]
    rows = rows.assign(ms=rows["cpu_ms"].fillna(rows["min_ms"]))
    wide = rows[rows["column"].isin(order)].pivot(index=index, columns="column", values="ms")[order]
    places = {name: i for i, name in enumerate(MODELS)}
    wide = wide.sort_index(key=lambda level: level.map(places) if level.name == "model" else level)
    return wide.rename_axis(index={"text": "text encoder"}, columns=None).reset_index()


def _machine(conditions: dict) -> str:
    threads, versions = conditions["threads"], conditions["versions"]
    on_cpu = conditions["device"] == "cpu"
    where = f"of the processor, {conditions['machine']['cpu']}, threads: {threads}" if on_cpu else conditions["gpu"]
    versions = f"torch {versions['torch']}, transformers {versions['transformers']}, Python {versions['python']}"
    return f"*Milliseconds, the least of the passes, {where}; eager float32, random weights, {versions}.*"


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for a wrong request."""
    given = _parser().parse_args(arguments)
    try:
        if given.table:
            print(rounded(_by_part(write_table(given.table))).to_string(index=False))
            return 0
        return _run(given)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"evsam_lib.sam3.bench: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if given.threads:
        torch.set_num_threads(given.threads)
    names = ("context", "scale", "device", "warm_up", "passes", "seed")
    shared, results = {name: getattr(given, name) for name in names}, []
    for name in given.models:
        for text in given.texts:
            for side in given.sizes:
                options = Options(text=checked_text(name, text), image_size=side, **shared)
                results.append(_one(name, options, given.out, resume=given.resume))
                gc.collect()
    rows = write_table(given.out) if given.out else table(results)
    print(rounded(_by_part(rows)).to_string(index=False))
    return 0


def _one(name: str, options: Options, out: Path | None, *, resume: bool) -> dict:
    path = None if out is None else out / f"{name}_{options.text}_{options.image_size}px.json"
    if resume and path is not None and path.is_file():
        print(f"{path}: already there", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))
    result = bench_sam3(name, options, say=lambda line: print(line, flush=True))
    if out is not None and path is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=1, default=str) + "\n")
    return result


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    default = Options()
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.sam3.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", type=words, default=MODELS, help=f"of {', '.join(MODELS)}; left out, all")
    add("--texts", type=words, default=(None,), help="SAM3 or a student's; left out, each model's own")
    add("--image-size", dest="sizes", type=lambda t: tuple(map(int, t.split(","))), default=(default.image_size,))
    add("--context", type=int, help="tokens of a phrase; left out, 16, for SAM3's text 32")
    add("--scale", default=default.scale, help="full, or mini for a trial")
    add("--device", default=default.device, help="cpu or cuda")
    add("--threads", type=int, default=0, help="of a CPU; left out, torch's own number")
    add("--warm-up", type=int, default=default.warm_up, help="passes before the first that counts")
    add("--passes", type=int, default=default.passes)
    add("--seed", type=int, default=default.seed)
    add("--out", type=Path, metavar="DIR", help="samples and table go there, beside those of other rows")
    add("--resume", action="store_true", help="leave alone the rows that DIR holds")
    add("--table", type=Path, metavar="DIR", help="make the table of these samples again, and time nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
