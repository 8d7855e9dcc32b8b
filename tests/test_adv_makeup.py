"""Adv-Makeup: masks, pasting, gradients are exact; a run resumes; pictures get a note; full scale starts."""
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facebook_nb import adv_makeup as A
from facebook_nb.files import UserError, read_image, read_json, read_weights, write_image
from tests.conftest import data_folder

TINY = {"people": 5, "photos": 2, "lessons": 2, "strangers": 16, "sources": 2, "n_seeds": 1, "start": 2, "sets": 1,
        "iterations": 2, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def people():
    return A.render_portraits(4, 1, seed=5)


@pytest.fixture(scope="module")
def src(people):
    return A.make_sources(2 * people.images - 1, [A.orbit_68(p) for p in people.landmarks.numpy()], (40, 104), A.DROP)


def test_the_mask_lies_around_the_eyes_and_not_on_them(people, src):
    mask = A.frame_mask(src)[:, 0] > 0
    share = mask.float().mean((1, 2))
    assert ((share > 0.04) & (share < 0.11)).all()                  # the authors': 6.9 % of their pictures
    at = people.landmarks.round().long()
    for m, p in zip(mask, at):
        eyes = p[[*range(36, 48)]].view(2, 6, 2).float().mean(1).round().long()
        assert not m[eyes[:, 1], eyes[:, 0]].any()                  # on the eyeball
        under = p[[41, 46]]
        assert m[under[:, 1] + 5, under[:, 0]].all()                # under it


def test_pasting_is_bilinear_and_leaves_the_rest_alone(src):
    patch = torch.rand(4, 3, 40, 104) * 2 - 1
    faces, boxes = A.paste(src, patch)
    for i, (t, l, h, w) in enumerate(src.box.tolist()):
        m = src.mask[i, :, :h, :w]
        new = F.interpolate(patch[i:i + 1], (h, w), mode="bilinear")[0]
        theirs = src.faces[i].clone()
        theirs[:, t:t + h, l:l + w] = new * m + theirs[:, t:t + h, l:l + w] * (1 - m)
        torch.testing.assert_close(faces[i], theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(boxes[i, :, :h, :w], theirs[:, t:t + h, l:l + w], rtol=0, atol=1e-6)
        assert (boxes[i] * (1 - src.inside[i]) == 0).all()


@pytest.mark.parametrize("h, w", [(94, 253), (31, 97), (40, 104), (41, 103), (155, 417), (8, 9)])
def test_the_weights_of_pasting_are_those_of_interpolate(h, w):
    x = torch.rand(1, 3, 40, 104) * 2 - 1
    (rows,), (cols,) = A._weights([h], h, 40), A._weights([w], w, 104)
    torch.testing.assert_close(rows @ x @ cols.T, F.interpolate(x, (h, w), mode="bilinear"), rtol=0, atol=1e-6)
    assert (A._weights([h, 5], h + 3, 40)[1, 5:] == 0).all()


def test_a_residual_keeps_the_skin_where_nothing_was_painted(src, people):
    same, _ = A.paste(src, src.crops, True)
    assert torch.equal(same, src.faces)
    lighter, _ = A.paste(src, src.crops + 0.2, True)
    change, mask = (lighter - src.faces), A.frame_mask(src)
    torch.testing.assert_close(change, (0.2 * mask).expand_as(change).minimum(1 - src.faces), rtol=0, atol=1e-5)
    soft = A.make_sources(src.faces, [A.orbit_68(p) for p in people.landmarks.numpy()], (40, 104), A.DROP, 1.5)
    assert ((soft.mask >= 0) & (soft.mask <= src.mask)).all() and soft.mask.max() == 1
    inner = ((soft.mask > 0) & (soft.mask < 0.9)).float().mean() / src.mask.mean()
    assert 0.1 < inner < 0.7                                        # it fades, inwards


@pytest.mark.parametrize("spoil, what", [
    (lambda p: np.full((68, 2), 75.0), "no width"), (lambda p: p * 0, "no width"),
    (lambda p: p[[*range(36), *range(42, 48), *range(36, 42), *range(48, 68)]], "swap their numbers"),
    (lambda p: p * [-1, 1] + [150, 0], "swap their numbers"), (lambda p: p * [1, -1] + [0, 150], "upright")])
def test_landmarks_that_are_no_upright_face_are_told(people, spoil, what):
    with pytest.raises(UserError, match=what):
        A.orbital_mask(A.orbit_68(spoil(people.landmarks[0].numpy())), 10)


def literal(G, src, aims, crew, eta):
    """Equations inner and identity, line by line."""
    rows, total = torch.arange(len(src.faces)), []
    for k in crew.steps:
        loss = aims[k](A.paste(src, G(src.crops))[0], rows).mean()
        step = torch.autograd.grad(loss, G.weights, retain_graph=True)
        faces, _ = A.paste(src, G(src.crops, [w - eta * g for w, g in zip(G.weights, step)]))
        total += [loss, torch.stack([aims[j](faces, rows).mean() for j in crew.judges]).mean()]
    return torch.stack(total).mean()


@pytest.mark.parametrize("crew", [A.Crew(["a", "b"], ["c"]), A.Crew(["a"], ["b", "c"]), A.Crew(["c", "b"], ["a"])])
def test_the_fast_identity_gradient_is_the_literal_one(src, crew):
    torch.manual_seed(0)
    G = A.Generator(4).train()
    some = src.rows(slice(0, 3))
    enrolled = torch.rand(3, 3, 150, 150) * 2 - 1
    aims = {n: A.aim(lambda x, k=k: F.avg_pool2d(x, k).flatten(1), enrolled, dodge=n == "b")
            for n, k in zip("abc", (25, 30, 50))}
    slow = literal(G, some, aims, crew, 0.05)
    theirs = torch.autograd.grad(slow, G.weights)
    mine, value = A.identity_gradient(G, some, torch.arange(3), A.paste(some, G(some.crops))[0], aims, crew, 0.05)
    assert abs(value - slow.item()) < 1e-5
    largest = max(g.abs().max() for g in theirs)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(largest))


def test_channels_last_changes_nothing(src):
    """But for rounding: in double precision nothing is left of it."""
    crops = src.crops.double()
    for width in (1, 2, 3, 8):
        torch.manual_seed(0)
        G = A.Generator(width).double().train()
        mine = G(crops)
        assert crops.is_contiguous(memory_format=torch.channels_last)
        theirs = G(crops.contiguous())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), G.weights)])
                for y in (mine, theirs))
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_recognisers_get_no_gradient_and_each_is_held_out_in_turn():
    assert [A.split(list("abc"), t).judges[0] for t in range(3)] == list("abc")
    assert A.split(list("abcd"), 1, official=True) == (["c", "d"], ["a", "b"])
    assert A.split(list("abc"), 1, official=True) == (["c", "a"], ["b"])
    assert A.split(["a"], 3) == (["a"], [])                        # with one surrogate there is no meta-learning
    net = A.SmallRecogniser("squeeze").eval().requires_grad_(False)
    loss = A.aim(net, torch.zeros(1, 3, 150, 150))
    x = torch.rand(2, 3, 150, 150, requires_grad=True)
    loss(x, torch.arange(2)).sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in net.parameters())


