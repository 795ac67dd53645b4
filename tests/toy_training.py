"""A task that compiles in a moment, for tests of the training loop: linear regression, with noise from the key."""

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax.train.config import TrainConfig
from sd_jax.train.data import Examples
from sd_jax.train.state import OptimizerConfig
from sd_jax.train.tasks import Task

OPTIMIZER = OptimizerConfig(0.05, warmup=2, decay="linear", ema=0.9)


def config(**changes) -> TrainConfig:
    settings = {"steps": 7, "batch_size": 8, "optimizer": OPTIMIZER, "log_every": 1, "save_every": 4, "max_bad": 2}
    return TrainConfig(**settings | changes)


def make_task(config, folder, start, tokenizer=None, *, stop=None, log=None, broken=()) -> Task:
    """In place of ``tasks.make_task``. Examples number ``broken`` of the 20 have a NaN."""
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)
    y[list(broken)] = np.nan

    def loss(params, batch, key):
        guess = batch["x"] @ params["net"]["w"] + params["net"]["b"]
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        return jnp.mean((guess + noise - batch["y"]) ** 2), {}

    params = {"net": start.get("net", {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)})}
    examples = Examples({"x": x, "y": y}, config.batch_size, config.seed)
    return Task(params, loss, examples, lambda params: np.zeros((3, 8, 8, 3), np.uint8))
