"""Training on several processes: torchrun --nproc-per-node 2 this_file."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import nngeo_lazy as ng

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)  # the same data in every process, which takes every second example here
x = torch.randn(2000, 20)[dist.get_rank() :: dist.get_world_size()]
y = (x[:, :5] + x[:, 5:10] * x[:, 10:15]).argmax(1)

model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5)))
optimizer = ng.optim.NaturalGradient(model)  # its processes are the wrapper's
for step in range(100):
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")
dist.barrier()  # nobody leaves while another one works
dist.destroy_process_group()
