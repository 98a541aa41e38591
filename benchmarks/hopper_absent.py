"""An H200 that is not there, and the cases of benchmarks/hopper for it."""

from collections.abc import Iterable
import contextlib
import functools
import pathlib
import time
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
import numpy as np

from benchmarks import hopper_cases
from benchmarks import packed_models
from benchmarks.hopper_cases import Case
from benchmarks.hopper_cases import Method
from msfp_jax.kernels import carriers

TARGET = pathlib.Path(__file__).parents[1] / 'tests' / 'h200.txtpb'


def sharding() -> jax.sharding.NamedSharding:
  """Returns one on the H200; needs JAX's plugin for CUDA."""
  # Else JAX looks for a GPU that is there.
  jax.config.update('jax_platforms', 'cpu')
  topology = topologies.get_topology_desc(
      platform='cuda', topology='1x1x1', target_config=TARGET.read_text())
  return jax.sharding.NamedSharding(
      topologies.make_mesh(topology, (1,), ('x',)),
      jax.sharding.PartitionSpec())


def describe(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error)[:120]}'.replace('\n', ' ')


def _no_device(sharding):
  """Lets jax 0.11 and later lower where there is not even a topology."""
  if sharding is not None or jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(
      device_kind='NVIDIA H200', num_cores=132, platform='cuda')
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (1,), ('x',), abstract_device=device))


def shapes(case: Case, method: Method) -> list[tuple[tuple[int, ...], Any]]:
  """Shapes and dtypes of what a way to compute a case takes."""
  dtype = carriers.DTYPES[method.carrier][0]
  n, *window = (case.w_shape[-1], *case.w_shape[:-2])
  weights = (n, *window, case.k), dtype
  if method.packed:
    weights = (-(-n // 64) * 64, *window, -(-case.k // 64) * 32), np.uint8
  column = (n,), np.float32
  return [(case.x_shape, dtype), weights, column, column, *[
      (shape, np.uint8 if name == 'flags' else np.float32)
      for name, shape in method.more.items()]]


def lower(case: Case, method: Method, sharding=None) -> jax.stages.Lowered:
  """Lowers a way to compute a case; it can be compiled with a sharding."""
  with _no_device(sharding):
    return jax.jit(method.function).trace(*(
        jax.ShapeDtypeStruct(*shape, sharding=sharding)
        for shape in shapes(case, method))
    ).lower(lowering_platforms=('cuda',))


def _compile_sampling(samples: int, sharding) -> None:
  """Compiles a step of packed sampling."""
  subject = packed_models.make(num_steps=1)
  shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
    model = subject.simulated.packed()
    arrays, (x, t) = jax.tree.map(
        shape, (model.arrays, packed_models.inputs(samples)))
    jax.jit(lambda arrays, x, t: model.with_arrays(arrays).eps_fn(x, t, 0)
            ).trace(arrays, x, t).lower(lowering_platforms=('cuda',)).compile()


def compile_all(cases: Iterable[Case], samples: int) -> int:
  """Compiles all cases; prints the outcomes, returns how many fail.

  Args:
    cases: in all of `hopper_cases.methods`.
    samples: of a step of packed sampling; 0: without that.
  """
  device = sharding()
  compile_ = lambda case, method: lower(case, method, device).compile()
  parts = [(f'{case.name:12} {method.name:28}',
            functools.partial(compile_, case, method))
           for case in cases for method in hopper_cases.methods(case)]
  if samples:
    parts.append(('sampling', functools.partial(
        _compile_sampling, samples, device)))
  failed = 0
  for name, work in parts:
    start = time.perf_counter()
    try:
      work()
      said = 'compiles'
    except Exception as error:  # noqa: BLE001 - the others go on
      failed += 1
      said = describe(error)
    print(f'{name} {said} ({time.perf_counter() - start:.1f} s)', flush=True)
  return failed
