"""LAP beside the released code of LAP and unsup3d: networks, losses, measures, and the demo from photo to picture."""
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb import lap, render
from tests.parity import recipe
from tests.parity.test_render import bumpy_depth

DATA = Path(__file__).parent / "data" / "lap"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def cases():
    with np.load(DATA / "cases.npz") as file:
        return {k: file[k] for k in file.files if not k.startswith("geom")}


def weights(network):
    layout = json.loads((DATA / f"layout_{network}.json").read_text())
    return recipe.state_dict(layout)


@cache
def official(network):
    return lap.load_official(weights(network), network)


def uniform(name, *shape):
    return torch.from_numpy(recipe.uniform(f"lap.{name}", shape, -1, 1))


def same(cases, key, value, stride=1, rtol=1e-4, atol=1e-5, outliers=0.0, largest=None):
    """Assert the reference's tolerance: atol in units of the largest |value| unless `largest` is given."""
    found = value.detach().cpu().double().numpy()
    expected = cases[key].astype(np.float64)
    stats = cases.get(f"{key}.stats")
    largest = largest or (np.abs(expected).max() if stats is None else stats[2])
    found = found.reshape(-1)[::stride]
    assert found.shape == expected.reshape(-1).shape, key
    off = np.abs(found - expected.reshape(-1)) > atol * largest + rtol * np.abs(expected.reshape(-1))
    assert off.mean() <= outliers, f"{key}: {off.sum()} of {off.size}"
    if stats is not None:
        whole = value.detach().cpu().double()
        np.testing.assert_allclose(
            [whole.mean(), whole.std(unbiased=False), whole.abs().max()], stats, rtol=1e-3, atol=1e-3 * stats[2])


@pytest.mark.parametrize("case, n", [("agg0", 1), ("agg1", 3)])
@torch.no_grad()
def test_aggregation(cases, case, n):
    photos = uniform(case, 1, 3 * n, 128, 128)
    net_d = official("netD")
    same(cases, f"{case}.netD", net_d(photos, n), 53)
    same(cases, f"{case}.netA", official("netA")(photos, n), 151)
    alpha = lap.aggregate(*net_d.encode(photos.view(n, 3, 128, 128), n))[1]
    same(cases, f"{case}.weights", alpha, 5)


@torch.no_grad()
def test_refining_light_and_view(cases):
    image, albedo = uniform("ref0.image", 1, 3, 128, 128), uniform("ref0.albedo", 1, 3, 128, 128)
    depth = torch.from_numpy(recipe.normal("lap.ref0.depth", (1, 1, 128, 128), 0.3))
    same(cases, "ref0.depth", official("refine_netD")(depth, image), 53)
    same(cases, "ref0.albedo", official("refine_netA")(albedo, image), 151)
    same(cases, "ref0.light", official("netL")(image))
    same(cases, "ref0.view", official("netV")(image))


@torch.no_grad()
def test_predecessor(cases):
    image = uniform("un0", 2, 3, 64, 64)
    for name, stride in (("netD", 13), ("netA", 41), ("netL", 1), ("netV", 1)):
        network = f"unsup3d_{name}"
        same(cases, f"un0.{name}", lap.load_official(weights(network), network)(image), stride)
    pixels, features = lap.load_official(weights("unsup3d_netC"), "unsup3d_netC")(image)
    same(cases, "un0.conf_l1", pixels, 29)
    same(cases, "un0.conf_perc", features, 3)


def test_losses_and_their_gradients(cases):
    a, b = uniform("loss0.a", 2, 3, 32, 32).requires_grad_(), uniform("loss0.b", 2, 3, 32, 32)
    mask = torch.from_numpy(recipe.uniform("lap.loss0.mask", (2, 1, 32, 32)) < 0.7).float()
    width = lambda name, size: torch.from_numpy(recipe.uniform(f"lap.loss0.{name}", (2, 1, size, size), 0.1, 2))
    sigma, sigma_perc = width("sigma", 32).requires_grad_(), width("sigma_perc", 8).requires_grad_()
    vgg = lap.load_official(weights("vgg16_relu3_3"), "vgg16_relu3_3")
    for name, m, s, s_perc in (("plain", None, None, None), ("mask", mask, None, None),
                               ("full", mask, sigma, sigma_perc)):
        pixels, features = lap.photometric(a, b, m, s), lap.perceptual(vgg, a, b, m, s_perc)
        same(cases, f"loss0.{name}", torch.stack([pixels, features]))
    d_im, d_sigma = torch.autograd.grad(pixels, (a, sigma))
    same(cases, "loss0.d_l1_im", d_im, 11)
    same(cases, "loss0.d_l1_sigma", d_sigma, 5)
    d_im, d_sigma = torch.autograd.grad(features, (a, sigma_perc))
    same(cases, "loss0.d_perc_im", d_im, 11)
    same(cases, "loss0.d_perc_sigma", d_sigma)


