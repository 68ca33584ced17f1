"""What an EKFAC (mc) of a language model takes on 1, 8 and 64 processes, by `ng.plan`.

    python tests/benchmarks/language_models.py [--models small,1.5B,7B]

The plan of one transformer block is made for real, of random weights; all blocks of a model are
alike. Embeddings, norms and heads are left out. Bytes are those of the matrix in each process: all
of it if it is replicated, of the process that has most if it is `Sharded`. Flops are those of the
statistics for a million tokens, shared out; forward and backward passes come on top.
"""

import argparse

import torch

import nngeo_lazy as ng
from nngeo_lazy.collectives import owners

import gpt2

MODELS = {"small": (768, 12), "1.5B": (1600, 48), "7B": (4096, 32)}  # width, layers
TOKENS = 1_000_000
LENGTH = 16  # of the example that the plan is made from
KINDS = ["h.*.attn.*", "h.*.proj.*", "h.*.fc.*", "h.*.out.*"]


def plan_of(width: int) -> ng.builders.BuildCost:
    gpt2.WIDTH, gpt2.HEADS, gpt2.LENGTH, gpt2.VOCABULARY = width, width // 64, LENGTH, 100
    torch.manual_seed(0)
    tokens = torch.randint(100, (2, LENGTH))
    model = gpt2.GPT2(1).eval()
    likelihood = ng.likelihoods.Categorical(shift=1)
    return ng.plan(
        ng.FIM,
        model,
        [(tokens, tokens)],
        "ekfac",
        likelihood=likelihood,
        estimator="mc",
        seed=0,
        params=KINDS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="small,1.5B,7B")
    chosen = parser.parse_args().models.split(",")
    print("| model | parameters | processes | replicated | sharded | exchanged | flops a process |")
    print("|---|---|---|---|---|---|---|")
    for name in chosen:
        width, layers = MODELS[name]
        plan = plan_of(width)
        blocks = [row.bytes for row in plan if row.bytes] * layers
        size = sum(row.size for row in plan) * layers
        factors = sum(blocks) - 4 * size  # the matrix has bases and eigenvalues
        for count in (1, 8, 64):
            loads = [0] * count
            for block, owner in zip(blocks, owners([float(b) for b in blocks], count), strict=True):
                loads[owner] += block
            sent = 0 if count == 1 else 2 * factors + 4 * size  # factors, bases, eigenvalues
            flops = plan.flops * layers / LENGTH * TOKENS / count
            print(
                f"| {name} | {size / 1e6:,.0f}M | {count} | {sum(blocks) / 1e9:.2f} GB | "
                f"{max(loads) / 1e9:.2f} GB | {sent / 1e9:.1f} GB | {flops:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