def test_attacks_stay_in_their_mask_and_bound(src):
    mask, rows = A.frame_mask(src), torch.arange(4)
    aims = {"a": A.aim(lambda x: F.avg_pool2d(x, 25).flatten(1), torch.rand(1, 3, 150, 150))}
    clean = A.rounded(src.faces)
    before = aims["a"](clean, rows)
    for name, how in A.ATTACKS.items():
        x = A.gradient_attack(clean, rows, aims, mask, 16 / 255, 4, seed=1, **how)
        assert ((x - clean) * (1 - mask)).abs().max() < 1e-6, name
        assert (x - clean).abs().max() <= 32 / 255 + 1 / 127.5 and x.abs().max() <= 1, name
        assert (aims["a"](x, rows) < before).all(), name
        again = A.gradient_attack(clean, rows, aims, mask, 16 / 255, 4, seed=1, **how)
        assert torch.equal(x, again)
    for epsilon in (8, -0.1):
        with pytest.raises(UserError, match="8/255"):
            A.gradient_attack(clean, rows, aims, mask, epsilon)
    shapes = set()                                                  # no square is taken for granted
    wide = {"a": lambda x, rows: shapes.add(tuple(x.shape[2:])) or x.mean((1, 2, 3))}
    A.gradient_attack(clean[..., :120], rows, wide, mask[..., :120], 8 / 255, 8, **A.ATTACKS["TI-DIM"])
    assert shapes == {(150, 120)}


