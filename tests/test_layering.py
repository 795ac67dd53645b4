"""The order of the package, held by reading its source: imports only point up the list, and importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sd_jax"

# From the contracts down to the command line. A module sees the ranks above its own, and the group it stands in.
RANKS = (
    ({"config", "types"},),
    ({"tokenizer", "images", "parallel", "checks", "progress"}, {"models"}, {"diffusion"}),
    ({"weights"},),
    ({"pipeline"},),
    ({"batch"}, {"safety"}, {"train"}, {"evaluate"}, {"research"}),
    ({"cli", "flags", "__main__"},),
)
PLACE = {
    name: (rank, group) for rank, groups in enumerate(RANKS) for group, names in enumerate(groups) for name in names
}


def sources() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of sd_jax that a file imports, wherever it does: late imports inside functions count too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "sd_jax"}
    return found


def may_import(importer: str, imported: str) -> bool:
    here, there = PLACE[importer], PLACE[imported]
    return there[0] < here[0] or there == here


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_up(path):
    assert part(path) in PLACE, f"{part(path)} has no place in RANKS yet; give it one"
    for name in imported_parts(ast.parse(path.read_text(encoding="utf-8"))):
        if name not in PLACE:  # the package itself: its lazy public names are for those outside, and the command line
            assert name == "__version__" or part(path) in ("cli", "flags", "__main__"), (
                f"{path.name} imports sd_jax.{name}, which is not in RANKS"
            )
            continue
        assert may_import(part(path), name), f"{path.relative_to(ROOT)} imports sd_jax.{name}, which stands below it"


def test_the_order_can_be_broken():
    assert may_import("pipeline", "models") and may_import("train", "types") and may_import("images", "parallel")
    assert not may_import("models", "pipeline") and not may_import("models", "diffusion")
    assert not may_import("train", "evaluate") and not may_import("types", "tokenizer")
    late = ast.parse("def f():\n    from sd_jax.models import unet\n    import sd_jax.cli")
    assert imported_parts(late) == {"models", "cli"}


def loaded_after(statements: str) -> set[str]:
    """The top-level modules in memory after running ``statements`` in a fresh interpreter."""
    code = f"import sys\n{statements}\nprint('|'.join({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split("|"))


def imports_of(paths: list[Path]) -> str:
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in paths]
    return "\n".join(f"import {name}" for name in names if not name.endswith("__main__"))


# Seconds each, and needed by some calls only, or by tests only: nothing may import them on being imported itself.
SLOW = {"torch", "diffusers", "transformers", "orbax", "grain", "huggingface_hub", "scipy", "matplotlib", "pandas"}


def test_no_module_imports_what_is_slow():
    assert not loaded_after(imports_of(sources())) & (SLOW - loaded_after("import jax, flax, optax"))


def test_the_networks_and_the_mathematics_need_jax_and_flax_only():
    pure = [path for path in sources() if part(path) in ("config", "types", "models", "diffusion")]
    unneeded = {"PIL", "tokenizers", "optax", "safetensors"}
    assert not loaded_after(imports_of(pure)) & (unneeded - loaded_after("import jax, flax.linen"))


def test_importing_sd_jax_is_free():
    """Nothing is loaded that ``import jax`` does not load, but for the package itself."""
    expensive = {"flax", "optax", "PIL", "tokenizers", "safetensors"} | SLOW
    assert not loaded_after("import sd_jax") & (expensive - loaded_after("import jax"))


def test_importing_touches_no_device():
    """The number of CPU devices can be set until a backend is initialised, and not after."""
    setting = "import jax\njax.config.update('jax_num_cpu_devices', 3)\nassert len(jax.devices('cpu')) == 3"
    flags = "import os\nos.environ['XLA_FLAGS'] = ''\nos.environ['JAX_PLATFORMS'] = 'cpu'"
    loaded_after(f"{flags}\nimport sd_jax\n{imports_of(sources())}\n{setting}")
    with pytest.raises(AssertionError, match="RuntimeError"):
        loaded_after(f"{flags}\nimport jax\njax.devices()\n{setting}")
