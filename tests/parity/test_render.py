"""The renderer beside the released LAP and unsup3d code (with neural_renderer's kernels): stored outputs, gradients."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facebook_nb import render
from tests.parity import recipe

CASES = Path(__file__).parent / "data" / "lap" / "cases.npz"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SCENES = {"geom0": (2, 32, 0.3, True), "geom1": (1, 48, 0.5, False)}  # batch, side, spread of angles, anti-aliasing
STRIDE = {
    "grid3d": 7, "normal": 5, "warped2d": 5, "recon_normal": 5, "inv2d": 5, "yaw": 37, "d_depth": 3, "d_depth_im": 3,
    "recon_im.align_corners=True": 5, "recon_im.align_corners=False": 5,
}


@pytest.fixture(scope="module")
def cases():
    with np.load(CASES) as file:
        return {k: file[k] for k in file.files if k.startswith("geom")}


def bumpy_depth(name, batch, side):
    """The reference's test depth: an ellipsoid and smooth noise."""
    g = (2 * torch.arange(side) + 1 - side) / side
    dome = (1 - (g / 0.8) ** 2 - (g[:, None] / 0.95) ** 2).clamp(min=0).sqrt()
    noise = torch.from_numpy(recipe.normal(name, (batch, 1, 5, 5)))
    noise = F.interpolate(noise, (side, side), mode="bicubic", align_corners=True)[:, 0]
    return 1.04 - 0.1 * dome + 0.008 * noise


def outputs(case, device="cpu", dtype=torch.float32):
    """Everything that the reference stores of a scene, whole."""
    batch, side, spread, antialias = SCENES[case]
    new = lambda a: torch.from_numpy(a).to(device, dtype)
    view = new(recipe.normal(f"lap.{case}.view", (batch, 6))) * new(np.float32([spread] * 3 + [0.02, 0.02, 0]))
    view.requires_grad_()
    d = bumpy_depth(f"lap.{case}.noise", batch, side).to(device, dtype).requires_grad_()
    image = new(recipe.uniform(f"lap.{case}.image", (batch, 3, side, side), -1, 1))
    k = render.intrinsics(side)
    turn, shift = render.rotation(view[:, :3]), view[:, 3:]
    points = render.unproject(d, k)
    moved = render.move(points, turn, shift)
    depth = render.render_depth(moved, k, antialias, pixel_centre="nr")
    images = {c: render.warp(image, depth, k, turn, shift, align_corners=c) for c in (True, False)}
    loss = (depth * new(recipe.normal(f"lap.{case}.grad", (batch, side, side)))).sum()
    d_depth, d_view = torch.autograd.grad(loss, (d, view), retain_graph=True)
    paint = new(recipe.normal(f"lap.{case}.grad_im", (batch, 3, side, side)))
    loss = (images[True] * (depth < 1.2)[:, None] * paint).sum()
    d_depth_im, d_view_im = torch.autograd.grad(loss, (d, view))
    yaw = render.render_yaw(
        image, d.detach(), k, (-0.6, 0.4), antialias=antialias, pixel_centre="nr", nr_texture_order=True
    )
    found = {
        "rot": turn, "trans": shift[:, None], "grid3d": points, "normal": render.normals(points, 1e-7),
        "warped2d": 2 * render.project(moved, k) / (side - 1) - 1, "recon_depth": depth,
        "recon_normal": render.normals(render.unproject(depth, k), 1e-7),
        "inv2d": render.lookup(depth, k, turn, shift),
        **{f"recon_im.align_corners={c}": v for c, v in images.items()},
        "d_depth": d_depth, "d_view": d_view, "d_depth_im": d_depth_im, "d_view_im": d_view_im, "yaw": yaw,
    }
    return {name: v.detach().cpu().double().numpy() for name, v in found.items()}


@pytest.fixture(scope="module", params=[(c, d) for c in SCENES for d in DEVICES], ids="-".join)
def scene(request, cases):
    """(found, expected): name -> array with the reference's stride, and the largest |expected|."""
    case, device = request.param
    found, expected = {}, {}
    for name, value in outputs(case, device).items():
        key = f"{case}.{name}"
        found[name] = value.reshape(-1)[:: STRIDE.get(name, 1)]
        stats = cases.get(f"{key}.stats")
        largest = np.abs(cases[key]).max() if stats is None else stats[2]
        expected[name] = cases[key].reshape(-1).astype(np.float64), largest
    return found, expected


@pytest.mark.parametrize(
    "name, atol, relative, outliers",  # the reference's README; relative: atol in units of the largest |value|
    [
        ("rot", 1e-5, True, 0), ("trans", 1e-5, True, 0), ("grid3d", 1e-5, True, 0),
        ("normal", 5e-4, False, 0), ("recon_normal", 5e-4, False, 0),
        ("warped2d", 1e-4, False, 0), ("inv2d", 1e-4, False, 0),
        ("recon_depth", 2e-5, False, 1e-3),
        ("recon_im.align_corners=True", 3e-3, False, 2e-3), ("recon_im.align_corners=False", 3e-3, False, 2e-3),
        ("yaw", 3e-3, False, 2e-3),
        ("d_depth", 2e-3, True, 2e-3), ("d_depth_im", 2e-3, True, 2e-3),
        ("d_view", 2e-3, True, 0), ("d_view_im", 2e-3, True, 0),
    ],
)
def test_outputs_and_gradients_are_the_released_renderers(scene, name, atol, relative, outliers):
    found, (expected, largest) = scene[0][name], scene[1][name]
    assert found.shape == expected.shape
    rtol = 1e-4 if name in ("rot", "trans", "grid3d") else 0
    off = np.abs(found - expected) > atol * (largest if relative else 1) + rtol * np.abs(expected)
    assert off.mean() <= outliers, f"{off.sum()} of {off.size}, worst {np.abs(found - expected).max():.2e}"


def test_gradients_hardly_depend_on_precision():
    """What float32 loses against float64 is far below what the reference allows: the centred form at work."""
    for case in SCENES:
        single, double = outputs(case), outputs(case, dtype=torch.float64)
        same = np.abs(single["recon_depth"] - double["recon_depth"]) < 1e-5
        assert same.mean() > 0.999
        for name in ("d_view", "d_view_im", "d_depth", "d_depth_im"):
            error = np.abs(single[name] - double[name]) / np.abs(double[name]).max()
            assert error.max() < 5e-4, (case, name)


def test_half_a_pixel_matters(cases):
    """The grid's own pixel centres give another depth map: the option is no ornament."""
    batch, side, spread, antialias = SCENES["geom0"]
    d = bumpy_depth("lap.geom0.noise", batch, side)
    k, expected = render.intrinsics(side), cases["geom0.recon_depth"]
    view = torch.from_numpy(recipe.normal("lap.geom0.view", (batch, 6))) * torch.tensor([spread] * 3 + [0.02, 0.02, 0])
    moved = render.move(render.unproject(d, k), render.rotation(view[:, :3]), view[:, 3:])
    apart = np.abs(render.render_depth(moved, k, antialias).numpy() - expected) > 2e-5
    assert apart[expected < 1.2].mean() > 0.9
