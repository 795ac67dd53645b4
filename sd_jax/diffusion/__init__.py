"""The mathematics of diffusion: pure functions of arrays and callables, without networks."""
