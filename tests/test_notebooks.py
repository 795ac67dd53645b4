"""The notebooks: each runs from its first line to its last, and each .ipynb is what its .py source says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))

# Runs the code cells one by one in one namespace, showing what ends a cell as a notebook would, and names a cell that
# fails. In a process of its own, because a notebook sets JAX's configuration for all that comes after it.
RUNNER = """
import ast, sys
import jupytext

namespace = {"__name__": "__main__"}
cells = [cell.source for cell in jupytext.read(sys.argv[1]).cells if cell.cell_type == "code"]
for number, source in enumerate(cells):
    body = ast.parse(source).body
    shown = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    try:
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), namespace)
        value = eval(compile(shown, f"cell {number}", "eval"), namespace) if shown else None
    except BaseException:
        print(f"cell {number} failed:", source, sep="\\n", file=sys.stderr)
        raise
    if value is not None:
        getattr(value, "_repr_png_", value.__repr__)()
print(f"ran {len(cells)} cells")
"""


def test_there_are_notebooks():
    assert SOURCES and len(list((ROOT / "notebooks").glob("*.ipynb"))) == len(SOURCES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs(source, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::DeprecationWarning:sd_jax", "-c", RUNNER, str(source)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    code_cells = [cell for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    assert done.stdout.endswith(f"ran {len(code_cells)} cells\n")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_ipynb_is_made_from_its_source(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    made, given = ([(cell.cell_type, cell.source) for cell in n.cells] for n in (notebook, jupytext.read(source)))
    assert made == given, f"run: jupytext --to ipynb --update notebooks/{source.name}"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_all_of_a_notebook_is_python(source):
    """A line magic would be a comment in the source, and so be run by readers but not by these tests."""
    for cell in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
