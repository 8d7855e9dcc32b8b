"""The penalised head beside the released one: logits, losses, gradients, selections; two processes; checkpoints."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facebook_nb import fpr
from facebook_nb.files import UserError
from facebook_nb.models.backbones import IRNet
from tests import fpr_child
from tests.parity import recipe

HERE = Path(__file__).parent / "data" / "fpr"
#        B, d, n, s, m, pull
CASES = {
    "plain": (8, 16, 20, 64, 0.35, 1.5),
    "medium": (32, 64, 100, 64, 0.35, 0.8),
    "hard": (128, 32, 500, 30, 0.2, 0.6),
    "random": (32, 64, 100, 64, 0.35, 0),
    "reversed": (40, 16, 20, 8, 0.35, -0.6),
    "single": (1, 16, 20, 8, 0.35, 1),
    "rounding": (3, 32, 8, 4, 0.35, 3),
    "two_classes": (5, 8, 2, 4, 0.35, 1),
    "ties": (8, 24, 30, 16, 0.35, 1),
    "wide": (64, 64, 1000, 64, 0.35, 1),
    "upstream": (12, 20, 40, 64, 0.35, 0.9),
    "no_margin": (16, 24, 50, 20, 0, 0.9),
    "ranks": (12, 16, 30, 64, 0.35, 1),
    "cosface": (16, 24, 50, 64, 0.4, 0.9),
    "arcface": (16, 24, 50, 64, 0.5, 0.9),
    "arcface_far": (8, 12, 20, 16, 0.5, -2),
}


@pytest.fixture(scope="module")
def cases():
    with np.load(HERE / "cases.npz") as file:
        return {k: file[k] for k in file.files}


def inputs(name):
    """x, kernel (d, n) and y of a case."""
    B, d, n, _, _, pull = CASES[name]
    p = f"fpr.dev.{name}"
    W, y = recipe.normal(f"{p}.w", (d, n)), recipe.integers(f"{p}.y", (B,), n)
    x = recipe.normal(f"{p}.x", (B, d)) + np.float32(pull) * W[:, y].T
    if name == "ties":
        x[B // 2:], y[B // 2:] = x[:B // 2], y[:B // 2]
    return torch.from_numpy(x), torch.from_numpy(W), torch.from_numpy(y)


def check(cases, key, found, share=None, atol=None):
    """Within atol, or within `share` of the tensor's largest value."""
    found = found.detach().numpy()
    if key in cases:
        theirs, largest = cases[key], float(np.abs(cases[key]).max())
    else:
        assert found.shape == tuple(cases[f"{key}/shape"])
        _, _, largest, step = cases[f"{key}/stats"]
        theirs, found = cases[f"{key}/slice"], found.ravel()[::int(step)]
    assert found.shape == theirs.shape
    assert np.abs(found - theirs).max() <= (share * largest if share else atol)


@pytest.mark.parametrize("name", [n for n in CASES if n != "ranks"])
def test_head(cases, name):
    B, _, n, s, m, _ = CASES[name]
    x, kernel, y = inputs(name)
    base = "arcface" if "arcface" in name else "cosface"
    penalty = None if base == "arcface" or name == "cosface" else fpr.PENALTIES["official"]
    W = kernel.T.contiguous().requires_grad_()
    x.requires_grad_()
    how = fpr.HeadSettings(n, s, m, base, penalty)
    output, seen = fpr.penalised_logits(x, W, y, how)
    loss, _ = fpr.penalised_loss(x, W, y, how)
    check(cases, f"{name}/output", output, atol=1e-5 * s)
    torch.testing.assert_close(fpr.split_cross_entropy(output, y, how), loss)
    np.testing.assert_allclose(loss.item(), cases[f"{name}/loss"], rtol=1e-5, atol=1e-5)
    target = loss
    if name == "upstream":
        target = (output * torch.from_numpy(recipe.normal("fpr.dev.upstream.up", (B, n)))).sum()
    d_x, d_W = torch.autograd.grad(target, (x, W))
    check(cases, f"{name}/d_x", d_x, share=2e-5)
    check(cases, f"{name}/d_w", d_W.T, share=2e-5)
    if penalty:
        k, selected, easy, hard, threshold = cases[f"{name}/info"]
        assert (seen.k, seen.selected, seen.easy, seen.hard) == (k, selected, easy, hard)
        assert abs(seen.threshold - threshold) <= 1e-6
        np.testing.assert_allclose(seen.rho.numpy(), cases[f"{name}/rho"], atol=1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("ranks", "cosface", "arcface", "arcface_far")])
