"""Checkpoints as the trainer of CompVis left them: weights among the objects of PyTorch Lightning and of NumPy."""

import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

_MODULES = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")


def save_checkpoint(path: Path, state_dict: dict[str, "torch.Tensor"]) -> Path:
    """Lightning's classes exist only while this writes."""

    class ModelCheckpoint:
        def __init__(self):
            self.best = torch.tensor(0.25)
            self.paths = {"a": [1, 2, (3,)]}

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = _MODULES[-1], "ModelCheckpoint"
    modules = {name: types.ModuleType(name) for name in _MODULES}
    modules[_MODULES[-1]].ModelCheckpoint = ModelCheckpoint
    layer = torch.nn.Linear(4, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state_dict,
        "callbacks": {ModelCheckpoint: {"state": ModelCheckpoint(), "best_score": np.float64(0.1)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last": np.int64(3), "lrs": np.arange(3.0), "seen": {1, 2}, "frozen": frozenset((3,))}],
        "rng": np.random.default_rng(0),
        "path": Path("x"),
        "big": 1 << 100,
    }
    with mock.patch.dict(sys.modules, modules):
        torch.save(value, path)
    return path
