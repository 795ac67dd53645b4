"""``python -m sd_jax`` is ``sd-jax``."""

import sys

from sd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
