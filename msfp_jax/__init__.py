"""msfp-jax: trained diffusion models as 4-bit floating-point models, in JAX.

The public names. MSFP, TALoRA and DFA are those of arXiv 2505.21591.
"""

import msfp_jax.base.quiet  # noqa: F401, isort: skip; before JAX
from msfp_jax.base import version
from msfp_jax.convert import load_first_stage
from msfp_jax.convert import load_lora
from msfp_jax.convert import load_plan
from msfp_jax.convert import load_pretrained
from msfp_jax.convert import merge_loras
from msfp_jax.diffusion import make_plan
from msfp_jax.diffusion import make_schedule
from msfp_jax.diffusion import sample
from msfp_jax.kernels.apply import QuantizedModel
from msfp_jax.packed.drift import correct_drift
from msfp_jax.packed.file import load
from msfp_jax.packed.file import save
from msfp_jax.packed.model import pack
from msfp_jax.packed.model import PackedModel
from msfp_jax.packed.streamed import pack_streamed
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.functional import fake_quant
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantize import quantize
from msfp_jax.quant.recipes import Recipe
from msfp_jax.quant.recipes import RECIPES
from msfp_jax.quant.spec import QuantSpec

__all__ = [
    'FPFormat', 'PackedModel', 'QuantSpec', 'QuantizedModel', 'RECIPES',
    'Recipe', 'calibrate', 'correct_drift', 'fake_quant', 'load',
    'load_first_stage', 'load_lora', 'load_plan', 'load_pretrained',
    'make_plan', 'make_schedule', 'merge_loras', 'pack', 'pack_streamed',
    'quantize', 'sample', 'save',
]
__version__ = version.VERSION
