"""How well pictures survive the autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def psnr(reconstruct: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int = 32) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB, float64 [N]: 10 log10(255^2 / mean squared error).

    ``images`` uint8 [N, H, W, 3]; ``reconstruct`` takes and gives such, always ``batch`` of them. A picture that comes
    back as it was has infinitely many.
    """
    found = []
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        full = np.concatenate([some, np.repeat(some[-1:], batch - len(some), 0)])
        error = reconstruct(full)[: len(some)].astype(np.float64) - some
        with np.errstate(divide="ignore"):
            found.append(10 * np.log10(255**2 / np.mean(error**2, axis=(1, 2, 3))))
    return np.concatenate(found)
