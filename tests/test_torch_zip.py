"""Zip checkpoints, written by torch.save itself and read without it."""

import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sd_jax.types import WeightsError
from sd_jax.weights.torch_zip import open_checkpoint
from tests.lightning import save_checkpoint

torch = pytest.importorskip("torch")

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
}


def save(path: Path, value, **options) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_comes_back_bit_by_bit(tmp_path, protocol):
    values = {str(d): torch.arange(-6, 6).reshape(3, 4).abs().to(d) for d in DTYPES}
    file = open_checkpoint(save(tmp_path / "a.pt", values, pickle_protocol=protocol))
    assert list(file.tensors) == list(values) and file.ignored == [] and file.foreign == []
    for torch_dtype, dtype in DTYPES.items():
        lazy, tensor = file.tensors[str(torch_dtype)], values[str(torch_dtype)]
        array = lazy.read()
        assert (lazy.dtype, lazy.shape) == (np.dtype(dtype), (3, 4)) == (array.dtype, array.shape)
        assert array.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_views_of_a_shared_storage_scalars_and_empty_tensors(tmp_path):
    base = torch.arange(60.0)
    values = {
        "transposed": base.reshape(5, 12).T,
        "strided": base[7::3],
        "offset": base[40:].reshape(4, 5)[1:, 2:],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[:4]),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    file = open_checkpoint(save(tmp_path / "a.pt", values))
    for name, tensor in values.items():
        np.testing.assert_array_equal(file.tensors[name].read(), tensor.detach().numpy())
    assert file.tensors["strided"].storage is file.tensors["transposed"].storage


def test_arrays_are_read_only_and_outlive_the_file_object(tmp_path):
    array = open_checkpoint(save(tmp_path / "a.pt", {"w": torch.ones(8)})).tensors["w"].read()
    assert array.sum() == 8
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_a_module_state_dict_and_a_size(tmp_path):
    layer = torch.nn.Linear(3, 2)  # its OrderedDict has an attribute, _metadata
    file = open_checkpoint(save(tmp_path / "a.bin", {"state_dict": layer.state_dict(), "size": torch.Size((1, 2))}))
    assert {k: v.shape for k, v in file.tensors.items()} == {"weight": (2, 3), "bias": (2,)}
    assert file.ignored == ["size"]


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.pt", {"w": torch.ones(8)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_checkpoint(path).tensors["w"].read().sum() == 8


@pytest.fixture
def lightning(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    return save_checkpoint(tmp_path / "sd.ckpt", model.state_dict()), model


def test_a_lightning_checkpoint(lightning):
    path, model = lightning
    file = open_checkpoint(path)
    assert list(file.tensors) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(file.tensors[name].read(), tensor.numpy())
    assert {"epoch", "callbacks", "optimizer_states", "lr_schedulers"} <= set(file.ignored)
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in file.foreign
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_nothing_is_imported_for_it(lightning):
    program = (
        "import sys; from sd_jax.weights.torch_zip import open_checkpoint\n"
        "before = set(sys.modules)\n"
        f"file = open_checkpoint({str(lightning[0])!r}); [t.read() for t in file.tensors.values()]\n"
        "new = set(sys.modules) - before\n"
        "assert not new, new\n"
        "assert not {'torch', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_thousand_tensors_are_listed_at_once(tmp_path):
    names = [f"model.diffusion_model.block.{i}.weight" for i in range(1500)]
    path = save(tmp_path / "a.ckpt", {"state_dict": {name: torch.zeros(4, 4) for name in names}})
    start = time.process_time()
    assert list(open_checkpoint(path).tensors) == names
    assert time.process_time() - start < 1  # about 0.05 s on an idle core


def test_what_is_no_checkpoint_is_named(tmp_path):
    legacy = save(tmp_path / "old.pt", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"before version 1\.6.*weights_only=True"):
        open_checkpoint(legacy)
    for content, expected in {
        b"": "is empty",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"<!DOCTYPE html>": "<!DOCTYP",
        b"\x80\x04K\x01.": "bare pickle",
    }.items():
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(WeightsError, match=expected):
            open_checkpoint(tmp_path / "x.ckpt")
    for path in (tmp_path, tmp_path / "missing.ckpt"):
        with pytest.raises(WeightsError, match="is not a file|cannot be read"):
            open_checkpoint(path)


def test_what_holds_no_tensors_is_listed(tmp_path):
    for value, expected in {"nothing": {}, "epoch, 3": {"epoch": 1, 3: 4}}.items():
        with pytest.raises(WeightsError, match=f"no tensors.*{value}"):
            open_checkpoint(save(tmp_path / "a.pt", expected))
    with pytest.raises(WeightsError, match="holds a list where"):
        open_checkpoint(save(tmp_path / "a.pt", [torch.ones(2)]))
    with pytest.raises(WeightsError, match="torch.nn.modules.linear.Linear"):
        open_checkpoint(save(tmp_path / "a.pt", torch.nn.Linear(2, 2)))
