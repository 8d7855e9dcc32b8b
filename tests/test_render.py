"""The renderer: coverage, depth and gradients against a literal loop, finite differences and analytic surfaces."""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from facebook_nb import render
from facebook_nb.files import UserError
from facebook_nb.render import grid_faces, interpolate, intrinsics, rasterise, rotation
from tests.conftest import ROOT

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def triangles(seed, batch=2, v=12, t=15, size=(9, 11), dtype=torch.float64, device="cpu"):
    """Random triangles that overlap each other and the raster's border."""
    rng = torch.Generator().manual_seed(seed)
    h, w = size
    xy = torch.rand(batch, v, 2, generator=rng, dtype=torch.float64) * torch.tensor([w + 6.0, h + 6.0]) - 3
    z = 0.5 + torch.rand(batch, v, generator=rng, dtype=torch.float64)
    different = torch.combinations(torch.arange(v), 3)  # no face twice: rounding would decide between the two
    faces = different[torch.randperm(len(different), generator=rng)[:t]]
    faces[::2] = faces[::2].flip(1)
    return xy.to(device, dtype), z.to(device, dtype), faces.to(device), size


def loop(xy, z, faces, size, near=0.1, far=100.0, background=100.0):
    """One mesh, one sample and one face at a time, in Python floats: face, weights and depth by sample."""
    h, w = size
    out = [[(-1, (0.0, 0.0, 0.0), background) for _ in range(w)] for _ in range(h)]
    for row in range(h):
        for column in range(w):
            for number, corners in enumerate(faces.tolist()):
                (ax, ay), (bx, by), (cx, cy) = (xy[c].tolist() for c in corners)
                area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
                if area == 0:
                    continue
                u = ((column - ax) * (cy - ay) - (row - ay) * (cx - ax)) / area
                v = ((bx - ax) * (row - ay) - (by - ay) * (column - ax)) / area
                weights = (1 - u - v, u, v)
                if min(weights) < 0:
                    continue
                depth = 1 / sum(a / z[c].item() for a, c in zip(weights, corners))
                if near < depth < far and depth < out[row][column][2]:
                    out[row][column] = number, weights, depth
    flat = [sample for line in out for sample in line]
    face, weights, depth = (torch.tensor(a) for a in zip(*flat))
    return face.view(h, w), weights.view(h, w, 3), depth.view(h, w)


def rows_covered(xy, faces, size=(8, 8), z=None, **options):
    """Which faces a raster of one mesh shows."""
    xy = torch.tensor([xy], dtype=torch.float32)
    z = torch.ones(xy.shape[:2]) if z is None else torch.tensor([z], dtype=torch.float32)
    return rasterise(xy, z, torch.tensor(faces), size, **options)


@pytest.mark.parametrize("seed", range(4))
def test_is_the_literal_loop(seed, device):
    xy, z, faces, size = triangles(seed, device=device)
    found = rasterise(xy, z, faces, size)
    assert 0.3 < (found.face >= 0).double().mean() < 1  # the scene is worth testing
    for b in range(len(z)):
        face, weights, depth = loop(xy[b].cpu(), z[b].cpu(), faces.cpu(), size)
        assert torch.equal(found.face[b].cpu(), face)
        torch.testing.assert_close(found.weights[b].cpu().float(), weights.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.z[b].cpu().float(), depth.float(), atol=1e-6, rtol=1e-6)


def test_single_precision_sees_the_same_faces(device):
    xy, z, faces, size = triangles(11, batch=8, v=60, t=120, size=(40, 50), device=device)
    double = rasterise(xy, z, faces, size)
    single = rasterise(xy.float(), z.float(), faces, size)
    assert single.z.dtype == single.weights.dtype == torch.float32
    same = single.face == double.face
    assert same.double().mean() > 0.9995
    torch.testing.assert_close(single.z[same].double(), double.z[same], atol=1e-5, rtol=0)


def test_each_image_is_as_alone_and_chunks_do_not_show(device):
    xy, z, faces, size = triangles(5, batch=5, v=40, t=90, size=(30, 20), dtype=torch.float32, device=device)
    whole = rasterise(xy, z, faces, size)
    for other in (rasterise(xy, z, faces, size, chunk=n) for n in (60, 500, 5000)):
        assert torch.equal(whole.face, other.face) and torch.equal(whole.z, other.z)
        assert torch.equal(whole.weights, other.weights)
    for b in range(5):
        alone = rasterise(xy[b : b + 1], z[b : b + 1], faces, size)
        assert torch.equal(whole.face[b], alone.face[0]) and torch.equal(whole.z[b], alone.z[0])


