"""Throughput and latency of image encoders in every engine, with the accuracy of each beside its speed (Table 1).

    python -m evsam_lib.bench --models efficientvit-sam-l0,sam-vit-h --engines eager,fused,openvino \\
        --precision fp32,bf16 --batch 1,4 --out results/cpu-NAME/bench
    python -m evsam_lib.bench --table results/cpu-NAME/bench       # the table again, from the samples kept there

Every engine first passes the accuracy gate (`deploy.gate`), on the weights it is timed with. All variants of a model
are warmed up until steady and then take turns in random order, in one process, so that a busy moment hits them alike;
a speed-up is believed when its three measures (least time, CPU time, median over rounds) agree. The machine's matrix
product is measured in the same run. One file of samples a model; the table is made from them. Exit code 0: done, with
missing packages listed as `not run`; 1: an engine failed, or its accuracy did; 2: wrong request. Notebook 07 uses it.
"""

import argparse
import gc
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import ceil, prod
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from evsam_lib.deploy.engines import DTYPES, ENGINES, with_engine
from evsam_lib.deploy.gate import Gate
from evsam_lib.deploy.onnx import load_weights
from evsam_lib.models.count import count_model
from evsam_lib.models.zoo import ZOO
from evsam_lib.study.paths import write_text
from evsam_lib.study.provenance import ask, provenance
from evsam_lib.study.tables import pipes
from evsam_lib.timing import gemm_ceiling, take_turns, warm_up, window

__all__ = ["TABLE_1", "Options", "bench_model", "main", "read", "rounded", "surroundings", "table", "write_table"]

TABLE_1 = {  # the paper's rows, in its order: our name of each
    "SAM-ViT-H": "sam-vit-h",
    "MobileSAM": "mobile-sam",
    "EdgeSAM": "edge-sam",
    "EfficientSAM": "efficient-sam-s",
    **{f"EfficientViT-SAM-{v}": f"efficientvit-sam-{v.lower()}" for v in ("L0", "L1", "L2", "XL0", "XL1")},
}
DECIDING = ("MALLOC_", "THP_", "OMP_", "KMP_", "MKL_", "ONEDNN_", "CUDA_VISIBLE", "NVIDIA_TF32")  # variables, by start
INPUTS = 4  # random batches taken in turn, or more of them, so that no input is in the caches; never zeros, faster
CACHES_BYTES = 64e6  # more than the last cache of the machines at hand (32 MB of a CPU, 60 MB of an H200)


@dataclass(frozen=True)
class Options:
    """What is timed, and for how long.

    Attributes:
        engines: keys of `deploy.engines.ENGINES`; speed-ups are over "eager", if it is among them.
        precisions: of the image encoder: "fp32", "bf16", "fp16"; "eager" is in fp32 whatever is asked for.
        batches: images at a time.
        weights: "random", "mini", "official" or a path.
        device: "cpu" or "cuda".
        seconds: each variant is timed for, and warmed up for at most, if a single run takes no longer.
        transfers: images come from pinned host memory and embeddings go back; else both stay on the device.
        check_images: scenes that the accuracy is measured on.
        seed: of the inputs and of the order.
        cache: folder of exported files; None is `deploy.engines.engines_root()`.
    """

    engines: tuple[str, ...] = ("eager", "fused")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    batches: tuple[int, ...] = (1,)
    weights: str = "random"
    device: str = "cpu"
    seconds: float = 5.0
    transfers: bool = False
    check_images: int = 2
    seed: int = 0
    cache: str | None = None

    def __post_init__(self):
        unknown = [name for name in self.engines if name not in ENGINES]
        unknown += [name for name in self.precisions if name not in DTYPES]
        if unknown:
            raise ValueError(
                f"Unknown {unknown[0]!r}; engines are {', '.join(ENGINES)}, precisions {', '.join(DTYPES)}."
            )
        least = {"batch": min(self.batches), "seconds": self.seconds, "check-images": self.check_images}
        for what, value in least.items():
            if value <= 0:
                raise ValueError(f"{what} must be above 0, got {value:g}.")
        if self.transfers and self.device == "cpu":
            raise ValueError("There are no transfers on a CPU; leave --transfers out, or name a GPU by --device cuda.")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"Device {self.device!r} needs a CUDA GPU, and torch {torch.__version__} sees none here.")


