"""dlib's recogniser in PyTorch, detection, alignment: against dlib itself, and against geometry."""
import math
import sys

import numpy as np
import pytest
import torch

from facebook_nb.files import UserError, read_image
from facebook_nb.models import recognisers
from facebook_nb.models.recognisers import (
    DLIB_THRESHOLD,
    TEMPLATES,
    align,
    crop_faces,
    detect_faces,
    embed,
    find_dlib_weights,
    find_face,
    five_points,
    halve,
    load_dlib,
    read_dlib,
    similarity,
)
from tests.conftest import data_folder


@pytest.fixture(scope="module")
def dlib():
    module = pytest.importorskip("dlib", reason="dlib is not installed: pip install 'facebook_nb[faces]'")
    try:
        find_dlib_weights()
    except UserError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture(scope="module")
def net(dlib):
    return load_dlib()


def texture(seed, size, smooth):
    """(size, size, 3) uint8 of smoothed noise with full contrast."""
    cv2 = pytest.importorskip("cv2")
    x = np.random.default_rng(seed).uniform(0, 1, (size, size, 3)).astype(np.float32)
    x = cv2.GaussianBlur(x, (0, 0), smooth) if smooth else x
    return ((x - x.min()) / (x.max() - x.min()) * 255).astype(np.uint8)


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


# the network

def test_the_embedding_is_dlibs(dlib, net):
    runtime = dlib.face_recognition_model_v1(str(find_dlib_weights()))
    chips = [texture(s, 150, s) for s in (0, 1, 2, 5, 12)] + [np.full((150, 150, 3), v, np.uint8) for v in (0, 255)]
    theirs = np.array([runtime.compute_face_descriptor(c) for c in chips])
    mine = net(torch.cat([as_tensor(c) for c in chips])).numpy()
    assert mine.shape == (7, 128) and np.abs(mine - theirs).max() <= 1e-5
    assert np.linalg.norm(theirs[0] - theirs[4]) > 0.2                  # and they are not all the same


def test_it_is_frozen_and_its_gradient_is_right(net):
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    double = load_dlib().double()
    torch.manual_seed(0)
    x = torch.rand(1, 3, 150, 150, dtype=torch.double).requires_grad_()
    up, v, h = torch.randn(128).double(), torch.randn(1, 3, 150, 150).double(), 1e-7
    (double(x) @ up).sum().backward()
    with torch.no_grad():
        slope = ((double(x + h * v) - double(x - h * v)) @ up).item() / (2 * h)
    assert slope == pytest.approx((x.grad * v).sum().item(), rel=1e-4)


@pytest.mark.parametrize("damage", [lambda b: b[:1_000_000], lambda b: b[:22_400_000], lambda b: b"", lambda b: b[700:],
                                    lambda b: b.replace(b"\x07affine_\x01\x02", b"\x07affine_\x01\x03")])
def test_a_damaged_file_is_named(dlib, tmp_path, damage):
    path = tmp_path / "model.dat"
    path.write_bytes(damage(find_dlib_weights().read_bytes()))
    with pytest.raises(UserError, match="model.dat"):
        load_dlib(path)


def test_missing_files_say_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nowhere.dat"):
        read_dlib(tmp_path / "nowhere.dat")
    monkeypatch.setattr(recognisers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "facebook_nb\[faces\]"'):
        load_dlib()


# geometry

def test_similarity_recovers_a_move_and_is_the_least_squares_fit():
    rng = np.random.default_rng(0)
    z, turn = rng.normal(0, 30, (4, 5, 2)), rng.uniform(-3, 3, 4)
    scale, shift = rng.uniform(0.2, 5, 4), rng.normal(0, 50, (4, 2))
    w = np.stack([s * (p @ np.array([[math.cos(t), math.sin(t)], [-math.sin(t), math.cos(t)]])) + b
                  for p, t, s, b in zip(z, turn, scale, shift)])
    a, b = similarity(torch.from_numpy(z), torch.from_numpy(w))
    assert np.abs(a.numpy() - scale * np.exp(1j * turn)).max() < 1e-10
    assert np.abs(b.numpy() - shift @ [1, 1j]).max() < 1e-9
    w += rng.normal(0, 5, w.shape)
    a, b = similarity(torch.from_numpy(z), torch.from_numpy(w))
    x, y = z[0].T
    one, zero = np.ones(5), np.zeros(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    best = np.linalg.lstsq(rows, np.concatenate(w[0].T), rcond=None)[0]
    assert np.abs(best - [a[0].real, a[0].imag, b[0].real, b[0].imag]).max() < 1e-9


@pytest.mark.parametrize("template", TEMPLATES)
def test_aligned_points_fall_on_the_template(template):
    """A picture whose colours are its coordinates says where each pixel of the crop came from."""
    side, target = TEMPLATES[template]
    y, x = torch.meshgrid(torch.arange(400.0), torch.arange(400.0), indexing="ij")
    picture = torch.stack([x, y])[None].repeat(3, 1, 1, 1)
    turn = torch.tensor([0.0, 0.5, -2.0])
    move = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()], -1).view(3, 2, 2)
    t = torch.from_numpy(target).float()
    points = (t - side / 2) @ move * 1.5 + 190
    crop = align(picture, points, template)
    assert crop.shape == (3, 2, side, side)
    grid = t / (side - 1) * 2 - 1
    got = torch.nn.functional.grid_sample(crop, grid.expand(3, 1, 5, 2), align_corners=True)[:, :, 0].mT
    assert (got - points).abs().max() < (1.2 if template == "dlib150" else 0.01)   # dlib: half a pixel of the chip off


