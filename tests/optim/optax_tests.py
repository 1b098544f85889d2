"""Runs optax's tests of contributed optimizers over ours: a script of its own process.

    python tests/optim/optax_tests.py FILE NAME

FILE is ``_common_test.py`` or ``_sharding_test.py`` of ``optax/contrib``. Its lists of
optimizers are replaced by ours of that name; everything else is as it is there.
"""

import importlib.util
import inspect
import sys
import unittest
from types import SimpleNamespace
from unittest import mock

import jax
import optax
from absl.testing import parameterized

from jaxpapers import optim

# Shapes depend on these: the test asks to list what cannot be injected.
STATIC = ("rank_fraction", "rank_multiple_of", "fraction")
PLAIN = {"learning_rate": 1e-2, "weight_decay": 0.0}
OPTIONS = {
    "dion": {},
    "dion_residual": {"nesterov": True, "residual": 1.0, "normalize_rows": True},
    "muon": {},
    "normuon": {},
    "dion2": {},
}


def factory(name):
    """dion of "dion_residual"."""
    return getattr(optim, name.partition("_")[0])


def cases(name):
    """As ``_common_test.py`` lists them."""
    options = PLAIN | OPTIONS[name]
    wrapper = {"wrapper_name": None, "wrapper_kwargs": None}
    return [{"opt_name": name, "opt_kwargs": options, **wrapper}]


def transformations(name):
    """As ``_sharding_test.py`` names them: a stack of matrices, or all to AdamW."""
    make, options = factory(name), PLAIN | OPTIONS[name]
    stack = optim.DimensionNumbers(1, 2)
    return {
        name: make(**options),
        f"{name}_stack": make(**options, weight_dimension_numbers=stack),
    }


def load(path, name):
    """The module, its parametrised tests made for ours."""
    product = parameterized.product

    def over_ours(*sequences, **axes):
        return product(*(cases(name) for _ in sequences), **axes)

    def named_over_ours(_):
        return named(transformations(name).items())

    named = parameterized.named_parameters
    spec = importlib.util.spec_from_file_location("optax_tests_of_ours", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.multiple(
        parameterized, product=over_ours, named_parameters=named_over_ours
    ):
        spec.loader.exec_module(module)
    if hasattr(module, "_inject"):
        module._inject = SimpleNamespace(inject_hyperparams=inject)
    return module


def inject(factory, static_args):
    """``optax.inject_hyperparams`` with our static arguments too."""
    known = inspect.signature(factory).parameters
    ours = (x for x in STATIC if x in known)
    return optax.inject_hyperparams(factory, (*static_args, *ours))


def main():
    path, name = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8)
    setattr(optax.contrib, name, factory(name))
    suite = unittest.defaultTestLoader.loadTestsFromModule(load(path, name))
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=2).run(suite)
    print(result.testsRun, len(result.skipped))
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
