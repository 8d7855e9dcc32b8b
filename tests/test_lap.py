"""LAP: aggregation, image formation, losses, measures, meshes, apply, runs on folders of photos."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from facebook_nb import lap, render
from facebook_nb.files import UserError, read_image, read_json, write_image
from tests.conftest import data_folder

TINY = {"people": 4, "test_people": 2, "dev_people": 1, "batch": 2, "settle": 1, "steps": 2, "more": 1, "refine": 2,
        "zdim": 8, "fit_people": 1, "fit_steps": 1}


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
    for n_max in (1, 2, 3, 4, 5, 6, 7, 10):
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
    history = lap.train_row(model, lap.ROWS[row], vars(world), config, 0)
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


def test_the_run_resumes_step_by_step(tmp_path):
    config = lap.Config.preset("smoke", out_dir=tmp_path, **TINY, few_rows=(), wide_seeds=0)
    first = lap.run(config)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("steps/**/*.npz")}
    (tmp_path / "steps" / "seed0" / "sets.npz").unlink()
    again = lap.run(config)
    now = {p: p.stat().st_mtime_ns for p in tmp_path.glob("steps/**/*.npz")}
    assert [p.name for p in times if now[p] != times[p]] == ["sets.npz"]
    assert str(first.metrics) == str(again.metrics)         # text, for NaN
    assert (tmp_path / "weights.safetensors").stat().st_size < 1.5e6
    assert first.claim.verdict == "undecided"  # one seed shows nothing
    assert {"flat wall", "mean depth", "true mean face in true pose", "fit, n=8", "sets, n=8",
            "single continued, median of maps, n=8", "sets, personalised, n=4"} <= first.metrics.keys()
    assert len(first.mechanism) == 5 and first.roles["true mean face in true pose"] == "ceiling"
    assert 0 <= first.metrics["sets, n=4"]["failed"][0] <= 1


def test_a_row_that_goes_on_starts_from_the_other_rows_weights():
    config = lap.Config.preset("smoke", **TINY, more_rate=0.0)
    start = lap._packed(lap._build(config, 5))
    found = lap.row_step(config, 0, 1.0, lap.ROWS["sets, mean of codes"], start)
    assert all((np.asarray(v) == start[k].numpy()).all() for k, v in found.items() if k != "development")
    model = lap._model(config, lap.ROWS["sets, mean of codes"], found)
    assert model.netD.how == "mean" and lap._model(config, {}, found).netD.how == "softmax"


def test_training_ends_with_the_weights_that_are_best_on_development_people(tmp_path):
    model, errors = torch.nn.Linear(1, 1), iter([3.0, 1.0, 2.0])
    best = lap.Best(lambda m: next(errors), tmp_path)
    for step in range(3):
        torch.nn.init.constant_(model.weight, step)
        best(model, step)
    assert best.error == 1 and best.state["weight"].item() == 1
    again = lap.Best(None, tmp_path)                        # after a stop
    assert again.error == 1 and again.state["weight"].item() == 1


def test_rows_that_do_not_exist_or_have_no_start_are_refused():
    preset = lambda **o: lap.Config.preset("book", **o)
    lap.check_rows(preset())
    for change, message in (({"few_rows": ("LAB",)}, "there are single"),
                            ({"rows": ("sets", "single")}, "goes on from"),
                            ({"rows": ("single", "sets")}, "add single continued")):
        with pytest.raises(UserError, match=message):
            lap.check_rows(preset(**change))


def test_rows_that_are_compared_draw_the_same_sets(world, monkeypatch):
    config = lap.Config.preset("smoke", **TINY | {"more": 6})
    seen, draw = {}, lap.draw_sets
    for row in ("sets", "sets, mean of codes", "sets, relaxed consistency", "sets, component swap"):
        kept = seen.setdefault(row, [])
        monkeypatch.setattr(lap, "draw_sets", lambda batch, n, kept=kept: kept.append(draw(batch, n)) or kept[-1])
        torch.manual_seed(0)
        lap.train_row(lap._build(config, 0), lap.ROWS[row], vars(world), config, 0)
    first, *others = ([sets["image"] for sets in kept] for kept in seen.values())
    assert len(first) == 6 and {len(images[0]) for images in first} == {4}
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    with pytest.raises(UserError, match="sets of 5 photos, but there are 4"):
        draw(vars(world), 5)


def test_the_claim_and_the_checks_follow_their_rule():
    def judged(gain, trust):
        rows = {"single continued, n=1": [20.0, 21, 22], "sets, n=1": [20 - gain, 21.1 - gain, 22 - gain]}
        metrics = {k: {"mad": v, "side": v} for k, v in rows.items()}
        one = {"trust": [trust, trust - 0.01, trust], "moved": [1.0, 1.1, 1.0], "within, n=1": [2.0, 2, 2.1],
               "within, n=4": [1.0, 1, 1], "agreement": [0.5, 0.5, 0.6], "between": [0.4, 0.3, 0.4]}
        return lap.judge(metrics, {"sets": one, "single continued": one | {"moved": [2.0, 2.0, 2.1]}})

    claim, findings, checks = judged(1, 0.8)
    assert claim.verdict == "shown" and claim.unit == "°" and len(findings) == 1
    assert [c.holds for c in checks] == [True, True, True, True, False]
    assert judged(-1, 1.0)[0].verdict == "refuted" and not judged(-1, 1.1)[2][0].holds


def test_a_face_out_of_frame_is_a_failure_and_never_pays(world):
    few = world.people(slice(0, 1))
    face = lap.ellipsoid(32)[None], torch.zeros(1, 3, 32, 32), few.light.flatten(0, 1)
    view = few.view.flatten(0, 1)
    away = view.clone()
    away[0, 3] = 3
    right, gone = lap.errors(*face, view, few), lap.errors(*face, away, few)
    assert gone["failed"].tolist() == [1, 0, 0, 0] and right["failed"].sum() == 0
    for name in ("side", "mad", "albedo", "image"):
        assert torch.isfinite(gone[name]).all() and gone[name][0] > 0
        assert gone[name][1:].equal(right[name][1:])
    assert gone["mad"][0] > right["mad"][0] and lap.averaged(gone)["mad"] > lap.averaged(right)["mad"]
    nothing = torch.zeros(1, 3, 8, 8)
    assert lap.photometric(nothing, nothing + 1, torch.zeros(1, 1, 8, 8)) == 0


def test_without_the_mirror_nothing_is_mirrored(world, monkeypatch):
    drawn = []
    own = lap.form
    monkeypatch.setattr(lap, "form", lambda *a, **k: drawn.append(own(*a, **k)) or drawn[-1])
    face = lap.ellipsoid(32).expand(2, -1, -1), torch.zeros(2, 3, 32, 32)
    x = world.image[:, 0]
    for flip in (0.0, 0.5):
        lap.explain_loss(*face, torch.zeros(2, 4), torch.zeros(2, 6), x, flip)
    assert [len(made.image) for made in drawn] == [2, 4]


def tiny_full(root):
    """Photos of two people and a network for the perceptual loss, in the real formats; settings for preset `full`."""
    noise = np.random.default_rng(0)
    for person, k in np.ndindex(2, 6):
        write_image(root / "people" / f"p{person}" / f"{k}.png", noise.integers(0, 256, (40, 40, 3), np.uint8))
    torch.manual_seed(0)
    torch.save({f"features.{k.split('.', 1)[1]}": v for k, v in lap.VGG16().state_dict().items()}, root / "vgg.pth")
    return {"data_root": root / "people", "vgg": root / "vgg.pth", "size": 32, "nf": 8, "workers": 0, "batch": 6,
            "checkpoint_every": 1} | {k: TINY[k] for k in ("settle", "steps", "more", "refine", "zdim")}


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
    assert {"image", "side", "mad", "mad_published"} <= report.metrics["sets, n=1"].keys()
    assert report.metrics.keys() == {"single, n=1", "sets, n=1", "refine, n=1"}
    assert lap.load_model(album / "out" / "weights.safetensors").size == 32
    found = lap.check_data(album / "people")
    assert not found.usable and "nobody has 6 photos" in str(found) and "2 rendered test faces" in str(found)


def test_a_stage_on_photos_goes_on_from_its_checkpoints(album, tmp_path, monkeypatch):
    config = lap.Config.preset("smoke", data_root=album / "people", photos=4, **TINY | {"n_max": 2, "settle": 2},
                               checkpoint_every=1)
    once = lap.photos_step(config, 0, "single", {}, tmp_path / "stage")
    assert [*(tmp_path / "stage").glob("settle/checkpoints/*")] and [*(tmp_path / "stage").glob("learn/checkpoints/*")]
    monkeypatch.setattr(lap, "explain_loss", lambda *a: pytest.fail("trained again"))
    again = lap.photos_step(config, 0, "single", {}, tmp_path / "stage")
    assert all((np.asarray(v) == np.asarray(again[k])).all() for k, v in once.items())


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
    assert {r["weights"] for r in rows} == {str(weights)} and by["p0"]["face"] == "not looked for"
    assert by["p0"]["photos"] == 4 and len(by["p0"]["weight"]) == 4
    assert "error" in by["broken.png"] and "error" in by["empty"] and "error" in by["nowhere.png"]
    for row in (by["p0"], by["0.png"]):
        for kind in ("mesh", "ply", "turntable", "maps"):
            assert (album / "out" / row[kind]).stat().st_size > 500
    assert by["p0"]["mesh"] != by["0.png"]["mesh"]
    assert Image.open(album / "out" / by["p0"]["turntable"]).n_frames == 16
    saved = read_json(album / "out" / "results.json")
    assert [r["input"] for r in saved] == [r["input"] for r in rows]
    assert read_image(album / "out" / by["p0"]["maps"]).shape == (128, 640, 3)


def test_two_folders_of_one_name_do_not_overwrite_each_other(album, weights, monkeypatch):
    from facebook_nb.models import recognisers

    monkeypatch.setattr(recognisers, "dlib_installed", lambda: False)
    for place in ("a", "b"):
        write_image(album / place / "me" / "0.png", np.full((40, 40, 3), 90, np.uint8))
    rows = lap.apply([album / "a" / "me", album / "b" / "me"], weights=weights, out_dir=album / "out")
    assert rows[0]["mesh"] != rows[1]["mesh"]


def test_without_a_face_there_is_no_mesh_but_the_reason(weights, tmp_path, monkeypatch, world):
    from facebook_nb.models import recognisers

    nobody = recognisers.Detections(torch.zeros(0, 4), torch.zeros(0, 5, 2), torch.zeros(0))
    monkeypatch.setattr(recognisers, "dlib_installed", lambda: True)
    monkeypatch.setattr(recognisers, "detect_faces", lambda image: nobody)
    cup = np.full((80, 60, 3), 120, np.uint8)
    write_image(tmp_path / "cups" / "0.png", cup)
    rows = lap.apply([tmp_path / "cups", cup, cup[:7, :5]], weights=weights, out_dir=tmp_path / "out")
    assert [r.get("face") for r in rows] == ["not found", "not found", "not found", None]
    assert not any("mesh" in r for r in rows) and "32" in rows[3]["error"] and rows[0]["reason"]
    assert not [*(tmp_path / "out").glob("*.obj")]
    monkeypatch.setattr(recognisers, "dlib_installed", lambda: False)
    row, = lap.apply(world.image[0, 0] / 2 + 0.5, weights=weights, out_dir=tmp_path / "out")
    assert row["face"] == "not looked for" and (tmp_path / "out" / row["mesh"]).exists()


def test_foreign_weights_are_refused(album, tmp_path):
    from facebook_nb.files import write_weights

    write_weights(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="not a model of this chapter"):
        lap.load_model(tmp_path / "x.safetensors")


def test_a_person_of_orl(weights, tmp_path):
    row, *others = lap.apply([data_folder("orl_faces") / "s1"], weights=weights, out_dir=tmp_path)
    assert row["photos"] + len(others) == 10 and (tmp_path / row["mesh"]).exists()


def test_features_join_the_loss(world):
    config = lap.Config.preset("smoke", **TINY, confident=True)
    model, vgg = lap._build(config, 0), lap.VGG16().eval().requires_grad_(False)
    sets = {"image": world.image[:, :1]}
    with_features = lap.set_loss(model, sets, config, features=vgg)["loss"]
    assert with_features != lap.set_loss(model, sets, config)["loss"]
    with_features.backward()
    assert all(p.grad is not None for p in model.netC.out_net2.parameters())
