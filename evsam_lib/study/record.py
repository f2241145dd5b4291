"""What a notebook records: its tables, figures, metrics and files, and where they came from.

`begin` opens a study, `Study.save` writes `results/<profile>/<name>/` whole or not at all. Explained in 00_start_here.
"""

import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from .paths import digest, publish, recover, resolve, shown, work_folder
from .picture import encode
from .provenance import provenance
from .reference import COMPUTED, GENERATED, MEASURED, compare
from .tables import COLUMNS, read_record, read_table, result_markdown

__all__ = ["RUNNER", "Result", "Study", "begin"]

RUNNER = "EVSAM_RUNNING"  # set by evsam_lib.run to the notebook's name: then the runner publishes what `save` made


def begin(
    name: str,
    *,
    profile: str = "mini",
    seed: int = 0,
    device: str = "cpu",
    threads: int = 0,
    data_root: str = "data",
    weights_root: str = "weights",
    results_root: str = "results",
    needs: Mapping[str | Path, str] | None = None,
    **parameters: Any,
) -> "Study":
    """Open a study: check what it needs, resolve its folders, set torch's threads and the
    folder of released checkpoints. Nothing else global is touched.

    Args:
        name: the notebook's name, "NN_topic".
        profile: "mini" or "paper"; names the results folder and decides what may be compared with the paper.
        seed: recorded; random state is passed on by the notebook itself.
        device: "cpu", "cuda", "cuda:1" or "auto" (the GPU if there is one).
        threads: threads torch may use; 0 leaves its own choice.
        data_root: folder of data sets; like the next two, a relative path counts from the repository root.
        weights_root: folder of checkpoints.
        results_root: folder of results.
        needs: what must be there, and how to get it: {path or package name: "download ... to ..."}.
        **parameters: the notebook's own parameters, recorded with the result.

    Raises:
        FileNotFoundError: a needed file or folder is missing; says how to get it and where to put it.
        ModuleNotFoundError: a needed package is missing; says how to install it.
        ValueError: the name is not of the form NN_topic, is not that of the notebook being run, or there is no such
            device.
    """
    if not re.fullmatch(r"\d\d_\w+", name):
        raise ValueError(f"a study is named as its notebook, NN_topic; got {name!r}")
    if os.environ.get(RUNNER, name) != name:
        raise ValueError(f"begin({name!r}) in notebook {os.environ[RUNNER]}: the two names must be equal")
    for what, how in (needs or {}).items():
        _check_need(what, how)
    folders = {"data_root": data_root, "weights_root": weights_root, "results_root": results_root}
    common = {"profile": profile, "seed": seed, "device": device, "threads": threads, **folders}
    folder = resolve(results_root) / profile / name
    recover(folder)
    shutil.rmtree(work_folder(folder, "files"), ignore_errors=True)
    os.environ["EVSAM_WEIGHTS_ROOT"] = str(resolve(weights_root))  # where `load_model` looks for released checkpoints
    os.environ.setdefault("EVSAM_ENGINES_ROOT", str(resolve("engines")))  # what engines export stays beside the study
    return Study(
        name=name,
        profile=profile,
        device=_set_up_torch(device, threads),
        folder=folder,
        data=resolve(data_root),
        weights=resolve(weights_root),
        parameters=common | parameters,
    )


def _check_need(what: str | Path, how: str) -> None:
    """A plain identifier is a package; anything else is a path."""
    if isinstance(what, str) and what.isidentifier():
        if importlib.util.find_spec(what) is None:
            raise ModuleNotFoundError(f"needs the package {what}: {how}")
    elif not resolve(what).exists():
        raise FileNotFoundError(f"needs {shown(what)}: {how}")


def _set_up_torch(device: str, threads: int) -> str:
    """Set the thread count and return the device to use, checked."""
    import torch

    if threads > 0:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, cuda:<number> or auto, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} needs a CUDA GPU, and torch {torch.__version__} sees none here: use cpu or auto"
        )
    return device


@dataclass(frozen=True)
class Result:
    """What an earlier notebook left: `metrics`, `table` (long rows) and its files."""

    folder: Path
    metrics: dict[str, Any]
    table: pd.DataFrame

    def file(self, name: str) -> Path:
        """Path of a file that the notebook kept.

        Raises:
            FileNotFoundError: there is none of that name; names those there are, and the command that makes them.
        """
        path = self.folder / name
        if not path.is_file():
            have = ", ".join(
                sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
            )
            raise FileNotFoundError(
                f"{shown(self.folder)} holds no {name}; it holds {have}. Checkpoints do not come with the repository: "
                f"`python -m evsam_lib.run --profile {self.folder.parent.name} {self.folder.name[:2]}` makes them"
            )
        return path


