"""What TPUs have measured of these kernels: nothing so far."""

from msfp_jax.kernels import slower

# Products that XLA computes faster, which `choice.pick` leaves to it.
SLOWER: tuple[slower.Slower, ...] = ()
