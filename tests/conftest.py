"""What all tests share: eight virtual CPU devices, no network, and markers that skip cleanly.

Tests run on the CPU. On a machine with an accelerator, ``JAX_PLATFORMS=cuda,cpu pytest -m gpu`` (or ``tpu,cpu`` and
``-m tpu``) runs those that need one. ``--no-full`` leaves out the ones at the full v1-4 size.
"""

import os

# Before jax and huggingface_hub are imported: both read their environment once.
_FLAGS = {
    "xla_force_host_platform_device_count": "8",
    # Tests compile many small programs and run each a few times: this halves the time of the whole suite.
    "xla_backend_optimization_level": "0",
}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_given, *(f"--{k}={v}" for k, v in _FLAGS.items() if k not in _given)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import ipaddress  # noqa: E402
import socket  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from sd_jax.config import NANO  # noqa: E402
from tests.random_weights import params_like  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--no-full", action="store_true", help="leave out the tests at the full v1-4 size")


def pytest_runtest_setup(item):
    if item.get_closest_marker("full") and item.config.getoption("--no-full"):
        pytest.skip("--no-full was given")
    for platform in ("gpu", "tpu"):
        if item.get_closest_marker(platform) and not _has(platform):
            pytest.skip(f"no {platform} among JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}")


def _has(platform: str) -> bool:
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Reaching beyond this machine is an error that no ``except OSError`` swallows. Loopback and unix sockets work."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host):
        if not _is_loopback(host):
            raise RuntimeError(f"a test reached for the network: {host!r}")

    def guarded(method):
        def call(self, address, *args):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return method(self, address, *args)

        return call

    def look_up(host, *args, **kwargs):
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def _is_loopback(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", "0.0.0.0", "::", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@pytest.fixture
def highest():
    """Exact float32 products, also where the hardware has faster ones."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def nano_params():
    """Random parameters of NANO, {"clip", "unet", "vae"}, without compiling an initialiser."""
    from sd_jax.models.clip import CLIPText
    from sd_jax.models.unet import UNet
    from sd_jax.models.vae import VAE

    context = jnp.zeros((1, NANO.clip.positions, NANO.clip.width))
    size = NANO.unet.sample_size
    return {
        "clip": params_like(CLIPText(NANO.clip), jnp.zeros((1, NANO.clip.positions), int)),
        "unet": params_like(UNet(NANO.unet), jnp.zeros((1, size, size, 4)), jnp.zeros(1), context),
        "vae": params_like(VAE(NANO.vae), jnp.zeros((1, NANO.default_size, NANO.default_size, 3))),
    }
