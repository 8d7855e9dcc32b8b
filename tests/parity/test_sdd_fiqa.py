"""SDD-FIQA gives the authors' numbers: distances, pseudo-labels, loss, optimiser, and their networks by their names."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb import sdd_fiqa
from facebook_nb.files import UserError
from tests.parity import recipe

DATA = Path(__file__).parent / "data" / "sdd_fiqa"
SETS = {"labels": ([6] * 10, 32, 1.5), "uneven": ([2, 3, 30, 5, 12, 4, 7, 2], 24, 3),
        "mixed": ([5, 9, 4, 8, 6, 7, 10], 16, 2)}


@pytest.fixture(scope="module")
def cases():
    return np.load(DATA / "cases.npz")


def embedded(name):
    """(n, d) float64 embeddings and (n,) identities of a case."""
    sizes, d, high = SETS[name]
    ids = np.repeat(np.arange(len(sizes)), sizes)
    n = len(ids)
    if name == "mixed":
        ids = ids[np.argsort(recipe.uniform("sdd.dev.mixed.perm", (n,)), kind="stable")]
    strength = recipe.uniform(f"sdd.dev.{name}.strength", (n, 1), .2, high)
    e = recipe.normal(f"sdd.dev.{name}.person", (len(sizes), d))[ids]
    e = e + strength * recipe.normal(f"sdd.dev.{name}.noise", (n, d))
    return e.astype(np.float64), ids


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype, w_close, label_close", [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-3)])
def test_labels_with_the_stored_pairs(cases, name, dtype, w_close, label_close):
    e, _ = embedded(name)
    pos, neg = (torch.as_tensor(cases[f"{name}/{k}"].astype(np.int64)) for k in ("pos", "neg"))
    w = sdd_fiqa.pair_distances(torch.as_tensor(e, dtype=dtype), pos, neg)
    order = cases[f"{name}/order"].astype(int)
    assert w.dtype == dtype
    np.testing.assert_allclose(w.numpy()[:, order], cases[f"{name}/wasserstein"], rtol=0, atol=w_close)
    label = sdd_fiqa.rescaled(w).mean(0).numpy()[order]
    np.testing.assert_allclose(label, cases[f"{name}/label"], rtol=0, atol=label_close)


W1 = {"equal": (24, 24), "fewer": (19, 24), "one": (1, 24), "coprime": (5, 7), "reversed": (11, 24), "same": (9, 9),
      "cross": (24, 24), "ties": (20, 24)}


@pytest.mark.parametrize("name", W1)
def test_wasserstein(cases, name):
    a, b = W1[name]
    u = recipe.normal(f"sdd.dev.w1/{name}.u", (a,), .1).astype(np.float64) + .4
    v = recipe.normal(f"sdd.dev.w1/{name}.v", (b,), .1).astype(np.float64)
    u, v = {"reversed": (u - .6, v), "same": (u, u), "cross": (3 * u - 1, v),
            "ties": (u.round(1), v.round(1))}.get(name, (u, v))
    mine = sdd_fiqa.wasserstein(torch.as_tensor(u), torch.as_tensor(v))
    assert abs(float(mine) - float(cases[f"w1/{name}"])) < 1e-9
    single = sdd_fiqa.wasserstein(torch.as_tensor(u).float(), torch.as_tensor(v).float())
    assert abs(float(single) - float(cases[f"w1/{name}"])) < 1e-5


def test_huber(cases):
    p, t = (torch.from_numpy(recipe.normal(f"sdd.dev.huber.{k}", (12,), 2)) for k in "pt")
    t[0], t[1] = p[0], p[1] + 1
    p.requires_grad_()
    loss = sdd_fiqa.huber(lambda x: x.unsqueeze(-1), (p, t), 0)     # the network's output is (B, 1)
    loss.backward()
    np.testing.assert_allclose(loss.item(), cases["huber/loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(p.grad, cases["huber/grad"], rtol=0, atol=1e-6)


def test_adam_and_its_rates(cases):
    w = torch.nn.Parameter(torch.from_numpy(recipe.normal("sdd.dev.adam.w", (7,))))
    config = sdd_fiqa.Config.preset("full")
    optimizer, schedule = sdd_fiqa.official_optimizer([w], config.rate), sdd_fiqa.OFFICIAL_SCHEDULE
    assert config.epochs == 20 and config.rate == 1e-4
    for epoch in range(12):
        optimizer.param_groups[0]["lr"] = config.rate * schedule(epoch / config.epochs)
        assert abs(optimizer.param_groups[0]["lr"] - cases["adam/lr"][epoch]) < 1e-12
        for step in range(2):
            w.grad = torch.from_numpy(recipe.normal(f"sdd.dev.adam.g{epoch}.{step}", (7,)))
            optimizer.step()
        np.testing.assert_allclose(w.detach(), cases["adam/w"][epoch], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def layouts():
    stored = np.load(DATA / "backbones.npz")
    return {k: json.loads(stored[f"layout/{k}"].tobytes()) for k in sdd_fiqa.OFFICIAL}


def filled(layout):
    return {k: v * np.float32(.5) if v.ndim >= 2 else v for k, v in recipe.state_dict(layout).items()}


@pytest.mark.parametrize("name", sdd_fiqa.OFFICIAL)
def test_official_networks(cases, layouts, name, tmp_path):
    state = filled(layouts[name])
    path = tmp_path / "net.pth"         # as DataParallel leaves it
    torch.save({f"module.{k}": torch.from_numpy(v) for k, v in state.items()}, path)
    x = torch.from_numpy(recipe.uniform(f"sdd.dev.{name}.image", (2, 3, 112, 112), -1, 1))
    net = sdd_fiqa.load_official(path if name.startswith("mfn") else state, network=name)
    assert not net.training
    theirs = cases[f"{name}/out"]
    with torch.no_grad():
        mine = net(x).numpy()
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * abs(theirs).max())


def test_official_networks_are_told_from_their_names(layouts):
    net = sdd_fiqa.load_official(filled(layouts["mfn_quality"]))
    assert net(torch.zeros(1, 3, 112, 112)).shape == (1, 1)


def test_official_weights_that_do_not_fit_are_named(layouts):
    state = filled(layouts["mfn_quality"])
    for change, word in ((lambda s: s.pop("quality.3.bias"), "quality.3.bias"),
                         (lambda s: s.update(more=np.zeros(3)), "more"),
                         (lambda s: s.update({"quality.1.weight": np.zeros(7)}), "quality.1.weight")):
        broken = dict(state)
        change(broken)
        with pytest.raises(UserError, match=word):
            sdd_fiqa.load_official(broken, network="mfn_quality")
    with pytest.raises(UserError, match="mfn_recogniser"):
        sdd_fiqa.load_official(state, network="vgg")
