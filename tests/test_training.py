"""The training loop: the same result in pieces, in processes, and after being killed."""
import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from facebook_nb import training
from facebook_nb.files import UserError, read_weights, write_weights
from facebook_nb.training import (
    Batches,
    Recipe,
    TrainingError,
    cosine,
    fit,
    milestones,
    one_cycle,
    seed_all,
    warmup,
)
from tests import training_child as child
from tests import warm

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))
device = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("FACEBOOK_NB_PROGRESS", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a, b, **tolerance):
    """Raises unless two models (or state dicts) agree, bit for bit if no tolerance is given."""
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance or dict(rtol=0, atol=0), equal_nan=True, msg=name)


def squares(model, batch, step):
    return F.mse_loss(model(batch[0]), batch[1])


# --- schedules, recipe, batches ---

def test_schedules_by_hand():
    assert [cosine(k / 4) for k in range(4)] == pytest.approx([1, 0.8535533906, 0.5, 0.1464466094])
    steps = milestones(0.3, 0.6, factor=0.5)
    assert [steps(k / 10) for k in range(10)] == [1, 1, 1, .5, .5, .5, .25, .25, .25, .25]
    assert [warmup(0.4, cosine)(k / 10) for k in (0, 1, 2, 4, 7)] == pytest.approx([0, .25, .5, 1, .5])
    cycle = one_cycle(0.25, 0.1, 0.01)
    assert [cycle(x) for x in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0.1, 0.55, 1, 0.505, 0.01])


@device
def test_schedule_drives_every_group_and_leaves_rates_as_they_were(device):
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1},
                                 {"params": model[1].parameters(), "lr": 0.02}])
    seen = []

    def loss(model, batch, step):
        seen.append([g["lr"] for g in optimizer.param_groups])
        return model[0](batch).mean() + model[1](batch).mean()

    fit(model, loss, torch.ones(4, 1), optimizer, Recipe(4, 2), schedule=milestones(0.5), device=device)
    assert seen[1] == [0.1, 0.02] and seen[2] == pytest.approx([0.01, 0.002])
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.02]


@pytest.mark.parametrize("field, value", [("steps", -1), ("batch_size", 0), ("accumulate", 0), ("keep", 0),
                                          ("precision", "fp16"), ("ema", 1.0), ("log_every", 0)])
def test_recipe_names_a_field_that_makes_no_sense(field, value):
    with pytest.raises(UserError, match=field):
        Recipe(**{"steps": 1, "batch_size": 1, field: value})


