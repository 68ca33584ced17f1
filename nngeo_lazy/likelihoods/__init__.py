"""The quantity axis: likelihoods, as output directions and loss-Hessian products.

The outputs of N examples are a tensor (N, ...). A *direction* is a cotangent shaped like it whose
n-th row is a column of S_n. S_n S_n^T is the Hessian of example n's loss in its outputs. If the
loss is a likelihood's, it is the Fisher information of the outputs. The loss of an example sums
over its positions. Exact roots have as few columns as possible.
"""

from __future__ import annotations

from .categorical import Categorical
from .dispersed import NegativeBinomial, StudentT
from .distributions import FromDistribution
from .elementwise import Bernoulli, Poisson
from .gaussian import Gaussian
from .heteroscedastic import HeteroscedasticGaussian
from .joint import Joint
from .likelihood import ESTIMATORS, Estimator, Likelihood, check_estimator
from .losses import CallableLoss, Reduction, resolve_loss
from .names import NAMES, LikelihoodLike, described, of_heads, resolve
from .preferences import BradleyTerry
from .weighted import Weighted

__all__ = [
    "ESTIMATORS",
    "NAMES",
    "Bernoulli",
    "BradleyTerry",
    "CallableLoss",
    "Categorical",
    "Estimator",
    "FromDistribution",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Joint",
    "Likelihood",
    "LikelihoodLike",
    "NegativeBinomial",
    "Poisson",
    "Reduction",
    "StudentT",
    "Weighted",
    "check_estimator",
    "described",
    "of_heads",
    "resolve",
    "resolve_loss",
]
