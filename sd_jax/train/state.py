"""One training step: a pure function from state and batch to state and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sd_jax.types import Array

Loss = Callable[[Any, Any, Array], tuple[Array, dict[str, Array]]]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on: the loop's only state, and what a checkpoint holds."""

    step: Array  # int32, updates done or skipped so far
    params: Any
    ema: Any  # exponential moving average of params: what sampling and evaluation use
    opt_state: Any
    bad: Array  # int32, consecutive steps skipped because their loss or gradient was not finite


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, as Stable Diffusion v1 was trained; ``decay`` is what happens after the warm-up."""

    learning_rate: float = 1e-4
    warmup: int = 10_000
    decay: str = "constant"  # or "cosine" or "linear", both to 0 at the last step
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip: float | None = 1.0  # global norm of the gradient
    ema: float = 0.9999


DECAYS = ("constant", "cosine", "linear")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Update number -> learning rate; ``steps`` is the length of the whole run."""
    rest = max(steps - config.warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
    }[config.decay]
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup, 1))
    return optax.join_schedules([warmup, after], [config.warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax chain; ``steps`` is the length of the whole run."""
    rate = learning_rate(config, steps)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay))


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # Copies and a zero each: the step donates its state, and one buffer cannot be donated twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        bad=jnp.zeros((), jnp.int32),
    )


def train_step(
    state: TrainState,
    batch: Any,
    key: Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of ``state`` by ``loss(params, batch, key) -> (scalar, metrics)``.

    ``key`` is the run's: the step's own is folded in here, so a resumed run draws what an undisturbed one would have.
    A step whose loss or gradient is not finite changes nothing but the counters.
    Returns the new state, and metrics with ``loss`` and ``grad_norm`` (float32 scalars).
    """
    key = jax.random.fold_in(key, state.step)
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(norm)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, ema)
    average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        ema=keep(average, state.ema),
        opt_state=keep(opt_state, state.opt_state),
        bad=jnp.where(good, 0, state.bad + 1),
    )
    return state, {"loss": value, "grad_norm": norm, **metrics}


def ema_decay(step: Array, limit: float) -> Array:
    """min(limit, (1 + n) / (10 + n)): short memory while there is little to remember. CompVis ema.py."""
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(limit, (1 + n) / (10 + n))