@pytest.mark.parametrize("samples, size, ranks, pieces", [(17, 8, 3, 1), (7, 20, 2, 3), (5, 5, 1, 2), (23, 7, 3, 2)])
def test_parts_make_up_the_batch_and_batches_the_epochs(samples, size, ranks, pieces):
    recipe = Recipe(steps=samples, batch_size=size, seed=5)
    whole = Batches(torch.arange(samples), recipe)
    cut = [Batches(torch.arange(samples), replace(recipe, accumulate=pieces), None, r, ranks) for r in range(ranks)]
    stream = []
    for t in range(samples):
        parts = [b[t * pieces + i] for b in cut for i in range(pieces)]
        assert sum(share for share, _ in parts) == pytest.approx(1)
        assert all(share == pytest.approx(len(part) / size) for share, part in parts)
        assert torch.cat([part for _, part in parts]).equal(whole[t][1])
        stream += whole[t][1].tolist()
    epochs = [stream[i:i + samples] for i in range(0, len(stream), samples)]
    assert len(epochs) == size and all(sorted(e) == list(range(samples)) for e in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_order_depends_on_the_seed_and_may_be_given():
    data, recipe = torch.arange(30), Recipe(steps=3, batch_size=30)
    assert not Batches(data, recipe)[0][1].equal(Batches(data, replace(recipe, seed=1))[0][1])
    pairs = Batches(data, Recipe(steps=4, batch_size=2), lambda epoch: torch.tensor([0, 1, 9, 8]) + epoch)
    assert [pairs[t][1].tolist() for t in range(4)] == [[0, 1], [9, 8], [1, 2], [10, 9]]


class Noisy(torch.utils.data.Dataset):
    """Samples that draw from all three generators."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return {"i": i, "noise": torch.tensor([torch.rand(()), np.random.rand(), random.random()])}


class Listed(Noisy):
    def __getitems__(self, indices):
        return torch.tensor(indices)


def test_data_of_every_kind(tmp_path):
    recipe = Recipe(steps=2, batch_size=6)
    index = Batches(torch.arange(20), recipe)[1][1]
    table = np.memmap(tmp_path / "table", np.float32, "w+", shape=(20, 2))
    table[:] = np.arange(40).reshape(20, 2)
    found = Batches({"a": (torch.arange(20), table), "b": torch.arange(20) * 2}, recipe)[1][1]
    assert found["a"][0].equal(index) and found["a"][1].equal(torch.from_numpy(table[index.numpy()]))
    assert found["b"].equal(index * 2)
    assert Batches(Noisy(), recipe)[1][1]["i"].equal(index) and Batches(Listed(), recipe)[1][1].equal(index)
    with pytest.raises(UserError, match=r"unequal lengths \[3, 4\]"):
        Batches((torch.zeros(3), torch.zeros(4)), recipe)
    with pytest.raises(UserError, match="no samples"):
        Batches(torch.zeros(0), recipe)
    with pytest.raises(UserError, match="batch_size=6 cannot be cut into 4 processes × 2 pieces"):
        Batches(torch.zeros(9), replace(recipe, accumulate=2), ranks=4)


def test_workers_change_nothing():
    def run(workers):
        torch.manual_seed(0)
        model, seen = nn.Linear(3, 1), []

        def loss(model, batch, step):
            seen.append(batch["noise"].clone())
            return F.dropout(model(batch["noise"]), 0.5).square().mean()

        fit(model, loss, Noisy(), torch.optim.SGD(model.parameters(), 0.1),
            Recipe(6, 4, accumulate=2, workers=workers), device="cpu")
        return model, torch.cat(seen)

    (a, seen_a), (b, seen_b) = run(0), run(2)
    assert seen_a.equal(seen_b) and len(seen_a.unique()) == seen_a.numel() == 6 * 4 * 3
    same(a, b)


# --- one step ---

@device
def test_pieces_equal_the_whole(device):
    whole = child.plain()
    fit(*whole, device=device)
    for pieces in (2, 3):               # of 8 samples; three are 2, 3 and 3
        args = child.plain(accumulate=pieces)
        fit(*args, device=device)
        same(args[0], whole[0], rtol=1e-9, atol=1e-12)


@device
def test_a_step_is_what_one_would_write(device):
    """With clipping, against torch's own, in a plain loop."""
    model, loss, data, _, recipe = child.plain(clip_norm=0.05)
    twin = child.plain()[0].to(device)
    history = fit(model, loss, data, torch.optim.SGD(model.parameters(), 0.3, momentum=0.9), recipe, device=device)
    optimizer, batches, losses = torch.optim.SGD(twin.parameters(), 0.3, momentum=0.9), Batches(data, recipe), []
    for t in range(recipe.steps):
        value = loss(twin, [part.to(device) for part in batches[t][1]], t)
        optimizer.zero_grad()
        value.backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
        optimizer.step()
        losses.append(value.item())
    same(model, twin, rtol=1e-9, atol=1e-12)
    assert history.losses["loss"] == pytest.approx(losses, rel=1e-6)


@device
def test_average_of_the_weights(device):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).to(device)
    trail, seen = [model[0].weight.item()], []
    means, data = [0.0], torch.randn(12, 1, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model[0].parameters(), 0.5)
    optimizer.register_step_post_hook(lambda o, *_: (trail.append(model[0].weight.item()),
                                                     means.append(model[1].running_mean.item())))
    fit(model, lambda m, b, s: (m(b) + m[0].weight).square().mean(), data, optimizer,
        Recipe(steps=9, batch_size=4, ema=0.5, evaluate_every=3), device=device,
        evaluate=lambda m, step: seen.append(m[0].weight.item()) or {})
    for values, end in ((trail, model[0].weight), (means, model[1].running_mean)):
        average = values[0]
        for t, value in enumerate(values[1:]):
            d = min(0.5, (1 + t) / (10 + t))
            average = d * average + (1 - d) * value
            if t == 2 and values is trail:
                assert seen[0] == pytest.approx(average, rel=1e-5)
        assert end.item() == pytest.approx(average, rel=1e-5) != pytest.approx(values[-1], rel=1e-3)


