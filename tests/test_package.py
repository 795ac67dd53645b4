"""The package as it is installed: its metadata, public names, licence, and the command."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sd_jax

ROOT = Path(__file__).parents[1]
EXTRAS = {"cuda13", "tpu", "train", "notebooks", "test"}


@pytest.fixture(scope="module")
def metadata():
    return importlib.metadata.metadata("sd_jax")


def test_one_version(metadata):
    """setup.py cannot import what it installs, so the number stands in several files."""
    setup = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text())[1]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert sd_jax.__version__ == setup == citation
    assert metadata["Version"] == setup, "the installed package is an older one: pip install -e . again"


def test_extras(metadata):
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    used = {extra for line in metadata.get_all("Requires-Dist") for extra in re.findall(r'extra == "(.+?)"', line)}
    assert used == EXTRAS


def test_what_only_tests_need_is_not_installed_for_all(metadata):
    core = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"jax", "flax", "safetensors"} <= core
    assert not core & {"torch", "diffusers", "pytest", "grain", "matplotlib", "jupytext"}


def test_supported_pythons(metadata):
    assert metadata["Requires-Python"] == ">=3.11"
    assert sys.version_info >= (3, 11)


def test_the_command():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="sd-jax")
    assert command.value == "sd_jax.cli:main"
    assert callable(command.load())


def test_every_public_name_is_there():
    for name in sd_jax.__all__:
        assert getattr(sd_jax, name) is not None
    assert set(sd_jax.__all__) <= set(dir(sd_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sd_jax.no_such_name


def test_public_names_are_imported_only_when_they_are_used():
    code = "import sys, sd_jax; early = set(sys.modules); sd_jax.NANO; print(sorted(set(sys.modules) - early))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = ast.literal_eval(done.stdout)
    assert "sd_jax.config" in loaded and "sd_jax.pipeline" not in loaded


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert text.count("\n") > 190, "this is not all of it"
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()


def test_the_embedded_model_goes_along():
    """Every file of it matches a pattern of package_data, at whatever depth."""
    patterns = re.search(r'package_data=\{"sd_jax": (\[.+?\])\}', (ROOT / "setup.py").read_text())[1]
    package = ROOT / "sd_jax"
    files = {path for path in (package / "tiny").rglob("*") if path.is_file()}
    assert files and sum(path.stat().st_size for path in files) <= 24_000_000
    assert files == {path for pattern in ast.literal_eval(patterns) for path in package.glob(pattern) if path.is_file()}
