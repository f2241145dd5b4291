"""The command line of `evsam_lib.fetch`.

    python -m evsam_lib.fetch weights NAME... | data NAME... | --list

Exit code 0: all there; 1: something failed, the rest is there; 2: wrong request; 130: stopped by hand.
"""

import argparse
import os
import sys
from pathlib import Path

from tabulate import tabulate

from evsam_lib.fetch.catalog import DATA, Source, choose, fetch, state, weights
from evsam_lib.fetch.download import FetchError, size_text
from evsam_lib.models.weights import weights_root
from evsam_lib.study.params import read_yaml
from evsam_lib.study.paths import repo_root, resolve


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        options = _parser().parse_intermixed_args(arguments)
        if options.list:
            print(_table(options.to))
            return 0
        sources = choose(options.names, weights() if options.what == "weights" else DATA)
        if not sources:
            raise ValueError("name what to fetch: weights NAME..., data NAME..., or --list for what there is")
        root = (options.to or _root(options.what)).absolute()
    except ValueError as error:
        print(f"evsam_lib.fetch: {error}", file=sys.stderr)
        return 2
    try:
        failed = _fetch_all(sources, root, keep_archive=options.keep_archive)
    except KeyboardInterrupt:
        return 130
    if options.to and len(failed) < len(sources):
        other = f", load_model with EVSAM_WEIGHTS_ROOT={root}" if options.what == "weights" else ""
        print(f"notebooks look there with -p {options.what}_root {root}{other}")
    return 1 if failed else 0


def _fetch_all(sources: dict[str, Source], root: Path, *, keep_archive: bool) -> list[str]:
    """Fetches each; one that fails does not stop the others. Returns the names of those that failed."""
    counts, failed = {True: 0, False: 0}, []
    for name, source in sources.items():
        print(f"{name} ({source.licence}), to {root}", flush=True)
        try:
            counts[fetch(source, root, keep_archive=keep_archive, say=_say)] += 1
        except (FetchError, OSError) as error:
            failed.append(name)
            text = error if isinstance(error, FetchError) else f"{error.filename}: {error.strerror}"
            print(f"evsam_lib.fetch: {name}: {text}", file=sys.stderr, flush=True)
    if len(sources) > 1 or failed:
        missing = f", {len(failed)} failed ({', '.join(failed)})" if failed else ""
        print(f"{counts[True]} fetched, {counts[False]} already there{missing}")
    return failed


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _root(what: str) -> Path:
    """Where weights or data belong: as params/local.yaml says, the notebooks read it too, or the usual folder."""
    setting = read_yaml(repo_root() / "params" / "local.yaml").get(f"{what}_root")
    if what == "weights":
        return resolve(setting) if setting and "EVSAM_WEIGHTS_ROOT" not in os.environ else weights_root()
    return resolve(setting or "data")


def _table(to: Path | None) -> str:
    parts = []
    for what, sources in (("weights", weights()), ("data", DATA)):
        root = (to or _root(what)).absolute()
        rows = [row for name, source in sources.items() for row in _rows(name, source, root)]
        headers = ("name", "licence", "size", "state", "file", *(["for"] if what == "data" else []))
        text = tabulate([row[: len(headers)] for row in rows], headers=headers, disable_numparse=True)
        parts.append(f"{what}, under {root}\n{text}")
    return "\n\n".join(parts)


def _rows(name: str, source: Source, root: Path) -> list[tuple[str, ...]]:
    """A row per file; what holds for all of them stands in the first."""
    heads, rows = (name, source.licence, source.purpose), []
    for item in source.items:
        makes = Path(item.folder) / (item.name if item.members is None else item.makes)
        rough = f"~{size_text(item.rough_size)}" if item.rough_size else "?"
        size = size_text(item.size) if item.size else rough
        rows.append((*heads[:2], size, state(item, root), str(makes), heads[2]))
        heads = ("", "", "")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evsam_lib.fetch", description="Fetches released weights and public data sets."
    )
    parser.add_argument("what", nargs="?", choices=("weights", "data"), help="what kind")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; `all` for all")
    parser.add_argument("--list", action="store_true", help="what there is and what is here; asks no network")
    parser.add_argument("--to", type=Path, metavar="DIR", help="instead of the weights_root or data_root")
    parser.add_argument("--keep-archive", action="store_true", help="leave zip files in place once they are unpacked")
    return parser


if __name__ == "__main__":
    sys.exit(main())
