"""The dynamic meta-filter beside the released code: stored outputs and gradients."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facebook_nb import dmf
from facebook_nb.models.backbones import ResNet12, block_mask
from tests.parity import recipe

HERE = Path(__file__).parent / "data" / "dmf"
LAYOUT = {k: tuple(v) for k, v in json.loads((HERE / "layout.json").read_text()).items()}


@pytest.fixture(scope="module")
def cases():
    with np.load(HERE / "cases.npz") as file:
        return {k: file[k] for k in file.files}


def official(groups=64, classes=64, off_scale=1.0):
    """The network, loaded the way a released checkpoint is, filled by the recipe."""
    shapes = LAYOUT | {
        "dw_gen.kernel_conv.weight": (groups, 640, 3, 3),
        "global_clasifier.weight": (classes, 640, 1, 1),
        "global_clasifier.bias": (classes,),
    }
    state = recipe.state_dict(shapes)
    state["dw_gen.off_conv.weight"] = state["dw_gen.off_conv.weight"] * np.float32(off_scale)
    return dmf.load_official(state)


def normal(name, shape, scale=1.0):
    return torch.from_numpy(recipe.normal(name, shape, scale))


def check(cases, key, found, step=1, gradient=False):
    """The tolerances of the reference's README, on what it stored."""
    found = found.detach().numpy()
    stats = cases.get(f"{key}.stats")
    largest = np.abs(cases[key]).max() if stats is None else stats[2]
    if stats is not None:
        assert np.allclose([found.mean(), found.std(), np.abs(found).max()], stats, rtol=1e-3, atol=1e-4 * largest)
    np.testing.assert_allclose(
        found.reshape(-1)[::step],
        cases[key].reshape(-1),
        rtol=1e-3 if gradient else 1e-4,
        atol=1e-4 * largest,
    )


def test_layout_is_the_released_networks():
    model = dmf.DMF(ResNet12())
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == LAYOUT
    assert sum(p.numel() for p in model.base.parameters()) == 12_424_320
    assert sum(p.numel() for p in model.dw_gen.parameters()) == 944_640


@pytest.mark.parametrize("case, shape", [("backbone0", (2, 3, 84, 84)), ("backbone1", (1, 3, 33, 47))])
def test_backbone(cases, case, shape):
    with torch.no_grad():
        found = official().base(normal(f"dmf.{case}", shape))
    assert tuple(found.shape) == tuple(cases[f"{case}.shape"])
    check(cases, case, found, 97)


@pytest.mark.parametrize("case, n, c, out, h, w, scale", [("dconv0", 2, 6, 4, 5, 7, 0.7), ("dconv1", 1, 8, 3, 6, 6, 6)])
def test_projecting_then_sampling_is_a_deformable_convolution(cases, case, n, c, out, h, w, scale):
    x = normal(f"dmf.{case}.x", (n, c, h, w)).requires_grad_()
    offset = normal(f"dmf.{case}.offset", (n, 18, h, w), scale).requires_grad_()
    weight = normal(f"dmf.{case}.weight", (out, c, 3, 3), (2 / (9 * c)) ** 0.5).requires_grad_()
    found = dmf.sampled_filter(x[:, None], offset[:, None, None], weight)[:, 0, 0]
    check(cases, f"{case}.out", found)
    grads = torch.autograd.grad((found * normal(f"dmf.{case}.grad", (n, out, h, w))).sum(), (x, offset, weight))
    for name, grad in zip(("d_x", "d_offset", "d_weight"), grads):
        check(cases, f"{case}.{name}", grad, gradient=True)


