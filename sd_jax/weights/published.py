"""SHA-256 of published v1 weights, as they are publicly documented.

Those of sd-v1-4, v1-5, the inpainting model and the autoencoders stand in several independent public lists (file pages
of the hub, installers that check them); those of v1-1 to v1-3 in the table by which deforum-stable-diffusion
(helpers/model_load.py) checks its downloads. None of the files was at hand when this was written.
"""

NAMES = {
    "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea": "sd-v1-1.ckpt",
    "efdeb5dc418a025d9a8cc0a8617e106c69044bc2925abecc8a254b2910d69829": "sd-v1-1-full-ema.ckpt",
    "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d": "sd-v1-2.ckpt",
    "bc5086a904d7b9d13d2a7bccf38f089824755be7261c7399d92e555e1e9ac69a": "sd-v1-2-full-ema.ckpt",
    "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f": "sd-v1-3.ckpt",
    "54632c6e8a36eecae65e36cb0595fab314e1a1545a65209f24fde221a8d4b2ca": "sd-v1-3-full-ema.ckpt",
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": "sd-v1-4.ckpt",
    "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a": "sd-v1-4-full-ema.ckpt",
    "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": "v1-5-pruned.ckpt",
    "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6": "v1-5-pruned.safetensors",
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "v1-5-pruned-emaonly.ckpt",
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "v1-5-pruned-emaonly.safetensors",
    "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19": "sd-v1-5-inpainting.ckpt",
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": "vae-ft-mse-840000-ema-pruned.ckpt",
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": "vae-ft-mse-840000-ema-pruned.safetensors",
    "0b204ad0cae549e0a7e298d803d57e36363760dec71c63109c1da3e1147ec520": "vae-ft-ema-560000-ema-pruned.ckpt",
    "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815": "sd-vae-ft-mse (diffusers, .safetensors)",
    "1b4889b6b1d4ce7ae320a02dedaeff1780ad77d415ea0d744b476155c6377ddc": "sd-vae-ft-mse (diffusers, .bin)",
    "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46": "sd-vae-ft-ema (diffusers, .safetensors)",
}
