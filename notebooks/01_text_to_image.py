# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Text to image with sd_jax
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sd-jax/sd_jax/blob/main/notebooks/01_text_to_image.ipynb)
#
# From a sentence to a picture, from a picture to another, and then inside: a sampler of your own, and what attention
# looks at. Everything here runs on a TPU, a GPU or a laptop's CPU, and needs no download: it uses the small model that
# comes with the package, which knows coloured cubes, spheres, cylinders and cones in pictures of 64x64 pixels, and
# nothing else. The same lines work with Stable Diffusion v1-4; how to load that one comes below.

# %% [markdown]
# ## Install
#
# Choose the line for your machine (in Colab, *Runtime > Change runtime type*), take away its `#`, and run it once.

# %%
# # !pip install "sd_jax[tpu]"     # TPU
# # !pip install "sd_jax[cuda13]"  # NVIDIA GPU
# # !pip install sd_jax            # CPU

# %% [markdown]
# The first picture of each kind compiles a program, which takes a while. JAX can keep such programs on disk, so that
# the next session has them at once.

# %%
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import sd_jax
from sd_jax import pipeline
from sd_jax.diffusion import draws
from sd_jax.diffusion.samplers import sample
from sd_jax.images import grid, to_uint8
from sd_jax.types import pytree

jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sd_jax" / "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.devices()

# %%
pipe = sd_jax.load("tiny")


def show(images, columns=4, scale=2):
    """Pictures, uint8 [B, H, W, 3], side by side and enlarged."""
    picture = Image.fromarray(grid(np.asarray(images), columns))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


# %% [markdown]
# ## A sentence, a picture
#
# A list of prompts gives a batch of pictures, uint8 `[B, height, width, 3]`. `guidance` says how closely to follow the
# prompt: each checkpoint has its own, 3 for this model and 7.5 for v1-4, which is taken where you leave it out.

# %%
STEPS, GUIDANCE = 15, 3.0
prompts = [
    "a red cube on top of a blue sphere",
    "a green cone to the left of a yellow cube",
    "a purple cylinder behind an orange sphere",
    "a large cyan sphere",
]
images = pipe.text_to_image(prompts, seed=0, steps=STEPS, guidance=GUIDANCE)
show(images)

# %% [markdown]
# ## Seeds
#
# Every picture has a seed of its own, and depends on that and its prompt alone, not on the batch it is made in. With
# `seed=s`, picture i has the seed s + i; `seeds` names each. One prompt is enough for all.

# %%
prompt = prompts[0]
show(pipe.text_to_image(prompt, seeds=[0, 1, 2, 3], steps=STEPS, guidance=GUIDANCE))

# %% [markdown]
# ## Guidance, and what to stay away from
#
# One seed, and guidance from none to too much. Prompts, seeds and guidance are data of the compiled program: another
# size, batch size, number of steps or sampler compiles anew.

# %%
show(pipe.text_to_image(prompt, seeds=[5] * 4, steps=STEPS, guidance=[1.0, 2.0, 4.0, 12.0]))

# %% [markdown]
# A negative prompt takes the place of the empty one that guidance leads away from. Here, cubes that are anything but
# red, and then anything but small.

# %%
negatives = ["", "a red cube", "a blue cube", "a small cube"]
show(pipe.text_to_image("a cube", negative=negatives, seeds=[8] * 4, steps=STEPS, guidance=GUIDANCE))

# %% [markdown]
# ## Another sampler
#
# `sampler` is one of the names below, `spacing` where its steps lie; by default both are the checkpoint's own. Samplers
# of higher order need fewer steps.

# %%
print(*sd_jax.SAMPLERS)
print(*sd_jax.SPACINGS)
show(pipe.text_to_image(prompts, seed=0, steps=8, guidance=GUIDANCE, sampler="dpmpp_2m"))

# %% [markdown]
# ## From a picture to another
#
# `strength` is how much of a picture is made anew: near 0 it stays as it is, at 1 only its noise decides.

# %%
recoloured = [
    "a yellow cube on top of a green sphere",
    "a purple cone to the left of a red cube",
    "a blue cylinder behind a gray sphere",
    "a large orange sphere",
]
changed = pipe.image_to_image(recoloured, images, strength=0.8, steps=STEPS, guidance=GUIDANCE)
show(np.concatenate([images, changed]))

# %% [markdown]
# ## Repainting a part
#
# Where the mask is not zero the picture is painted anew, here its upper half; the rest is kept.