def test_a_turned_change_is_as_visible_and_attacks_nobody(src):
    aims = {"a": A.aim(lambda x: F.avg_pool2d(x, 25).flatten(1), torch.rand(1, 3, 150, 150))}
    old, rows = A.rounded(src.faces), torch.arange(4)
    new = A.gradient_attack(old, rows, aims, A.frame_mask(src), 16 / 255, 4)
    level = A.ssim(old, new)
    other = A.turned(old, new, level)
    assert (A.ssim(old, other) - level).abs().max() < 0.01
    assert (aims["a"](new, rows) < aims["a"](old, rows)).all() and (aims["a"](other, rows) > aims["a"](old, rows)).all()


def test_thresholds_need_two_people(people):
    with pytest.raises(UserError, match="one person"):
        A.calibrate(A.Recogniser(lambda x: F.avg_pool2d(x, 25).flatten(1)), people._replace(person=0 * people.person))


def test_wearables_have_the_area_asked_for(people):
    seen = [A.wearable(kind, people.landmarks[0].numpy(), 1500) for kind in A.WEARABLES]
    assert [w.sum() for w in seen] == [1500] * 3
    eyes = people.landmarks[0, 36:48].view(2, 6, 2).mean(1).round().long()
    assert not any(w[y, x] for w in seen for x, y in eyes.tolist())


def test_ssim_and_the_scaling_to_it():
    x = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    assert (A.ssim(x, x) - 1).abs().max() < 1e-5 and (A.ssim(x, y) < 0.95).all()
    k = torch.exp(-torch.arange(-5, 6).double().square() / 4.5)
    k = torch.outer(k, k) / k.sum() ** 2
    blur = lambda v: F.conv2d(v.double(), k.expand(3, 1, 11, 11), groups=3)
    a, b = (x.double() + 1) / 2, (y.double() + 1) / 2               # the definition, window by window
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    theirs = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    torch.testing.assert_close(A.ssim(x, y).double(), theirs.mean((1, 2, 3)), rtol=0, atol=1e-5)
    level = torch.tensor([0.97, 0.9, 0.0])
    z = A.at_visibility(x, y, level)
    got = A.ssim(x, z)
    assert (got[:2] - level[:2]).abs().max() < 0.01 and torch.allclose(z[2], A.rounded(y)[2])


def test_poisson_blending_keeps_gradients_and_takes_the_colours_of_the_place():
    rng = np.random.default_rng(0)
    old = rng.integers(60, 120, (20, 30, 3)).astype(np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 6:25] = True
    assert abs(A.poisson_blend(old + 70, old, mask).astype(int) - old).max() <= 1
    assert (A.poisson_blend(old, old, np.zeros_like(mask)) == old).all()
    full = A.poisson_blend(255 - old, old, np.ones_like(mask))      # a mask up to the border keeps the border
    assert (full[0] == old[0]).all() and (full[:, -1] == old[:, -1]).all()


def test_poisson_faces_forget_how_bright_the_paint_was(src):
    dim, bright = (A.poisson_faces(src, 0.5 * src.crops + b) for b in (0.0, 0.3))
    assert (dim - bright).abs().max() <= 3 / 127.5
    mask = A.frame_mask(src)
    assert ((dim - A.rounded(src.faces)) * (1 - mask)).abs().max() < 1e-6
    assert (dim - A.rounded(src.faces)).abs().max() > 0.05


