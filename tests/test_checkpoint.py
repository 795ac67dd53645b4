"""weights/checkpoint.py: the training state comes back exactly, wherever it is wanted, or an error says why not."""

import json
import os
import subprocess

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sd_jax.types import RequestError
from sd_jax.weights import checkpoint


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt: optax.OptState
    ema: dict | None
    key: jax.Array


def make_state(seed=0, ema=True, width=16):
    key = jax.random.key(seed)
    params = {"unet": {"kernel": jax.random.normal(key, (8, width)), "half": jnp.full(3, 1 / 3, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt = optimizer.update(params, optimizer.init(params), params)[1]
    return State(jnp.int32(seed), params, opt, jax.tree.map(lambda x: x / 2, params) if ema else None, key)


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = make_state(3)
    extra = {"epoch": 2, "position": 12345678901, "config": {"lr": 1e-4, "name": "ä"}}
    path = checkpoint.save(tmp_path / "new" / "run", 7, state, extra)
    assert path == tmp_path / "new" / "run" / "00000007"
    restored, step, found = checkpoint.restore(tmp_path / "new" / "run", abstract(state))
    assert step == 7 and found == extra
    assert_same(restored, state)
    assert checkpoint.problems(tmp_path / "new" / "run", 7) == []


def test_the_list_is_one_that_sha256sum_reads(tmp_path):
    path = checkpoint.save(tmp_path, 1, make_state())
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path).returncode == 0
    listed = {line.split("  ", 1)[1] for line in (path / "SHA256SUMS").read_text().splitlines()}
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert present == listed | {"SHA256SUMS"}


def test_the_newest_are_kept_and_any_can_be_asked_for(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.steps(tmp_path / "none") == []
    states = {step: make_state(step) for step in (5, 10, 100_000_000)}
    checkpoint.save(tmp_path, 1, make_state(1), keep=2)
    for step, state in states.items():
        checkpoint.save(tmp_path, step, state, {"at": step}, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 100_000_000] and checkpoint.latest(tmp_path) == 100_000_000
    assert sorted(os.listdir(tmp_path)) == ["00000010", "100000000"]
    restored, step, extra = checkpoint.restore(tmp_path, abstract(states[10]), step=10)
    assert step == 10 and extra == {"at": 10}
    assert_same(restored, states[10])
    with pytest.raises(RequestError, match=r"step 5 \(it is not there\)"):
        checkpoint.restore(tmp_path, abstract(states[5]), step=5)


def test_gone_back_to_an_earlier_step_the_new_one_is_never_pruned(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make_state(step))
    checkpoint.save(tmp_path, 2_000, make_state(), keep=9)
    (tmp_path / "00002000" / "record.json").unlink()
    checkpoint.save(tmp_path, 4, make_state(4), keep=1)
    assert checkpoint.steps(tmp_path) == [4, 2000]


def test_an_intact_step_is_not_saved_over(tmp_path):
    state = make_state(1)
    checkpoint.save(tmp_path, 1, state)
    with pytest.raises(RequestError, match="step 1 is already saved"):
        checkpoint.save(tmp_path, 1, make_state(2))
    assert_same(checkpoint.restore(tmp_path, abstract(state))[0], state)


def test_a_broken_step_is_replaced(tmp_path):
    path = checkpoint.save(tmp_path, 1, make_state(1))
    (path / "SHA256SUMS").unlink()
    state = make_state(2)
    checkpoint.save(tmp_path, 1, state)
    assert_same(checkpoint.restore(tmp_path, abstract(state))[0], state)


def test_restores_into_any_sharding(tmp_path):
    devices = jax.devices()
    state = make_state()
    checkpoint.save(tmp_path, 1, state)
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    restored, _, _ = checkpoint.restore(tmp_path, abstract(state, everywhere))
    assert_same(restored, state)
    assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(restored))
    if len(devices) > 1 and 8 % len(devices) == 0:
        split = abstract(state, everywhere)
        kernel = split.params["unet"]["kernel"]
        rows = NamedSharding(mesh, PartitionSpec("batch"))
        split.params["unet"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=rows)
        restored, _, _ = checkpoint.restore(tmp_path, split)
        assert_same(restored, state)
        assert restored.params["unet"]["kernel"].sharding.is_equivalent_to(rows, 2)
        checkpoint.save(tmp_path, 2, restored)
    restored, _, _ = checkpoint.restore(tmp_path, abstract(state))
    assert_same(restored, state)
    assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    "wanted, message",
    [
        (lambda: make_state(ema=True), "missing there ema/unet/half, ema/unet/kernel;"),
        (lambda: make_state(ema=False).replace(opt=()), "only there opt/1/0/count, opt/1/0/mu/unet/half"),
        (lambda: make_state(ema=False, width=8), r"params/unet/kernel float32\[8,16\] not float32\[8,8\]"),
        (lambda: make_state(ema=False).replace(step=jnp.float32(0)), r"different there step int32\[\] not float32\[\]"),
    ],
)
def test_a_state_of_another_shape_is_an_error(tmp_path, wanted, message):
    checkpoint.save(tmp_path, 1, make_state(ema=False))
    with pytest.raises(RequestError, match=message) as caught:
        checkpoint.restore(tmp_path, abstract(wanted()))
    assert "start a new run from weights" in str(caught.value) and "\n" not in str(caught.value)


def test_an_extra_that_is_not_json_is_found_before_writing(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, make_state(), {"x": object()})
    assert os.listdir(tmp_path) == []


def test_nothing_to_restore(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RequestError, match="has no step that can be restored, it is empty or not there"):
            checkpoint.restore(folder, abstract(make_state()))
    with pytest.raises(RequestError, match="is an address"):
        checkpoint.save("gs://bucket/run", 1, make_state())


def test_the_record_says_what_was_saved(tmp_path):
    path = checkpoint.save(tmp_path, 1, make_state(), {"a": 1})
    record = json.loads((path / "record.json").read_text())
    assert record["step"] == 1 and record["extra"] == {"a": 1}
    assert record["leaves"]["params/unet/half"] == "bfloat16[3]"