@dataclass
class Study:
    """One run of one notebook. Made by `begin`; `save` writes what was recorded."""

    name: str
    profile: str
    device: str
    folder: Path  # results/<profile>/<name>
    data: Path
    weights: Path
    parameters: dict[str, Any]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    run_id: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}")
    _rows: dict[tuple, dict] = field(default_factory=dict, repr=False)
    _metrics: dict[str, float | None] = field(default_factory=dict, repr=False)
    _figures: dict[str, tuple[str, bytes]] = field(default_factory=dict, repr=False)  # suffix, file
    _files: list[str] = field(default_factory=list, repr=False)
    _inputs: list[dict] = field(default_factory=list, repr=False)

    def table(
        self,
        name: str,
        rows: Mapping[str, Mapping[str, float | None]] | pd.DataFrame | Sequence[Mapping],
        *,
        unit: str | Mapping[str, str] = "",
        n: int | None = None,
        spread: float | None = None,
        status: str | None = None,
    ) -> pd.DataFrame:
        """Record numbers of one table, and return them as a table to look at. A cell recorded twice keeps the last.

        Args:
            name: "table1" ... "table5", "sginw", "text" with the paper's columns (see results/reference), or a name of
                your own.
            rows: wide, {row: {column: value}} or a DataFrame indexed by row; or long, records with row, column, value
                and, where they differ from the arguments, unit, n, spread, status.
            unit: of all values, or by column.
            n: how many measurements stand behind each value.
            spread: of these measurements, in the value's unit.
            status: "measured", "computed" (follows from the architecture alone), "generated data" or
                "not run: <what is missing>". Left out: "generated data" in mini, else "measured".

        Raises:
            ValueError: an unknown status, or a value that is no number.
        """
        status = status or (GENERATED if self.profile == "mini" else MEASURED)
        records = [
            {
                "table": name,
                "row": str(record["row"]),
                "column": str(record["column"]),
                "value": record.get("value"),
                "unit": record.get("unit", unit if isinstance(unit, str) else unit.get(str(record["column"]), "")),
                "n": record.get("n", n),
                "spread": record.get("spread", spread),
                "profile": self.profile,
                "status": record.get("status", status),
                "run_id": self.run_id,
            }
            for record in _long(rows)
        ]
        for record in records:
            where = (name, record["row"], record["column"])
            record["value"] = _number(record["value"], where)
            if record["status"] not in (MEASURED, COMPUTED, GENERATED) and not record["status"].startswith("not run: "):
                kinds = "measured, computed, generated data or 'not run: <what is missing>'"
                raise ValueError(f"status of {where} must be {kinds}, got {record['status']!r}")
            self._rows[where] = record
        wide: dict[str, dict] = {}
        for record in records:
            wide.setdefault(record["row"], {})[record["column"]] = record["value"]
        return pd.DataFrame.from_dict(wide, orient="index")

    def metric(self, name: str, value: float) -> None:
        """Record one number for later notebooks; the name ends in its unit (`train_s`, `miou_percent`)."""
        self._metrics[name] = _number(value, name)

    def figure(self, fig: Any, name: str, *, title: str = "", caption: str = "") -> None:
        """Show a matplotlib figure and keep it in figures/, <name>.png or, with photographs, .jpg. It is closed.

        Args:
            fig: the figure.
            name: file name, lower case with underscores.
            title: the finding, in the report; left out, the figure's own title.
            caption: what is shown, under what conditions.
        """
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"a figure's name is lower case with underscores, got {name!r}")
        from matplotlib import pyplot as plt

        title = title or fig.get_suptitle() or next((ax.get_title() for ax in fig.axes if ax.get_title()), name)
        order = list(self._figures).index(name) if name in self._figures else len(self._figures)
        text = {"Title": " ".join(title.split()), "Description": " ".join(caption.split()), "Order": str(order)}
        suffix, data, width = encode(fig, text)
        self._figures[name] = suffix, data
        plt.close(fig)  # else the inline backend shows it a second time
        _show(data, text["Title"], width)

    def file(self, name: str) -> Path:
        """A path to write to (a checkpoint, a log); `save` keeps the file with the result."""
        path = work_folder(self.folder, "files") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in self._files:
            self._files.append(name)
        return path

    def resumable(
        self, source: str, prompt: str, *, model: str, weights: str, label: str, limit: int = 0
    ) -> dict[str, Any]:
        """Arguments with which `evaluate` goes on where a killed run of hours stopped; none in mini, all of it anew.

        They name a file under results/<profile>/evaluations. The Snakefile's jobs leave their results there too, under
        the same names.

        Args:
            source: data set, or stem of the file of a detector's boxes.
            prompt: of the evaluation.
            model: name in the zoo, which names released weights ("official").
            weights: what was asked for; others than "official" go by the label.
            label: of the row.
            limit: images, 0 for all.
        """
        if self.profile == "mini":
            return {}
        words = [source.lower(), prompt, model if weights == "official" else label, *([str(limit)] if limit else [])]
        name = "-".join(re.sub(r"[^\w.-]+", "_", word) for word in words)
        return {"out": self.folder.parent / "evaluations" / f"{name}.json", "resume": True}

    def input(self, path: str | Path) -> Path:
        """Note a data set or checkpoint this result rests on, with its sha256, and return its path.

        Raises:
            FileNotFoundError: it is not there.
        """
        path = resolve(path)
        if not path.exists():
            raise FileNotFoundError(f"no input {shown(path)}")
        self._inputs = [known for known in self._inputs if known["path"] != shown(path)]
        self._inputs.append({"path": shown(path), "sha256": digest(path)})
        return path

    def result(self, name: str) -> Result:
        """What an earlier notebook left under the same profile.

        Raises:
            FileNotFoundError: it has not run yet; says which command runs it.
            ValueError: a file of it is damaged.
        """
        folder = self.folder.parent / name
        recover(folder)
        if not (folder / "metrics.json").is_file():
            raise FileNotFoundError(
                f"{self.name} builds on {name}, and {shown(folder)} holds no result: "
                f"run `python -m evsam_lib.run --profile {self.profile} {name[:2]}` first"
            )
        return Result(folder, read_record(folder / "metrics.json", run_id=str), read_table(folder))

    def save(self) -> pd.DataFrame:
        """Write the result, whole or not at all, and return the comparison with the paper.

        Returns:
            The cells of the paper that this notebook claims, with our values and verdicts (see `reference.compare`);
            where it claims none, its own long table.
        """
        table = pd.DataFrame(self._rows.values(), columns=COLUMNS)
        table = table.astype({"value": float, "n": "Int64", "spread": float})
        origin = provenance(
            notebook=self.name,
            run_id=self.run_id,
            started=self.started,
            parameters=self.parameters,
            device=self.device,
            inputs=self._inputs,
        )
        metrics = {"notebook": self.name, "profile": self.profile, "run_id": self.run_id, **self._metrics}
        new, ready = work_folder(self.folder, "new"), work_folder(self.folder, "ready")
        shutil.rmtree(new, ignore_errors=True)
        (new / "figures").mkdir(parents=True)
        for name in self._files:
            source = work_folder(self.folder, "files") / name
            if not source.is_file():
                raise FileNotFoundError(f"{self.name} asked to keep {name} but wrote no such file")
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, new / name)
        for name, (suffix, data) in self._figures.items():
            (new / "figures" / f"{name}{suffix}").write_bytes(data)
        table.to_csv(new / "table.csv", index=False)
        _write_json(new / "metrics.json", metrics)
        _write_json(new / "provenance.json", origin)
        (new / "table.md").write_text(result_markdown(self.name, table, origin), encoding="utf-8")
        shutil.rmtree(ready, ignore_errors=True)
        new.rename(ready)
        if RUNNER not in os.environ:
            publish(ready, self.folder)
        comparison = compare(table, notebook=self.name)
        shown_table = comparison if len(comparison) else table.drop(columns=["profile", "run_id"])
        return shown_table.dropna(axis="columns", how="all")


def _long(rows: Any) -> list[Mapping]:
    """Wide or long rows as records with at least row, column and value."""
    if isinstance(rows, pd.DataFrame):
        rows = rows.to_dict("index")
    if isinstance(rows, Mapping):
        return [{"row": r, "column": c, "value": v} for r, cells in rows.items() for c, v in cells.items()]
    return list(rows)


def _number(value: Any, where: Any) -> float | None:
    """A plain int or float; None for a missing or non-finite one."""
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} must be a number, got {value!r}")
    return value if math.isfinite(value) else None


def _show(data: bytes, title: str, width: int) -> None:
    """Display the very picture that is saved, where somebody looks."""
    if "IPython" not in sys.modules:
        return
    from IPython import display, get_ipython

    if get_ipython() is not None:
        display.display(display.Image(data, width=width, alt=title))


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
