"""A Fisher matrix of data that several processes share: torchrun --nproc-per-node 2 this_file."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)  # the same network and data in every process
model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
x, y = torch.randn(1000, 20), torch.randint(5, (1000,))

data = ng.Distributed(DataLoader(TensorDataset(x, y), batch_size=64))
cost = ng.plan(ng.FIM, model, data, "ekfac", estimator="mc", seed=0)
F = ng.FIM(model, data, "ekfac", estimator="mc", seed=0)  # every process calls it, and holds F
step = F.solve(F.space.randn(), damping=1e-3)  # local: nothing is exchanged

G = ng.GGN(model, data, loss="categorical")  # matrix-free: each product is a sum over processes
largest = ng.eigsh(G, 3, seed=0).eigenvalues

if dist.get_rank() == 0:  # printing exchanges nothing; whatever reads the data would wait here
    print(cost)
    print(F.report())
    print(f"{F.num_examples} examples, |F^-1 v| = {step.norm():.4g}, largest of G: {largest}")
dist.barrier()  # nobody leaves while another one works
dist.destroy_process_group()