KERNEL = """
import warnings
import torch
from facebook_nb import render
from tests.test_render import triangles
warnings.simplefilter("ignore")     # numpy's, at 0 / 0 in the interpreter
scenes = [triangles(s, dtype=d) for s in range(2) for d in (torch.float32, torch.float64)]
g = torch.linspace(0, 8, 7)         # corners and edges on samples: ties
grid = torch.stack(torch.meshgrid(g, g, indexing="xy"), -1).view(1, -1, 2).repeat(2, 1, 1)
z = 1 + 0.1 * torch.rand(2, 49, generator=torch.Generator().manual_seed(0))
faces = render.grid_faces(7, 7)
scenes.append((grid, z.round(decimals=1), torch.cat([faces, faces.flip(1)]), (9, 9)))
xy, z, faces, size = triangles(3, dtype=torch.float32)
z[0, 3], z[1, 2], xy[0, 5, 0], xy[1, 7, 1] = -1, torch.nan, torch.nan, torch.inf
scenes.append((xy, z, faces, size))
plain = render.draw
for xy, z, faces, size in scenes:
    for cull, chunk in ((False, 1 << 18), (True, 60)):
        scene = xy, z, faces, size, 0.1, 1.3, cull, chunk
        wanted = render.zbuffer(*scene)
        render.draw = render.triton_draw
        assert torch.equal(render.zbuffer(*scene), wanted), (z.dtype, cull)
        render.draw = plain
        assert 0.1 < (wanted != render.EMPTY).double().mean() < 1 or size == (9, 9)
print("equal")
"""