def test_an_upright_face_is_left_as_it_is():
    picture, points = torch.rand(2, 3, 112, 112), torch.from_numpy(TEMPLATES["arcface112"][1]).expand(2, 5, 2)
    assert (align(picture, points) - picture).abs().max() < 1e-4
    assert align(picture, points, size=56).shape == (2, 3, 56, 56)
    with pytest.raises(UserError, match="arcface112"):
        align(picture, points, "arcface")


def test_shrinking_does_not_alias():
    stripes = (torch.arange(896) // 2 % 2).float().expand(1, 1, 896, 896)     # period 4, half a pixel of the crop
    points = torch.from_numpy(TEMPLATES["arcface112"][1])[None] * 8 + 3.3
    assert align(stripes, points)[..., 8:-8, 8:-8].std() < 0.01
    assert (halve(torch.ones(1, 2, 9, 12))[..., 1:-1, 1:-1] - 1).abs().max() < 1e-6
    assert halve(torch.ones(1, 2, 9, 12)).shape == (1, 2, 5, 6)
    for shape in ((2, 3, 8, 8), (1, 1, 9, 31), (1, 3, 40, 17), (1, 3, 5, 30)):   # OpenCV's form, the convolutions
        x = torch.rand(shape)
        slow = halve(x.clone().requires_grad_())
        slow.sum().backward()
        assert (halve(x) - slow).abs().max() < 5e-7 and not halve(x).requires_grad
        bytes_ = (255 * x).byte()
        assert (halve(bytes_) - halve(bytes_ / 255)).abs().max() < 5e-7


def test_a_batch_is_its_parts_and_gradients_reach_both_inputs():
    torch.manual_seed(0)
    pictures = torch.rand(3, 3, 300, 300, dtype=torch.double).requires_grad_()
    t = torch.from_numpy(TEMPLATES["dlib150"][1])
    points = torch.stack([t, t * 0.5 + 40, t * 2.2 - 20]).requires_grad_()   # the third is halved, the others are not
    crops = align(pictures, points, "dlib150", 40)
    alone = torch.cat([align(pictures[i:i + 1], points[i:i + 1], "dlib150", 40) for i in range(3)])
    assert torch.equal(crops, alone)
    weights = torch.rand_like(crops)
    (crops * weights).sum().backward()
    assert (pictures.grad.flatten(1).abs().sum(1) > 0).all() and (points.grad.abs().sum((1, 2)) > 0).all()
    v, h = torch.rand_like(pictures), 1e-3                                   # the crop is linear in the picture
    there = (align(pictures + h * v, points, "dlib150", 40) - crops).detach()
    assert (there * weights).sum().item() / h == pytest.approx((pictures.grad * v).sum().item(), rel=1e-6)


@pytest.mark.parametrize("scale, mean, most", [(0.6, 0.55, 1.05), (1.0, 0.55, 1.05), (1.9, 0.55, 1.05),
                                               (2.4, 1.1, 3.0), (5.0, 1.7, 4.0)])
def test_the_crop_is_dlibs_chip(dlib, scale, mean, most):
    """In grey levels; dlib cuts fractions off, once, and once more each time it halves the picture."""
    rng = np.random.default_rng(int(scale * 10))
    picture = texture(3, 900, 4 * scale)
    points = TEMPLATES["dlib150"][1] @ [[math.cos(0.2), math.sin(0.2)], [-math.sin(0.2), math.cos(0.2)]] * scale
    points = (points + rng.normal(0, 3 * scale, (5, 2))).round().astype(int)
    points += (450 - points.mean(0)).astype(int)
    shape = dlib.full_object_detection(dlib.rectangle(0, 0, 899, 899), [dlib.point(*map(int, p)) for p in points])
    chip = dlib.get_face_chip(picture, shape).astype(np.float64)
    mine = align(as_tensor(picture), torch.from_numpy(points)[None], "dlib150")[0].permute(1, 2, 0).numpy() * 255
    away = np.abs(mine - chip)[25:-25, 25:-25]
    assert away.mean() < mean and away.max() < most


def test_five_points_of_68():
    landmarks = torch.stack([torch.arange(68.0), torch.arange(68.0) + 100], -1)
    assert five_points(landmarks)[:, 0].tolist() == [38.5, 44.5, 30, 48, 54]
    assert five_points(landmarks.expand(2, 68, 2), "dlib")[1, :, 1].tolist() == [145, 142, 136, 139, 133]


# photos

@pytest.fixture(scope="module")
def world():
    """Eight procedural photos of four people, and the truth about them."""
    from facebook_nb.worlds.faces import render_faces, sample_people, sample_photos
    people = sample_people(4, 5)
    return render_faces(people, sample_photos(people, 2, 5, pose=15.0), 160)


def test_faces_are_found_where_they_are(dlib, world):
    pictures = [(x * 255).round().byte().permute(1, 2, 0).numpy() for x in world.image]
    truth = five_points(world.landmarks, "dlib")
    for picture, points in zip(pictures, truth):
        found = detect_faces(picture)
        assert len(found.boxes) and found.scores[0] > 0
        left, top, right, bottom = found.boxes[0]
        assert left < points[:, 0].min() and points[:, 0].max() < right and top < points[:, 1].min() < bottom
        eyes = (points[0] - points[2]).norm()
        assert (found.points[0] - points).norm(dim=-1).max() < 0.25 * eyes
    big = np.kron(pictures[0], np.ones((2, 2, 1), np.uint8))          # pixel i becomes 2i and 2i + 1
    once, twice = detect_faces(pictures[0], upsample=1), detect_faces(big, upsample=0)
    assert ((once.points[0] + 0.5) * 2 - 0.5 - twice.points[0]).abs().max() < 4


@pytest.mark.parametrize("template", ["arcface112", "dlib150"])
@pytest.mark.parametrize("scale", [0.7, 3.0, 9.0])
def test_what_is_far_from_the_face_changes_nothing(template, scale, monkeypatch):
    """A part of the picture is cut, in bytes; the crop is that of the whole in floats, at its edges too."""
    image = torch.from_numpy(texture(3, 900, 2)).permute(2, 0, 1)[None]
    side, points = TEMPLATES[template]
    for at in ((0, 0), (430, 300), (850, 880)):
        p = torch.from_numpy((points - side / 2) * scale + at).float()[None]
        got = align(image, p, template)
        with monkeypatch.context() as patch:
            patch.setattr(recognisers, "_span", lambda at, step, end: (0, end))
            assert (got - align(image / 255, p, template)).abs().max() < 1e-4
    huge = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8).expand(1, 3, 20000, 20000)   # 4.8 GB, were it copied
    p = torch.from_numpy(points * 3 + 9000).float()[None]
    assert (align(huge, p, template) - 0.2).abs().max() < 1e-5