# %%
masks = np.zeros(images.shape[:3], np.uint8)
masks[:, : images.shape[1] // 2] = 255
tops = [f"a {colour} cone on top of a blue sphere" for colour in ("green", "yellow", "purple", "gray")]
repainted = pipe.inpaint(tops, images[:1], masks, steps=STEPS, guidance=GUIDANCE)
show(np.concatenate([images[:1].repeat(4, 0), repainted]))

# %% [markdown]
# ## Stable Diffusion v1-4
#
# ```python
# pipe = sd_jax.load("CompVis/stable-diffusion-v1-4")     # a hub id: 4 GB, fetched once
# pipe = sd_jax.load("sd-v1-4.ckpt")                      # or one file, .ckpt or .safetensors
# pipe = sd_jax.load("my_model/")                         # or a folder in diffusers' layout
# images = pipe.text_to_image("a photograph of an astronaut riding a horse", steps=50, guidance=7.5)
# show(images, scale=1)
# ```
#
# Its weights have a licence of their own, CreativeML OpenRAIL-M, which `load` tells you about.

# %% [markdown]
# ## A sampler of your own
#
# Under the pipeline lie pure functions in which everything is an argument: the model `pipe.sd`, its parameters, a plan
# of the steps, tokens, seeds. They are the same under `jit`, `vmap`, `grad` and on many devices. A sampler is a pair
# of functions too, `init` and `step`, where `x = alpha * x0 + sigma * eps` and `s` says which level the step leaves and
# which it goes to. This is DDIM:


# %%
@pytree
class MySampler:
    """Song et al. 2020, eq. 12. ``eta`` is the share of fresh noise: 0 is the deterministic ODE, 1 is DDPM."""

    eta: float = 0.0

    def init(self, x):
        return ()

    def step(self, denoise, x, state, s, keys):
        eps, aux = denoise(x, s)
        x0 = (x - s.sigma * eps) / s.alpha
        ratio = (s.alpha * s.sigma_next) / (s.alpha_next * s.sigma)
        std = self.eta * s.sigma_next * jnp.sqrt(jnp.maximum(1 - ratio**2, 1e-12))
        x = s.alpha_next * x0 + jnp.sqrt(s.sigma_next**2 - std**2) * eps
        return x + std * draws.draw(keys, x), state, aux


# %%
text_to_image = jax.jit(pipeline.text_to_image, static_argnames=("sd", "size"))

size = (pipe.sd.config.default_size,) * 2
plan = pipeline.make_plan(pipe.sd.config.noise, STEPS, "ddim")
tokens = np.stack([pipe.tokenizer.encode(["", text]).tokens for text in prompts])  # [B, 2, 1, 77]: empty, prompt
seeds = draws.seed_words([0, 1, 2, 3])
guidance = np.full(len(prompts), GUIDANCE, np.float32)


def run(sampler):
    return text_to_image(pipe.sd, pipe.params, plan.replace(sampler=sampler), tokens, seeds, guidance, size=size)


mine = to_uint8(run(MySampler()))
difference = np.abs(np.asarray(mine, int) - images).max()
print(f"largest difference from the built-in ddim: {difference} of 255")
show(np.concatenate([mine, to_uint8(run(MySampler(eta=1.0)))]))  # eta is data as well: nothing is compiled anew

# %% [markdown]
# ## What attention looks at
#
# An attention edit says which layers it wants to see (`where`), is given their probabilities, and returns those to be
# used instead. This one changes nothing, but what it returns is reported in `aux`, and `sample` collects it from
# every step. Shown are, for each word, the places of the picture that looked at it.


# %%
@pytree
class Watch:
    def where(self, site):
        return site.cross and site.place == "up" and site.level == 0

    def __call__(self, probs, site, s):  # [B, 2, heads, places, 77]; 0 is the empty prompt, 1 the prompt
        return probs


@functools.partial(jax.jit, static_argnames=("sd", "size"))
def watch(sd, params, plan, tokens, seeds, guidance, size):
    """-> images [B, H, W, 3], and how much each place looked at each token [B, places, 77], over steps and layers."""

    def collect(x, s, aux):
        layers = jnp.stack(jax.tree.leaves(aux["intermediates"]))
        return layers[:, :, 1].mean(axis=(0, 2))

    denoise = pipeline.make_denoise(sd, params, tokens, guidance, attn_edit=Watch())
    x = plan.scale * pipeline.starting_latents(sd, seeds, size)
    x, maps = sample(plan.sampler, denoise, x, plan.steps, draws.keys(seeds), collect=collect)
    return pipeline.decode(sd, params, x), maps.mean(axis=0)


# %%
picture, maps = watch(pipe.sd, pipe.params, plan, tokens[:1], seeds[:1], guidance[:1], size)
words = ["red", "cube", "top", "blue", "sphere"]
height, width = (side // pipe.sd.config.vae.factor for side in size)
panels = [np.asarray(to_uint8(picture))[0]]
for word in words:
    looked = np.asarray(maps)[0][:, pipe.tokenizer.positions(prompts[0], word)].sum(axis=-1).reshape(height, width)
    looked = np.kron(looked / looked.max(), np.ones((size[0] // height, size[1] // width)))
    panels.append(np.repeat(np.uint8(255 * looked)[..., None], 3, axis=-1))
print("the picture", *words, sep=", ")
show(np.stack(panels), columns=6)