def test_the_triton_kernel_equals_the_candidates_to_the_last_bit():
    pytest.importorskip("triton", reason="triton is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported: a process of its own
    done = subprocess.run([sys.executable, "-c", KERNEL], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_the_triton_kernel_compiles_without_fused_multiplications():
    """For a GPU that is not here; the code has to be valid, and edges must round as their neighbours do."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kind in ("*fp32", "*fp64"):
        types = dict(p=kind, q="*i64", key="*i64", K="i32", width="i32", near="fp32", far="fp32",
                     single="constexpr", D="constexpr")
        source = ASTSource(render._draw_kernel(), types, {"single": kind == "*fp32", "D": 32})
        ptx = compile(source, GPUTarget("cuda", 80, 32), {"num_warps": 1, "enable_fp_fusion": False}).asm["ptx"]
        assert ".min.s64" in ptx and "fma.rn.f" not in ptx and "div.rn" in ptx


def test_without_triton_the_kernel_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    render._draw_kernel.cache_clear()
    try:
        with pytest.raises(UserError, match="not installed"):
            render.triton_draw(*[None] * 10)
    finally:
        render._draw_kernel.cache_clear()


def test_edges_are_inclusive_and_ties_go_to_the_lower_face(device):
    square = torch.tensor([[[1.0, 1], [5, 1], [1, 5], [5, 5]]], device=device)
    z = torch.ones(1, 4, device=device)
    a, b = [0, 2, 1], [1, 2, 3]
    for faces, diagonal in (([a, b], 0), ([b, a], 0), ([a, b, a], 0)):
        face = rasterise(square, z, torch.tensor(faces, device=device), (8, 8)).face[0]
        assert (face >= 0).sum() == 25 and (face[1:6, 1:6] >= 0).all()  # the rim belongs to the square
        assert [face[1 + i, 5 - i].item() for i in range(5)] == [diagonal] * 5
    nearer = torch.tensor([[1.0, 1, 1, 0.9]], device=device)
    face = rasterise(square, nearer, torch.tensor([a, b, b], device=device), (8, 8)).face[0]
    assert set(face.unique().tolist()) == {-1, 0, 1}  # face 2 lies on face 1 and never wins


@pytest.mark.parametrize("seed", range(3))
def test_a_closed_surface_has_no_cracks(seed):
    """Samples on or within rounding of shared edges and vertices belong to one of their faces."""
    n, side = 9, 33
    g = torch.linspace(0, side - 1, n)  # vertices on samples
    xy = torch.stack(torch.meshgrid(g, g, indexing="xy"), -1).view(1, -1, 2)
    torch.manual_seed(seed)
    jitter = torch.tensor([0.0, 1e-6, 3e-6, 1e-5, 1e-4]).view(-1, 1, 1) * torch.randn(5, n * n, 2)
    scale = torch.tensor([1.0, 1 / 3, 0.7])[seed]  # no longer on binary fractions
    xy = (xy - 16) / scale * scale + 16 + jitter
    z = 1 + 0.1 * torch.rand(5, n * n)
    face = rasterise(xy, z, grid_faces(n, n), (side, side)).face
    assert (face[:, 1:-1, 1:-1] >= 0).all()


def test_what_cannot_be_drawn_is_not():
    far_away = [[-9, -9], [-3, -9], [-9, -3], [20, 20], [30, 20], [20, 30], [1.2, 1.2], [1.8, 1.3], [1.5, 1.7]]
    assert (rows_covered(far_away, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]).face == -1).all()  # outside; between samples
    line = [[0, 0], [3, 3], [6, 6], [0, 0]]
    assert (rows_covered(line, [[0, 1, 2], [0, 0, 1], [1, 1, 1]]).face == -1).all()  # no area
    corner = [[0, 0], [7, 0], [0, 7]]
    nan, inf = math.nan, math.inf
    for xy, z in (
        (corner, [1, 1, 0]), (corner, [1, -1, 1]), (corner, [1, nan, 1]), ([[nan, 0], [7, 0], [0, 7]], None),
        ([[inf, 0], [7, 0], [0, 7]], None), ([[-inf, inf], [7, 0], [0, 7]], None), (corner, [101] * 3),
        (corner, [0.05] * 3),
    ):
        empty = rows_covered(xy, [[0, 1, 2]], z=z)
        assert (empty.face == -1).all() and (empty.z == 100).all() and (empty.weights == 0).all()
    assert (rows_covered(corner, [[0, 1, 2]], z=[4] * 3, near=4).face == -1).all()  # strict
    assert (rows_covered(corner, [[0, 1, 2]], z=[4] * 3, far=4).face == -1).all()
    assert (rows_covered(corner, [[0, 1, 2]], z=[4] * 3, near=3, far=6, background=7).z.unique().tolist()) == [4, 7]
    nothing = rasterise(torch.zeros(2, 0, 2), torch.zeros(2, 0), torch.zeros(0, 3, dtype=torch.int64), (3, 4))
    assert nothing.face.shape == (2, 3, 4) and (nothing.face == -1).all()
    nobody = rasterise(torch.zeros(0, 3, 2), torch.zeros(0, 3), torch.tensor([[0, 1, 2]]), (3, 4))
    assert nobody.weights.shape == (0, 3, 4, 3)


def test_a_triangle_far_larger_than_the_raster_fills_it():
    seen = rows_covered([[-1e6, -1e6], [3e6, -1e6], [-1e6, 3e6]], [[0, 1, 2]], size=(50, 40), chunk=7)
    assert (seen.face == 0).all() and torch.allclose(seen.z, torch.ones(1, 50, 40))


def test_culling_drops_the_far_side_only(device):
    """On a closed convex surface the faces that turn away are hidden anyway."""
    torch.manual_seed(0)
    v, faces = sphere(24, 24)
    points = torch.stack([render.move(v[None], rotation(torch.randn(1, 3)), torch.zeros(1, 3))[0] for _ in range(3)])
    k = intrinsics(40).to(device)
    points = points.to(device) + torch.tensor([0.0, 0, 5], device=device)
    xy = render.project(points, k)
    faces = faces.to(device)
    both = rasterise(xy, points[..., 2], faces, (40, 40))
    one = rasterise(xy, points[..., 2], faces, (40, 40), cull=True)
    rim = (both.face != one.face).double().mean()
    assert (both.face >= 0).double().mean() > 0.2 and rim < 0.002  # a sample on the silhouette belongs to both sides
    turned = rasterise(xy, points[..., 2], faces.flip(1), (40, 40), cull=True)
    assert (turned.z >= one.z - 1e-6).all() and (turned.z > one.z + 1e-3).any()  # only the inside of the far half


def sphere(rows, columns, radius=0.3, centre=(0.0, 0.0, 1.0)):
    """Vertices (V, 3) and faces of a sphere; seen from outside the faces run anticlockwise."""
    a = torch.linspace(0, math.pi, rows)[:, None].double()
    b = torch.arange(columns).double() * 2 * math.pi / columns
    v = torch.stack([a.sin() * b.cos(), a.sin() * b.sin(), a.cos().expand(rows, columns)], -1).view(-1, 3)
    i = torch.arange(rows * columns).view(rows, columns)
    p, q, r, s = i[:-1], i[:-1].roll(-1, 1), i[1:], i[1:].roll(-1, 1)
    faces = torch.cat([torch.stack(f, -1).view(-1, 3) for f in ((p, r, q), (q, r, s))])
    faces = faces[(v[faces].roll(1, 1) - v[faces]).norm(dim=-1).min(1).values > 1e-9]  # none at the poles
    return (v * radius + torch.tensor(centre).double()).float(), faces


def test_depth_of_a_sphere():
    size, radius = 64, 0.3
    k = intrinsics(size, 40.0)
    v, faces = sphere(200, 200, radius)
    z = rasterise(render.project(v[None], k), v[None, :, 2], faces, (size, size)).z[0]
    ray = render.unproject(torch.ones(1, size, size), k)[0]  # |p t - c| = r along each ray
    a, b = (ray**2).sum(-1), ray[..., 2]
    root = b**2 - a * (1 - radius**2)
    truth = (b - root.clamp(min=0).sqrt()) / a
    inside, outside = root > 5e-3, root < 0
    assert inside.sum() > 1000
    torch.testing.assert_close(z[inside], truth[inside], atol=5e-4, rtol=0)  # facets of 1.8 degrees: sagitta 4e-5
    assert (z[outside] == 100).all()


def test_a_step_hides_what_is_behind_it():
    """Two planes at depths 0.95 and 1.05 and a wall: turned, the near one covers part of the far one."""
    size = 64
    k = intrinsics(size)
    depth = torch.full((1, size, size), 1.05)
    depth[..., : size // 2] = 0.95
    points = render.unproject(depth, k)
    for yaw, hides in ((-0.3, True), (0.3, False)):
        turn = rotation(torch.tensor([[0.0, yaw, 0.0]]))
        moved = render.move(points, turn, torch.zeros(1, 3))
        seen = render.render_depth(moved, k, limits=(0.0, 100.0))[0, size // 2]
        # where the far plane's first column goes on the screen, and what is seen there
        column = render.project(moved, k)[0, size // 2, size // 2, 0].round().int()
        far_plane, z = moved[0, size // 2, size // 2, 2], seen[column + 1]
        assert (z < far_plane - 0.02) == hides
        on_plane = render.move_back(render.unproject(seen.expand(1, size, size), k), turn, torch.zeros(1, 3))
        z = on_plane[0, size // 2, (seen > 0.1) & (seen < 2), 2]
        flat = ((z - 0.95).abs() < 1e-4) | ((z - 1.05).abs() < 1e-4)
        assert flat.double().mean() > (0.9 if hides else 0.7)  # the rest is the wall


def test_depth_of_a_tilted_plane(device):
    size = 24
    k = intrinsics(size).to(device)
    ray = render.unproject(torch.ones(1, size, size, device=device), k)
    slope = torch.tensor([0.8, -0.5, 1.0], device=device)
    depth = 1 / (ray * slope).sum(-1)  # the plane slope . P = 1
    for antialias in (False, True):
        found = render.render_depth(render.unproject(depth, k), k, antialias)
        inner = (slice(None), slice(1, -1), slice(1, -1))
        torch.testing.assert_close(found[inner], depth[inner], atol=2e-5, rtol=0)
        assert (found[:, 0] == torch.tensor(1.2)).all() == antialias  # half of the rim's samples are off the mesh
    shifted = render.render_depth(render.unproject(depth, k), k, False, "nr")[:, :-1, :-1]
    f, c = k[0, 0], k[0, 2]
    at = (torch.arange(size - 1, device=device) + 0.5 - c) / f
    truth = 1 / (slope[0] * at + slope[1] * at[:, None] + slope[2])
    torch.testing.assert_close(shifted[0], truth, atol=2e-6, rtol=0)
    n = render.normals(render.unproject(depth, k))
    torch.testing.assert_close(n[inner], (slope / slope.norm()).expand(1, size - 2, size - 2, 3), atol=2e-3, rtol=0)
    assert n[:, 0].unique(dim=1).tolist() == [[[0, 0, 1]]] and n[:, :, -1].unique(dim=1).tolist() == [[[0, 0, 1]]]


def test_a_pixel_with_one_empty_sample_is_masked_and_has_no_gradient():
    k = intrinsics(8)
    depth = torch.ones(1, 8, 8, requires_grad=True)
    moved = render.move(render.unproject(depth, k), torch.eye(3)[None], torch.tensor([[0.03, 0.0, 0.0]]))
    seen = render.render_depth(moved, k)
    empty = seen == torch.tensor(1.2)
    assert 0 < empty.sum() < empty.numel() and empty[..., 0].all()
    seen[empty].sum().backward()
    assert (depth.grad == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_finite_differences(seed):
    xy, z, faces, size = triangles(seed + 20, batch=2, v=7, t=6, size=(5, 4))
    paint = torch.randn(2, 7, 3, dtype=torch.float64)

    def outputs(xy, z, paint):
        seen = rasterise(xy, z, faces, size, background=0.0)
        return seen.weights, seen.z, interpolate(seen, faces, paint), interpolate(seen, faces, paint, z)

    assert (rasterise(xy, z, faces, size).face >= 0).sum() > 10
    assert torch.autograd.gradcheck(outputs, [a.requires_grad_() for a in (xy, z, paint)])


@pytest.mark.parametrize("antialias", [False, True])
def test_gradients_of_a_whole_reconstruction(antialias):
    torch.manual_seed(3)
    k = intrinsics(5).double()
    depth = (1 + 0.02 * torch.randn(1, 5, 5)).double().requires_grad_()
    view = (torch.randn(1, 6) * torch.tensor([0.3, 0.3, 0.3, 0.02, 0.02, 0.02])).double().requires_grad_()
    image = torch.randn(1, 3, 5, 5).double().requires_grad_()

    def outputs(depth, view, image):
        turn, shift = rotation(view[:, :3]), view[:, 3:]
        points = render.unproject(depth, k)
        seen = render.render_depth(render.move(points, turn, shift), k, antialias)
        light = torch.tensor([[0.6, 0.0, 0.8]]).double()
        lit = image * render.shading(render.normals(points, 1e-7), view[:, 0], view[:, 1], light)[:, None]
        return seen, render.warp(lit, seen, k, turn, shift) * (seen < 1.2)[:, None]

    assert torch.autograd.gradcheck(outputs, (depth, view, image))


def test_gradients_survive_slivers_in_single_precision():
    """Depth's derivative at a needle far from the origin: float32 within 0.1 % of float64."""
    torch.manual_seed(0)
    t = 400
    at = torch.rand(t, 1, 2) * 40 + 12
    along, across = torch.randn(t, 1, 2), 10 ** -(1 + torch.rand(t, 1, 1))
    xy = at.round() + along * torch.tensor([-1.0, 0.1, 1.0])[:, None] + across * torch.randn(t, 3, 2)
    z = 1 + 0.02 * torch.randn(t, 3)
    faces = torch.tensor([[0, 1, 2]])
    grads = []
    for dtype in (torch.float32, torch.float64):
        corners = [a.to(dtype).requires_grad_() for a in (xy, z)]
        seen = rasterise(*corners, faces, (64, 64), background=0.0)
        grads.append(torch.autograd.grad(seen.z.sum(), corners))
        hits = (seen.face >= 0).flatten(1).any(1)
    assert hits.sum() > 50
    for single, double in zip(*grads):
        scale = double.abs().flatten(1).max(1).values
        error = (single - double).abs().flatten(1).max(1).values
        assert ((error <= 1e-3 * scale) | ~hits).all()


def test_interpolation_is_linear_on_the_surface(device):
    """With z, interpolated positions are the points that depth says; without, they are linear on the screen."""
    xy, z, faces, size = triangles(7, device=device)
    seen = rasterise(xy, z, faces, size)
    hit = (seen.face >= 0)[:, None]
    position = torch.cat([xy * z[..., None], z[..., None]], -1)  # a camera with K = 1
    x, y, depth = interpolate(seen, faces, position, z).unbind(1)
    row = torch.arange(size[0], device=device, dtype=z.dtype)[:, None]
    column = torch.arange(size[1], device=device, dtype=z.dtype)
    for found, truth in ((x, column * seen.z), (y, row * seen.z), (depth, seen.z)):
        torch.testing.assert_close(found[:, None][hit], truth[:, None].expand_as(hit)[hit])
    x, y = interpolate(seen, faces, xy).unbind(1)
    torch.testing.assert_close(x[hit[:, 0]], column.expand_as(x)[hit[:, 0]])
    torch.testing.assert_close(y[hit[:, 0]], row.expand_as(y)[hit[:, 0]])
    paint = torch.randn(xy.shape[1], 4, device=device, dtype=z.dtype)
    shared = interpolate(seen, faces, paint, z)
    assert shared.shape == (2, 4, *size) and (shared.masked_select(~hit) == 0).all()
    torch.testing.assert_close(shared, interpolate(seen, faces, paint.expand(2, -1, -1), z))


def test_half_precision_is_computed_in_single():
    xy, z, faces, size = triangles(1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rasterise(xy, z, faces, size)
        points = render.move(torch.rand(1, 4, 4, 3) + 1, rotation(torch.ones(1, 3)), torch.ones(1, 3))
    assert torch.equal(cast.z, rasterise(xy, z, faces, size).z) and points.dtype == torch.float32
    coarse = rasterise(xy.bfloat16(), z.bfloat16(), faces, size)
    assert coarse.z.dtype == torch.float32
    assert torch.equal(coarse.z, rasterise(xy.bfloat16().float(), z.bfloat16().float(), faces, size).z)


def test_supersampling_counts_covered_quarters():
    xy = torch.tensor([[[0.75, -9.0], [0.75, 40.0], [-40.0, 0.0]]])  # a half-plane whose edge is at x = 0.75
    seen = rasterise(render.supersample(xy), torch.ones(1, 3), torch.tensor([[0, 1, 2]]), (4, 6))
    cover = render.pool((seen.face >= 0).float()[:, None])[0, 0]
    assert cover.tolist() == [[1.0, 0.5, 0.0]] * 2  # pixel 1 spans 0.5 .. 1.5, its samples lie at 0.75 and 1.25
    assert render.pool(cover[None, None], 1)[0, 0] is not None
    torch.testing.assert_close(render.supersample(torch.tensor([0.0, 3.0]), 4), torch.tensor([1.5, 13.5]))


def test_rotations_and_moves():
    angles = torch.tensor([0.3, -0.4, 0.5]).double()
    r = rotation(angles)
    one = lambda i: rotation(torch.where(torch.arange(3) == i, angles, 0.0))
    torch.testing.assert_close(r, one(2) @ one(1) @ one(0))
    torch.testing.assert_close(r @ r.T, torch.eye(3).double())
    right, down, away = torch.eye(3).double()
    quarter = rotation(torch.eye(3).double() * math.pi / 2)
    for turn, a, b in zip(quarter, (down, away, right), (away, right, down)):
        torch.testing.assert_close(turn @ a, b)
    points, shift = torch.randn(2, 4, 5, 3).double(), torch.randn(2, 3).double()
    turns = rotation(torch.randn(2, 3).double())
    moved = render.move(points, turns, shift, 1.3)
    torch.testing.assert_close(render.move_back(moved, turns, shift, 1.3), points)
    o = torch.tensor([0, 0, 1.3]).double()
    torch.testing.assert_close(moved[1, 2, 3], turns[1] @ (points[1, 2, 3] - o) + o + shift[1])


def test_the_camera():
    k = intrinsics(128)
    assert k[0, 2] == 63.5 and math.isclose(k[0, 0], 127 / (2 * math.tan(math.radians(5))), rel_tol=1e-6)
    depth = 0.9 + 0.2 * torch.rand(2, 128, 128)
    points = render.unproject(depth, k)
    assert torch.equal(points[..., 2], depth)
    uv = render.project(points, k)
    torch.testing.assert_close(uv[0, :, 0, 1], torch.arange(128.0), atol=2e-5, rtol=0)
    torch.testing.assert_close(uv[1, 5, :, 0], torch.arange(128.0), atol=2e-5, rtol=0)
    width = render.unproject(torch.ones(1, 128, 128), k)[0, 0, :, 0]
    assert math.isclose(width[-1] - width[0], 2 * math.tan(math.radians(5)), rel_tol=1e-5)


def test_official_normals_are_short():
    """length + 1e-7 costs 0.3 % at 64 pixels a side and 1.3 % at 128, on a plane facing the camera."""
    for size, length in ((64, 0.997), (128, 0.987)):
        points = render.unproject(torch.ones(1, size, size), intrinsics(size))
        official, exact = render.normals(points, 1e-7), render.normals(points)
        assert abs(official[0, 9, 9].norm() - length) < 5e-4 and abs(exact[0, 9, 9].norm() - 1) < 1e-6


def test_shading_by_hand():
    normal = torch.tensor([[[[0.0, 0.0, 1.0], [0.0, 0.6, -0.8]]]])
    s = render.shading(normal, torch.tensor([0.2]), torch.tensor([0.5]), torch.tensor([[0.6, 0.0, 0.8]]))
    torch.testing.assert_close(s, torch.tensor([[[0.2 + 0.5 * 0.8, 0.2]]]))


def test_faces_of_a_grid_run_along_the_diagonal():
    faces = grid_faces(3, 3).tolist()
    assert faces[:4] == [[0, 3, 1], [1, 4, 2], [3, 6, 4], [4, 7, 5]]
    assert faces[4:] == [[1, 3, 4], [2, 4, 5], [4, 6, 7], [5, 7, 8]]
    assert len(grid_faces(4, 6)) == 2 * 3 * 5


def smooth_image(size):
    g = torch.linspace(-1, 1, size)
    return torch.stack([g.expand(size, size), g[:, None].expand(size, size), (3 * g).sin() * (2 * g[:, None]).cos()])


def bump(size):
    g = torch.linspace(-1, 1, size)
    return 1.04 - 0.08 * torch.exp(-2 * (g**2 + g[:, None] ** 2))


def test_warping_to_the_same_view_changes_nothing(device):
    size = 32
    k, image = intrinsics(size).to(device), smooth_image(size)[None].to(device)
    depth = bump(size)[None].to(device)
    eye, zero = torch.eye(3, device=device)[None], torch.zeros(1, 3, device=device)
    torch.testing.assert_close(render.warp(image, depth, k, eye, zero), image, atol=1e-4, rtol=0)
    other = render.warp(image, depth, k, eye, zero, align_corners=False)
    assert (other - image)[..., 0].abs().max() > 0.2  # half a pixel of zero padding at the border


def test_two_roads_to_a_turned_picture_agree(device):
    """Looking up through the rendered depth, and painting the moved mesh, see the same smooth picture."""
    size, yaws = 48, (-0.35, 0.0, 0.25)
    k, image = intrinsics(size).to(device), smooth_image(size)[None].to(device)
    depth = bump(size)[None].to(device)
    painted = render.render_yaw(image, depth, k, yaws, antialias=False)
    assert painted.shape == (1, 3, 3, size, size)
    for yaw, frame in zip(yaws, painted[0]):
        turn = rotation(torch.tensor([[0.0, yaw, 0.0]], device=device))
        zero = torch.zeros(1, 3, device=device)
        seen = render.render_depth(render.move(render.unproject(depth, k), turn, zero), k, antialias=False)
        looked_up = render.warp(image, seen, k, turn, zero)[0]
        inner = F.max_pool2d((seen >= 1.2).float()[None], 3, 1, 1)[0, 0] == 0  # the surface, less its rim
        assert inner.double().mean() > 0.5
        error = (looked_up - frame).abs()[:, inner]
        assert error.mean() < 2e-3 and error.max() < 0.03
    outside = (painted[0, 0] == 1).all(0)
    assert outside[:, :2].any() or outside[:, -2:].any()  # what the mesh leaves free is white


def test_yaw_starts_from_and_ends_in_a_pose():
    size = 24
    k, image, depth = intrinsics(size), smooth_image(size)[None], bump(size)[None]
    pose = rotation(torch.tensor([[0.1, 0.3, -0.2]])), torch.tensor([[0.01, -0.02, 0.0]])
    still = render.render_yaw(image, depth, k, [0.0])
    there_and_back = render.render_yaw(image, depth, k, [0.0], before=pose, after=pose)
    assert (still - there_and_back).abs().flatten().quantile(0.95) < 1e-3
    quarter = rotation(torch.tensor([[0.0, 0.3, 0.0]])), torch.zeros(1, 3)
    torch.testing.assert_close(
        render.render_yaw(image, depth, k, [0.3]), render.render_yaw(image, depth, k, [0.0], after=quarter)
    )