def bench_model(name: str, options: Options, *, say: Callable[[str], object] = lambda line: None) -> dict:
    """Times one model in every engine, precision and batch size.

    Args:
        name: of the zoo.
        options: see there.
        say: takes lines of progress.

    Returns:
        conditions (machine, versions, ceilings, ...) and runs: one entry a variant, with its samples in seconds.

    Raises:
        ValueError: unknown model, or weights that are not its own.
        FileNotFoundError: the weights are not there.
    """
    if name not in ZOO:
        raise ValueError(f"Unknown model {name!r}; the zoo has {', '.join(ZOO)}.")
    started = datetime.now(UTC)
    torch._dynamo.reset()  # what is compiled for one model counts against the next
    model = load_weights(name, options.weights)[0].to(options.device)
    ceilings = {p: gemm_ceiling(options.device, DTYPES[p]) for p in dict.fromkeys(("fp32", *options.precisions))}
    gate = Gate(model, images=options.check_images)
    ready, runs = {}, []
    for engine in options.engines:
        for precision in ("fp32",) if engine == "eager" else options.precisions:
            if precision not in ENGINES[engine].precisions:
                continue
            entry = {"model": name, "engine": engine, "precision": precision, "weights": Path(options.weights).name}
            behind, more = _admit(model, gate, engine, precision, options)
            say(f"{name} {engine} {precision}: {more['status']}")
            if behind is None:
                runs.append(entry | more)
            else:
                ready[engine, precision] = behind, entry | more
    for batch in options.batches if ready else ():
        runs += _time(ready, batch, options, gate.seconds, say)
    conditions = _conditions(name, options, ceilings, started)
    return {"conditions": conditions, "runs": runs}


def _admit(model, gate: Gate, engine: str, precision: str, options: Options) -> tuple[object | None, dict]:
    """The model behind the engine if its answers are right, else None; and what there is to say of it."""
    start = time.perf_counter()
    try:
        behind = with_engine(model, engine, precision=precision, cache=options.cache)
        accuracy = gate(behind)
    except (ModuleNotFoundError, ValueError) as error:
        return None, {"status": f"not run: {error}"}
    except Exception as error:  # a compiler's; the other engines go on
        return None, {
            "status": f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        }
    failure = accuracy.failure(precision)
    found = asdict(accuracy) | {"ready_s": time.perf_counter() - start}
    return (None, found | {"status": f"failed: {failure}"}) if failure else (behind, found | {"status": "measured"})


# ---------------------------------------------------------------- timing


@torch.inference_mode()
def _time(ready: dict, batch: int, options: Options, gate_s: float, say: Callable) -> list[dict]:
    """Warms the variants up at this batch size, then times them in turns; the gate took `gate_s` for an image."""
    gpu = options.device != "cpu"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    variants, runs, too_large = {}, {}, []
    for key, (behind, entry) in ready.items():
        runs[key] = entry | {"batch": batch, "transfers": options.transfers}
        try:
            variants[key] = window(_encoding(behind, batch, options), gpu=gpu)
            if batch == 1 and gate_s > 5 * options.seconds:  # a giant, which the gate has warmed up
                runs[key] |= {"warm_up_runs": options.check_images, "steady": False, "pace_s": gate_s}
            else:
                runs[key] |= warm_up(variants[key], seconds=options.seconds, gpu=gpu)
        except torch.OutOfMemoryError:
            too_large.append(runs.pop(key) | {"status": "failed: out of memory"})
            variants.pop(key, None)
            continue
        say(f"{entry['model']} {key[0]} {key[1]}, batch {batch}: warm after {runs[key]['warm_up_runs']} runs")
    if not runs:
        return too_large
    paces = {key: run["pace_s"] for key, run in runs.items()}
    found = take_turns(variants, paces, seconds=options.seconds, gpu=gpu, seed=options.seed)
    more = {"gpu_state": _gpu_state(), "peak_bytes_of_all_variants": torch.cuda.max_memory_allocated()} if gpu else {}
    return [run | found[key] | more for key, run in runs.items()] + too_large


