"""What the oracle tests share: a network with labels, the package's Fisher and the oracle's."""

import torch

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

import oracle
import zoo

LIKELIHOODS = {
    "categorical": lambda outputs: Categorical(class_dim=outputs.dim() - 1),
    "gaussian": lambda outputs: Gaussian(oracle.VARIANCE),
    "bernoulli": lambda outputs: Bernoulli(),
    "poisson": lambda outputs: Poisson(),
    "covariance": lambda outputs: Gaussian(oracle.covariance(outputs.shape[-1])),
}


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm().clamp_min(1e-12), (a - b).norm() / b.norm()


SEED, SAMPLES = 3, 2


class Case:
    """A network with labels, the package's Fisher and the oracle's."""

    def __init__(self, net: zoo.Net, likelihood: str, estimator: str):
        self.net, self.likelihood, self.estimator = net, likelihood, estimator
        with torch.no_grad():
            out = torch.cat([oracle.outputs(net.model, net.call, e) for e in net.examples])
        self.outputs, self.labels = out, oracle.targets(likelihood, out)
        self.object = LIKELIHOODS[likelihood](out)

    def build(self, representation, **options):
        if self.estimator == "mc":
            options = {"seed": SEED, "samples": SAMPLES, **options}
        return ng.FIM(
            self.net.model,
            self.net.batch,
            representation,
            likelihood=self.object,
            estimator=self.estimator,
            target=lambda batch: self.labels,
            forward=self.net.forward,
            **options,
        )

    def expected(self):
        if self.estimator == "mc":  # of the same draws
            generator = torch.Generator().manual_seed(SEED)
            drawn = self.object.directions(
                self.outputs, self.labels, "mc", samples=SAMPLES, generator=generator
            )
            stacked = torch.stack(list(drawn))
            return oracle.from_directions(self.net.model, self.net.call, self.net.examples, stacked)
        return oracle.fisher(
            self.net.model,
            self.net.call,
            self.net.examples,
            self.likelihood,
            self.estimator,
            self.labels,
        )

    def gradients(self):
        """Each example's gradient of the loss at its label, (N, P)."""
        J = oracle.jacobian(self.net.model, self.net.call, self.net.examples)
        nll = oracle.NLL[self.likelihood]
        scores = [
            torch.func.grad(nll)(f, y).flatten()
            for f, y in zip(self.outputs, self.labels, strict=True)
        ]
        return torch.einsum("ncp,nc->np", J, torch.stack(scores))
