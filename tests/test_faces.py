"""The face world: deterministic, true to itself, and taken for faces by judges that never saw it."""
import importlib.util
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from facebook_nb.files import UserError
from facebook_nb.models.recognisers import load_dlib
from facebook_nb.worlds.faces import (
    EXPRESSION,
    GROUPS,
    LANDMARKS,
    LOOK,
    OCCLUDERS,
    PARSING,
    SHAPE,
    Faces,
    compress,
    face_geometry,
    hair_colour,
    head_model,
    landmark_points,
    render_faces,
    sample_people,
    sample_photos,
    skin_colour,
)


@pytest.fixture(scope="module")
def people():
    return sample_people(12, seed=1)


@pytest.fixture(scope="module")
def plain(people):
    """One quiet frontal photo of each person."""
    return sample_photos(people, 1, seed=2, pose=0, light=0.3, expression=0.0)


@pytest.fixture(scope="module")
def faces(people, plain):
    return render_faces(people, plain, size=160, crop="face")


def same(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_people_and_photos_are_prefixes_of_larger_samples(people):
    assert same(people, sample_people(40, seed=1)[:12])
    assert not torch.equal(people.shape, sample_people(12, seed=2).shape)
    assert same(sample_photos(people[:3], 4, seed=5), sample_photos(people, 4, seed=5)[:12])


@pytest.mark.parametrize("size, crop", [(64, "face"), (112, "head")])
def test_a_photo_does_not_depend_on_its_batch(people, size, crop):
    photos = sample_photos(people, 1, seed=3, occlusion=0.5)
    whole = render_faces(people, photos, size, crop, chunk=12)
    assert same(whole, render_faces(people, photos, size, crop, chunk=12))
    assert same(whole, render_faces(people, photos, size, crop, chunk=5))
    assert same(whole[7:8], render_faces(people[4:9], replace(photos[7:8], person=torch.tensor([3])), size, crop))


def test_shapes_and_ranges(faces):
    n, size = 12, 160
    assert faces.image.shape == faces.albedo.shape == faces.normals.shape == (n, 3, size, size)
    assert faces.depth.shape == (n, 1, size, size) and faces.parsing.shape == (n, size, size)
    assert faces.landmarks.shape == (n, 68, 2) and faces.visible.shape == (n, 68)
    for value in (faces.image, faces.albedo):
        assert 0 <= value.min() and value.max() <= 1
    assert faces.parsing.dtype == torch.uint8 and faces.parsing.max() < len(PARSING)
    assert sorted(i for r in LANDMARKS.values() for i in r) == list(range(68))
    assert 30 < faces.depth.min() and faces.depth.max() < 200
    assert faces.image.flatten(1).std(1).min() > 0.05


def test_traits_have_names_limits_and_correlations():
    crowd = sample_people(2000, seed=4)
    assert crowd.shape.shape == (2000, len(SHAPE)) and crowd.look.shape == (2000, len(LOOK))
    assert crowd["age"].min() >= 18 and crowd["age"].max() <= 80
    assert torch.corrcoef(torch.stack([crowd["masc"], crowd["beard"]]))[0, 1] > 0.4
    assert torch.corrcoef(torch.stack([crowd["age"], crowd["grey"]]))[0, 1] > 0.4
    with pytest.raises(KeyError, match="height"):
        crowd["height"]


def test_groups_share_their_traits_and_spread_scales_them():
    crowd = sample_people(4000, seed=4)
    tone = torch.stack([crowd["melanin"][crowd.group == g].mean() for g in range(GROUPS)])
    assert (tone.diff() > 0.1).all()
    spread = [1.0, 0.8, 0.65, 0.5]
    varied = sample_people(4000, seed=4, spread=spread)
    for g in range(GROUPS):
        ratio = varied["eye_spacing"][varied.group == g].std() / crowd["eye_spacing"][crowd.group == g].std()
        assert abs(ratio - spread[g]) < 1e-3
    assert sample_people(9, seed=4, groups=2, spread=0).shape.std(0).max() < 1e-6


def test_pigments_darken():
    steps = torch.linspace(0, 2, 20)
    skin, hair = skin_colour(steps, 0.4 + 0 * steps), hair_colour(steps / 2, 0.2 + 0 * steps, 0 * steps)
    assert (skin.diff(dim=1) < 0).all() and (hair.diff(dim=1) < 0).all()
    assert (skin[0] > skin[1]).all() and (skin[1] > skin[2]).all()      # no blue skin


def test_template_is_symmetric_and_of_human_size():
    model = head_model()
    rows, cols = model.grids[0]
    head = model.points[: rows * cols].view(rows, cols, 3)
    torch.testing.assert_close(head, head.flip(1) * torch.tensor([-1.0, 1, 1]), atol=1e-9, rtol=0)
    assert model.faces.max() < len(model.points) and model.rest.shape == (len(model.points), 3)


def test_heads_have_human_sizes_and_two_sexes():
    """Within 4 mm of the survey's means (Zhuang and Bradtmiller 2005), men and women apart by their shape alone."""
    crowd = sample_people(160, seed=3)
    still = sample_photos(crowd, 1, seed=0, pose=0, light=0, expression=0)
    at = landmark_points(face_geometry(crowd, still, fine=False), crowd, still)
    length, lips = (10 * (at[:, i] - at[:, j]).norm(dim=1) for i, j in ((27, 8), (48, 54)))
    man = crowd["masc"] > 0
    for measure, men, women in ((length, 122.7, 113.4), (lips, 51.1, 48.0)):
        assert abs(measure[man].mean() - men) < 4 and abs(measure[~man].mean() - women) < 4
    assert length.std() > 5 and abs(crowd["masc"]).mean() > 0.6
    assert not crowd["beard"][~man].any() and crowd["beard"][man].gt(0.3).float().mean() > 0.05


def test_both_meshes_are_one_head(people, plain):
    """Small pictures take the coarse mesh: the same face to half a millimetre at the landmarks."""
    fine, coarse = (landmark_points(face_geometry(people, plain, fine=f), people, plain) for f in (True, False))
    assert (fine - coarse).norm(dim=-1).median() < 0.05 and (fine - coarse).norm(dim=-1).max() < 0.4


def test_compression_and_lens_take_what_they_say(people, plain, faces):
    quality = lambda q: compress(faces.image, torch.full((12,), float(q)))
    loss = [(quality(q) - faces.image).abs().mean() for q in (98, 60, 20)]
    assert loss[0] < 0.01 and loss[0] < loss[1] < loss[2] < 0.08
    clear = sample_photos(people, 1, seed=2, lens=0).lens
    assert (clear[:, [0, 1]] == 0).all() and (clear[:, 2:4] == 1).all() and (clear[:, 5] == 100).all()
    soft = replace(plain, lens=plain.lens + torch.tensor([8.0, 0, 0, 0, 0, 0]))
    edges = lambda f: f.image.diff(dim=3).abs().mean()
    blurred = render_faces(people, soft, 160, "face")
    assert edges(blurred) < 0.9 * edges(faces) and torch.equal(blurred.normals, faces.normals)


def test_landmarks_agree_with_parsing(people, faces):
    photos = sample_photos(people, 2, seed=6, pose=20)
    for shot, size in ((faces, 160), (render_faces(people, photos, 200, "face"), 200)):
        every = torch.arange(len(shot))

        def label(ids, shot=shot, every=every, size=size):
            x, y = shot.landmarks[:, ids].mean(1).round().long().clamp(0, size - 1).T
            return shot.parsing[every, y, x]

        for eye in ("eye_left", "eye_right"):
            assert (label(list(LANDMARKS[eye])) == PARSING.index("eyes")).float().mean() >= 0.9
        mouth = label(list(LANDMARKS["mouth_inner"]))
        assert torch.isin(mouth, torch.tensor([PARSING.index("lips"), PARSING.index("mouth")])).float().mean() >= 0.95
        assert (label([30]) == PARSING.index("nose")).float().mean() >= 0.95
        assert (label([19]) == PARSING.index("brows")).float().mean() >= 0.6
        left = shot.landmarks[:, list(LANDMARKS["eye_left"]), 0].mean(1)
        assert (left < shot.landmarks[:, list(LANDMARKS["eye_right"]), 0].mean(1)).all()
        inside = shot.landmarks[:, 17:]
        assert ((inside > 0) & (inside < size - 1)).all()
        on_face = shot.parsing[every, inside[:, 13].round().long()[:, 1], inside[:, 13].round().long()[:, 0]]
        assert (on_face > 0).all()


def test_normals_are_unit_face_the_camera_and_follow_depth(faces):
    n = faces.normals
    torch.testing.assert_close(n.norm(dim=1), torch.ones_like(n[:, 0]), atol=1e-4, rtol=0)
    skin = faces.mask("skin", "nose", "orbital")
    assert n[:, 2][skin].min() > -0.5 and n[:, 2][skin].mean() > 0.6
    cm = 17.0 / 160                                       # a pixel at the face, up to zoom
    z = -faces.depth[:, 0]
    slope_x = (z[:, 1:-1, 2:] - z[:, 1:-1, :-2]) / (2 * cm)
    slope_y = (z[:, :-2, 1:-1] - z[:, 2:, 1:-1]) / (2 * cm)
    made = torch.nn.functional.normalize(torch.stack([-slope_x, -slope_y, torch.ones_like(slope_x)], 1), dim=1)
    agree = (made * n[:, :, 1:-1, 1:-1]).sum(1)[skin[:, 1:-1, 1:-1]]
    assert agree.median() > 0.97 and (agree > 0.8).float().mean() > 0.9


def test_nose_tip_is_nearest_and_turns_with_yaw(people, plain):
    shots = [render_faces(people, replace(plain, yaw=torch.full((12,), a)), 128, "face") for a in (-30.0, 0.0, 30.0)]
    tip = [s.landmarks[:, 30, 0] - s.landmarks[:, 36:48, 0].mean(1) for s in shots]
    assert (tip[0] < tip[1]).all() and (tip[1] < tip[2]).all()
    front = shots[1]
    x, y = front.landmarks[:, 30].round().long().T
    tip_depth = front.depth[torch.arange(12), 0, y, x]
    eye_x, eye_y = front.landmarks[:, 36:42].mean(1).round().long().T
    assert (tip_depth + 1 < front.depth[torch.arange(12), 0, eye_y, eye_x]).all()
    # turned the other way a far jaw landmark hides behind the head
    assert (~shots[2].visible[:, 16]).float().mean() > 0.9 and front.visible[:, 30].all()


def test_expressions_move_what_they_should(people, plain, faces):
    def shot(**strengths):
        e = plain.expression.clone()
        for name, value in strengths.items():
            e[:, EXPRESSION.index(name)] = value
        return render_faces(people, replace(plain, expression=e), 160, "face")

    height = lambda f, a, b: f.landmarks[:, b, 1] - f.landmarks[:, a, 1]
    width = lambda f: f.landmarks[:, 54, 0] - f.landmarks[:, 48, 0]
    assert (width(shot(smile=1.0)) > 1.05 * width(faces)).all()
    wide = shot(open=1.0)
    assert (height(wide, 62, 66) > height(faces, 62, 66) + 8).all()
    assert wide.mask("mouth").sum() > 20 * max(1, faces.mask("mouth").sum())
    assert (height(shot(blink=1.0), 37, 41).abs() < 0.3 * height(faces, 37, 41)).all()
    assert shot(blink=1.0).mask("eyes").sum() < 0.3 * faces.mask("eyes").sum()
    parted = shot(show=1.0)
    assert (height(parted, 62, 66) > height(faces, 62, 66) + 3).all() and parted.mask("mouth").any()
    assert (height(shot(**{"raise": 1.0}), 19, 27) > height(faces, 19, 27) + 2).all()


def test_light_changes_the_image_alone(people, plain, faces):
    lamp = torch.tensor([[-0.8, 0.3, 0.5]])
    other = render_faces(people, replace(plain, key=(lamp / lamp.norm()).expand(12, 3)), 160, "face")
    for name in ("albedo", "depth", "normals", "landmarks", "parsing"):
        assert torch.equal(getattr(other, name), getattr(faces, name))
    assert (other.image - faces.image).abs().mean() > 0.02
    cheek = faces.mask("skin")[:, None] & (torch.arange(160) < 80)
    bright = lambda f, where: f.image[where.expand(-1, 3, -1, -1)].mean()
    gap = lambda f: bright(f, cheek) - bright(f, faces.mask("skin")[:, None] & ~(torch.arange(160) < 80))
    assert gap(other) > gap(faces) + 0.05


@pytest.mark.parametrize("name", OCCLUDERS[1:])
def test_occluders_cover_and_say_so(people, plain, faces, name):
    hidden = replace(plain, occluder=torch.full((12,), OCCLUDERS.index(name)))
    shot = render_faces(people, hidden, 160, "face")
    share = shot.mask("occluder").flatten(1).float().mean(1)
    assert share.min() > 0.01 and not faces.mask("occluder").any()
    outside = ~torch.nn.functional.max_pool2d(shot.mask("occluder")[:, None].float(), 9, 1, 4).bool()
    moved = (shot.albedo - faces.albedo).abs() * outside
    assert moved.mean() < 0.01
    drawn = sample_photos(people, 50, seed=1, occlusion=0.4)
    assert 0.3 < (drawn.occluder > 0).float().mean() < 0.5
    assert (sample_photos(people, 2, seed=1, occlusion=name).occluder == OCCLUDERS.index(name)).all()


def test_on_every_device(people, plain, device):
    shot = render_faces(people.to(device), plain.to(device), 64, "face")
    assert shot.image.device.type == device.type
    here = render_faces(people, plain, 64, "face")
    assert (shot.image.cpu() - here.image).abs().mean() < 2e-3
    torch.testing.assert_close(shot.landmarks.cpu(), here.landmarks, atol=1e-2, rtol=0)


def test_wrong_requests_are_named(people):
    photos = sample_photos(people, 1, seed=1)
    with pytest.raises(UserError, match="crop: 'mugshot'"):
        render_faces(people, photos, crop="mugshot")
    with pytest.raises(UserError, match="occlusion: 'hat'"):
        sample_photos(people, 1, seed=1, occlusion="hat")
    with pytest.raises(UserError, match="groups"):
        sample_people(3, seed=1, groups=7)
    with pytest.raises(UserError, match="mask: 'teeth'"):
        Faces(*[torch.zeros(1, 1, 1, dtype=torch.uint8)] * 7).mask("teeth")


def judge():
    """dlib, its frontal detector and its five-point predictor, or a skip."""
    dlib = pytest.importorskip("dlib")
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None:
        pytest.skip("face_recognition_models is not installed")
    points = spec.submodule_search_locations[0] + "/models/shape_predictor_5_face_landmarks.dat"
    return dlib, dlib.get_frontal_face_detector(), dlib.shape_predictor(points)


def pixels(faces):
    image = (faces.image.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.numpy())


def test_a_hundred_photos_take_seconds():
    """58 a second on a free core; a third of that is asked for, by the processor's clock, on one that others share."""
    crowd = sample_people(6, seed=3)
    photos = sample_photos(crowd, 4, seed=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        render_faces(crowd, photos[:8], 112)
        start = time.process_time()
        render_faces(crowd, photos, 112)
        assert len(photos) / (time.process_time() - start) > 20
    finally:
        torch.set_num_threads(threads)


def test_a_real_detector_finds_the_faces():
    """At least 99 % of 120 people at 200 pixels, |yaw| <= 25 degrees, the image not enlarged."""
    detect = judge()[1]
    crowd = sample_people(120, seed=0)
    shots = render_faces(crowd, sample_photos(crowd, 1, seed=0, pose=25), 200, "head", samples=1)
    centre = shots.landmarks[:, 17:].mean(1)
    found = sum(
        any(box.left() < x < box.right() and box.top() < y < box.bottom() for box in detect(image, 0))
        for image, (x, y) in zip(pixels(shots), centre.tolist())
    )
    assert found >= 0.99 * len(crowd)


def test_a_real_recogniser_tells_the_people_apart():
    """Verification AUC over 20 people, 5 photos each, |yaw| <= 30 degrees, varied light and expression."""
    from sklearn.metrics import roc_auc_score

    dlib, detect, predict = judge()
    crowd = sample_people(20, seed=21)
    photos = sample_photos(crowd, 5, seed=21, pose=30)
    shots = render_faces(crowd, photos, 200, "head", samples=1)
    chips = []
    for image, points in zip(pixels(shots), shots.landmarks[:, 17:].numpy()):
        box = max(detect(image, 0), key=lambda b: b.area(), default=None)
        if box is None:                                   # a missed face still has to be recognised
            box = dlib.rectangle(*[int(v) for v in (*points.min(0), *points.max(0))])
        chip = dlib.get_face_chip(image, predict(image, box), 150)
        chips.append(chip)
    chips = torch.from_numpy(np.stack(chips)).permute(0, 3, 1, 2) / 255
    codes = torch.cat([load_dlib()(c) for c in chips.split(20)])    # dlib's network, held equal to dlib's runtime
    one, two = torch.triu_indices(100, 100, 1)
    distance = (codes[one] - codes[two]).norm(dim=1)
    same_person = photos.person[one] == photos.person[two]
    assert roc_auc_score(same_person, -distance) >= 0.985
