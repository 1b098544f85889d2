r"""Exact Gaussian processes in buffers of a fixed size.

A process f ~ GP(m0, k), with a length scale for each input (``kernels``), observed with
noise of variance s2:

$$ y = f(x) + \varepsilon, \quad \varepsilon \sim N(0, s_2), \qquad
   C = k(X, X) + s_2 I = L L^\top, \quad \alpha = C^{-1} (y - m_0) $$
$$ E f(q) = m_0 + k(q, X) \alpha, \quad
   \mathrm{cov}(f(q), f(q')) = k(q, q') - k(q, X) C^{-1} k(X, q') $$
$$ \log p(y) = -\tfrac12 (y - m_0)^\top \alpha - \sum_i \log L_{ii}
   - \tfrac n2 \log 2\pi $$

- ``regression``: ``fit``, ``predict``, ``append`` (one more observation in O(n^2)),
  ``refit`` (other observations of the same inputs), evidence, information gain.
- ``temporal``: values observed through rewards, with two laws of the noise.
- ``samples``: functions drawn from a posterior, by random features and Matheron's rule.
- ``evidence``: hyper-parameters of the largest evidence within bounds.
- ``retention``: which observations to keep when a buffer is full.

A buffer has a fixed number of rows, of which ``mask`` says which are observations; the
rest is padding, never read, so that nothing is compiled again as data grow. Where a
covariance cannot be factorised, jitter is added, ten times as much each time; if none is
enough, an error (see ``fit``). Computations are in the dtype of the inputs, float32 or
float64. ``Model`` is a pytree: ``jax.vmap`` over it fits several processes at once.

Reference: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006.
"""

from jaxpapers.ops.gaussian_process.evidence import Maximum, maximise
from jaxpapers.ops.gaussian_process.kernels import (
    KINDS,
    Model,
    kernel_matrix,
    model,
    split,
    stationary,
)
from jaxpapers.ops.gaussian_process.regression import (
    Link,
    Observations,
    Posterior,
    append,
    check_finite,
    condition,
    covariance,
    cross,
    evidence,
    expected_variance,
    factor,
    fit,
    information_gain,
    log_evidence,
    observations,
    predict,
    refit,
    solve,
)
from jaxpapers.ops.gaussian_process.retention import keep_by_variance
from jaxpapers.ops.gaussian_process.samples import (
    Features,
    Function,
    draw_noise,
    draw_prior,
    evaluate,
    evaluate_prior,
    feature_map,
    observed,
    pathwise,
    prior_covariance,
    random_features,
    sample,
    sample_joint,
)
from jaxpapers.ops.gaussian_process.temporal import (
    NOISES,
    differences,
    draw_td_noise,
    fit_td,
)

__all__ = [
    "KINDS", "NOISES", "Features", "Function", "Link", "Maximum", "Model",
    "Observations", "Posterior", "append", "check_finite", "condition", "covariance",
    "cross", "differences", "draw_noise", "draw_prior", "draw_td_noise", "evaluate",
    "evaluate_prior", "evidence", "expected_variance", "factor", "feature_map", "fit",
    "fit_td", "information_gain", "keep_by_variance", "kernel_matrix", "log_evidence",
    "maximise", "model", "observations", "observed", "pathwise", "predict",
    "prior_covariance", "random_features", "refit", "sample", "sample_joint", "solve",
    "split", "stationary",
]  # fmt: skip
