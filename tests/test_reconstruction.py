"""The PSNR of an autoencoder, on ones whose answer is known."""

import numpy as np

from sd_jax.evaluate.reconstruction import psnr

IMAGES = np.random.default_rng(0).integers(20, 200, (5, 8, 6, 3), np.uint8)


def test_a_known_error_has_a_known_ratio():
    seen = []

    def brighter(images):
        seen.append(images.shape)
        return images + np.uint8(5)

    np.testing.assert_allclose(psnr(brighter, IMAGES, batch=2), 20 * np.log10(255 / 5))
    assert seen == [(2, 8, 6, 3)] * 3, "one compiled program makes them all"


def test_each_picture_has_its_own():
    def spoil_the_first(images):
        return np.where((images == IMAGES[0]).all((1, 2, 3), keepdims=True), 255 - images, images)

    found = psnr(spoil_the_first, IMAGES)
    assert found[0] < 20 and np.isinf(found[1:]).all()
