"""Adv-Makeup gives its authors' numbers: networks, losses, pasting, one iteration, Poisson; and loads by name."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facebook_nb import adv_makeup as A
from facebook_nb.files import UserError
from tests.parity import recipe

DATA = Path(__file__).parent / "data" / "adv_makeup"
P = "adv_makeup.dev"


@pytest.fixture(scope="module")
def cases():
    return np.load(DATA / "cases.npz")


def state(name):
    """The recipe's weights: biases of encoder and decoder around 0, the last layer small."""
    out = recipe.state_dict(json.loads((DATA / f"{name}.layout.json").read_text()))
    for k, v in out.items():
        if k.startswith(("vars_enc", "vars_dec")) and int(k.split(".")[1]) % 2:
            out[k] = v - 1
    if "vars_dec.12" in out:
        out["vars_dec.12"] = out["vars_dec.12"] * np.float32(.3)
    return {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in out.items()}


def generator():
    G = A.Generator()
    G.encoder, G.decoder = A.load_official(state("encoder")), A.load_official(state("decoder"))
    return G


def discriminator():
    return A.load_official(state("discriminator"))


def vgg():
    net = A.Style()
    full = {k: recipe.parameter(k, tuple(v.shape)) for k, v in net.state_dict().items()}
    more = {"features.24.weight": np.zeros((512, 512, 3, 3), np.float32), "classifier.0.bias": np.zeros(4, np.float32)}
    return A.load_official({**full, **more})        # the file holds the classifier too


def uniform(name, shape):
    return torch.from_numpy(recipe.uniform(f"{P}.{name}", shape, -1, 1))


def close(cases, key, mine, atol=0.0, rtol=0.0, of_max=0.0):
    """Within atol + rtol |theirs|, or within a share of the largest stored value."""
    mine = np.asarray(mine.detach() if isinstance(mine, torch.Tensor) else mine)
    if key in cases:
        theirs = cases[key]
    else:
        assert tuple(mine.shape) == tuple(cases[f"{key}/shape"])
        theirs, mine = cases[f"{key}/slice"], mine.ravel()[::int(cases[f"{key}/stats"][2])][:258]
    np.testing.assert_allclose(mine.reshape(theirs.shape), theirs, rtol=rtol,
                               atol=max(atol, of_max * float(abs(theirs).max())))


def test_generator_in_training(cases):
    G = generator().train()
    f1, f2 = G.encoder(uniform("x", (2, 3, 32, 84)))
    y = G.decoder(f1, f2)
    for key, value in (("f1", f1), ("f2", f2), ("y", y)):
        close(cases, f"train/{key}", value, 1e-5)
    for side, stats in (("enc", G.encoder.vars_bn_enc), ("dec", G.decoder.vars_bn_dec)):
        for i, s in enumerate(stats):
            close(cases, f"train/vars_bn_{side}.{i}", s, 1e-5)


def test_generator_at_test_and_with_other_weights(cases):
    G = generator()
    with torch.no_grad():
        close(cases, "eval/y", G.eval()(uniform("xbig", (1, 3, 160, 420))), 1e-5)
        fast = [w + .01 * torch.from_numpy(recipe.normal(f"{P}.fast_{side}.{i}", tuple(w.shape)))
                for side, own in (("enc", G.encoder.vars_enc), ("dec", G.decoder.vars_dec)) for i, w in enumerate(own)]
        close(cases, "fast/y", G(uniform("x", (2, 3, 32, 84)), fast, training=True), 1e-5)


def test_discriminator_and_its_game(cases):
    x = uniform("x", (2, 3, 32, 84)).requires_grad_()
    out = discriminator()(x)
    close(cases, "discr/out", out, 1e-5)
    loss = A.generator_loss(out)
    close(cases, "gan/real_or_gen", loss, rtol=1e-4)
    both = A.discriminator_loss(out, out)
    close(cases, "gan/fake", both - loss, rtol=1e-4)
    close(cases, "gan/real_grad", torch.autograd.grad(loss, x)[0], of_max=1e-4)


def test_blending_losses(cases):
    style, one = vgg(), torch.ones(1, 1, 40, 104)
    old, new = uniform("orig", (1, 3, 40, 104)), uniform("pasted", (1, 3, 40, 104)).requires_grad_()
    grams = style(new, one)
    for i, gram in enumerate(grams):
        close(cases, f"gram/{i}", gram, of_max=1e-4)
    losses = {"style": 1e5 * A.style_loss(grams, style(old, one)), "lap": A.laplacian_loss(new, old, one),
              "tv": A.variation_loss(new, one)}
    for key, loss in losses.items():
        close(cases, key, loss, rtol=1e-4 if key == "style" else 1e-5)
        close(cases, f"{key}_grad", torch.autograd.grad(loss, new)[0], of_max=2e-3 if key == "style" else 1e-5)


def two_sources(cases, crops=None):
    faces = torch.cat([uniform(f"image.{i}", (1, 3, 300, 300)) for i in (0, 1)])
    src = A.make_sources(faces, [A.orbit_106(cases[f"landmarks/{i}"]) for i in (0, 1)], (32, 84), 40)
    return src if crops is None else src._replace(crops=crops)


def test_mask_and_pasting(cases):
    src = two_sources(cases)
    faces, boxes = A.paste(src, uniform("patch", (2, 3, 32, 84)))
    for i, (_, _, h, w) in enumerate(src.box.tolist()):
        assert (h, w) == tuple(cases[f"paste/mask_shape/{i}"])
        mask = np.unpackbits(cases[f"paste/mask/{i}"])[:h * w].reshape(h, w)
        assert (src.mask[i, 0, :h, :w].numpy() == mask).all() and src.mask[i].sum() == mask.sum()
        close(cases, f"paste/orig_eye/{i}", A.native(src)[i:i + 1, :, :h, :w], 1e-6)
        close(cases, f"paste/pasted_eye/{i}", boxes[i:i + 1, :, :h, :w], 1e-6)
        close(cases, f"paste/image/{i}", faces[i], 1e-6)