@device
def test_bf16_is_used_and_stays_close(device):
    kinds = {}

    def run(precision):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
        x = torch.randn(64, 4)

        def loss(model, batch, step):
            kinds[precision] = (out := model(batch)).dtype
            return F.mse_loss(out, batch.sum(1, keepdim=True))

        history = fit(model, loss, x, torch.optim.Adam(model.parameters(), 1e-2),
                      Recipe(60, 32, precision=precision), device=device)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return np.array(history.losses["loss"])

    exact, rough = run("no"), run("bf16")
    assert kinds == {"no": torch.float32, "bf16": torch.bfloat16}
    assert not np.array_equal(exact, rough) and np.abs(exact - rough).max() < 0.02 * exact[0]
    assert rough[-1] < 0.1 * rough[0]


@device
def test_channels_last(device, tmp_path):
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3))
        return net, torch.optim.Adam(net.parameters(), 1e-2)

    def loss(net, batch, step):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
        return net(batch).square().mean()

    recipe = Recipe(6, 4, channels_last=True, checkpoint_every=2)
    images = torch.randn(8, 3, 6, 6)
    (calm, optimizer), (net, stopped) = build(), build()
    fit(calm, loss, images, optimizer, recipe, device=device)
    with pytest.raises(child.Stop):
        fit(net, child.stopping(loss, 3), images, stopped, recipe, device=device, folder=tmp_path)
    net, optimizer = build()
    fit(net, loss, images, optimizer, recipe, device=device, folder=tmp_path)
    if device == "cpu":
        same(net, calm)
    else:
        same(net, calm, rtol=1e-3, atol=1e-5)


def test_compiled_in_place(monkeypatch):
    """A model, or each part of a ModuleDict; names, state and numbers stay."""
    compiled = []
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part: (compiled.append(type(part)), real(part, backend="eager")))
    results = []
    for recipe in (Recipe(3, 8), Recipe(3, 8, compile=True)):
        torch.manual_seed(0)
        model = nn.ModuleDict({"net": nn.Linear(3, 4), "head": nn.Sequential(nn.Linear(4, 1))})
        loss = lambda m, batch, step: (m["head"](m["net"](batch[0])) - batch[1]).square().mean()
        fit(model, loss, (torch.ones(8, 3), torch.ones(8, 1)), torch.optim.SGD(model.parameters(), 0.1), recipe,
            device="cpu")
        results.append(model.state_dict())
    assert compiled == [nn.Linear, nn.Sequential]
    same(*results)


@device
def test_rivals_take_turns(device):
    """Each optimiser moves its own on its own loss; the other is frozen while it plays."""
    (model, losses, data, optimizers, recipe), more = child.gan(steps=4, accumulate=1)
    trail = []

    def watched(name, other):
        def loss(model, batch, step):
            trail.append((step, name))
            assert all(p.grad is None for p in model.parameters())
            assert not any(p.requires_grad for p in getattr(model, other).parameters())
            assert all(p.requires_grad for p in getattr(model, name).parameters())
            return losses[name](model, batch, step)
        return loss

    history = fit(model, {"critic": watched("critic", "painter"), "painter": watched("painter", "critic")}, data,
                  optimizers, recipe, device=device, **more)
    assert trail == [(t, name) for t in range(4) for name in ("critic", "painter")]
    assert all(p.requires_grad for p in model.parameters())
    assert set(history.losses) == {"critic/loss", "critic/right", "painter/loss"}
    assert [math.isnan(x) for x in history.losses["painter/loss"]] == [False, False, True, False]
    steps, means = history.curve("painter/loss", points=3)
    assert steps.tolist() == [1, 2, 4] and np.isfinite(means).all()


