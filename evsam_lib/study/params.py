"""Parameters of notebooks: what a notebook declares, what a profile changes, and strict checks of both.

A notebook's own defaults are the mini profile. On top of them come, each winning over the one before:
`params/<profile>.yaml` (run-wide), `params/<profile>/NN_name.yaml`, `params/local.yaml` (yours alone), and `-p key
value`. Explained in notebook 00_start_here.
"""

import ast
import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

__all__ = ["Parameter", "UsageError", "coerce", "declared", "merge", "read_notebook", "read_yaml"]

_SCALARS = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}


class UsageError(ValueError):
    """A wrong request, found before anything ran."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: annotation = default`."""

    name: str
    annotation: str
    default: Any


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook file.

    Raises:
        UsageError: it is missing or none.
    """
    try:
        book = nbformat.convert(nbformat.reader.reads(path.read_text(encoding="utf-8")), 4)
        nbformat.validate(book)
    except Exception as error:  # nbformat, its schema and JSON have many kinds
        raise UsageError(f"{path}: no readable notebook ({_one_line(error)})") from None
    return book


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares in its cell tagged `parameters`, in order.

    Read from the syntax tree: papermill's own inspection skips a line whose comment holds an equals sign and does not
    know `int | None`.

    Raises:
        UsageError: a line of the cell is no plain `name: type = literal`, or the literal is not of that type.
    """
    cells = read_notebook(notebook).cells
    source = next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), "")
    try:
        lines = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last ones: nested too deep
        where, what = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UsageError(f"{notebook.name}: parameters cell, line {where}: {what}") from None
    found = {}
    for line in lines:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or line.value is None:
            raise UsageError(
                f"{notebook.name}: parameters cell, line {line.lineno}: expected `name: type = default`, "
                f"got `{_one_line(ast.unparse(line))}`"
            )
        name = line.target.id
        try:
            default = ast.literal_eval(line.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise UsageError(f"{notebook.name}: the default of {name} is no plain value") from None
        parameter = Parameter(name, ast.unparse(line.annotation), default)
        coerce(default, parameter, notebook.name)
        found[name] = parameter
    return found


def coerce(value: Any, parameter: Parameter, where: str) -> Any:
    """The value as its declared type.

    An int is taken where a float is declared, and so is text that reads as a number, since YAML takes `2e-6` for text.

    Raises:
        UsageError: the value is nested, of another type, infinite or no number; names `where` it was given.
    """
    for option in parameter.annotation.replace(" ", "").split("|"):
        try:
            return _as_type(value, option)
        except (TypeError, ValueError, OverflowError):
            continue
    raise UsageError(f"{where}: {parameter.name} must be {parameter.annotation}, got {reprlib.repr(value)}")


def _as_type(value: Any, annotation: str) -> Any:
    """The value as `annotation` ("int", "list[float]", ...), or TypeError/ValueError."""
    base, _, inner = annotation.removesuffix("]").partition("[")
    if base == "list":
        if not isinstance(value, list) or any(isinstance(item, (list, dict)) for item in value):
            raise TypeError("no flat list")
        return [_as_type(item, inner) for item in value] if inner else value
    if base not in _SCALARS:
        raise TypeError(f"unknown type {annotation}")
    if base == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not _SCALARS[base]:
        raise TypeError(f"not {base}")
    if base == "float" and not math.isfinite(value):
        raise ValueError("results are kept as JSON, which has no infinity")
    if (base == "int" and not -(2**63) <= value < 2**63) or (base == "str" and "\0" in value):
        raise ValueError("beyond what tensors and paths can hold")
    if base == "str":
        value.encode("utf-8")  # or ValueError: typed under a locale that does not know the letters
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat mapping of a parameter file; empty if there is no such file.

    Raises:
        UsageError: the file cannot be read, is no mapping, or a value in it is nested.
    """
    if not path.exists():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: expected a file of lines `name: value` ({error.strerror})") from None
    except Exception as error:  # yaml has its own kind, and lets through those of what it calls
        raise UsageError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected lines `name: value`, got {type(values).__name__}")
    for key, value in values.items():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)):
            raise UsageError(f"{path}: {_one_line(key)} is nested; parameters are flat scalars or flat lists")
    return values


def _one_line(told: object) -> str:
    return " ".join(str(told).split())[:200] or type(told).__name__


def merge(
    chosen: Mapping[str, Mapping[str, Parameter]],
    every: Mapping[str, Mapping[str, Parameter]],
    *,
    folder: Path,
    profile: str,
    command_line: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """The values to pass to each chosen notebook, checked.

    Args:
        chosen: declared parameters of the notebooks to run, by notebook name.
        every: declared parameters of all notebooks; a run-wide key must be declared by one of them.
        folder: the folder of parameter files.
        profile: "mini", or one that has a file or folder of its own.
        command_line: `-p` values as typed; each must be declared by a chosen notebook.

    Raises:
        UsageError: a file or the command line names a parameter nobody declares, or gives a value of another type.
    """
    passed: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for name, parameters in chosen.items():
        for path, declarations in (
            (folder / f"{profile}.yaml", every.values()),
            (folder / profile / f"{name}.yaml", [parameters]),
            (folder / "local.yaml", every.values()),
        ):
            values = read_yaml(path)
            _check_known(values, declarations, str(path), name if path.stem == name else "any notebook")
            for key in values.keys() & parameters.keys():
                passed[name][key] = coerce(values[key], parameters[key], str(path))
    _check_known(command_line, chosen.values(), "-p", "the chosen notebooks")
    for name, parameters in chosen.items():
        for key in command_line.keys() & parameters.keys():
            passed[name][key] = _typed(command_line[key], parameters[key])
        if "profile" in parameters:
            passed[name]["profile"] = profile
    return passed


def _typed(text: str, parameter: Parameter) -> Any:
    """A command-line value: read as YAML, but taken as typed where text is declared (a folder may be called 2024)."""
    try:
        value = yaml.safe_load(text)
    except Exception:  # see read_yaml
        value = text
    options = parameter.annotation.replace(" ", "").split("|")
    if "str" in options and not (value is None and "None" in options):
        value = text
    return coerce(value, parameter, "-p")


def _check_known(keys: Iterable[str], declarations: Collection[Mapping[str, Parameter]], where: str, who: str) -> None:
    names = sorted({name for parameters in declarations for name in parameters})
    for key in keys:
        if key == "profile":
            raise UsageError(f"{where}: the profile is chosen by --profile, not as a parameter")
        if key not in names:
            near = difflib.get_close_matches(str(key)[:99], names, n=3, cutoff=0.5) or names
            raise UsageError(
                f"{where}: unknown parameter {reprlib.repr(key)} for {who}; the nearest are {', '.join(near)}"
            )
