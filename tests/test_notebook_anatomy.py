"""Every notebook has the same anatomy, so that a reader of one finds his way in all. Nothing is executed here."""

import ast
import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
RUN_WIDE = {"profile", "seed", "device", "threads", "data_root", "weights_root", "results_root"}
SECTIONS = [
    "What the paper says",
    "The idea in ten lines",
    "At study scale",
    "Result",
    "Against the paper",
    "What could be wrong",
    "Exercises",
]
FORBIDDEN_CALLS = {"sys.exit", "exit", "quit", "os.chdir", "warnings.simplefilter", "warnings.filterwarnings"}
MOST_LINES, MOST_PARAMETER_LINES, MOST_FUNCTION_LINES = 25, 22, 10


def problems(notebook, name: str) -> list[str]:
    """What is wrong with a notebook of this name (without .ipynb), a sentence each."""
    cells = notebook.cells
    if [cell.cell_type for cell in cells[:3]] != ["markdown", "code", "code"]:
        return ["the first three cells are not title (markdown), parameters (code) and imports (code)"]
    return [
        *_title(cells[0].source, name),
        *_parameters(cells[1]),
        *_opening(cells[2].source, name),
        *_order(cells),
        *_stored_state(notebook),
        *(
            f"cell {i + 1}: {found}"
            for i, c in enumerate(cells)
            if c.cell_type == "code"
            for found in _code(c.source, i)
        ),
    ]


def _title(source, name):
    title = re.match(r"# (\d\d)  \S", source)
    if title is None or title[1] != name[:2]:
        yield f"the title is not '# {name[:2]}  Title', with two spaces"
    for word in ("Paper", "Makes", "Needs", "Time"):
        if not re.search(rf"^(?:[-*] )?\*\*{word}[.:]?\*\*[.:]?\s*\S", source, re.MULTILINE):
            yield f"the title cell has no line **{word}**"


def _parameters(cell):
    if "parameters" not in cell.metadata.get("tags", []):
        yield "the second cell has no tag 'parameters'"
    if len(cell.source.splitlines()) > MOST_PARAMETER_LINES:
        yield f"the parameters take more than {MOST_PARAMETER_LINES} lines"
    try:
        statements = ast.parse(cell.source).body
    except SyntaxError:
        return  # reported with all code cells
    tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    values = {}
    for line in statements:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
            yield f"parameters: '{ast.unparse(line)}' is not 'name: type = default'"
            continue
        key = line.target.id
        try:
            values[key] = ast.literal_eval(line.value)
        except ValueError:
            values[key] = {}
        flat = values[key] if isinstance(values[key], list) else [values[key]]
        if not all(value is None or isinstance(value, str | int | float) for value in flat):
            yield f"parameters: the default of {key} is neither a plain value nor a flat list of them"
        if line.end_lineno not in commented:
            yield f"parameters: {key} has no comment that says what it means"
    if missing := RUN_WIDE - values.keys():
        yield f"parameters: {', '.join(sorted(missing))} missing"
    if values.get("profile", "mini") != "mini":
        yield "parameters: the default of profile is not 'mini'"


def _opening(source, name):
    if not re.search(rf"\bbegin\(\s*[\"']{re.escape(name)}[\"']", source):
        yield f'the third cell does not call begin("{name}", ...)'


def _order(cells):
    if len(cells) < 4 or cells[3].cell_type != "markdown":
        yield "no text stands between the imports and the first piece of work"
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    if "study.save(" not in code[-1]:
        yield "the last code cell does not call study.save("
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = [found.strip() for found in re.findall(r"^##+ (.+)$", text, re.MULTILINE)]
    if "Exercises" not in headings:
        yield "there is no section 'Exercises'"
    order = [SECTIONS.index(heading) for heading in headings if heading in SECTIONS]
    if order != sorted(order):
        yield f"the sections do not follow the order {', '.join(SECTIONS)}"


def _stored_state(notebook):
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "cell ids are missing or not unique"
    for number, cell in enumerate(notebook.cells, 1):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            yield f"cell {number} is stored with outputs or a count"
        if "papermill" in cell.metadata:
            yield f"cell {number} keeps papermill's metadata"


def _code(source, index):
    if index != 1 and len(source.splitlines()) > MOST_LINES:
        yield f"more than {MOST_LINES} lines"
    try:
        tree = ast.parse(source)
    except SyntaxError:
        yield "not plain Python (a magic, a shell command or a slip)"
        return
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef():
                yield "defines a class"
            case ast.Try() | ast.TryStar():
                yield "uses try"
            case ast.Global():
                yield "uses global"
            case ast.FunctionDef() if node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES:
                yield f"function {node.name} has more than {MOST_FUNCTION_LINES} lines"
            case ast.Import() | ast.ImportFrom() if index != 2:
                yield "imports outside the third cell"
            case ast.Call() if ast.unparse(node.func) in FORBIDDEN_CALLS:
                yield f"calls {ast.unparse(node.func)}"
            case ast.Constant(value=str(text)) if re.match(r"/\w+/|~/|[A-Z]:\\", text):
                yield f"names the absolute path {text}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_common_anatomy(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert not problems(notebook, path.stem)


