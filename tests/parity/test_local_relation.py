"""Local relations: the numbers of the community's detector, part by part and whole, by its names."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facebook_nb import local_relation as L
from facebook_nb.files import UserError
from tests.parity import recipe

DATA = Path(__file__).parent / "data" / "local_relation"


@pytest.fixture(scope="module")
def cases():
    return np.load(DATA / "cases.npz")


def name(case, what):
    return f"local_relation/reference/{case}/{what}"


def normal(case, what, shape):
    return torch.as_tensor(recipe.normal(name(case, what), shape))


def close(a, b, atol):
    np.testing.assert_allclose(a.detach().numpy(), b, rtol=0, atol=atol)


def picture(case):
    if case == "freq_c":
        x = recipe.integers(name(case, "image"), (16, 16, 3), 256)
        return x.repeat(16, 0).repeat(16, 1)
    return recipe.integers(name(case, "image"), (64 if case == "freq_a" else 48, 64, 3), 256)


@pytest.mark.parametrize("case, end", [("freq_a", ""), ("freq_b", ""), ("freq_c", "_strided")])
def test_frequency_view(cases, case, end):
    x = torch.as_tensor(picture(case).astype(np.uint8)).permute(2, 0, 1)[None]
    every = slice(None, None, 8 if end else 1)
    grey = L.to_grey(x)
    assert (grey[0, every, every].numpy() == cases[f"{case}/gray{end}"]).all()
    h = L.high_pass(grey)
    close(h[0, every, every], cases[f"{case}/highpass{end}"], 1e-3)
    rgb, view = L.views(x, scale="published")
    close(view[0, 0, every, every], cases[f"{case}/normalised{end}"], 1e-5)
    close(rgb, (x.numpy() / 255 - 0.5) / 0.5, 1e-6)
    assert L.kept_frequencies(*grey.shape[1:]).sum() == cases[f"{case}/kept_coefficients"]
    if end:
        close(torch.stack([h.mean(), h.std(correction=0)]), cases["freq_c/highpass_mean_std"], 1e-3)


@pytest.mark.parametrize("case, n", [("target_a", 4), ("target_b", 5), ("target_c", 4)])
def test_target(cases, case, n):
    shape = {"target_a": (3, 256, 256), "target_b": (2, 30, 30), "target_c": (2, 10, 10)}[case]
    mask = torch.as_tensor(recipe.uniform(name(case, "mask"), shape))
    if case == "target_b":
        mask = (mask > 0.5).float()
    close(L.target_similarity(mask, n, bands="chunk"), cases[f"{case}/similarity"], 1e-5)
    if case != "target_c":                                  # patches of one size: no choice to make
        close(L.target_similarity(mask, n), cases[f"{case}/similarity"], 1e-5)


@pytest.mark.parametrize("case, shape, n", [("mpsm_a", (2, 24, 8, 8), 4), ("mpsm_b", (3, 7, 6, 6), 3)])
def test_patch_similarity(cases, case, shape, n):
    f = normal(case, "features", shape).requires_grad_()
    s = L.patch_similarity(f, n)
    v = L.off_diagonal(s)
    close(s, cases[f"{case}/similarity"], 1e-5)
    close(v, cases[f"{case}/vector"], 1e-5)
    ((v * normal(case, "grad_vector", v.shape)).sum() + (s * normal(case, "grad_similarity", s.shape)).sum()).backward()
    close(f.grad, cases[f"{case}/grad_features"], 1e-5)


def test_patches_in_rows_and_columns():
    f = normal("mpsm_c", "features", (2, 16, 4, 8))
    p = f.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 8, -1).numpy()
    length = np.linalg.norm(p, axis=2, keepdims=True)
    close(L.patch_similarity(f, (2, 4)), (1 + (p / length) @ (p / length).transpose(0, 2, 1)) / 2, 1e-5)


@pytest.mark.parametrize("case, shape", [("rfam_eval", (2, 8, 9, 9)), ("rfam_train", (3, 6, 8, 8))])
def test_attention(cases, case, shape):
    gate = L.RFAM(shape[1]).train(case == "rfam_train")
    gate.load_state_dict({k: torch.as_tensor(recipe.parameter(name(case, k), tuple(v.shape)))
                          for k, v in gate.state_dict().items()})
    x1, x2 = (normal(case, k, shape).requires_grad_() for k in ("x1", "x2"))
    y1, y2, _ = gate(x1, x2)
    close(y1, cases[f"{case}/y1"], 1e-5)
    close(y2, cases[f"{case}/y2"], 1e-5)
    ((y1 * normal(case, "grad_y1", shape)).sum() + (y2 * normal(case, "grad_y2", shape)).sum()).backward()
    for tensor, key in ((x1, "x1"), (x2, "x2"), (gate.attention[0].weight, "conv1_weight"),
                        (gate.attention[3].weight, "conv2_weight")):
        close(tensor.grad, cases[f"{case}/grad_{key}"], 1e-5)
    if case == "rfam_train":
        close(gate.attention[1].running_mean, cases[f"{case}/running_mean"], 1e-5)
        close(gate.attention[1].running_var, cases[f"{case}/running_var"], 1e-5)


def test_decoder(cases):
    net = L.Decoder((24, 8, 8, 6, 4))
    net.load_state_dict({k: torch.as_tensor(recipe.parameter(name("decoder", k), tuple(v.shape)))
                         for k, v in net.state_dict().items()})
    f = normal("decoder", "features", (2, 24, 4, 4)).requires_grad_()
    y = net(f)
    close(y[:, :, ::4, ::4], cases["decoder/output_strided"], 1e-5)
    close(torch.stack([y.mean(), y.std()]), cases["decoder/output_mean_std"], 1e-5)
    (y * normal("decoder", "grad", y.shape)).sum().backward()
    close(f.grad, cases["decoder/grad_features"], 1e-5)


def test_losses(cases):
    uniform = lambda what, *rest: torch.as_tensor(recipe.uniform(name("losses", what), *rest))
    s = uniform("similarity", (3, 16, 16)).requires_grad_()
    p = uniform("mask_pred", (3, 1, 32, 32), 0.02, 0.98).requires_grad_()
    logits = normal("losses", "logits", (3, 2)).requires_grad_()
    mask = (uniform("mask", (3, 1, 32, 32)) > 0.6).float()
    label = torch.as_tensor(recipe.integers(name("losses", "label"), (3,), 2))
    found = L.losses(L.Output(logits, s, p.logit(), None, []), label, mask, 4, 1.0, 1.0)
    for key, theirs in (("loss", "overall"), ("sim", "sim_loss"), ("seg", "seg_loss"), ("ce", "ce_loss")):
        assert abs(found[key].item() - cases[f"losses/{theirs}"]) < 1e-5
    found["loss"].backward()
    close(s.grad, cases["losses/grad_similarity"], 1e-5)
    close(p.grad[:, :, ::4, ::4], cases["losses/grad_mask_pred_strided"], 1e-5)
    close(logits.grad, cases["losses/grad_logits"], 1e-5)


@pytest.fixture(scope="module")
def weights():
    layout = json.loads((DATA / "layout.json").read_text())
    layout = {k: v["shape"] if isinstance(v, dict) else v for k, v in layout.items()}
    state = recipe.state_dict(layout)
    return {k: v * np.float32(0.8) if k.endswith("_bn2.weight") else v for k, v in state.items()}


def test_the_whole_detector(cases, weights):
    case, P = "detector_eval", "detector_eval/"
    net = L.load_official(weights)
    assert not net.training and len(net.state_dict()) == len(weights) - 4       # two unused layers
    x = normal(case, "image", (2, 3, 256, 256)).requires_grad_()
    h = normal(case, "highpass", (2, 1, 256, 256)).requires_grad_()
    mask = torch.as_tensor(recipe.uniform(name(case, "mask"), (2, 1, 16, 16))) > 0.5
    mask = mask.float().repeat_interleave(16, 2).repeat_interleave(16, 3)
    label = torch.as_tensor(recipe.integers(name(case, "label"), (2,), 2))
    with torch.no_grad():
        close(net.encoder_rgb.low(x)[:, :4, ::8, ::8], cases[P + "rgb_low_slice"], 1e-4)
        close(net.encoder_idct.low(h)[:, :4, ::8, ::8], cases[P + "highpass_low_slice"], 1e-4)
    out = net(x, h)
    close(out.features[:, ::251, ::2, ::2], cases[P + "features_slice"], 1e-4)
    close(out.similarity, cases[P + "similarity"], 1e-4)
    close(out.logits, cases[P + "logits"], 1e-4)
    close(out.logits.softmax(1)[:, 1], cases[P + "prob"], 1e-4)
    close(out.mask.sigmoid()[:, :, ::16, ::16], cases[P + "mask_pred_strided"], 1e-4)
    found = L.losses(out, label, mask, 4, 1.0, 1.0)
    for key, theirs in (("loss", "overall"), ("sim", "sim_loss"), ("seg", "seg_loss"), ("ce", "ce_loss")):
        assert abs(found[key].item() - cases[P + theirs]) < 1e-4
    found["loss"].backward()
    for tensor, key in ((x, "image"), (h, "highpass")):
        close(tensor.grad[:, :, ::16, ::16], cases[f"{P}grad_{key}_strided"], 5e-6)
        assert abs(tensor.grad.norm().item() - cases[f"{P}grad_{key}_norm"]) < 1e-4


def test_the_decoder_is_not_needed_to_judge(weights):
    net = L.load_official(weights)
    x, h = torch.zeros(1, 3, 256, 256), torch.zeros(1, 1, 256, 256)
    net.decoder.forward = None                              # would fail if it were called
    with torch.no_grad():
        assert net(x, h, masks=False).mask is None


def test_what_does_not_fit_is_named(weights):
    for change, word in ((lambda w: w.pop("rfam2.attention.0.bias"), "missing"),
                         (lambda w: w.update(extra=np.zeros(1)), "surplus"),
                         (lambda w: w.update({"final.weight": np.zeros((1, 32, 1, 1))}), "ill-shaped")):
        broken = dict(weights)
        change(broken)
        with pytest.raises(UserError, match=word):
            L.load_official(broken)
    with pytest.raises(UserError, match="detector"):
        L.load_official(weights, "encoder")


def test_imagenet_weights_start_both_encoders(weights):
    own = {k.removeprefix("encoder_rgb.efficientnet."): v for k, v in weights.items()
           if k.startswith("encoder_rgb.efficientnet.")}
    own |= {"_fc.weight": np.zeros((1000, 1792)), "_fc.bias": np.zeros(1000)}
    net = L.LocalRelation(L.B4Encoder, 4).eval()
    L.load_imagenet(net, own)
    grey = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        colour = net.encoder_rgb.efficientnet.stem(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(net.encoder_idct.efficientnet.stem(grey), colour, rtol=1e-4, atol=1e-5)
    assert F.mse_loss(net.encoder_rgb.efficientnet._conv_head.weight, torch.as_tensor(own["_conv_head.weight"])) == 0