def _encoding(model, batch: int, options: Options) -> Callable[[int], Tensor]:
    """A function that encodes one of some random batches; where transfers count, from host memory and back to it."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (batch, 3, model.image_size, model.image_size)
    count = max(INPUTS, ceil(CACHES_BYTES / (4 * prod(shape))))
    inputs = [torch.randn(shape, generator=generator) for _ in range(count)]
    if not options.transfers:
        inputs = [images.to(model.device) for images in inputs]
        return lambda i: model.encode(inputs[i % count])
    inputs = [images.pin_memory() for images in inputs]
    return lambda i: model.encode(inputs[i % count].to(model.device, non_blocking=True)).to("cpu")


def _gpu_state() -> str | None:
    """Clock, power and temperature right after the last window; read only."""
    return ask("nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader")


def _conditions(name: str, options: Options, ceilings: dict, started: datetime) -> dict:
    origin = provenance(
        notebook="evsam_lib.bench",
        run_id=f"{started:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        started=started,
        parameters={"profile": "bench", **asdict(options), "cache": None, "weights": Path(options.weights).name},
        device=options.device,
        inputs=[],
    )
    costs = count_model(name)
    return (
        origin
        | {
            "scope": "image encoder",
            "parameters_of_model": int(costs["parameters"]["whole"]),
            "macs": int(costs["macs"]["image_encoder"]),
            "gemm_flops": ceilings,
        }
        | surroundings()
    )


def surroundings() -> dict:
    """What else decides over seconds: instructions in use, and variables that libraries listen to."""
    return {
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(DECIDING)},
    }


# ---------------------------------------------------------------- the table


def table(results: Iterable[dict]) -> pd.DataFrame:
    """The table of what `bench_model` returned, one row a variant; no number in it is from anywhere else.

    Speed-ups are over the same model's eager float32 at the same batch size, in the same run, three ways.
    """
    rows = [
        _row(run, result) for result in results for run in sorted(result["runs"], key=lambda run: run.get("batch", 0))
    ]
    return pd.DataFrame(rows)


def _row(run: dict, result: dict) -> dict:
    known = {key: run.get(key) for key in ("model", "engine", "precision", "batch", "transfers", "weights", "status")}
    accuracy = {key: run.get(key) for key in ("embedding_error", "mask_iou")}
    if "samples_s" not in run:
        return known | accuracy
    seconds, conditions = run["samples_s"], result["conditions"]
    p50, p90, p99 = pd.Series(seconds).quantile([0.5, 0.9, 0.99])
    flops = 2 * conditions["macs"] * run["batch"] / p50
    speed = {
        "images_per_s": run["batch"] / p50,
        **{
            f"{key}_ms": 1e3 * value for key, value in (("p50", p50), ("p90", p90), ("p99", p99), ("min", min(seconds)))
        },
        "tflops": flops / 1e12,
        "percent_of_gemm": 100 * flops / conditions["gemm_flops"][run["precision"]],
    }
    speed |= _speed_ups(run, result["runs"])
    return known | speed | accuracy | {"n": len(seconds), "steady": run["steady"], "ready_s": run["ready_s"]}


def _speed_ups(run: dict, runs: list[dict]) -> dict[str, float]:
    base = next((r for r in runs if r["engine"] == "eager" and r.get("batch") == run["batch"]), None)
    if base is None or "samples_s" not in base:
        return {}
    pairs = zip(base["window_s"], run["window_s"], strict=True)
    return {
        "speed_up_min": min(base["samples_s"]) / min(run["samples_s"]),
        "speed_up_cpu": min(base["cpu_s"]) / min(run["cpu_s"]),
        "speed_up_paired": statistics.median(theirs / ours for theirs, ours in pairs),
    }


def read(
    folder: str | Path, *, shown: Callable[[dict], object] | None = None, by: str = "evsam_lib.bench"
) -> list[dict]:
    """What a run left in a folder, model by model.

    Args:
        folder: of the samples.
        shown: makes of one file's content what a reader sees; what it fails on is no file of samples. None is this
            module's table.
        by: the module that makes such files.

    Raises:
        FileNotFoundError: it holds no samples.
        ValueError: a file in it is damaged, or is no file of samples.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"No samples (*.json) in {folder}; make them by `python -m {by} --out {folder}`.")
    return [_samples(file, shown or _shown) for file in files]