def test_official_head_gives_logits_and_cosines(cases, name):
    _, _, _, s, m, _ = CASES[name]
    x, kernel, y = inputs(name)
    head = fpr.load_official({"some_set": {"module.kernel": kernel}})
    head.settings = head.settings._replace(s=s, m=m)
    output, origin = head(x, y)
    check(cases, f"{name}/output", output, atol=1e-5 * s)
    check(cases, f"{name}/origin", origin, atol=1e-5 * s)
    assert not origin.requires_grad and not head.training


def test_two_processes(cases, tmp_path):
    x, kernel, y = inputs("ranks")
    fpr_child.start(2, tmp_path, "once", dict(x=x, W=kernel.T.contiguous(), y=y, sizes=[6, 6], how=dict(classes=30)))
    parts = [torch.load(tmp_path / f"once-{rank}.pt") for rank in range(2)]
    check(cases, "ranks/output", torch.cat([p["z"] for p in parts], 1), atol=1e-5 * 64)
    for part in parts:      # the authors' d_x is of each process's own mean: twice ours
        np.testing.assert_allclose(part["loss"].item(), cases["ranks/loss"].mean(), rtol=1e-5, atol=1e-5)
    check(cases, "ranks/d_x", 2 * torch.cat([p["d_x"] for p in parts]), share=2e-5)
    check(cases, "ranks/d_w", torch.cat([p["d_W"] for p in parts]).T, share=2e-5)
    assert parts[0]["info"][:4] == cases["ranks/info"][:4].tolist() == parts[1]["info"][:4]


def test_backbone_files(cases, tmp_path):
    shapes = {k: tuple(v.shape) for k, v in IRNet(34).state_dict().items()}
    state = {k: torch.from_numpy(np.asarray(v * np.float32(0.5) if np.ndim(v) > 1 else v))
             for k, v in recipe.state_dict(shapes).items()}
    torch.save(state, tmp_path / "Backbone_Epoch_45_checkpoint.pth")
    net = fpr.load_official(tmp_path / "Backbone_Epoch_45_checkpoint.pth")
    x = torch.from_numpy(recipe.uniform("fpr.dev.ir34.image", (2, 3, 112, 112), -1, 1)).requires_grad_()
    out = net(x)
    theirs = torch.from_numpy(cases["ir34/embedding"])
    torch.testing.assert_close(out.detach(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    (F.normalize(out) * torch.from_numpy(recipe.normal("fpr.dev.ir34.up", (2, 512)))).sum().backward()
    check(cases, "ir34/d_image", x.grad, share=1e-3)
    del state["body.3.res_layer.1.weight"]
    with pytest.raises(UserError, match=r"missing.*body\.3\.res_layer\.1\.weight"):
        fpr.load_official(state, "ir34")


def test_head_files(tmp_path):
    kernel = torch.from_numpy(recipe.normal("kernel", (16, 9)))
    path = tmp_path / "HEAD_Epoch_45_checkpoint.pth"
    for state in ({"A": {"module.kernel": kernel}}, {"A": {"kernel": kernel}}, {"kernel": kernel}):
        torch.save(state, path)
        torch.testing.assert_close(fpr.load_official(path, "head").weight.detach(), kernel.T)
    with pytest.raises(UserError, match="A, B"):
        fpr.load_official({"A": {"kernel": kernel}, "B": {"kernel": kernel}})
    with pytest.raises(UserError, match="kernel"):
        fpr.load_official({"A": {"kernel": kernel, "bias": kernel[0]}})
    with pytest.raises(UserError, match="no such file"):
        fpr.load_official(tmp_path / "none.pth")
    path.write_bytes(b"damaged")
    with pytest.raises(UserError):
        fpr.load_official(path)
