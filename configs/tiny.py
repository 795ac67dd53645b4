"""The model that is embedded in the package (``sd_jax.load("tiny")``).

Command:  python tools/train_tiny.py --workdir runs/tiny        (or: sd-jax train configs/tiny.py --workdir runs/tiny)
Hardware: two CPU cores, 4 GiB of memory; any accelerator that JAX has. On a CPU,
          XLA_FLAGS=--xla_force_host_platform_device_count=2 lets each core have its half of a batch.
Data:     50,000 scenes of 64x64 pixels that it renders itself, two minutes on a core.

The weights in the package came about in two rounds. The first was from nothing: 2800 steps of 8 pictures and 1500 for
the decoder alone, 600 of 64 for the text tower, and 4000 of 48 for diffusion, with seven tenths of its timesteps high.
The second was this, with init_from=tiny where that was the first one's; it took 44 and 74 minutes. From nothing, this
as it stands has not been run.

Expected: 34.7 dB (sd-jax evaluate reconstruction), and of never-seen pairs 99 % right in everything (sd-jax evaluate
compositional --n 128 --steps 20 --batch-size 64).
"""

from sd_jax.config import CLIPConfig, NoiseConfig, SDConfig, UNetConfig, VAEConfig
from sd_jax.train.config import DataConfig, Recipe, TrainConfig, VAELoss
from sd_jax.train.data import scene_tokenizer
from sd_jax.train.losses import NoiseLoss
from sd_jax.train.state import OptimizerConfig


def get_config() -> Recipe:
    model = SDConfig(
        clip=CLIPConfig(vocab_size=scene_tokenizer().vocab_size, width=128, mlp_width=512, layers=3, heads=4),
        unet=UNetConfig(
            widths=(64, 128),
            layers=1,
            attention=(True, True),
            heads=(2, 4),
            context_width=128,
            groups=16,
            sample_size=8,
        ),
        vae=VAEConfig(widths=(16, 32, 64, 128), layers=1, groups=8),  # its scale is measured
        noise=NoiseConfig(sampler="ddim", spacing="trailing", guidance=3.0),
    )
    return Recipe(
        model=model,
        data=DataConfig(scenes=50_000, seed=0),
        vae=TrainConfig(
            task="vae",
            seed=4,
            steps=5000,
            batch_size=16,
            optimizer=OptimizerConfig(1e-3, warmup=100, decay="cosine", b2=0.99, weight_decay=0.0, ema=0.998),
            # So much divergence that the decoder has to put up with latents that are a tenth off: a UNet's are.
            vae_loss=VAELoss(kl=2e-3, mse=4.0, edges=0.5),
            save_every=500,
            preview_every=500,
        ),
        text=TrainConfig(
            task="text",
            seed=1,
            steps=600,
            batch_size=64,
            optimizer=OptimizerConfig(1e-3, warmup=50, decay="cosine", ema=0.99),
            save_every=200,
        ),
        diffusion=TrainConfig(
            task="diffusion",
            seed=5,
            steps=8500,
            batch_size=16,
            repeats=3,
            optimizer=OptimizerConfig(1e-3, warmup=200, decay="linear", b1=0.9, b2=0.99, ema=0.999),
            noise_loss=NoiseLoss(min_snr=5.0, high_share=0.4, high_from=550, high_weight=8.0),
            save_every=500,
            preview_every=1000,
        ),
    )