def test_the_loop_learns_and_repeats(src):
    def train():
        torch.manual_seed(0)
        G, D = A.Generator(4), A.Discriminator(4)
        aims = {n: A.aim(lambda x, k=k: F.avg_pool2d(x, k).flatten(1), -src.faces[:1])
                for n, k in zip("abc", (25, 30, 50))}
        log = A.train_generator(G, D, src, A.paint_shadow(src, 0), aims, A.Style(2), A.Weights(1, 20, 1, .1, .1), 16, 2,
                                5e-3, 1e-2, drops=(14,), seed=3)
        return log, A.synthesise(G, src)
    log, faces = train()
    assert log["identity"][-4:].mean() < log["identity"][:4].mean()
    assert ((faces - A.rounded(src.faces)) * (1 - A.frame_mask(src))).abs().max() < 1e-6
    again = train()
    assert torch.equal(faces, again[1]) and all((log[k] == again[0][k]).all() for k in log)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("dlib")
    folder = tmp_path_factory.mktemp("run")
    config = A.Config.preset("smoke", out_dir=folder, **TINY)
    return config, A.run(config)


def test_a_run_leaves_its_numbers_and_resumes(finished):
    config, report = finished
    first = report.as_dict()
    steps = sorted((config.out_dir / "steps").rglob("*.npz"))
    assert len(steps) == 3 + 2 + len(A.KINDS)
    (config.out_dir / "steps" / "seed0" / "plain.npz").unlink()
    again = A.run(config).as_dict()
    for row in (A.OURS, "TI-DIM, turned", "FGSM, ε 8/255", "gradients"):
        for column, x in first["metrics"][row].items():
            assert x["values"] == again["metrics"][row][column]["values"] or np.isnan(x["mean"]), (row, column)
    rows = report.metrics
    visible = [rows[r]["SSIM"][0] for r in A.EQUAL]
    assert max(visible) - min(visible) < 0.03                       # equal visibility, or less
    assert len(report.findings) == 5 and len(report.mechanism) == 3 and report.roles[A.CEILING] == "ceiling"
    assert abs(rows["defence: none"]["victim"][0] - rows[A.OURS]["victim"][0]) < 1e-5
    assert report.arrays["cosine"].shape == (1, 5, 5) and (np.diagonal(report.arrays["cosine"][0]) > 0.999).all()
    assert (config.out_dir / "weights.safetensors").stat().st_size < 1.5e6


def test_apply_does_the_others_when_one_is_damaged(finished, tmp_path, people):
    for i in (0, 1):
        x = (255 * people.images[i]).round().byte().permute(1, 2, 0).numpy()
        write_image(tmp_path / f"{i}.png", np.pad(x, ((40, 40), (40, 40), (0, 0)), mode="edge"))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG cut off")
    weights = finished[0].out_dir / "weights.safetensors"
    rows = A.apply([tmp_path / "0.png", tmp_path / "cut.png", tmp_path / "1.png"], weights, tmp_path / "out", 2)
    assert len(rows) == 2 and "error" in rows[1] and [*rows[0]][:2] == ["input", "weights"]
    assert {"similarity_before", "similarity_after", "threshold", "output", "note"} < set(rows[0])
    assert rows[0]["face"] == "found"
    assert read_json(tmp_path / "out" / "results.json") == rows
    picture = read_image(tmp_path / "out" / rows[0]["output"])
    assert picture.shape == (334, 900, 3)
    band = picture[300:].astype(int)
    assert (band[..., 0] - band[..., 1]).max() > 100                # the note is there, in red
    bad = A.apply([tmp_path / "0.png", tmp_path / "cut.png"], weights, tmp_path / "out2", 2)
    assert "target" in bad[0]["error"] and read_json(tmp_path / "out2" / "results.json") == bad
    grey = np.full((200, 200, 3), 128, np.uint8)
    row, = A.apply([grey, read_image(tmp_path / "1.png")], weights, None, 2)     # arrays will do
    assert row["face"] == "not found" and "similarity_after" not in row
    with pytest.raises(UserError, match="TARGET"):
        A.apply([tmp_path / "0.png"], weights)


def test_apply_without_dlib_says_who_judged(finished, tmp_path, people, monkeypatch):
    def missing():
        raise UserError("dlib: not installed")
    monkeypatch.setattr(A, "judge", missing)
    monkeypatch.setattr(A, "dlib_installed", lambda: False)
    x = (255 * people.images[:2]).round().byte().permute(0, 2, 3, 1).numpy()
    for i in (0, 1):
        write_image(tmp_path / f"{i}.png", x[i])
    row, = A.apply([tmp_path / "0.png", tmp_path / "1.png"], finished[0].out_dir / "weights.safetensors", None, 1)
    assert row["judge"] == A.KINDRED and row["output"] is None
    kept = read_weights(finished[0].out_dir / "weights.safetensors")[f"threshold.{A.KINDRED}"]
    assert row["threshold"] == pytest.approx(float(kept), abs=1e-3)