class LinearFR(torch.nn.Module):
    """The reference's stand-in for a recogniser."""

    def __init__(self, name):
        super().__init__()
        self.w = torch.from_numpy(recipe.parameter(f"fr_{name}.weight", (32, 192)))
        self.b = torch.from_numpy(recipe.parameter(f"fr_{name}.bias", (32,)))

    def forward(self, x):
        return torch.tanh(F.adaptive_avg_pool2d(x, 8).flatten(1) @ self.w.T + self.b)


def aims():
    target = uniform("target", (1, 3, 300, 300))
    return {k: A.aim(A.Resized(LinearFR(k), A.SIDES[k]), target) for k in A.RECOGNISERS}


def test_attack_loss_of_each_recogniser(cases):
    src = two_sources(cases)
    faces = A.paste(src, uniform("patch", (2, 3, 32, 84)))[0].requires_grad_()
    for name, aim in aims().items():
        loss = aim(faces, torch.arange(2)).mean()
        close(cases, f"target/{name}", loss, rtol=1e-5)
        close(cases, f"target_grad/{name}", torch.autograd.grad(loss, faces)[0], of_max=1e-5)


def test_one_whole_iteration(cases):
    G, D, style = generator().train(), discriminator(), vgg()
    src = two_sources(cases, uniform("before", (2, 3, 32, 84)))
    with torch.no_grad():
        grams = style(A.native(src), src.inside)
    crew = A.Crew([str(k) for k in cases["step/meta_train"]], [str(k) for k in cases["step/meta_test"]])
    to_G, to_D = A.optimisers(G, D)
    theirs = {}
    to_D.register_step_pre_hook(lambda *_: theirs.update({k: p.grad.clone() for k, p in D.named_parameters()}))
    values = A.iteration(G, D, to_G, to_D, src, torch.arange(2), uniform("after", (2, 3, 32, 84)), aims(), crew,
                         style, grams, A.Weights(), 1e-3)
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert norm < 5                                             # so clipping changed nothing
    gradients = {f"discr_grad/{k}": g for k, g in theirs.items()}
    gradients |= {f"enc_grad/{i}": p.grad for i, p in enumerate(G.encoder.vars_enc)}
    gradients |= {f"dec_grad/{i}": p.grad for i, p in enumerate(G.decoder.vars_dec)}
    for key, g in gradients.items():
        close(cases, f"step/{key}", g, atol=1e-6, of_max=1e-3)
    losses = {"disp_ad_true_loss": None, "tar_l": values["identity"], "style_l": values["style"],
              "grad_l": values["gradient"], "tv_l": values["variation"]}
    for key, value in losses.items():
        if value is not None:
            close(cases, f"step/{key}", value, rtol=1e-4)
    both = cases["step/disp_ad_true_loss"] + cases["step/disp_ad_fake_loss"]
    assert abs(values["discriminator"] / both - 1) < 1e-4
    total = sum(v for k, v in values.items() if k != "discriminator")
    close(cases, "step/disp_g_loss", total, rtol=1e-4)
    for side, stats in (("enc", G.encoder.vars_bn_enc), ("dec", G.decoder.vars_bn_dec)):
        for i, s in enumerate(stats):
            close(cases, f"step/vars_bn_{side}.{i}", s, 1e-5)


def test_poisson(cases):
    new, old = (recipe.integers(f"{P}.poisson_{k}", (18, 26, 3), 256).astype(np.uint8) for k in ("source", "target"))
    mask = cases["poisson/mask"] > 0
    out = A.poisson_blend(new, old, mask, official=True)
    assert abs(out.astype(int) - cases["poisson/out"]).max() <= 1
    mine = A.poisson_blend(new, old, mask)
    edge = np.ones_like(mask)
    edge[1:-1, 1:-1] = False
    assert (mine[edge | ~mask] == old[edge | ~mask]).all()      # the border keeps its colours


@pytest.mark.parametrize("network", A.RECOGNISERS)
def test_recognisers_load_by_name(network):
    stored = np.load(DATA / "backbones.npz")
    layout = json.loads(stored[f"layout/{network}"].tobytes())
    tensors = {f"module.{k}": torch.zeros(v) for k, v in layout.items()}
    if network == "facenet":
        tensors |= {"module.logits.weight": torch.zeros(2, 512), "module.logits.bias": torch.zeros(2)}
    net = A.load_official(tensors)                              # told from the names
    assert type(net) is type(A.load_official(tensors, network)) and not net.training
    assert len(net.state_dict()) == len(layout)
    first = next(k for k in tensors if k.endswith("weight"))
    with pytest.raises(UserError, match=first.removeprefix("module.")):
        A.load_official({k: v for k, v in tensors.items() if k != first}, network)


def test_outputs_through_load_official():
    stored = np.load(DATA / "backbones.npz")
    layout = json.loads(stored["layout/mobile_face"].tobytes())
    net = A.load_official(recipe.state_dict(layout), "mobile_face")
    with torch.no_grad():
        out = net(torch.from_numpy(recipe.uniform(f"{P}.face.mobile_face", (2, 3, 112, 112), -1, 1)))
    theirs = stored["mobile_face/embedding"]
    np.testing.assert_allclose(out, theirs, rtol=1e-4, atol=1e-4 * abs(theirs).max())
