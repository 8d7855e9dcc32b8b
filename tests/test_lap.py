"""LAP: aggregation, image formation, losses, measures, meshes, apply, runs on folders of photos."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb import lap, render
from facebook_nb.files import UserError, read_image, read_json, write_image
from tests.conftest import data_folder

TINY = {"people": 4, "batch": 2, "settle": 1, "steps": 2, "refine": 2, "zdim": 8, "fit_people": 1, "fit_steps": 2}


@pytest.fixture(scope="module")
def model():
    return lap.initialise(lap.LAP(32, 8, 8), 0).eval()


@pytest.fixture(scope="module")
def world():
    return lap.make_sets(2, 4, 3)


def test_a_set_is_the_weighted_sum_of_its_photos(model):
    photos = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    net = model.netD
    with torch.no_grad():
        found = net(photos.flatten(1, 2), 3)
        for b in range(2):  # literal: photo by photo, channel by channel
            codes, logits = zip(*(net.encode(photo[None], 1) for photo in photos[b]))
            codes, logits = torch.cat(codes)[:, 0], torch.cat(logits)[:, 0]
            z = torch.zeros(codes.shape[1])
            for c in range(len(z)):
                share = logits[:, c].exp() / logits[:, c].exp().sum()
                z[c] = (share * codes[:, c]).sum()
            torch.testing.assert_close(net.decode(z[None]), found[b : b + 1], rtol=1e-4, atol=1e-5)


def test_weights_get_gradients_and_the_mean_gives_none(model):
    photos = torch.rand(1, 2, 3, 32, 32)
    for how, moved in (("softmax", True), ("mean", False)):
        codes, logits = torch.rand(1, 2, 5), torch.rand(1, 2, 5, requires_grad=True)
        z, alpha = lap.aggregate(codes, logits, how)
        assert torch.allclose(alpha.sum(1), torch.ones(1, 5))
        assert z.requires_grad == moved
    assert model.aggregate_by("mean").face(photos)[0].shape == (1, 32, 32)
    model.aggregate_by("softmax")


def test_canonical_depth_forgets_the_distance_and_sets_the_border():
    raw = torch.randn(2, 16, 16)
    d = lap.canonical_depth(raw)
    torch.testing.assert_close(d, lap.canonical_depth(raw + 5), rtol=0, atol=1e-6)
    assert (d[:, :, :2] == 1.05).all() and (d[:, :, -2:] == 1.05).all()
    assert 0.9 < d.min() and d.max() < 1.1


def test_a_mirrored_face_under_mirrored_light_and_view_makes_the_mirrored_photo():
    size = 32
    g = torch.linspace(-1, 1, size)
    d = (1.05 - 0.08 * torch.exp(-2 * (g - 0.2) ** 2 - g[:, None] ** 2))[None]
    albedo = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) - 0.5
    light, view = torch.tensor([[0.1, 0.4, 0.5, 0.3]]), torch.tensor([[0.1, 0.3, 0.05, 0.2, 0.1, 0]])
    twin_light = light * torch.tensor([1, 1, -1, 1])
    twin_view = view * torch.tensor([1, -1, -1, -1, 1, 0])
    one = lap.form(d, albedo, lap.read_light(light), lap.read_view(view))
    two = lap.form(d.flip(-1), albedo.flip(-1), lap.read_light(twin_light), lap.read_view(twin_view))
    both = one.mask * two.mask.flip(-1)
    # the triangulation is not symmetric, so equal only up to interpolation
    assert both.mean() > 0.5 and ((one.image - two.image.flip(-1)).abs() * both).mean() < 0.02


def test_one_face_for_many_photos_equals_one_by_one(world):
    d, albedo = torch.rand(2, 32, 32) * 0.02 + 1, torch.rand(2, 3, 32, 32)
    light, view = torch.rand(6, 4) - 0.5, (torch.rand(6, 6) - 0.5) * 0.5
    many = lap.form(d, albedo, lap.read_light(light), lap.read_view(view), photos=3)
    each = lap.form(d.repeat_interleave(3, 0), albedo.repeat_interleave(3, 0), lap.read_light(light),
                    lap.read_view(view))
    torch.testing.assert_close(many.image, each.image)


def test_an_ambient_lamp_from_the_front_shows_the_albedo():
    d = torch.full((1, 32, 32), 1.0)
    albedo = torch.rand(1, 3, 32, 32) * 2 - 1
    made = lap.form(d, albedo, lap.read_light(torch.tensor([[1.0, -1, 0, 0]])), lap.read_view(torch.zeros(1, 6)))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(made.image[inside], albedo[inside], rtol=0, atol=1e-4)


def test_slack_is_free_and_the_target_fixed():
    x, t = torch.zeros(4, requires_grad=True), torch.tensor([0.05, -0.05, 0.3, -0.5], requires_grad=True)
    loss = lap.relaxed(x, t, 0.1)
    assert math.isclose(loss.item(), (0.2 + 0.4) / 4, rel_tol=1e-6)
    loss.backward()
    assert t.grad is None and x.grad.tolist() == [0, 0, -0.25, 0.25]
    assert lap.relaxed(x, t, math.inf) == 0


def test_the_curriculum_grows_and_reaches_its_end():
    for n_max in (1, 2, 4, 6):
        sizes = [lap.largest_set(k / 60, n_max) for k in range(60)]
        assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == n_max


def test_measures_know_a_scale_and_a_tilt():
    k = render.intrinsics(64)
    ray = render.unproject(torch.ones(1, 64, 64, dtype=torch.float64), k)
    flat = torch.ones(1, 64, 64, dtype=torch.float64)
    slope = math.tan(math.radians(12))
    tilted = 1 / (1 - slope * ray[..., 0])  # the plane z = 1 + slope * x
    m = lap.erode(torch.ones(1, 64, 64))
    assert abs(lap.mad(tilted, flat, m).item() - 12) < 1e-6
    assert lap.mad(flat, flat, m).item() < 1e-6 < lap.mad(flat.float(), flat.float(), m, exact=False).item()
    assert lap.side(3 * tilted, tilted, m).item() < 1e-12
    assert m.sum() == 62 * 62


def test_gain_error_forgives_a_gain():
    t, m = torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8)
    assert lap.gain_error(t * torch.tensor([0.5, 2, 1]).view(3, 1, 1), t, m).max() < 1e-6
    assert lap.gain_error(1 - t, t, m).min() > 0.05


def test_the_world_is_a_function_of_its_seed(world):
    again = lap.make_sets(2, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(vars(world).values(), vars(again).values()))
    assert not torch.equal(world.image, lap.make_sets(2, 4, 4).image)
    assert world.image.abs().max() <= 1
    face = world.depth[world.head]
    assert 0.85 < face.min() and face.max() < 1.2
    assert (world.covered >= 0).all() and (world.covered <= 1).all()


def test_true_depth_fits_the_photos_better_than_another_persons():
    """The measures at the truth: a depth map is nearest to itself."""
    sets = lap.make_sets(2, 2, 5, scene=0)
    d, g = sets.depth[0], sets.depth[1]
    m = lap.erode(sets.head[0] & sets.head[1] & (d < 1.15) & (g < 1.15))
    assert lap.side(d, d, m).max() < 1e-9 < lap.side(d, g, m).min()


@pytest.mark.parametrize("row", lap.ROWS)
def test_every_row_trains_and_moves_the_weights(row, world):
    config = lap.Config.preset("smoke", **TINY)
    model = lap._build(config, 0)
    before = model.netD.network[-1].weight.detach().clone()
    history = lap.train_row(model, row, vars(world), config, 0)
    assert np.isfinite(history.losses["loss"]).all()
    assert not torch.equal(before, model.netD.network[-1].weight)


def test_a_step_moves_shape_through_the_renderer(world):
    config = lap.Config.preset("smoke", **TINY, confident=True)
    model = lap._build(config, 0)
    lap.set_loss(model, {"image": world.image[:, :2]}, config, consistency=0.5)["loss"].backward()
    for name in ("netD", "netA", "netL", "netV", "netC"):
        # netC's second head is for features, which smoke does without
        grads = [p.grad for k, p in getattr(model, name).named_parameters() if not k.startswith("out_net2")]
        assert all(g is not None and g.abs().sum() > 0 for g in grads), name


def test_an_untrained_model_draws_the_ellipsoid(model, world):
    found = lap.canonical_depth(lap.resting(32)[None])[0]
    assert (found - lap.ellipsoid(32))[:, 2:-2].abs().max() < 0.02  # up to its mean, which canonical_depth removes
    with torch.no_grad():
        drawn = lap.canonical_depth(model.face(world.image)[0])
    assert (drawn - found).abs().mean() < 0.01


def test_sets_of_photos_keep_people_apart(world):
    pairs = world.sets_of(2)
    assert pairs.image.shape[:2] == (4, 2)
    assert torch.equal(pairs.view[1], world.view[0, 2:]) and torch.equal(pairs.view[2], world.view[1, :2])


def test_the_world_is_explained_by_its_own_light_pose_and_depth():
    """Errors at the truth are those of sampling; with another pose they are not."""
    sets = lap.make_sets(2, 4, 7, scene=0)
    true = lap.front(2, 7, 32)
    at = lambda view: lap.errors(true, torch.zeros(2, 3, 32, 32), sets.light.flatten(0, 1), view, sets)
    right, wrong = at(sets.view.flatten(0, 1)), at(sets.view.flatten(0, 1).roll(1, 0))
    assert right["side"].max() < 0.25 and right["mad"].max() < 5  # half an expression remains
    assert wrong["mad"].mean() > 2 * right["mad"].mean()


def test_a_set_shapes_a_face_that_one_photo_cannot():
    sets = lap.make_sets(1, 4, 6)
    one, four = (lap.measure_fit(sets, n, 40, lap.STUDIO)["mad"] for n in (1, 4))
    assert four < 0.8 * one
    found = lap.fit_face(sets.image, 3)  # nothing given: light and pose are found, too
    assert [tuple(a.shape) for a in found] == [(1, 32, 32), (1, 3, 32, 32), (4, 4), (4, 6)]
    assert found[2].abs().max() > 0 < found[3].abs().max()
    given = lap.fit_face(sets.image, 1, sets.light, sets.view)
    assert torch.equal(given[2], sets.light[0]) and torch.equal(given[3], sets.view[0])


def test_what_is_given_is_not_penalised_and_teaches_its_network(world):
    light, view = torch.rand(4, 4), torch.rand(4, 6)
    assert lap.settled(light, view, ()) == 0 < lap.settled(light, view, ("light",))
    config = lap.Config.preset("smoke", **TINY)
    model = lap._build(config, 0)
    sets = lap.draw_sets(vars(world), 2)
    assert sets["image"].shape[:2] == (1, 2) and sets["view"].shape == (1, 2, 6)
    lap.set_loss(model, sets, config, given=lap.STUDIO)["loss"].backward()
    assert model.netV.network[0].weight.grad.abs().sum() > 0
    assert model.netC.network[0].weight.grad is None


def test_the_run_resumes(tmp_path):
    config = lap.Config.preset("smoke", out_dir=tmp_path, **TINY)
    first = lap.run(config)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("steps/**/*.npz")}
    assert len(times) == 1 + len(config.rows)  # the fits and the rows
    again = lap.run(config)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("steps/**/*.npz")} == times
    assert first.metrics == again.metrics
    assert (tmp_path / "weights.safetensors").stat().st_size < 1.5e6
    assert not first.claim.holds  # one seed shows nothing


def test_rows_that_go_on_start_from_the_other_rows_weights(tmp_path):
    config = lap.Config.preset("smoke", out_dir=tmp_path, **TINY, rate=0.0, depth_rate=0.0,
                               rows=("single photos", "then mean of codes"))
    rows, models, _ = lap.seed_rows(config, 0, lap.RunFolder(config))
    first, then = (models[r].state_dict() for r in config.rows)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), then.values(), strict=True))  # nothing was learned
    assert rows["then mean of codes, n=1"]["mad"] == rows["single photos, n=1"]["mad"]
    assert models["then mean of codes"].netD.how == "mean" and models["single photos"].netD.how == "softmax"


def test_rows_that_do_not_exist_or_come_too_early_are_refused():
    lap.check_rows(lap.Config.preset("book").rows)
    with pytest.raises(UserError, match="there are supervised"):
        lap.check_rows(("LAB",))
    with pytest.raises(UserError, match="goes on from 'single photos'"):
        lap.check_rows(("LAP", "then LAP", "single photos"))


def test_rows_that_are_compared_draw_the_same_sets(world, monkeypatch):
    config = lap.Config.preset("smoke", **TINY, more=12)
    seen, draw = {}, lap.draw_sets
    for row in ("then LAP", "then mean of codes", "then no consistency", "then component swap"):
        kept = seen.setdefault(row, [])
        monkeypatch.setattr(lap, "draw_sets", lambda batch, n, kept=kept: kept.append(draw(batch, n)) or kept[-1])
        lap.train_row(lap._build(config, 0), row, vars(world), config, 0)
    first, *others = ([sets["image"] for sets in kept] for kept in seen.values())
    assert len(first) == 12 and {len(images[0]) for images in first} == {1, 2, 3, 4}
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_the_claim_is_judged_by_its_rule():
    row = lambda side, mad: {"side": side, "mad": mad}
    good = {"single photos, n=1": row([1.0, 1.1, 1.2], [20.0, 21, 22]),
            "LAP, n=1": row([1.0, 1.0, 1.1], [20.0, 20, 21]),
            "LAP, n=2": row([0.9, 1.0, 1.0], [19.0, 19, 20]), "LAP, n=4": row([0.8, 0.9, 1.01], [18.0, 18.5, 20])}
    assert lap.judge(good).holds
    good["LAP, n=2"] = row([0.7, 0.8, 0.9], [19.0, 19, 20])  # not monotone
    assert not lap.judge(good).holds


def test_full_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="data_root.*vgg"):
        lap.run(lap.Config.preset("full", out_dir=tmp_path))


@pytest.fixture
def album(tmp_path, world):
    """Two people with four photos each, and rendered test faces with depth beside them."""
    for person in range(2):
        for k in range(4):
            picture = lap._bytes(world.image[person, k] / 2 + 0.5)
            write_image(tmp_path / "people" / f"p{person}" / f"{k}.png", picture)
    grey = np.zeros((64, 64), np.uint8)
    grey[8:56, 12:52] = 160 + np.add.outer(np.arange(48), np.arange(40)) // 2
    for k in range(2):
        write_image(tmp_path / "synface" / "test" / "image" / f"image_{k}.png", np.dstack([grey] * 3))
        write_image(tmp_path / "synface" / "test" / "depth" / f"depth_{k}.png", grey)
    return tmp_path


def test_a_run_on_folders_of_photos(album):
    config = lap.Config.preset(
        "smoke", data_root=album / "people", out_dir=album / "out", photos=4, **{**TINY, "n_max": 2})
    report = lap.run(config)
    assert {"image", "side", "mad", "mad_published"} <= report.metrics["LAP, nothing given, n=1"].keys()
    assert lap.load_model(album / "out" / "weights.safetensors").size == 32
    found = lap.check_data(album / "people")
    assert not found.usable and "nobody has 6 photos" in str(found) and "2 rendered test faces" in str(found)


def test_meshes_open_in_trimesh(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    g = torch.linspace(-1, 1, 32)
    depth = 1.05 - 0.1 * torch.exp(-2 * g**2 - g[:, None] ** 2)
    points = lap.fine_points(depth, 64)
    texture = torch.rand(3, 32, 32)
    lap.write_mesh(tmp_path / "face", lap.face_mesh(points), texture)
    for suffix in (".obj", ".ply"):
        mesh = trimesh.load(tmp_path / f"face{suffix}", process=False)
        assert len(mesh.faces) == 2 * (len(points) - 1) ** 2
        assert mesh.face_normals[:, 2].min() > 0  # all towards the viewer
        tip = mesh.vertices[mesh.vertices[:, 2].argmax()]
        assert abs(tip[0]) < 0.01 and abs(tip[1]) < 0.01 and abs(tip[2] - 0.05) < 1e-3
    assert mesh.visual.vertex_colors.shape == (len(points) ** 2, 4)
    upper_left = (texture[:, 0, 0] * 255).round().byte().numpy()
    assert (mesh.visual.vertex_colors[0, :3] == upper_left).all()
    mesh = trimesh.load(tmp_path / "face.obj", process=False)
    assert mesh.visual.material.image.size == (32, 32)
    assert mesh.visual.uv[:, 1].max() == 1 and mesh.vertices[mesh.visual.uv[:, 1] == 1, 1].min() > 0


def test_the_turntable_is_an_animation_that_starts_in_front(tmp_path):
    from PIL import Image

    depth = 1.05 - 0.1 * torch.exp(-4 * torch.linspace(-1, 1, 32) ** 2).expand(32, 32)
    frames = lap.turntable(lap.fine_points(depth, 48), torch.rand(3, 32, 32), frames=8, size=40)
    lap.write_film(tmp_path / "face.gif", frames)
    with Image.open(tmp_path / "face.gif") as film:
        assert film.format == "GIF" and film.is_animated and film.n_frames == 8 and film.size == (40, 40)
        assert film.info["loop"] == 0
        shown = []
        for t in range(8):
            film.seek(t)
            shown.append(np.array(film.convert("RGB")).astype(int))
    for found, wanted in zip(shown, frames, strict=True):
        assert np.abs(found - wanted).mean() < 16  # a palette of 128
    at_rest, turned = (np.abs(shown[0] - shown[t]).mean() for t in (4, 2))
    assert at_rest < 1e-9 < turned  # half-way round it looks ahead again


def test_unwrapping_at_rest_gives_the_photo():
    photo = torch.rand(3, 8, 8)
    photo = torch.nn.functional.interpolate(photo[None], (64, 64), mode="bilinear")[0]
    points = render.unproject(torch.ones(1, 64, 64), render.intrinsics(64))[0]
    view = torch.eye(3)[None], torch.zeros(1, 3)
    torch.testing.assert_close(lap.unwrap(photo, points, view, 64), photo, rtol=0, atol=1e-3)


@pytest.fixture
def weights(tmp_path, model):
    lap.save_model(model, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_apply_to_folder_photos_and_damage_without_dlib(album, weights, monkeypatch):
    from PIL import Image

    from facebook_nb.models import recognisers

    monkeypatch.setattr(recognisers, "dlib_installed", lambda: False)
    person = album / "people" / "p0"
    (person / "broken.png").write_bytes(b"\x89PNG")
    (album / "empty").mkdir()
    rows = lap.apply([person, album / "empty", album / "people" / "p1" / "0.png", album / "nowhere.png"],
                     weights=weights, out_dir=album / "out")
    by = {Path(r["input"]).name: r for r in rows}
    assert by["p0"]["photos"] == 4 and len(by["p0"]["weight"]) == 4
    assert "error" in by["broken.png"] and "error" in by["empty"] and "error" in by["nowhere.png"]
    for row in (by["p0"], by["0.png"]):
        for kind in ("mesh", "ply", "turntable", "maps"):
            assert Path(row[kind]).stat().st_size > 500
    assert by["p0"]["mesh"] != by["0.png"]["mesh"]
    assert Image.open(by["p0"]["turntable"]).n_frames == 16
    saved = read_json(album / "out" / "results.json")
    assert [r["input"] for r in saved] == [r["input"] for r in rows]
    assert read_image(by["p0"]["maps"]).shape == (128, 640, 3)


def test_two_folders_of_one_name_do_not_overwrite_each_other(album, weights):
    for place in ("a", "b"):
        write_image(album / place / "me" / "0.png", np.full((40, 40, 3), 90, np.uint8))
    rows = lap.apply([album / "a" / "me", album / "b" / "me"], weights=weights, out_dir=album / "out")
    assert rows[0]["mesh"] != rows[1]["mesh"]


def test_foreign_weights_are_refused(album, tmp_path):
    from facebook_nb.files import write_weights

    write_weights(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="not a model of this chapter"):
        lap.load_model(tmp_path / "x.safetensors")


def test_a_person_of_orl(weights, tmp_path):
    row, = lap.apply([data_folder("orl_faces") / "s1"], weights=weights, out_dir=tmp_path)
    assert row["photos"] == 10 and Path(row["mesh"]).exists()


def test_features_join_the_loss(world):
    config = lap.Config.preset("smoke", **TINY, confident=True)
    model, vgg = lap._build(config, 0), lap.VGG16().eval().requires_grad_(False)
    sets = {"image": world.image[:, :1]}
    with_features = lap.set_loss(model, sets, config, features=vgg)["loss"]
    assert with_features != lap.set_loss(model, sets, config)["loss"]
    with_features.backward()
    assert all(p.grad is not None for p in model.netC.out_net2.parameters())
