"""Several gloo processes with the class-sharded head; apart from the tests, so that a child imports little."""
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests import warm


def start(ranks, out, job, what):
    """Run `job` in `ranks` processes; each leaves JOB-RANK.pt in `out`."""
    torch.save(what, out / f"{job}.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = warm.context()
    running = [server.Process(target=member, args=(job, str(out), rank, ranks, port)) for rank in range(ranks)]
    for process in running:
        process.start()
    for process in running:
        process.join(240)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in running] == [0] * ranks


def member(job, out, rank, ranks, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", timeout=timedelta(seconds=200))
    out = Path(out)
    what = torch.load(out / f"{job}.pt", weights_only=False)
    torch.save(JOBS[job](what, rank, ranks), out / f"{job}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def once(what, rank, ranks):
    """Loss, local logits and gradients; x, y are cut by `sizes`, classes evenly but for the remainder."""
    from facebook_nb import fpr

    n, group = what["how"]["classes"], dist.group.WORLD
    first, last = (n * r // ranks for r in (rank, rank + 1))
    how = fpr.HeadSettings(**what["how"], first=first, group=group)
    W = what["W"][first:last].clone().requires_grad_()
    x, y = (what[k].split(what["sizes"])[rank].clone() for k in ("x", "y"))
    x.requires_grad_()
    everything, labels = fpr.gather_rows(x, group), fpr.gather_rows(y, group)
    z, seen = fpr.penalised_logits(everything, W, labels, how)
    again = fpr.split_cross_entropy(z, labels, how)
    loss, _ = fpr.penalised_loss(everything, W, labels, how)
    torch.testing.assert_close(loss, again)
    (loss * len(x) / len(what["x"])).backward()         # its share, as `fit` weighs it
    return dict(z=z.detach(), loss=loss.detach(), d_x=x.grad, d_W=W.grad,
                info=[a.item() for a in seen[2:]], rho=seen.rho)


def many(what, rank, ranks):
    return [once(each, rank, ranks) for each in what]


def network(classes, ranks=1):
    """A small body and the head, the same for any number of processes; 20 images."""
    from facebook_nb.fpr import FPRHead

    torch.manual_seed(3)
    body = nn.Linear(6, 8)
    head = FPRHead(8, classes, s=8.0, m=0.2, sharded=ranks > 1)
    model = nn.ModuleDict({"body": body, "head": head}).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    return model, (x, torch.randint(classes, (20,))), head


def train(classes, ranks=1, folder=None, stop=None):
    """A run of six steps, with a checkpoint every two of them in `folder`; cut short at step `stop`."""
    from facebook_nb.training import Recipe, fit

    class Stop(Exception):
        pass

    def loss(net, batch, step):
        if step == stop:
            raise Stop
        return net["head"](net["body"](batch[0]), batch[1])

    model, data, head = network(classes, ranks)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    try:
        history = fit(model, loss, data, optimizer,
                      Recipe(steps=6, batch_size=8, clip_norm=0.5, ema=0.8, seed=1, checkpoint_every=2, keep=1),
                      folder=folder, device="cpu", sharded=head if ranks > 1 else None)
    except Stop:
        return None
    return dict(body=model["body"].weight.detach(), weight=head.weight.detach(), loss=history.losses["loss"],
                momentum=optimizer.state[head.weight]["momentum_buffer"])


def fitted(what, rank, ranks):
    return [train(ranks=ranks, **how) for how in what]


def full(what, rank, ranks):
    """Preset `full` on a small network: the losses of the first row, and the report."""
    from facebook_nb import fpr
    from facebook_nb.models.backbones import SmallResNet

    fpr.NETWORKS["tiny"] = lambda: SmallResNet(512, 2, 112)
    report = fpr.run(fpr.Config.preset("full", data_root=what["root"], out_dir=what["out"], devices=ranks,
                                       **what["settings"]))
    return report.metrics


JOBS = {"once": once, "many": many, "fitted": fitted, "full": full}