@pytest.mark.parametrize("case, groups, n, h, off_scale", [("align0", 64, 2, 11, 0.05), ("align1", 160, 1, 6, 1.0)])
def test_alignment(cases, case, groups, n, h, off_scale):
    model = official(groups, off_scale=off_scale)
    s, x = (normal(f"dmf.{case}.{k}", (n, 640, h, h))[:, None] for k in ("support", "query"))
    with torch.no_grad():
        f = model.dw_gen(x, s)[:, 0, 0].sigmoid()
        check(cases, f"{case}.offset", model.dw_gen.offsets(x, s), 7)
        check(cases, f"{case}.filter", f, 13)
        check(cases, f"{case}.aligned", dmf.integrate(x[:, 0], f), 101)
        grown = dmf.gain(f).repeat_interleave(640 // groups, 1)
        closed = torch.where(x[:, 0] > 0, grown * x[:, 0], x[:, 0])
        check(cases, f"{case}.aligned", closed, 101)


@pytest.mark.parametrize("case, n, c, groups, h, w, k", [("ode0", 2, 12, 4, 5, 6, 1), ("ode1", 1, 8, 2, 4, 4, 3)])
def test_ode_block(cases, case, n, c, groups, h, w, k):
    x = normal(f"dmf.{case}.query", (n, c, h, w)).requires_grad_()
    f = torch.from_numpy(recipe.uniform(f"dmf.{case}.filter", (n, groups * k * k, h, w))).requires_grad_()
    found = dmf.integrate(x, f, "rk4", k, order="authors")
    check(cases, f"{case}.out", found)
    grads = torch.autograd.grad((found * normal(f"dmf.{case}.grad", x.shape)).sum(), (x, f))
    check(cases, f"{case}.d_query", grads[0], gradient=True)
    check(cases, f"{case}.d_filter", grads[1], gradient=True)


@pytest.mark.parametrize(
    "case, groups, b, way, shot, queries, size, off_scale, classes",
    [("ep0", 64, 1, 5, 1, 10, 84, 0.05, 64), ("ep1", 64, 2, 3, 2, 6, 48, 0.02, 20)],
)
def test_whole_episodes(cases, case, groups, b, way, shot, queries, size, off_scale, classes):
    model = official(groups, classes, off_scale)
    m = way * shot
    support = normal(f"dmf.{case}.support", (b, m, 3, size, size))
    query = normal(f"dmf.{case}.query", (b, queries, 3, size, size))
    support_labels = torch.arange(way).repeat_interleave(shot).expand(b, -1)
    assert (support_labels.numpy() == cases[f"{case}.support_labels"]).all()
    labels = recipe.integers(f"dmf.{case}.labels", (b, queries), way)
    labels[:, :way] = np.arange(way)
    pids = recipe.integers(f"dmf.{case}.pids", (b, queries), classes)
    with torch.no_grad():
        feat = model.base(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
        maps = feat[: b * m].unflatten(0, (b, m)), feat[b * m :].unflatten(0, (b, queries))
        check(cases, f"{case}.eval_scores", model.head(*maps, support_labels))
        one_hot = F.one_hot(support_labels).float()
        torch.testing.assert_close(model.head(*maps, one_hot), model.head(*maps, support_labels))

    feat = (feat / feat.std()).requires_grad_()
    model.train()
    found, scores = model.head(
        feat[: b * m].unflatten(0, (b, m)), feat[b * m :].unflatten(0, (b, queries)), support_labels
    )
    check(cases, f"{case}.train_global", found, 103)
    check(cases, f"{case}.train_scores", scores, 5 if scores.numel() > 4000 else 1)
    loss = dmf.episode_loss(found, scores, *(torch.from_numpy(t).flatten() for t in (pids, labels)))
    np.testing.assert_allclose([loss[k].item() for k in ("global", "few", "loss")], cases[f"{case}.loss"], rtol=1e-4)
    over = {
        "d_feat": (feat, 211),
        "d_off_conv": (model.dw_gen.off_conv.weight, 499),
        "d_kernel_conv": (model.dw_gen.kernel_conv.weight, 997),
        "d_global_w": (model.global_clasifier.weight, 61),
        "d_global_b": (model.global_clasifier.bias, 1),
    }
    grads = torch.autograd.grad(loss["loss"], [t for t, _ in over.values()])
    for (name, (_, step)), grad in zip(over.items(), grads):
        check(cases, f"{case}.{name}", grad, step, gradient=True)


def test_schedule(cases):
    found = [0.35 * dmf.authors_rate(i, 44, 20) for i in range(1, 45)]
    np.testing.assert_allclose(found, cases["sched0"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case, shape, p", [("drop0", (2, 3, 7, 7), 0.08), ("drop1", (1, 2, 17, 17), 0.0)])
def test_dropblock_mask_with_its_defect(cases, case, shape, p):
    seeds = torch.from_numpy((recipe.uniform(f"dmf.{case}", shape) < p).astype(np.float32))
    mask = block_mask(seeds, 5, authors=True)
    assert (mask.numpy() == cases[case]).all()
    assert abs(mask.numel() / mask.sum().item() - cases[f"{case}.scale"]) < 1e-6
    meant = block_mask(seeds, 5)
    assert (meant <= mask).all() and (case == "drop1") == bool(meant.all())