def test_a_loss_with_second_order_steps_inside():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(6, 3, dtype=torch.float64)

    def loss(model, batch, step):
        theta = dict(model.named_parameters())
        inner = torch.func.functional_call(model, theta, batch[0::2]).square().mean()
        gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        adapted = {name: p - 0.5 * g for (name, p), g in zip(theta.items(), gradients)}
        return (torch.func.functional_call(model, adapted, batch[1::2]) - 1).square().mean()

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).requires_grad_()
    first = Batches(x, Recipe(1, 6))[0][1]
    value = lambda t, rows: rows @ t[:3] + t[3]
    step = lambda t: t - 0.5 * torch.func.grad(lambda t: value(t, first[0::2]).square().mean())(t)
    (value(step(theta), first[1::2]) - 1).square().mean().backward()
    fit(model, loss, x, torch.optim.SGD(model.parameters(), 0.1), Recipe(1, 6), device="cpu")
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(after, theta.detach() - 0.1 * theta.grad, rtol=1e-9, atol=1e-12)


def test_the_caller_is_left_alone(capfd):
    seed_all("caller")
    expected = torch.rand(3), np.random.rand(), random.random()
    args = child.plain()
    seed_all("caller")
    fit(*args, device="cpu", evaluate=lambda m, step: {"x": torch.rand(())})
    assert torch.rand(3).equal(expected[0]) and (np.random.rand(), random.random()) == expected[1:]
    assert capfd.readouterr() == ("", "")


