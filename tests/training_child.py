"""What the processes of test_training.py run: problems small enough for a test, and entry points."""
import os
import signal
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from facebook_nb import training
from facebook_nb.files import write_weights
from facebook_nb.training import GradientSum, Recipe, cosine, fit, warmup


class Stop(Exception):
    """Ends a run in the middle of a step."""


def stopping(loss, at):
    def wrapped(model, batch, step):
        if step == at:
            raise Stop
        return loss(model, batch, step)
    return wrapped


def plain(samples=17, **changes):
    """Regression in float64, nothing random in it: arguments of fit."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.randn(samples, 4, dtype=torch.float64)
    recipe = Recipe(**dict(steps=12, batch_size=8, clip_norm=0.5, seed=3) | changes)
    return (model, lambda model, batch, step: F.mse_loss(model(batch[0]), batch[1]), (x, x.prod(1, keepdim=True)),
            torch.optim.Adam(model.parameters(), 1e-2), recipe)


class Pair(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.painter = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3),
                                     nn.Linear(width, 3))
        self.critic = nn.Sequential(nn.Linear(3, width), nn.LeakyReLU(), nn.Dropout(0.3), nn.Linear(width, 1))


def critic_loss(model, batch, step):
    fake = model.painter(torch.randn(len(batch), 4, device=batch.device))
    real, fake = model.critic(batch), model.critic(fake)
    return {"loss": F.softplus(-real).mean() + F.softplus(fake).mean(), "right": (real > 0).float().mean()}


def painter_loss(model, batch, step):
    if step % 3 == 2:                   # sits out
        return None
    return F.softplus(-model.critic(model.painter(torch.randn(len(batch), 4, device=batch.device)))).mean()


def gan(width=16, stop=None, **changes):
    """Everything at once: two optimisers, dropout, batch norm, an average, pieces, clipping, a schedule."""
    torch.manual_seed(2)
    model = Pair(width)
    losses = {"critic": critic_loss, "painter": stopping(painter_loss, stop)}
    optimizers = {"critic": torch.optim.Adam(model.critic.parameters(), 1e-2, betas=(0.5, 0.9)),
                  "painter": torch.optim.SGD(model.painter.parameters(), 0.05, momentum=0.9, nesterov=True)}
    settings = dict(steps=30, batch_size=12, accumulate=2, clip_norm={"critic": 1.0}, ema=0.9, seed=4, log_every=7,
                    evaluate_every=8, checkpoint_every=5)
    args = model, losses, torch.randn(50, 3), optimizers, Recipe(**settings | changes)
    return args, {"schedule": warmup(0.2, cosine), "evaluate": lambda m, step: {
        "mean": m.painter(torch.ones(2, 4, device=next(m.parameters()).device)).mean()}}


def train_gan(folder, threads=1, die_at_rename=None, **changes):
    """Entry point of a child that is killed, or, at its n-th checkpoint, kills itself before the file gets its name."""
    torch.set_num_threads(threads)
    renames, replace = [0], os.replace

    def fatal(source, target):
        renames[0] += 1
        if renames[0] == die_at_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = fatal
    args, more = gan(**changes)
    fit(*args, folder=folder, device="cpu", **more)


# --- several processes ---

CLASSES, WIDTH = 6, 8


class Classifier(nn.Module):
    """A body, and the rows of a class matrix that belong to this process."""

    def __init__(self, rank, ranks):
        super().__init__()
        self.body = nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        part = CLASSES // ranks
        self.first = rank * part
        self.head.weight = nn.Parameter(self.head.weight.detach()[self.first:self.first + part].clone())


def shard_loss(model, batch, step):
    """Mean cross-entropy of the whole batch, over classes that are spread over the processes."""
    x, labels = batch
    features, several = model.body(x), dist.is_initialized()
    if several:
        from torch.distributed.nn import functional as D

        features = torch.cat(D.all_gather(features))
        everyone = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, labels)
        labels = torch.cat(everyone)
    total = (lambda t: D.all_reduce(t)) if several else (lambda t: t)
    logits = model.head(features)                               # (B, classes here)
    here = F.one_hot(labels, CLASSES)[:, model.first:model.first + logits.shape[1]]
    return (total(logits.exp().sum(1)).log() - total((logits * here).sum(1))).mean()


def sharded(rank=0, ranks=1, stop=None, **changes):
    torch.manual_seed(5)
    model = Classifier(rank, ranks).double()
    data = torch.randn(20, 5, dtype=torch.float64), torch.randint(CLASSES, (20,))
    settings = dict(steps=10, batch_size=8, clip_norm=0.3, ema=0.8, seed=6, checkpoint_every=4)
    args = (model, stopping(shard_loss, stop), data, torch.optim.SGD(model.parameters(), 0.5, momentum=0.9),
            Recipe(**settings | changes))
    return args, {"sharded": model.head}


def lopsided(rank, ranks):
    """Process 1 alone uses the second layer, nobody the third."""
    torch.manual_seed(7)
    model = nn.ModuleList(nn.Linear(3, 1) for _ in range(3)).double()

    def loss(model, batch, step):
        out = model[0](batch)
        if ranks == 1:                  # its second half is what process 1 has
            out = out + torch.cat([0 * out[:2], model[1](batch)[2:]])
        elif rank == 1:
            out = out + model[1](batch)
        return out.square().mean()

    return (model, loss, torch.arange(12, dtype=torch.float64).view(4, 3),
            torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5), Recipe(steps=3, batch_size=4))


def member(rank, ranks, port, out):
    """One of several gloo processes; leaves the weights of every job in `out`, and the histories' last losses."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    out = Path(out)

    def keep(name, model, history=None):
        state = dict(model.state_dict())
        if history:
            for key, values in history.losses.items():
                state[f"history {key}"] = torch.tensor(values)
        write_weights(out / f"{name}-{rank}.safetensors", state)

    early = []                          # gradients that leave while others are still to come
    arrived = GradientSum._arrived

    def watched(self, p):
        arrived(self, p)
        early.append(len(self.sent) and any(self.missing))

    with mock.patch.multiple(GradientSum, SIZE=16, _arrived=watched):      # a bucket holds 16 numbers, not four million
        for name, changes in {"plain": {}, "pieces": {"accumulate": 2}}.items():
            args = plain(**changes)
            keep(name, args[0], fit(*args, device="cpu"))
    assert any(early)
    if ranks == 2:
        model, loss, *more = plain()
        keep("dice", model, fit(model, lambda *a: {"loss": loss(*a), "draw": torch.rand(())}, *more, device="cpu"))
        args = lopsided(rank, ranks)
        keep("lopsided", args[0], fit(*args, device="cpu"))
        for name, build in {"gan": gan, "sharded": lambda **k: sharded(rank, ranks, **k)}.items():
            args, more = build()
            keep(name, args[0], fit(*args, device="cpu", **more))
            folder = out / "shared" / name if rank == 0 else out / f"empty{rank}" / name    # no shared disk
            try:
                args, more = build(stop=9)
                fit(*args, device="cpu", folder=folder, **more)
            except Stop:
                pass
            args, more = build()
            keep(f"{name} resumed", args[0], fit(*args, device="cpu", folder=folder, **more))
            own = [p.name for p in sorted(folder.glob("*/*"))]
            assert rank == 0 or own == ([] if name == "gan" else [
                f"step-{step:06d}.rank-1.safetensors" for step in (8, 10)]), "only process 0 writes, but for shards"
        (folder / "checkpoints/step-000010.rank-1.safetensors").unlink(missing_ok=True)
        args, more = sharded(rank, ranks)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            keep("sharded lost", args[0], fit(*args, device="cpu", folder=folder, **more))
        said = [str(w.message) for w in said if "checkpoint" in str(w.message)]
        assert len(said) == 1 - rank and all("step-000010.rank-1.safetensors: no such" in text for text in said), said
        args = plain(steps=5)
        loss = args[1]
        try:                            # NaN in one process stops both
            fit(args[0], lambda m, b, s: loss(m, b, s) * (torch.nan if rank == 1 and s == 3 else 1), *args[2:],
                device="cpu")
        except training.TrainingError as error:
            (out / f"error-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()
