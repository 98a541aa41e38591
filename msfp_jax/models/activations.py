"""Functions between dense layers, by the names that configurations call them.
"""

from collections.abc import Callable
import functools

import jax

_TANH = functools.partial(jax.nn.gelu, approximate=True)
# Three functions share the name GELU: the exact one, its approximation by tanh
# (of which transformers has two spellings), and CLIP's by a sigmoid. They are
# up to 2e-2 apart.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_new': _TANH,
    'gelu_pytorch_tanh': _TANH,
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'swish': jax.nn.silu,
}
