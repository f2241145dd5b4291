"""The runner: strict before, honest after. Tiny notebooks are made and really executed."""

import errno
import json
import os
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from evsam_lib import run as runner
from evsam_lib.study import params

PARAMETERS = (
    'profile: str = "mini"  # p\nresults_root: str = "results"  # r\nn: int = 3  # count\nrate: float = 0.5  # x'
)
OPEN = "from evsam_lib.study import begin\nstudy = begin({name!r}, profile=profile, results_root=results_root, n=n)"
SAVE = 'study.table("x", {"a": {"b": n}})\nstudy.save()'


@pytest.fixture
def place(tmp_path):
    """A folder for notebooks, one for parameters, one for results."""
    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    return tmp_path


def write(place, name, *cells, needs=()):
    cells = cells or (SAVE,)
    head = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    book = new_notebook(cells=[head, *(new_code_cell(c) for c in (OPEN.format(name=name), *cells))])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.metadata["evsam"] = {"needs": list(needs)}
    nbformat.write(book, place / "notebooks" / f"{name}.ipynb")


def go(place, *arguments):
    """The command line's exit code."""
    folders = ["--notebooks-dir", str(place / "notebooks"), "--params-dir", str(place / "params")]
    return runner.main([*folders, "-p", "results_root", str(place / "results"), *arguments])


