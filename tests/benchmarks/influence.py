"""Influences on a small transformer: time and peak memory, beside kronfluence if it is installed.

    python tests/benchmarks/influence.py [--sequences 2000] [--queries 10] [--peer] [--threads 1]

About a million parameters, sequences of 64 tokens from random tables of transitions. F is an EKFAC
of all linear layers from observed labels, so that nothing is drawn. Each way runs in a process of
its own; its time is that of the processor, so that other programs count little. On a tenth of the
sequences, the streamed scores are compared with those from gradients that a loop makes; with
`--peer`, all of them with kronfluence's.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Categorical

from structured import memory

LENGTH, VOCABULARY, WIDTH, DAMPING = 64, 640, 128, 1e-3
LOSS = Categorical(class_dim=-1, shift=1)


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens (N, T) to logits (N, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of each sequence, summed over its positions."""
    logits = model(tokens)[:, :-1]
    each = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return each.sum(1)


def sequences(n: int) -> Tensor:
    """From one of eight tables of transitions each."""
    generator = torch.Generator().manual_seed(1)
    tables = torch.randint(VOCABULARY, (8, VOCABULARY, 3), generator=generator)
    which = torch.randint(8, (n,), generator=generator)
    tokens = [torch.randint(VOCABULARY, (n,), generator=generator)]
    for _ in range(LENGTH - 1):
        way = torch.randint(3, (n,), generator=generator)
        tokens.append(tables[which, tokens[-1], way])
    return torch.stack(tokens, 1)


def trained(tokens: Tensor) -> nn.Module:
    """After some steps, so that gradients are no noise."""
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(60):
        batch = tokens[(step * 32) % (len(tokens) - 32) :][:32]
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return model.eval()


def ours(model: nn.Module, train: Tensor, test: Tensor, folder: Path) -> Tensor:
    """Streamed, N times the difference that leaving out makes."""
    loader = DataLoader(TensorDataset(train, train), batch_size=20)
    options = {"likelihood": LOSS, "estimator": "empirical", "params": nn.Linear}
    F = ng.FIM(model, loader, "ekfac", **options)
    ng.save(F, folder / "F")
    return ng.influences(model, F, loader, (test, test), damping=DAMPING) * len(train)


def unstreamed(model: nn.Module, train: Tensor, test: Tensor, folder: Path) -> Tensor:
    """Of a tenth, from gradients by a loop over single sequences."""
    F = ng.load(folder / "F")
    chosen = [dict(model.named_parameters())[name] for name in F.space.names]

    def gradients(tokens: Tensor) -> Tensor:
        rows = []
        for one in tokens.split(1):
            grads = torch.autograd.grad(losses(model, one).sum(), chosen)
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows)

    part = train[: len(train) // 10]
    solved = F.solve(gradients(test).mT, damping=DAMPING).mT
    return torch.cat([solved @ gradients(some).mT for some in part.split(200)], 1)


def kronfluence(model: nn.Module, train: Tensor, test: Tensor, folder: Path) -> Tensor:
    """Their Analyzer with the same definitions: observed labels, damping, sums over positions."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Language(Task):  # type: ignore[misc]
        def compute_train_loss(
            self, batch: list[Tensor], model: nn.Module, sample: bool = False
        ) -> Tensor:
            return losses(model, batch[0]).sum()

        def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
            return losses(model, batch[0]).sum()

    task = Language()
    model = prepare_model(model, task)
    analyzer = Analyzer("run", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    analyzer.fit_all_factors(
        "ekfac", TensorDataset(train), per_device_batch_size=20, factor_args=factors
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "ekfac",
        query_dataset=TensorDataset(test),
        train_dataset=TensorDataset(train),
        per_device_query_batch_size=len(test),
        per_device_train_batch_size=20,
        score_args=ScoreArguments(damping_factor=DAMPING),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


WAYS = {"ours": ours, "unstreamed": unstreamed, "kronfluence": kronfluence}


def child(way: str, options: argparse.Namespace) -> None:
    """In a process of its own: keeps the scores, prints seconds and MiB."""
    folder = Path(options.folder)
    tokens = sequences(options.sequences + options.queries)
    model = Transformer().eval()
    model.load_state_dict(torch.load(folder / "model.pt"))
    train, test = tokens[: options.sequences], tokens[options.sequences :]
    start, before = time.process_time(), memory("VmRSS")
    scores = WAYS[way](model, train, test, folder)
    seconds = time.process_time() - start
    torch.save(scores, folder / f"{way}.pt")
    print("result", seconds, memory("VmHWM") / 2**20, (memory("VmHWM") - before) / 2**20)


def main() -> None:
    """Run each way, and compare the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder")
    parser.add_argument("--way")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        child(options.way, options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = trained(sequences(options.sequences))
        torch.save(model.state_dict(), folder / "model.pt")
        size = sum(p.numel() for p in model.parameters())
        print(f"{size:,} parameters, {options.sequences} sequences, {options.queries} queries")
        for way in [*(["kronfluence"] if options.peer else []), "ours", "unstreamed"]:
            command = [sys.executable, __file__, "--way", way, "--folder", name]
            for key in ("sequences", "queries", "threads"):
                command += [f"--{key}", str(getattr(options, key))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr)
                raise SystemExit(f"{way} failed with exit status {done.returncode}")
            line = next(line for line in done.stdout.splitlines() if line.startswith("result"))
            seconds, peak, above = map(float, line.split()[1:])
            print(f"{way:12} {seconds:6.0f} s, peak {peak:5.0f} MiB, {above:5.0f} above the start")
        mine, loop = torch.load(folder / "ours.pt"), torch.load(folder / "unstreamed.pt")
        part = mine[:, : loop.shape[1]]
        print(f"streamed and unstreamed: {float((part - loop).norm() / loop.norm()):.1e} apart")
        if options.peer:
            theirs = torch.load(folder / "kronfluence.pt")
            both = torch.stack([mine.flatten(), theirs.flatten().to(mine)])
            print(f"correlation with kronfluence {float(torch.corrcoef(both)[0, 1]):.5f}")


if __name__ == "__main__":
    main()