# --- the paper's data

def released(root, n=2):
    """A tiny set in the released layout."""
    rng, table = np.random.default_rng(0), {}
    stored = np.load("tests/parity/data/adv_makeup/cases.npz")
    for folder in A.PARTS.values():
        (root / "Datasets_Makeup" / folder).mkdir(parents=True)
        for i in range(n):
            name = f"{i:05d}.jpg"
            write_image(root / "Datasets_Makeup" / folder / name, rng.integers(0, 256, (300, 300, 3)).astype(np.uint8))
            if "target" not in folder:
                table[f"{folder}/{name}"] = stored[f"landmarks/{i % 2}"]
    with (root / "Datasets_Makeup" / "landmark_aligned_600.pk").open("wb") as file:
        pickle.dump(table, file)


def test_the_released_set_is_read(tmp_path):
    released(tmp_path)
    found = A.read_makeup(tmp_path)
    assert [len(found.files[k]) for k in A.PARTS] == [2, 2, 2] and not found.problems
    assert A.check_data(tmp_path).usable
    assert found.orbit(found.files["before"][0]).box.shape == (17, 2)
    write_image(tmp_path / "Datasets_Makeup" / A.PARTS["before"] / "more.jpg", np.zeros((9, 9, 3), np.uint8))
    found = A.check_data(tmp_path / "Datasets_Makeup")
    assert found.usable and "1 pictures without landmarks" in str(found)


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_landmark_file_cannot_run_code(tmp_path, capsys):
    for content in (pickle.dumps({"a": Runs()}), b"cut", pickle.dumps([1]), pickle.dumps({"a": np.zeros((68, 2))})):
        (tmp_path / "x.pk").write_bytes(content)
        with pytest.raises(UserError, match="x.pk"):
            A.read_landmarks(tmp_path / "x.pk")
    assert capsys.readouterr().out == ""


def test_full_lists_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="data_root"):
        A.run(A.Config.preset("full"))
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="before_aligned_600.*ir152.pth.*vgg16.pth.*lfw"):
        A.run(A.Config.preset("full", data_root=tmp_path))
    with pytest.raises(UserError, match="victim"):
        A.run(A.Config.preset("full", data_root=tmp_path, victim="other"))


class Pooled(torch.nn.Module):                                      # in place of networks of 70 million weights
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        return F.avg_pool2d(x, self.k).flatten(1)


def stand_ins():
    """In place of the released networks, for this process."""
    sides = {"ir152": 16, "irse50": 28, "mobile_face": 14, "facenet": 20}
    A.load_official = lambda path, name: A.Style(2) if name == "vgg16" else Pooled(sides[name])


