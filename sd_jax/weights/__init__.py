"""Weights: read from and written to every layout that Stable Diffusion v1 comes in, without torch."""
