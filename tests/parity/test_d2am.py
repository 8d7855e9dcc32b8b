"""D2AM's networks, meta-step, statistics, relabelling, MMD, DRLM and metrics against the reference cases."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb import d2am
from facebook_nb.d2am import D2AM, DepthHead, Embedder, Extractor, Look, Terms, load_official, meta_loss
from facebook_nb.files import UserError
from facebook_nb.metrics.verification import auc
from tests.parity import recipe

DATA = Path(__file__).parent / "data" / "d2am"
CASES = np.load(DATA / "cases.npz")
P = "d2am/reference/"
NETWORKS = ("extractor", "depth", "embedder")


def official(network: str, wrapped: bool = False) -> dict:
    layout = json.loads((DATA / f"{network}_layout.json").read_text())
    prefix = "module." if wrapped else ""
    return {prefix + k: recipe.parameter(f"{P}{network}/{k}", tuple(v)) for k, v in layout.items()}


def draw(name: str, *shape) -> torch.Tensor:
    return torch.from_numpy(recipe.uniform(P + name, shape))


def close(key: str, value, tol: float = 1e-4) -> None:
    want = CASES[key]
    got = np.asarray(value.detach() if hasattr(value, "detach") else value).reshape(want.shape)
    assert np.abs(got - want).max() <= tol * max(1.0, np.abs(want).max()), key


def moments(x) -> list[float]:
    return [float(x.double().mean()), float(x.double().std())]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_networks(mode):
    E, D, M = (load_official(official(n, wrapped=n != "embedder"), n) for n in NETWORKS)
    for m in M.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
    for net in (E, D, M):
        net.train(mode == "train")
    case = f"net_{mode}/"
    with torch.no_grad():
        both, last = E(draw(case + "images", 1 if mode == "eval" else 2, 6, 256, 256))
        depth, logits = D(both), M(last)
    close(case + "features_slice", last[:, ::16, ::4, ::4])
    close(case + "features_mean_std", moments(last))
    close(case + "concatenated_slice", both[:, ::32, ::4, ::4])
    close(case + "concatenated_mean_std", moments(both))
    close(case + "depth", depth[:, :, ::2, ::2])
    close(case + "logits", logits)
    if mode == "train":
        close(case + "embedder_bn0_running_mean", M.features[0].bn0.running_mean)
        close(case + "embedder_bn0_running_var", M.features[0].bn0.running_var)
        close(case + "extractor_inc_running_var", E.inc["conv"][1].running_var)


SLOW = pytest.mark.skipif(not os.environ.get("FACEBOOK_NB_SLOW"),
                          reason="half a minute of convolutions; meta_64 covers it (FACEBOOK_NB_SLOW=1)")


@pytest.mark.parametrize("case, size, cut, tol, slice_tol", [
    # RFM's step as the others, on pictures of 64 pixels (its pooling to 32 is then one to 8)
    ("meta_64", 64, True, 5e-4, 1e-3), ("meta_64", 64, False, 5e-4, 1e-3),
    pytest.param("meta_large", 256, True, 5e-3, 3e-2, marks=SLOW),
    pytest.param("meta_small", 256, False, 5e-3, 3e-2, marks=SLOW)])
def test_meta_step(case, size, cut, tol, slice_tol):
    net = D2AM(Extractor(drlm=False), DepthHead(), Embedder(momentum=1.0)).train()
    for network, part in zip(NETWORKS, (net.E, net.D, net.M)):
        d2am.load_strict(part, official(network))
    d = size // 8
    x = torch.cat([draw(f"meta/domain{k}/{kind}/images", 1, 6, size, size)
                   for k in range(3) for kind in ("live", "spoof")])
    depth = torch.cat([torch.cat([draw(f"meta/domain{k}/depth", 1, 1, d, d), torch.zeros(1, 1, d, d)])
                       for k in range(3)])
    terms = Terms(alpha=1e-3 if case == "meta_small" else 0.5, mmd=0, confusion=0, cut=cut, norm="domain")
    out = meta_loss(net, x, torch.tensor([1, 0] * 3), depth, 3, terms)
    out["loss"].backward()
    close(f"{case}/Loss_cls_train", out["train"])
    close(f"{case}/Loss_cls_test", out["test"])
    total = CASES[f"{case}/Loss_meta_train"] + CASES[f"{case}/Loss_meta_test"]
    assert abs(float(out["loss"].detach()) - total) < 1e-4 * total
    close(f"{case}/embedder_bn0_running_mean", net.M.features[0].bn0.running_mean)
    checked = 0
    for name, part in zip(NETWORKS, (net.E, net.D, net.M)):
        for key, p in part.named_parameters():
            module = part.get_submodule(key.rpartition(".")[0])
            if isinstance(module, torch.nn.Conv2d) and key.endswith("bias"):
                continue                        # zero up to rounding before a batch norm
            want, got = float(CASES[f"{case}/grad_norm/{name}/{key}"]), float(p.grad.norm())
            assert abs(got - want) <= tol * want, (name, key, got, want)
            if f"{case}/grad_slice/{name}/{key}" in CASES:
                want = CASES[f"{case}/grad_slice/{name}/{key}"]
                got = p.grad.flatten()[::p.grad.numel() // 16][:16].numpy()
                assert np.abs(got - want).max() <= slice_tol * np.abs(want).max(), (name, key)
                checked += 1
    assert checked > 12


@pytest.mark.parametrize("case, shape", [("style_a", (3, 8, 9, 9)), ("style_b", (2, 16, 4, 6))])
def test_style(case, shape):
    x = torch.from_numpy(recipe.normal(f"{P}{case}/features", shape))
    var, mean = torch.var_mean(x, (2, 3))
    f = d2am.domain_features(Look([], [mean], [var], None), "plain")
    close(f"{case}/mean", f[:, :shape[1]], 1e-6)
    close(f"{case}/std", f[:, shape[1]:], 1e-6)


@pytest.mark.parametrize("case, n, K", [("relabel_a", 60, 3), ("relabel_b", 40, 4)])
def test_relabel(case, n, K):
    before = recipe.integers(f"{P}{case}/before", (n,), K)
    perm = np.argsort(recipe.uniform(f"{P}{case}/permutation", (K,)))
    keep = recipe.uniform(f"{P}{case}/noise", (n,)) < 0.75
    after = np.where(keep, perm[before], recipe.integers(f"{P}{case}/random", (n,), K))
    got = d2am.relabel(torch.from_numpy(before), torch.from_numpy(after), K).numpy()
    assert (got == CASES[f"{case}/relabelled"]).all()
    agreement = float(CASES[f"{case}/agreement"])
    assert (got == before).mean() == pytest.approx(agreement if agreement <= 1 else agreement / n)


@pytest.mark.parametrize("case, b, d", [("mmd_a", 6, 5), ("mmd_b", 10, 16)])
def test_mmd(case, b, d):
    h = torch.from_numpy(1.5 * recipe.normal(f"{P}{case}/h", (b, d)) + 0.3)
    t = torch.from_numpy(recipe.normal(f"{P}{case}/prior", (b, d)))
    close(f"{case}/biased_mmd2_sigma_1", d2am.mmd(h, t, 1.0), 1e-6)
    close(f"{case}/biased_mmd2_sigma_sqrt_d", d2am.mmd(h, t), 1e-6)


def test_drlm():
    x = torch.from_numpy(recipe.uniform(P + "drlm/features", (2, 16, 6, 6), -0.5, 1.5))
    gate = d2am.DRLM(16, 4)
    for name, shape in (("w1", (4, 16)), ("w2", (16, 4)), ("wp", (16,))):
        getattr(gate, name).data = torch.from_numpy(recipe.normal(f"{P}drlm/{name}", shape, 0.5))
    mean = x.mean((2, 3))
    a = gate(mean)
    close("drlm/attention", a, 1e-6)
    close("drlm/task_features_mean", a * mean, 1e-6)
    close("drlm/domain_features_mean", (1 - a) * mean, 1e-6)
    E = torch.nn.Module()
    E.drlm = [gate]
    look = Look([], [mean], [mean], [a])
    close("drlm/probability", (((1 - a) * mean) @ gate.wp).sigmoid(), 1e-6)
    close("drlm/p_log_p", d2am.confusion_loss(E, look, None, "p_log_p"), 1e-6)
    close("drlm/negative_binary_entropy", d2am.confusion_loss(E, look, None), 1e-6)


@pytest.mark.parametrize("case, n, shift", [("metric_a", 200, 1.0), ("metric_b", 37, 0.3)])
def test_metrics(case, n, shift):
    live = recipe.integers(f"{P}{case}/labels", (n,), 2)
    z = recipe.normal(f"{P}{case}/scores", (n,)).astype(float) + shift * (2 * live - 1)
    p = 1 / (1 + np.exp(-z))
    eer, threshold, hter, hter_half = CASES[f"{case}/eer_threshold_hter_hter05"]
    one = 1 / min((live == 1).sum(), (live == 0).sum())
    assert abs(d2am.errors(p, live, d2am.equal_error(p, live))[2] - hter) <= one
    assert d2am.errors(p, live, threshold)[2] == pytest.approx(hter, abs=1e-9)
    far, frr, half = d2am.errors(p, live, 0.5)
    assert half == pytest.approx(hter_half, abs=1e-9)
    apcer, bpcer, acer, _ = CASES[f"{case}/apcer_bpcer_acer_acc_at_05"]
    assert (far, frr, half) == pytest.approx((apcer, bpcer, acer), abs=1e-9)
    assert auc(p[live == 1], p[live == 0]) == pytest.approx(float(CASES[f"{case}/auc"]), abs=1e-9)


def test_official_weights_that_do_not_fit():
    state = official("embedder")
    assert type(load_official(state)).__name__ == "RFMEmbedder"     # told from the names
    del state["fc.bias"]
    with pytest.raises(UserError, match="missing.*fc.bias"):
        load_official(state)
    with pytest.raises(UserError, match="no 'head'"):
        load_official(official("depth"), "head")