def test_measures(cases):
    d, g = (bumpy_depth(f"lap.met0.{x}", 2, 32) for x in "ab")
    mask = torch.from_numpy(recipe.uniform("lap.met0.mask", (2, 32, 32)) < 0.8)
    same(cases, "met0.side", lap.side(d, g, mask))
    np.testing.assert_allclose(lap.mad(d, g, mask, exact=False).numpy(), cases["met0.mad"], atol=1e-3)


@pytest.fixture(scope="module")
def demo():
    """The demo's course: refined maps, light, view, and the picture in the photo's view."""
    nets = {name: official(name) for name in ("netD", "netA", "netL", "netV", "refine_netD", "refine_netA")}
    last = nets["refine_netD"].network_decoder[22].weight.data
    image = torch.from_numpy(recipe.integers("lap.demo0", (128, 128, 3), 256).astype(np.uint8))
    x = image.permute(2, 0, 1)[None].float() / 255 * 2 - 1
    with torch.no_grad():
        last.mul_(0.05)  # random weights would saturate tanh
        raw = nets["refine_netD"](nets["netD"](x, 1), x)[:, 0]
        last.div_(0.05)
        albedo = nets["refine_netA"](nets["netA"](x, 1), x)
        return raw, albedo, nets["netL"](x), nets["netV"](x)


@torch.no_grad()
def test_demo(cases, demo):
    raw, albedo, light_raw, view_raw = demo
    depth = lap.canonical_depth(raw, demo_corner=True)
    light, (turn, shift) = lap.read_light(light_raw), lap.read_view(view_raw)
    same(cases, "demo0.canon_depth", depth, 11)
    same(cases, "demo0.canon_albedo", albedo, 29)
    same(cases, "demo0.light", torch.cat([light[0][:, None], light[1][:, None], light[2]], 1))
    angles = view_raw[:, :3] * np.pi / 3
    same(cases, "demo0.view", torch.cat([angles, shift], 1))
    torch.testing.assert_close(turn, render.rotation(angles))
    # stored as the demo shows them: normalised once more
    normal = render.normals(render.unproject(depth, render.intrinsics(128)))
    same(cases, "demo0.canon_normal", normal, 29, rtol=0, atol=5e-4, largest=1)
    for aligned in (True, False):
        made = lap.form(depth, albedo, light, (turn, shift), antialias=True, align_corners=aligned,
                        pixel_centre="nr", eps=1e-7)
        same(cases, f"demo0.recon_im.align_corners={aligned}", made.image, 29, 0, 3e-3, 2e-3, largest=1)
    same(cases, "demo0.canon_im", made.canonical, 29)
    same(cases, "demo0.shading", made.cosine, 11)
    same(cases, "demo0.recon_depth", made.depth, 11, 0, 2e-5, 1e-3, largest=1)


def test_a_checkpoint_of_all_networks_loads_by_name(tmp_path):
    tensors = {n: {k: torch.from_numpy(v) for k, v in weights(n).items()} for n in ("netL", "netV")}
    torch.save(tensors, tmp_path / "checkpoint.pth")
    light = lap.load_official(tmp_path / "checkpoint.pth", "netL")
    assert torch.equal(light.network[0].weight, tensors["netL"]["network.0.weight"])
    with pytest.raises(lap.UserError, match="holds no network 'netD'"):
        lap.load_official(tmp_path / "checkpoint.pth", "netD")
    with pytest.raises(lap.UserError, match="there are netD"):
        lap.load_official(tensors["netL"], "netX")
    broken = dict(tensors["netL"])
    broken.pop("network.0.weight")
    with pytest.raises(lap.UserError, match="network.0.weight"):
        lap.load_official(broken, "netL")


def test_vgg_loads_torchvisions_names():
    state = weights("vgg16_relu3_3")
    renamed = {f"features.{k.split('.', 1)[1]}": v for k, v in state.items()}
    renamed |= {"features.17.weight": np.zeros((1,), np.float32), "classifier.0.bias": np.zeros(1, np.float32)}
    loaded = lap.load_official(renamed, "vgg16_relu3_3").state_dict()
    assert all(np.array_equal(loaded[k].numpy(), v) for k, v in state.items())
