"""Eight devices on the CPU, so that meshes can be tested anywhere."""

import jax
from hypothesis import settings

# Must come before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("tripletjax", deadline=None, print_blob=True)
settings.load_profile("tripletjax")