def test_a_progress_bar_on_a_terminal_only(monkeypatch, capfd):
    monkeypatch.delenv("FACEBOOK_NB_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)    # another test may have imported it
    fit(*child.plain(), device="cpu")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(*child.plain(log_every=4, steps=300), device="cpu")
    shown = capfd.readouterr().err
    assert "/300 [" in shown and "loss=" in shown and "it/s" in shown


def test_evaluation_sees_the_model_at_rest():
    (model, *args), more = child.gan()
    modes = []

    def evaluate(model, step):
        modes.append((step, model.training, torch.is_grad_enabled(), torch.rand(()).item()))
        return {"x": np.float32(step), "y": torch.tensor([1, 2])}

    history = fit(model, *args, device="cpu", evaluate=evaluate)
    assert [m[:3] for m in modes] == [(s, False, False) for s in (8, 16, 24, 30)] and not model.training
    assert history.evaluations == [{"step": s, "x": float(s), "y": [1, 2]} for s in (8, 16, 24, 30)]
    assert len({m[3] for m in modes}) == 4


def test_mistakes_are_named():
    model, loss, data, optimizer, recipe = child.plain()
    with pytest.raises(UserError, match=r"losses \['a'\], but optimizers \['b'\]"):
        fit(model, {"a": loss}, data, {"b": optimizer}, recipe, device="cpu")
    with pytest.raises(UserError, match="not part of the model"):
        fit(nn.Linear(1, 1), loss, data, optimizer, recipe, device="cpu")


# --- not a number ---

@device
def test_a_loss_that_is_not_finite_stops_the_run(device, tmp_path):
    (model, losses, *args), more = child.gan()
    critic = losses["critic"]
    poisoned = lambda m, b, s: critic(m, b, s) | ({"loss": m.critic(b).mean() * math.inf} if s == 17 else {})
    with pytest.raises(TrainingError, match=r"step 17: the critic/loss is (nan|inf|-inf) \(last finite one: 1\.\d+\)"):
        fit(model, {**losses, "critic": poisoned}, *args, folder=tmp_path, device=device, **more)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-000010.safetensors", "step-000015.safetensors"]
    assert all(torch.isfinite(t).all() for name, t in read_weights(
        tmp_path / "checkpoints/step-000015.safetensors").items() if not name.startswith("losses/"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, loss, data, _, recipe = child.plain(steps=9, checkpoint_every=3)

    def steep(model, batch, step):      # a finite loss with an infinite gradient
        extra = (model[0].weight.sum() * 0).abs().sqrt() if step == 5 else 0
        return loss(model, batch, step) + extra

    with pytest.raises(TrainingError, match="step 6: the weights are no longer finite"):
        fit(model, steep, data, torch.optim.SGD(model.parameters(), 0.1), replace(recipe, clip_norm=None),
            folder=tmp_path, device="cpu")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003.safetensors"]


# --- stopped and resumed ---

@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that nobody stopped: model, history."""
    torch.set_num_threads(1)
    args, more = child.gan()
    history = fit(*args, folder=tmp_path_factory.mktemp("calm"), device="cpu", **more)
    return args[0], history


@pytest.mark.parametrize("stop", [3, 16, 27, 28])
def test_resumed_equals_uninterrupted(calm, tmp_path, stop):
    with pytest.raises(child.Stop):
        args, more = child.gan(stop=stop)
        fit(*args, folder=tmp_path, device="cpu", **more)
    torch.rand(stop)                    # whatever happened in between
    args, more = child.gan()
    history = fit(*args, folder=tmp_path, device="cpu", **more)
    same(args[0], calm[0])
    for name, values in calm[1].losses.items():
        np.testing.assert_array_equal(values, history.losses[name])
    assert history.evaluations == calm[1].evaluations and history.seconds > 0
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-000025.safetensors", "step-000030.safetensors"]


def test_a_folder_changes_nothing(calm):
    args, more = child.gan(checkpoint_every=None, evaluate_every=None, log_every=1)
    fit(*args, device="cpu", **more)
    same(args[0], calm[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_resumed_on_cuda(tmp_path):
    args, more = child.gan()
    fit(*args, device="cuda", **more)
    other, _ = child.gan(stop=16)
    with pytest.raises(child.Stop):
        fit(*other, folder=tmp_path, device="cuda", **more)
    other, _ = child.gan()
    fit(*other, folder=tmp_path, device="cuda", **more)
    same(other[0], args[0], rtol=1e-3, atol=1e-5)


def test_a_finished_run_is_only_read(calm, tmp_path):
    args, more = child.gan()
    first = fit(*args, folder=tmp_path, device="cpu", **more)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
    (model, losses, *rest), more = child.gan()
    never = lambda *_: pytest.fail("the loss of a finished run was called")
    history = fit(model, dict.fromkeys(losses, never), *rest, folder=tmp_path, device="cpu", **more)
    same(model, calm[0])
    assert history.evaluations == first.evaluations and not model.training
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")} == files


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after step 22, with checkpoints of 15 and 20."""
    folder = tmp_path_factory.mktemp("stopped")
    with contextlib.suppress(child.Stop):
        args, more = child.gan(stop=22)
        fit(*args, folder=folder, device="cpu", **more)
    return folder


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header", "lacking", "foreign", "renamed"])
def test_a_damaged_checkpoint_is_passed_over(calm, stopped, tmp_path, damage):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints/step-000020.safetensors"
    data = bytearray(newest.read_bytes())
    if damage == "lacking":             # under a digest that is right
        write_weights(newest, {k: v for k, v in read_weights(newest).items() if not k.endswith("bias")})
    elif damage == "foreign":
        write_weights(newest, {"a": torch.ones(2)})
    elif damage == "renamed":           # the state of step 15 must not pass for that of step 20
        shutil.copy(tmp_path / "checkpoints/step-000015.safetensors", newest)
    else:
        data[-100] ^= 1
        newest.write_bytes({"flip": data, "cut": data[:len(data) // 2], "empty": b"",
                            "header": data[:8] + b"{" * 300 + data[308:]}[damage])
    (model, *rest), more = child.gan()
    with pytest.warns(UserWarning, match=r"step-000020\.safetensors.*going on from the checkpoint before"):
        fit(model, *rest, folder=tmp_path, device="cpu", **more)
    same(model, calm[0])


def test_what_others_put_beside_the_checkpoints(calm, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    place = tmp_path / "checkpoints"
    strays = {place / f"step-000010{end}.safetensors" for end in (" (1)", ".sync-conflict")}
    for stray in strays:                # a browser's copy, and a file service's
        shutil.copy(place / "step-000015.safetensors", stray)
    write_weights(place / "step-000099.safetensors", {"a": torch.ones(2)})
    args, more = child.gan(keep=1)
    with pytest.warns(UserWarning, match=r"step-000099\.safetensors: not a checkpoint"):
        fit(*args, folder=tmp_path, device="cpu", **more)
    same(args[0], calm[0])
    assert set(place.iterdir()) == strays | {place / "step-000030.safetensors", place / "step-000099.safetensors"}


def test_another_network_is_another_run(tmp_path):
    model, *rest = child.plain(steps=2)
    fit(model, *rest, folder=tmp_path, device="cpu")
    model, loss, data, _, recipe = child.plain(steps=2)
    model[2] = nn.Linear(16, 1, bias=False).double()
    with pytest.raises(UserError, match=r"parameters=4, not 3; take"):
        fit(model, loss, data, torch.optim.Adam(model.parameters(), 1e-2), recipe, folder=tmp_path, device="cpu")
    model, loss, data, _, recipe = child.plain(steps=2)
    model[2] = nn.Linear(16, 2).double()
    with pytest.raises(UserError, match=r"another network, model/2.weight is \(1, 16\), not \(2, 16\)"):
        fit(model, loss, data, torch.optim.Adam(model.parameters(), 1e-2), recipe, folder=tmp_path, device="cpu")


@pytest.mark.parametrize("field, changes", [
    ("batch_size", {"batch_size": 10}), ("seed", {"seed": 5}), ("ema", {"ema": 0.8}), ("steps", {"steps": 40}),
    (r"critic\.Adam\[0\]\.lr", "rate"), ("schedule", "schedule"), ("margin", "settings"), ("samples", "samples")])
def test_other_settings_are_another_run(tmp_path, field, changes):
    args, more = child.gan(steps=2)
    fit(*args, folder=tmp_path, device="cpu", settings={"margin": 0.5}, **more)
    more["settings"] = {"margin": 0.5}
    (model, losses, data, optimizers, recipe), _ = child.gan(**{"steps": 2} | changes if changes.__class__ is dict
                                                             else {"steps": 2})
    if changes == "rate":
        optimizers["critic"].param_groups[0]["lr"] *= 2
    elif changes == "schedule":
        more["schedule"] = cosine
    elif changes == "settings":
        more["settings"] = {"margin": 0.3}
    elif changes == "samples":
        data = data[1:]
    with pytest.raises(UserError, match=rf"holds a run with {field}=.*, not .*; take its setting or another folder"):
        fit(model, losses, data, optimizers, recipe, folder=tmp_path, device="cpu", **more)


def test_what_may_change_on_the_way(tmp_path):
    with contextlib.suppress(child.Stop):
        args, more = child.gan(stop=22)
        fit(*args, folder=tmp_path, device="cpu", **more)
    args, more = child.gan(keep=1, log_every=3, checkpoint_every=4, evaluate_every=None, accumulate=3)
    history = fit(*args, folder=tmp_path, device="cpu", **more)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000030.safetensors"]
    assert [e["step"] for e in history.evaluations] == [8, 16, 30]


def test_scalars_in_a_file(tmp_path):
    log, names = tmp_path / "logs/scalars.jsonl", ("critic/loss", "critic/right", "painter/loss", "rate")
    with contextlib.suppress(child.Stop):
        args, more = child.gan(stop=23)
        fit(*args, folder=tmp_path, device="cpu", **more)
    with log.open("a") as file:
        file.write('{"step": 28, "rate')        # a line that was cut off
    args, more = child.gan()
    history = fit(*args, folder=tmp_path, device="cpu", **more)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line for line in lines if "rate" in line]
    assert [line["step"] for line in losses] == [7, 14, 21, 28, 30] and all(n in line for n in names for line in losses)
    assert losses[1]["critic/loss"] == pytest.approx(np.mean(history.losses["critic/loss"][7:14]))
    assert [(line["step"], line["mean"]) for line in lines if "mean" in line] == [
        (e["step"], e["mean"]) for e in history.evaluations]


def test_scalars_for_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    seen = []
    writer = type("Writer", (), {"__init__": lambda self, *a, **k: seen.append(k), "close": lambda self: None,
                                 "add_scalar": lambda self, *scalar: seen.append(scalar)})
    monkeypatch.setattr(training, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    fit(*child.plain(log_every=6), folder=tmp_path, device="cpu")
    assert [s if isinstance(s, dict) else (s[0], s[2]) for s in seen] == [
        {"purge_step": 0}, ("loss", 6), ("rate", 6), ("loss", 12), ("rate", 12)]


# --- killed ---

@pytest.fixture(scope="module")
def server():
    return warm.context()


def age(folder):
    """Remnants of a killed process go when they are an hour old: a younger one may have a living writer."""
    for remnant in folder.glob("checkpoints/.*"):
        os.utime(remnant, (time.time() - 4000,) * 2)


BIG = {"width": 400, "steps": 50, "checkpoint_every": 1, "log_every": 40, "evaluate_every": 20}


def test_sigkill_at_any_moment(server, tmp_path):
    args, more = child.gan(**BIG)
    started = time.perf_counter()
    fit(*args, device="cpu", **more)
    length = time.perf_counter() - started
    moments, folder, remnants = random.Random(), tmp_path / "run", 0
    for _ in range(4):
        process = server.Process(target=child.train_gan, args=(folder,), kwargs=BIG)
        seen = set(folder.glob("checkpoints/step-*"))
        process.start()
        limit = time.perf_counter() + 30
        while process.is_alive() and set(folder.glob("checkpoints/step-*")) <= seen:
            assert time.perf_counter() < limit
            time.sleep(0.002)
        time.sleep(moments.uniform(0, length / 4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        remnants += len(list(folder.glob("checkpoints/.*.part")))
    assert list(folder.glob("checkpoints/step-*"))
    age(folder)
    other, more = child.gan(**BIG)
    fit(*other, folder=folder, device="cpu", **more)
    same(other[0], args[0])
    assert not list(folder.glob("checkpoints/.*")), f"{remnants} remnants"


def test_killed_while_a_checkpoint_is_written(server, calm, tmp_path):
    process = server.Process(target=child.train_gan, args=(tmp_path,), kwargs={"die_at_rename": 4})
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names[1:] == ["step-000005.safetensors", "step-000010.safetensors"] and names[0].endswith(".part")
    args, more = child.gan(stop=17)
    with pytest.raises(child.Stop):
        fit(*args, folder=tmp_path, device="cpu", **more)
    assert (tmp_path / "checkpoints" / names[0]).exists(), "its writer might be alive"
    age(tmp_path)
    args, more = child.gan()
    fit(*args, folder=tmp_path, device="cpu", **more)
    same(args[0], calm[0])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000025.safetensors", "step-000030.safetensors"]


# --- several processes ---

def run_members(server, ranks, out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [server.Process(target=child.member, args=(rank, ranks, port, str(out))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks


@pytest.fixture(scope="module")
def pair(server, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    run_members(server, 2, out)
    return lambda name: [
        {k: v for k, v in read_weights(out / f"{name}-{r}.safetensors").items()} for r in (0, 1)], out


def weights(state):
    return {k: v for k, v in state.items() if not k.startswith("history ")}


@pytest.mark.parametrize("job", ["plain", "pieces"])
def test_two_processes_equal_one(pair, job):
    first, second = pair[0](job)
    args = child.plain()
    history = fit(*args, device="cpu")
    same(weights(first), args[0].state_dict(), rtol=1e-9, atol=1e-12)
    same(first, second)
    assert first["history loss"].tolist() == pytest.approx(history.losses["loss"], rel=1e-6)


def test_three_processes_and_nothing_divides(server, tmp_path):
    run_members(server, 3, tmp_path)
    args = child.plain()                # 17 samples, batches of 8
    fit(*args, device="cpu")
    for job in ("plain", "pieces"):
        for rank in range(3):
            same(weights(read_weights(tmp_path / f"{job}-{rank}.safetensors")), args[0].state_dict(),
                 rtol=1e-9, atol=1e-12)


def test_every_step_and_process_has_its_own_dice(pair):
    model, loss, *more = child.plain()
    history = fit(model, lambda *a: {"loss": loss(*a), "draw": torch.rand(())}, *more, device="cpu")
    first = np.array(history.losses["draw"])
    mean = pair[0]("dice")[0]["history draw"].numpy()      # of both processes, of which the first draws as one alone
    second = 2 * mean - first
    assert len(set(first.tolist())) == 12 and np.abs(second - first).min() > 1e-4
    assert (0 <= second).all() and (second < 1).all()


def test_a_parameter_that_one_process_uses(pair):
    first, second = pair[0]("lopsided")
    args = child.lopsided(0, 1)
    untouched = args[0][2].weight.detach().clone()
    args = (*args[:4], args[4])
    fit(*args, device="cpu", order=lambda epoch: torch.arange(4))
    same(weights(first), weights(second))
    assert first["2.weight"].equal(untouched), "no decay of what nobody uses, as in one process"
    assert not first["1.weight"].equal(untouched)


def test_processes_stop_and_resume_together(pair):
    for job in ("gan", "sharded"):
        for whole, resumed in zip(pair[0](job), pair[0](f"{job} resumed")):
            same(whole, resumed)
    first, second = pair[0]("gan")
    same(first, second)                 # buffers and averages, too
    assert all("step 3: the loss is nan" in (pair[1] / f"error-{r}.txt").read_text() for r in (0, 1))


def test_a_shard_that_is_lost(pair):
    """All go on from the checkpoint before; where no disk has the rows of all, nothing is begun anew."""
    for lost, whole in zip(pair[0]("sharded lost"), pair[0]("sharded")):
        same(lost, whole)
    args, more = child.sharded(steps=10)
    with pytest.warns(UserWarning, match="going on"), pytest.raises(
            UserError, match=r"step-000010.rank-1.safetensors: no such.*; bring what all processes wrote together"):
        fit(*args, folder=pair[1] / "shared/sharded", device="cpu", **more)


def test_a_head_sharded_by_class_equals_a_whole_one(pair):
    first, second = pair[0]("sharded")
    args, more = child.sharded()
    fit(*args, device="cpu")
    whole = args[0].state_dict()
    for state, rows in ((first, slice(0, 3)), (second, slice(3, 6))):
        expected = {**whole, "head.weight": whole["head.weight"][rows]}
        same(weights(state), expected, rtol=1e-9, atol=1e-12)


# --- speed ---

def test_the_loop_costs_little():
    data = torch.randn(500, 4), torch.randn(500, 1)

    def bare(steps=150):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for step in range(steps):
            index = torch.randint(500, (16,))
            squares(model, [part[index] for part in data], step).backward()
            optimizer.step()
            optimizer.zero_grad()

    def ours(steps=150):
        model = nn.Linear(4, 1)
        fit(model, squares, data, torch.optim.SGD(model.parameters(), 1e-3), Recipe(steps, 16), device="cpu")

    def fastest(function):
        times = []
        for _ in range(5):
            started = time.thread_time()        # not the wall clock: machines may be busy
            function()
            times.append((time.thread_time() - started) / 150)
        return min(times)

    assert fastest(ours) - fastest(bare) < 1e-3