def _shown(found: dict) -> tuple[pd.DataFrame, str]:
    return table([found]), _machine(found["conditions"])


def _samples(file: Path, shown: Callable[[dict], object]) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        shown(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} holds no samples of a benchmark, or is damaged: remove it, or time again.") from error
    return found


def write_table(folder: str | Path) -> pd.DataFrame:
    """Writes table.csv and table.md from the samples in a folder, and returns the table."""
    folder, results = Path(folder), read(folder)
    rows = table(results)
    write_text(folder / "table.csv", rows.to_csv(index=False))
    machines = sorted({_machine(result["conditions"]) for result in results})
    write_text(folder / "table.md", "\n\n".join([*machines, pipes(rounded(rows))]) + "\n")
    return rows


def _machine(conditions: dict) -> str:
    threads, versions = conditions["threads"], conditions["versions"]
    where = conditions["gpu"] if conditions["device"] != "cpu" else f"{conditions['machine']['cpu']}, {threads} threads"
    return f"*Image encoder alone, {where}, torch {versions['torch']}, Python {versions['python']}.*"


def rounded(rows: pd.DataFrame) -> pd.DataFrame:
    """A table to read: four significant digits, nothing where there is no value."""
    return rows.map(lambda value: f"{value:.4g}" if isinstance(value, float) and pd.notna(value) else value).fillna("")


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.table:
            print(rounded(write_table(given.table)).to_string(index=False))
            return 0
        return _run(given)
    except (ValueError, OSError, ModuleNotFoundError) as error:  # OSError: missing files, and where one cannot write
        print(f"evsam_lib.bench: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    names = ("engines", "precisions", "batches", "weights", "device", "seconds", "transfers", "check_images", "seed")
    options = Options(**{name: getattr(given, name) for name in names}, cache=given.cache)
    if unknown := [name for name in given.models if name not in ZOO]:
        raise ValueError(f"Unknown model {unknown[0]!r}; the zoo has {', '.join(ZOO)}.")
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.out:  # before anything is timed
        given.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=given.out).close()
    results = []
    for name in given.models:
        results.append(bench_model(name, options, say=lambda line: print(line, flush=True)))
        if given.out:
            text = json.dumps(results[-1], indent=1, default=str) + "\n"
            write_text(given.out / f"{name}.json", text)
        gc.collect()
    rows = write_table(given.out) if given.out else table(results)
    print(rounded(rows).to_string(index=False))
    return 1 if any(run["status"].startswith("failed") for result in results for run in result["runs"]) else 0


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(word) for word in text.split(","))

    default = Options()
    parser = argparse.ArgumentParser(prog="python -m evsam_lib.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", type=words, default=tuple(TABLE_1.values()), help="of the zoo; left out, the nine of Table 1")
    add("--engines", type=words, default=default.engines, help=f"of {', '.join(ENGINES)}")
    add("--precision", dest="precisions", type=words, default=default.precisions, help="of fp32, bf16, fp16")
    add("--batch", dest="batches", type=numbers, default=default.batches, help="images at a time, such as 1,4,16")
    add("--weights", default=default.weights, help="random (speed is the same), mini, official or a path")
    add("--device", default=default.device, help="cpu or cuda")
    add("--threads", type=int, default=0, help="of a CPU; left out, torch's own number")
    add("--seconds", type=float, default=default.seconds, help="each variant is timed for")
    add("--transfers", action="store_true", help="images from host memory, embeddings back to it")
    add("--check-images", type=int, default=default.check_images, help="scenes the accuracy is measured on")
    add("--seed", type=int, default=default.seed)
    add("--cache", help="folder of exported files (default: $EVSAM_ENGINES_ROOT, or engines)")
    add("--out", type=Path, metavar="DIR", help="samples and table go there, beside those of other models")
    add("--table", type=Path, metavar="DIR", help="make the table of these samples again, and time nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