def tiny_full(root):
    """The released set and stand-ins' files below root; the settings of a run."""
    released(root)
    (root / "models").mkdir()
    for name in (*A.RECOGNISERS, "vgg16"):
        (root / "models" / f"{name}.pth").touch()
    rng = np.random.default_rng(1)
    for i in range(46):                                             # 1,035 pairs support a FAR of 0.001
        write_image(root / "lfw" / f"p{i}" / "0.png", rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    return dict(data_root=root, width=2, side=(32, 84), iterations=2, batch_size=2)


def test_full_runs_on_tiny_files(tmp_path, monkeypatch):
    monkeypatch.setattr(A, "load_official", A.load_official)        # given back afterwards
    stand_ins()
    config = A.Config.preset("full", out_dir=tmp_path / "out", targets=1, **tiny_full(tmp_path))
    report = A.run(config)
    assert set(report.metrics) == {"clean", A.OURS}
    assert all(0 <= v[0] <= 1 for row in report.metrics.values() for v in row.values())
    assert report.claim.unit == "points" and (tmp_path / "out" / "steps" / "targets.npz").exists()


def test_a_folder_of_pictures_is_checked(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        A.check_data(tmp_path / "none")
    for i in range(8):
        write_image(tmp_path / f"{i}.png", np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes(b"no")
    found = A.check_data(tmp_path)
    assert found.usable and "cut.png" in str(found) and "8 pictures of 8 people" in str(found)
    for i in range(8):                                              # one folder is one person
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / f"{i}.png").rename(tmp_path / "one" / f"{i}.png")
    found = A.check_data(tmp_path)
    assert not found.usable and "3 pictures of 1 people" in str(found)      # no more than three photos of a person


def people_of(root, people, photos=2):
    """Rendered faces as PERSON/PHOTO.png, a damaged one among them, and one picture of a person without a folder."""
    for i in range(people.images.shape[0]):
        x = (255 * people.images[i]).round().byte().permute(1, 2, 0).numpy()
        name = f"p{i // photos}/{i % photos}.png" if i // photos else f"alone{i}.png"
        write_image(root / name, np.pad(x, ((40, 40), (40, 40), (0, 0)), mode="edge"))
    (root / "p1" / "cut.png").write_bytes(b"no")


def test_people_in_folders_are_enrolled_with_another_photo(tmp_path):
    pytest.importorskip("dlib")
    people_of(tmp_path, A.render_portraits(8, 2, seed=31))
    p = A.folder_portraits(tmp_path)
    counts = torch.bincount(p.person).tolist()
    assert sum(counts) >= 14 and max(counts) == 2 and counts[0] == 1        # what lies in the folder itself comes alone
    config = A.Config.preset("smoke", data_root=tmp_path, sources=2)
    c = A.cast(config, 0)
    assert c["images"].shape == c["enrolled"].shape == (4, 3, 150, 150)
    mirrored = [torch.equal(e, (2 * x - 1).flip(2)) for e, x in zip(c["enrolled"], c["images"])]
    who = [next(i for i, y in enumerate(p.images) if torch.equal(x, y)) for x in c["images"]]
    people = p.person[who].tolist()
    assert mirrored == [counts[i] == 1 for i in people] and len(set(people)) == 4
    marks = A.calibrate(A.judge(), p)
    assert marks["AUC"] > 0.9                                       # there are genuine pairs now
    with pytest.raises(UserError, match="at least 7"):
        A.folder_portraits(tmp_path / "p1")


def test_a_run_on_a_folder_of_people_ends(tmp_path):
    pytest.importorskip("dlib")
    people_of(tmp_path / "in", A.render_portraits(8, 2, seed=31))
    report = A.run(A.Config.preset("smoke", data_root=tmp_path / "in", out_dir=tmp_path / "out", **TINY))
    assert report.mean("recogniser: dlib", "AUC") > 0.9
    assert np.isfinite(report.mean(A.OURS, "dlib"))


def test_portraits_take_the_place_of_the_rendered(tmp_path):
    pytest.importorskip("dlib")
    root = data_folder("portraits")
    config = A.Config.preset("smoke", data_root=root, sources=2)
    c = A.cast(config, 0)
    assert c["images"].shape == (4, 3, 150, 150) and c["target"].shape == (1, 3, 150, 150)
    eyes = c["landmarks"][:, 36:48].view(-1, 2, 6, 2).mean(2)
    assert (eyes[:, 1, 0] - eyes[:, 0, 0] > 40).all() and ((eyes[..., 1] > 30) & (eyes[..., 1] < 70)).all()


def test_a_face_at_the_edge_keeps_what_is_in_the_picture(people):
    faces, points = 2 * people.images[:1] - 1, people.landmarks[0].numpy()
    high, wide = faces.shape[2:]
    for shift in ((-40, 0), (60, 0), (0, -50), (0, 90)):
        s = A.make_sources(faces, [A.orbit_68(points + shift)], (40, 104), A.DROP)
        t, left, h, w = s.box[0].tolist()
        assert t >= 0 and left >= 0 and t + h <= high and left + w <= wide and s.mask.shape[2:] == (h, w)
        patch = torch.full((1, 3, 40, 104), 0.5)
        assert (A.paste(s, patch)[0] != faces).any().item() == bool(s.mask.any())
    with pytest.raises(UserError, match="outside of the picture"):
        A.make_sources(faces, [A.orbit_68(points + [500, 0])], (40, 104), A.DROP)
