"""KFAC and EKFAC of a GPT-2-shaped language model: seconds, peak memory, largest blocks.

    python tests/benchmarks/gpt2.py [--layers 12] [--examples 8] [--representation kfac]
    python tests/benchmarks/gpt2.py --width 768 --heads 12 --vocabulary 50257  # GPT-2 small

By default 12 layers of width 256 with 4 heads, a vocabulary of 5,000; sequences of 128. The head is
tied to the token embedding, addmm layers as in Hugging Face's GPT-2 (weights stored (in, out));
random weights and tokens; Monte Carlo labels, next-token loss. The peak of an EKFAC is shown beside
the bytes of the model, the factors, and the eigenvectors and eigenvalues that are made of them.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nngeo_lazy as ng

from structured import memory

LENGTH = 128


class Conv1D(nn.Module):
    """A linear layer that stores its weight (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = Conv1D(width, 3 * width), Conv1D(width, width)
        self.fc, self.out = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.attn(self.ln_1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (N, heads, T, width / heads)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, width))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class GPT2(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight  # tied, in opposite layouts

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))  # (N, T, V)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=5_000)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--representation", choices=["kfac", "ekfac"], help="default: both")
    options = parser.parse_args()
    torch.manual_seed(0)
    start_bytes = memory("VmRSS")
    model = GPT2(options.layers, options.width, options.heads, options.vocabulary)
    size = sum(p.numel() for p in model.parameters())
    tokens = torch.randint(options.vocabulary, (options.examples, LENGTH))
    loader = [{"tokens": t, "labels": t} for t in tokens.split(options.batch)]
    lik = ng.likelihoods.Categorical(shift=1, class_dim=2)
    print(f"{size:,} parameters, {options.examples} sequences of {LENGTH}")
    start = time.perf_counter()
    logits = model(tokens[: options.batch, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[: options.batch, 1:].flatten()).backward()
    print(f"one gradient of {options.batch} sequences: {time.perf_counter() - start:.1f} s")
    model.zero_grad()
    del logits
    for representation in [options.representation] if options.representation else ["kfac", "ekfac"]:
        common = (model, loader, representation)
        arguments = {"likelihood": lik, "estimator": "mc", "seed": 0}
        plan = ng.plan(ng.FIM, *common, **arguments)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        start = time.perf_counter()
        fim = ng.FIM(*common, **arguments)
        print(f"\n{representation}: {time.perf_counter() - start:.1f} s, ", end="")
        peak = memory("VmHWM")
        print(f"peak {peak / 2**30:.2f} GiB in all")
        if representation == "ekfac":
            factors = ng.plan(ng.FIM, model, loader, "kfac", **arguments).bytes
            known = 4 * size + factors + plan.bytes
            ratio = (peak - start_bytes) / known
            print(f"above the start {ratio:.2f} times model, factors, bases and eigenvalues")
        report = fim.report()
        print(f"planned {plan.bytes:,} bytes, built {report.bytes:,}; largest blocks:")
        for row in sorted(report, key=lambda row: -row.bytes)[:5]:
            print(f"  {row.parameter:20} {row.block:50} {row.bytes:>13,} bytes  {row.note}")
        start = time.perf_counter()
        step = fim.solve(fim.space.randn(), damping=1e-3)
        print(f"solve: {time.perf_counter() - start:.1f} s, finite: {bool(step.isfinite().all())}")


if __name__ == "__main__":
    main()