PARAMETERS = """\
profile: str = "mini"  # which defaults
seed: int = 0  # of all random draws
device: str = "cpu"  # torch device
threads: int = 2  # of torch
data_root: str = ""  # folder
weights_root: str = ""  # folder
results_root: str = "results"  # folder
sizes_px: list[int] = [128, 256]  # image sides, pixels"""


def good_notebook():
    """The smallest notebook that the rules accept."""
    cells = [
        new_markdown_cell(
            "# 03  Data\n\nIt reads.\n\n**Paper** Sec. 4\n\n**Makes** table.csv\n\n**Needs** nothing\n\n**Time** 9 s"
        ),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell('from evsam_lib.study import begin\n\nstudy = begin("03_data", seed=seed)'),
        new_markdown_cell("## What the paper says\n\nThat images are read."),
        new_code_cell("def half(x):\n    return x / 2\n\n\nhalf(sizes_px[0])"),
        new_markdown_cell("## Exercises\n\n1. Set `sizes_px` to `[64]`."),
        new_code_cell("study.save()"),
    ]
    return new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )


def test_the_checker_accepts_a_good_notebook():
    assert problems(good_notebook(), "03_data") == []


def edit(cell, old, new):
    def change(notebook):
        assert old in notebook.cells[cell].source
        notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)

    return change


def put(cell, **values):
    return lambda notebook: notebook.cells[cell].update(values)


BAD = {
    "title number": (edit(0, "# 03", "# 04"), "title is not '# 03  Title'"),
    "title spaces": (edit(0, "03  Data", "03 Data"), "with two spaces"),
    "no paper": (edit(0, "**Paper**", "Paper"), r"no line \*\*Paper"),
    "no time": (edit(0, "**Time** 9 s", "**Time**"), r"no line \*\*Time"),
    "no tag": (put(1, metadata={}), "no tag 'parameters'"),
    "no annotation": (edit(1, "seed: int = 0", "seed = 0"), "'seed = 0' is not 'name: type = default'"),
    "no comment": (edit(1, "  # of torch", ""), "threads has no comment"),
    "computed default": (edit(1, "int = 2", "int = 2 * 3"), "default of threads is neither"),
    "nested default": (edit(1, "[128, 256]", "[[128], [256]]"), "default of sizes_px is neither"),
    "no device": (edit(1, "device", "machine"), "parameters: device missing"),
    "paper default": (edit(1, '"mini"', '"paper"'), "default of profile is not 'mini'"),
    "long parameters": (edit(1, "seed", "\n" * 22 + "seed"), "more than 22 lines"),
    "no begin": (edit(2, "begin(", "start("), "does not call begin"),
    "begin of another": (edit(2, "03_data", "04_distill"), "does not call begin"),
    "no text": (lambda nb: nb.cells.pop(3), "no text stands between"),
    "no exercises": (edit(5, "## Exercises", "## Homework"), "no section 'Exercises'"),
    "order": (edit(3, "## What", "## Exercises\n\n## What"), "do not follow the order"),
    "no save": (edit(6, "study.save()", "study"), r"does not call study.save\("),
    "kernel": (lambda nb: nb.metadata.kernelspec.update(name="evsam"), "kernel is not python3"),
    "twice the id": (lambda nb: nb.cells[4].update(id=nb.cells[5].id), "ids are missing or not unique"),
    "no id": (lambda nb: nb.cells[4].pop("id"), "ids are missing or not unique"),
    "output": (
        put(4, outputs=[{"output_type": "stream", "name": "stdout", "text": "1"}]),
        "cell 5 is stored with outputs",
    ),
    "count": (put(4, execution_count=3), "cell 5 is stored with outputs or a count"),
    "papermill": (put(4, metadata={"papermill": {}}), "cell 5 keeps papermill"),
    "long cell": (put(4, source="x = 1\n" * 26), "cell 5: more than 25 lines"),
    "class": (put(4, source="class A:\n    pass"), "cell 5: defines a class"),
    "try": (put(4, source="try:\n    x = 1\nfinally:\n    pass"), "cell 5: uses try"),
    "global": (put(4, source="def f():\n    global x"), "cell 5: uses global"),
    "long function": (put(4, source="def f():\n" + "    x = 1\n" * 10), "function f has more than 10 lines"),
    "shell": (put(4, source="!ls"), "cell 5: not plain Python"),
    "magic": (put(4, source="%matplotlib inline"), "cell 5: not plain Python"),
    "exit": (put(4, source="if seed:\n    sys.exit(0)"), "cell 5: calls sys.exit"),
    "chdir": (put(4, source='os.chdir("..")'), "cell 5: calls os.chdir"),
    "warnings": (put(4, source='warnings.filterwarnings("ignore")'), "cell 5: calls warnings.filterwarnings"),
    "late import": (put(4, source="def f():\n    import json"), "cell 5: imports outside the third cell"),
    "absolute path": (put(4, source='open("/home/me/x.json")'), "cell 5: names the absolute path"),
    "wrong start": (lambda nb: nb.cells.pop(1), "first three cells are not"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD.keys())
def test_the_checker_names_what_is_wrong(spoil, words):
    notebook = good_notebook()
    spoil(notebook)
    found = problems(notebook, "03_data")
    assert any(re.search(words, problem) for problem in found), found
