"""One process of the distributed test: trains on its half of each batch and saves what came of it.

`python ddp_worker.py RANK FILE OUT NORMS STEPS`: FILE is where the processes meet.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from nets_torch import Net, step

import kquant_torch
from kquant_torch.fake_quantize import FakeQuantize

BATCH = 8


def batch(i: int) -> torch.Tensor:
    return torch.randn(2 * BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(100 + i)) * (1 + i / 4)


def wrapped(norms: str, config) -> torch.nn.Module:
    torch.manual_seed(5)
    qmodel = kquant_torch.wrap(Net(norms != "absent", dropout=0.0), config, example_inputs=batch(0)[:2])
    if norms == "frozen":
        kquant_torch.freeze_batch_norm(qmodel)
    return qmodel.train()


def ranges(qmodel: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{m.name}.{k}": b.clone()
        for m in qmodel.modules()
        if isinstance(m, FakeQuantize)
        for k, b in m.named_buffers()
    }


def train(model: torch.nn.Module, qmodel: torch.nn.Module, part: slice, steps: int) -> list[dict[str, torch.Tensor]]:
    """The ranges after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    found = []
    for i in range(steps):
        step(model, optimizer, batch(i)[part])
        found.append(ranges(qmodel))
    return found


def main() -> None:
    rank, meeting, out, norms, steps = int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    qmodel = wrapped(norms, None)
    model = torch.nn.parallel.DistributedDataParallel(qmodel)
    found = train(model, qmodel, slice(rank * BATCH, (rank + 1) * BATCH), steps)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