def test_what_was_judged_is_said(dlib, world, monkeypatch, capsys):
    colour = (world.image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    crop, word = find_face(colour, "dlib150", 64)
    assert word == "found" and (crop == crop_faces([colour], "dlib150", 64).images[0]).all()
    wall = np.full((90, 60, 3), 9, np.uint8)
    assert find_face(wall)[1] == "not found" and capsys.readouterr().err == ""
    monkeypatch.setattr(recognisers, "dlib_installed", lambda: False)
    assert [find_face(x)[1] for x in (wall, colour)] == ["not looked for"] * 2
    assert capsys.readouterr().err.count("no face detector") == 1


def test_small_grey_and_odd_pictures(dlib, world):
    cv2 = pytest.importorskip("cv2")
    colour = (world.image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    grey = cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(colour, (56, 56), interpolation=cv2.INTER_AREA)      # its face is too small for the detector
    odd = [np.zeros((1, 1), np.uint8), np.zeros((3, 2000, 3), np.uint8)]
    assert len(detect_faces(small).boxes) and not len(detect_faces(odd[0]).boxes)
    crops = crop_faces([colour, grey, small, np.dstack([colour, grey]), *odd])
    assert crops.method == ["dlib"] * 4 + ["none"] * 2 and crops.found.tolist() == [True] * 4 + [False] * 2
    assert crops.images.shape == (6, 3, 112, 112) and crops.images.isfinite().all()
    assert (crops.images[0] - crops.images[3]).abs().max() == 0             # a fourth channel is ignored
    with pytest.raises(TypeError, match="float64"):
        crop_faces([np.zeros((8, 8))])
    with pytest.raises(UserError, match="none were given"):
        crop_faces([])


def test_both_ways_into_arcfaces_frame_agree_on_scale(world):
    a, _ = similarity(five_points(world.landmarks), torch.from_numpy(TEMPLATES["arcface112"][1]).expand(8, 5, 2))
    b, _ = similarity(five_points(world.landmarks, "dlib"),
                      torch.from_numpy(TEMPLATES["dlib_arcface112"][1]).expand(8, 5, 2))
    assert 0.9 < (a.abs() / b.abs()).mean() < 1.1


def test_embedding_tells_people_apart(dlib, net, world):
    photos = list(world.image)
    e = embed(photos, batch=3)
    assert e.method == ["dlib"] * 8 and not e.vectors.requires_grad
    torch.testing.assert_close(e.vectors, embed(iter(photos)).vectors, rtol=0, atol=1e-5)
    distance = torch.cdist(e.vectors, e.vectors)
    person = torch.arange(8) // 2
    genuine = distance[torch.arange(0, 8, 2), torch.arange(1, 8, 2)]
    impostor = distance[person[:, None] != person]
    assert genuine.max() < DLIB_THRESHOLD and impostor.mean() > genuine.mean() + 0.1
    truth = net(align(world.image, five_points(world.landmarks, "dlib"), "dlib150"))
    assert (truth - e.vectors).norm(dim=1).max() < DLIB_THRESHOLD


def test_gradients_pass_through_embedding(dlib, world):
    photo = world.image[0].clone().requires_grad_()
    vectors = embed([photo, world.image[2]]).vectors
    (vectors[0] - vectors[1]).norm().backward()
    assert photo.grad.abs().max() > 0


def test_without_dlib_the_centre_stands_in(monkeypatch):
    recognisers._dlib_tools.cache_clear()
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(UserError, match=r'pip install "facebook_nb\[faces\]"'):
        detect_faces(np.zeros((9, 9, 3), np.uint8))
    picture = texture(0, 140, 2)[:, 14:126]                               # 112 wide, 140 high
    crops = crop_faces([picture], "dlib_arcface112")
    assert crops.method == ["none"] and not crops.found.any()
    assert (crops.images - as_tensor(picture[14:126])).abs().max() < 1e-3
    mean = embed([picture], lambda x: x.mean((2, 3)), "dlib_arcface112")
    assert mean.method == ["none"] and mean.vectors.shape == (1, 3)


# real faces, where there are some

def test_orl_faces_are_told_apart(dlib):
    folder = data_folder("orl_faces")
    paths = [folder / f"s{s}" / f"{k}.pgm" for s in range(1, 41, 2) for k in (1, 4, 7, 10)]
    e = embed(read_image(p, grey=True) for p in paths)
    found = torch.tensor([m == "dlib" for m in e.method])
    assert found.sum() >= 78
    distance, person = torch.cdist(e.vectors, e.vectors)[found][:, found], torch.arange(80)[found] // 4
    same = person[:, None] == person
    pairs = ~torch.eye(len(person), dtype=torch.bool)
    genuine, impostor = distance[same & pairs], distance[~same]
    assert (genuine[:, None] < impostor).float().mean() > 0.999              # area under the ROC curve
    assert abs(genuine.mean() - 0.31) < 0.03 and abs(impostor.mean() - 0.76) < 0.03


def test_portraits_as_dlib_would(dlib, net):
    paths = sorted(data_folder("portraits").glob("*.png"))[:8]
    runtime = dlib.face_recognition_model_v1(str(find_dlib_weights()))
    detector, predictor = recognisers._dlib_tools()
    for path in paths:
        picture = read_image(path)
        box = detector(picture, 1)[0]
        chip = dlib.get_face_chip(picture, predictor(picture, box))
        theirs = torch.tensor(list(runtime.compute_face_descriptor(chip)))
        points = torch.tensor([[(p.x, p.y) for p in predictor(picture, box).parts()]])
        mine = net(align(as_tensor(picture), points, "dlib150"))[0]
        assert (mine - theirs).norm() < 0.05                                 # same landmarks, our crop
        assert (embed([picture]).vectors[0] - theirs).norm() < 0.3           # our own choice of size as well
