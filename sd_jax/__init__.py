"""sd_jax: Stable Diffusion v1-4 in JAX/Flax. ``sd_jax.load()`` gives a pipeline; see the README."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load": "pipeline",
    "Pipeline": "pipeline",
    "LicenceNotice": "pipeline",
    "NotFinite": "pipeline",
    "SAMPLERS": "diffusion.samplers",
    "SPACINGS": "diffusion.schedule",
    "SDConfig": "config",
    "SD_V1_4": "config",
    "NANO": "config",
    "RequestError": "types",
    "WeightsError": "types",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    """Public names are imported when they are first used, so that ``import sd_jax`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sd_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sd_jax.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