def result(place, name, file="metrics.json"):
    return place / "results" / "mini" / name / file


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["7"], "no notebook '7'; there are 01_one"),
            (["-p", "m", "3"], "unknown parameter 'm'"),
            (["-p", "raet", "3"], "nearest are rate"),
            (["-p", "n", "three"], "n must be int, got 'three'"),
            (["-p", "n", "2.5"], "n must be int, got 2.5"),
            (["-p", "n", "true"], "n must be int, got True"),
            (["-p", "rate", "[1]"], "rate must be float, got [1]"),
            (["-p", "profile", "paper"], "chosen by --profile"),
            (["--profile", "papre"], "unknown profile 'papre'; there are mini"),
        ],
    )
    def test_wrong_requests_run_nothing(self, place, capsys, arguments, message):
        write(place, "01_one")
        assert go(place, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (place / "results").exists()

    def test_files_are_as_strict(self, place, capsys):
        write(place, "01_one")
        (place / "params" / "local.yaml").write_text("n: {a: 1}\n")
        assert go(place) == 2
        assert "n is nested" in capsys.readouterr().err

    def test_a_broken_parameters_cell(self, place, capsys):
        write(place, "01_one")
        file = place / "notebooks" / "01_one.ipynb"
        file.write_text(file.read_text().replace("n: int = 3", "n = 3"))
        assert go(place) == 2
        assert "expected `name: type = default`, got `n = 3`" in capsys.readouterr().err

    def test_a_folder_where_a_file_of_parameters_belongs(self, place, capsys):
        write(place, "01_one")
        (place / "params" / "local.yaml").mkdir()
        assert go(place) == 2
        assert "local.yaml: expected a file of lines `name: value` (Is a directory)" in capsys.readouterr().err

    def test_a_damaged_notebook(self, place, capsys):
        write(place, "01_one")
        file = place / "notebooks" / "01_one.ipynb"
        file.write_text(file.read_text()[:100])
        assert go(place) == 2
        assert "01_one.ipynb: no readable notebook" in capsys.readouterr().err

    @pytest.mark.parametrize("folder", ["a\0b", "f\udcc3\udcbcr"])  # the second: typed in UTF-8 under LC_ALL=C
    def test_no_name_of_a_folder(self, place, capsys, folder):
        write(place, "01_one")
        assert go(place, "-p", "results_root", folder) == 2
        assert "-p: results_root must be str, got" in capsys.readouterr().err

    def test_no_notebooks(self, place, capsys):
        assert go(place) == 2
        assert "no notebooks" in capsys.readouterr().err


class TestNoRoom:
    """A disk that is full or read-only: one sentence, exit code 1, and the last good result stays."""

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
    @pytest.mark.parametrize("step", ["papermill.execute_notebook", "_move_book", "write_text", "publish"])
    def test_is_said(self, place, capsys, monkeypatch, number, step):
        write(place, "01_one")
        good = result(place, "01_one", "table.csv")
        good.parent.mkdir(parents=True)
        good.write_text("good")

        def fail(*arguments, **options):
            raise OSError(number, os.strerror(number))

        if step != "papermill.execute_notebook":
            monkeypatch.setattr(runner, "_execute", lambda *arguments, **options: None)
            monkeypatch.setattr(runner, "_check_whole", lambda *arguments: None)
        if step in ("write_text", "publish"):
            monkeypatch.setattr(runner, "_move_book", lambda *arguments: None)
        if step == "publish":
            monkeypatch.setattr(runner, "write_text", lambda *arguments: None)
        monkeypatch.setattr(f"evsam_lib.run.{step}", fail)
        assert go(place) == 1
        out = capsys.readouterr().out
        assert f"FAILED: cannot write under {place / 'results' / 'mini'}: {os.strerror(number)}\n" in out
        assert good.read_text() == "good"

    def test_an_interrupt_says_how_to_go_on(self, place, capsys, monkeypatch):
        write(place, "01_one")

        def interrupt(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(runner, "_execute", interrupt)
        assert go(place) == 130
        assert "--resume goes on" in capsys.readouterr().err

    def test_what_an_earlier_run_left_makes_room(self, place, monkeypatch):
        """Else a run that filled the disk with its own files could not be started again."""
        write(place, "01_one")
        left = place / "results" / "mini" / ".work" / "01_one.files" / "checkpoint.bin"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"x")
        seen = []
        monkeypatch.setattr(runner, "_execute", lambda *arguments, **options: seen.append(left.exists()))
        assert go(place) == 1
        assert seen == [False]

    def test_a_report_that_cannot_be_written_hides_no_error(self, place, capsys, monkeypatch):
        write(place, "01_one")

        def fail(notebook, copy, *arguments, **options):
            copy.write_text("{")  # cut off, as on a full disk
            raise runner.NotebookError("cell 3: OSError: [Errno 28] No space left on device")

        monkeypatch.setattr(runner, "_execute", fail)
        assert go(place) == 1
        assert "FAILED: cell 3: OSError" in capsys.readouterr().out

    @pytest.mark.parametrize("file", ["stamp.json", "provenance.json"])
    def test_resume_does_not_trust_a_damaged_note(self, place, monkeypatch, file):
        write(place, "01_one")
        book = runner._notebooks(place / "notebooks")[0]
        values = {"results_root": str(place / "results"), "profile": "mini"}
        stamp = {"parameters": values, "code": runner._code_digest(book.path), "inputs": {}}
        for name, content in (("stamp.json", stamp), ("provenance.json", {"inputs": []})):
            place_of = result(place, "01_one", name)
            place_of.parent.mkdir(parents=True, exist_ok=True)
            place_of.write_text(json.dumps(content))
        assert not runner._run_one(book, values, values, resume=True)  # up to date
        result(place, "01_one", file).write_text("{")
        ran = []
        monkeypatch.setattr(runner, "_execute", lambda *arguments, **options: ran.append(True))
        with pytest.raises(runner.NotebookError):
            runner._run_one(book, values, values, resume=True)
        assert ran


class TestRuns:
    def test_a_result_is_published_with_its_notebook(self, place, capsys):
        write(place, "01_one")
        (place / "params" / "mini.yaml").write_text("n: 5\n")
        assert go(place, "1") == 0
        assert "1 of 1 notebooks ran whole" in capsys.readouterr().out
        assert ",5.0," in result(place, "01_one", "table.csv").read_text()
        book = nbformat.read(result(place, "01_one", "run.ipynb"), as_version=4)
        assert book.metadata.papermill.parameters["n"] == 5
        assert go(place, "--resume") == 0
        assert "up to date" in capsys.readouterr().out
        assert go(place, "--resume", "-p", "n", "6") == 0
        assert "up to date" not in capsys.readouterr().out
        assert ",6.0," in result(place, "01_one", "table.csv").read_text()

    def test_failure_keeps_the_last_good_result_and_stops_what_builds_on_it(self, place, capsys):
        write(place, "01_one")
        write(place, "02_two", needs=["01_one"])
        assert go(place, "01") == 0
        good = result(place, "01_one", "table.csv").read_text()
        write(place, "01_one", "raise ValueError('no such thing')", SAVE)
        assert go(place) == 1
        out = capsys.readouterr().out
        assert "cell 3: ValueError: no such thing" in out
        assert "02_two ... 0 s FAILED: not started, it builds on 01_one" in out
        assert result(place, "01_one", "table.csv").read_text() == good
        assert result(place, "01_one", "failed.ipynb").is_file()
        assert not result(place, "02_two").exists()

    def test_an_early_exit_is_no_success(self, place, capsys):
        write(place, "01_one", "import sys\nsys.exit(0)", SAVE)
        assert go(place) == 1
        assert "never ran" in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_notebook_that_saves_nothing_is_no_success(self, place, capsys):
        write(place, "01_one", "n")
        assert go(place) == 1
        assert "never called study.save()" in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_kernel_registered_by_others_is_not_used(self, place, monkeypatch):
        spec = place / "jupyter" / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "theirs", "language": "python"}))
        monkeypatch.setenv("JUPYTER_PATH", str(place / "jupyter"))
        write(place, "01_one", f"import sys\nassert sys.executable == {sys.executable!r}", SAVE)
        assert go(place) == 0

    @pytest.mark.slow
    def test_a_hanging_cell(self, place, capsys, monkeypatch):
        monkeypatch.setitem(runner.TIMEOUT_S, "mini", 10)
        write(place, "01_one", "import time\ntime.sleep(60)", SAVE)
        assert go(place) == 1
        assert "ran longer than 10 s" in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_dead_kernel(self, place, capsys):
        write(place, "01_one", "import os\nos._exit(9)", SAVE)
        assert go(place) == 1
        assert "kernel died" in capsys.readouterr().out

    @pytest.mark.slow
    def test_resume_reruns_what_an_input_changed(self, place, capsys):
        write(place, "01_one")
        write(place, "02_two", needs=["01_one"])
        assert go(place) == 0
        assert go(place, "01") == 0  # a new run of the input
        capsys.readouterr()
        assert go(place, "02", "--resume") == 0
        assert "up to date" not in capsys.readouterr().out
        stamp = json.loads(result(place, "02_two", "stamp.json").read_text())
        assert stamp["inputs"]["01_one"] == json.loads(result(place, "01_one").read_text())["run_id"]

    @pytest.mark.slow
    def test_resume_reruns_when_a_noted_file_changed(self, place, capsys):
        (place / "weights.bin").write_bytes(b"one")
        write(place, "01_one", f"study.input({str(place / 'weights.bin')!r})", SAVE)
        assert go(place) == 0
        assert go(place, "--resume") == 0
        assert "up to date" in capsys.readouterr().out
        (place / "weights.bin").write_bytes(b"two")
        assert go(place, "--resume") == 0
        assert "up to date" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("float", "2e-6", 2e-6),  # YAML reads it as text
        ("float", 1, 1.0),
        ("int | None", None, None),
        ("list[float]", [1, 2.5], [1.0, 2.5]),
        ("str", "04", "04"),
    ],
)
def test_coerce(annotation, value, expected):
    found = params.coerce(value, params.Parameter("p", annotation, None), "here")
    assert found == expected
    assert type(found) is type(expected)


def test_later_layers_win(tmp_path):
    declared = {"01_one": {name: params.Parameter(name, "int", 0) for name in "abcd"}}
    (tmp_path / "paper").mkdir()
    for file, keys in (("paper.yaml", "abcd"), ("paper/01_one.yaml", "bcd"), ("local.yaml", "cd")):
        (tmp_path / file).write_text("".join(f"{key}: {len(file)}\n" for key in keys))
    passed = params.merge(declared, declared, folder=tmp_path, profile="paper", command_line={"d": "1"})
    assert passed == {"01_one": {"a": len("paper.yaml"), "b": len("paper/01_one.yaml"), "c": len("local.yaml"), "d": 1}}


def test_list_names_parameters(place, capsys):
    write(place, "01_one")
    assert go(place, "--list") == 0
    assert "n: int = 3" in capsys.readouterr().out


def test_a_report_that_is_there_follows_every_run(place):
    write(place, "01_one")
    assert go(place, "1") == 0
    report = place / "results/mini/RESULTS.md"
    assert not report.exists()  # notebook 20 makes the first
    report.write_text("old")
    assert go(place, "1", "-p", "n", "47110") == 0
    assert "47110" in report.read_text()
