"""Local relations: forgeries with true masks, readers of the public formats, the experiment, apply, and full scale."""
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from facebook_nb import local_relation as L
from facebook_nb.files import UserError, read_image, read_json, write_image, write_json, write_weights
from facebook_nb.models import recognisers
from facebook_nb.readers import forgery as R
from facebook_nb.seeding import generator
from facebook_nb.worlds import forgery as W
from tests.conftest import data_folder


@pytest.fixture(scope="module")
def clips():
    return W.render_clips(6, 2, seed=3)


@pytest.fixture(scope="module")
def forgeries(clips):
    return W.make_set(clips, 0, real=2)


# --- the world

@pytest.mark.parametrize("kind", W.MANIPULATIONS)
def test_a_forgery_changes_its_mask_and_nothing_else(clips, kind):
    g = generator(0, "test")
    u, other = torch.rand(len(clips), 16, generator=g), torch.arange(len(clips)).roll(2)
    make = lambda: W.forge(kind, clips.images, clips.points, clips.images[other], clips.points[other], u,
                           generator(1, "noise"))
    y, mask = make()
    change = (y - clips.images).abs()
    assert (change * (mask == 0)).max() == 0
    assert ((change * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)) > 2e-3).all()
    share = mask.mean((1, 2, 3))
    assert (share > 0.005).all() and (share < 0.6).all() and mask.max() <= 1
    assert torch.equal(y, make()[0])
    with pytest.raises(UserError, match="swap"):
        W.forge("morph", clips.images, clips.points, clips.images, clips.points, u, g)


def test_most_real_pictures_are_processed_all_over(clips):
    x = clips.images[:1].expand(400, -1, -1, -1)
    u = torch.rand(400, 16, generator=generator(0, "u"))
    y = W.honest(x, u, generator(0, "g"))
    changed = ((y - x).abs() > 0.5 / 255).float().mean((1, 2, 3))
    assert 0.6 < (changed > 0).float().mean() < 0.8
    assert changed[changed > 0].median() > 0.3
    corner = (y - x).abs()[:, :, :16, :16].amax((1, 2, 3))
    assert (corner[changed > 0] > 0).all()


def test_the_spline_brings_points_to_their_targets(clips):
    # a white dot on the landmark arrives at the target
    p = clips.points[:1, W.CONTROL]
    target = p + torch.tensor([3.0, -2.0])
    target[:, 5] += 2.0
    for k in (0, 5, 12):
        x = torch.zeros(1, 1, 64, 64)
        at = p[0, k].round().long().clamp(2, 61)
        x[0, 0, at[1] - 1:at[1] + 2, at[0] - 1:at[0] + 2] = 1
        y = W.spline_warp(x, p, target)[0, 0]
        place = (W._pixels(64, 64) * y.reshape(-1, 1)).sum(0) / y.sum()
        assert (place - target[0, k]).norm() < 1.2


def test_a_set_is_reproducible_and_keeps_people_apart(clips, forgeries):
    again = W.make_set(clips, 0, real=2)
    assert torch.equal(forgeries.images, again.images) and torch.equal(forgeries.masks, again.masks)
    assert not torch.equal(forgeries.images, W.make_set(clips, 1, real=2).images)
    real = forgeries.kind == 0
    assert not forgeries.masks[real].any() and forgeries.masks[~real].flatten(1).any(1).all()
    for c in forgeries.clip.unique():
        at = forgeries.clip == c
        assert len(forgeries.kind[at].unique()) == len(forgeries.source[at].unique()) == 1
    some = clips.of([4, 1])
    assert torch.equal(some.images[:2], clips.images[8:10]) and some.clip.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="two people"):
        W.make_set(clips.of([0]), 0)


def test_h264_compresses_clips_apart(forgeries):
    x, clip = forgeries.images[:8], forgeries.clip[:8]
    error = [(W.h264(x, clip, crf).float() - x.float()).square().mean().item() for crf in (None, 10, 23, 40)]
    assert error[0] == 0 and 0 < error[1] < error[2] < error[3]
    # a clip is not predicted from the one before: after another one it is no worse than alone
    loss = lambda y: (y.float() - x[4:6].float()).square().mean().item()
    assert loss(W.h264(x, clip, 40)[4:6]) < 1.5 * loss(W.h264(x[4:6], clip[4:6], 40))


def test_h264_repeats_itself():
    """With its macroblock tree x264 does not, from one call to the next."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(60, 3, 16, 16, generator=g), (64, 64), mode="bicubic") * 255
    x = (x + 8 * torch.randn(x.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    once, *more = (W.h264(x.repeat(3, 1, 1, 1), torch.arange(180) // 3, 23) for _ in range(6))
    assert all(torch.equal(once, again) for again in more)


def test_photographs_are_cut_as_faces_are_rendered():
    paths = sorted(data_folder("portraits").glob("*.png"))[:4]
    real = W.photo_clips([read_image(p) for p in paths], 64)
    assert len(real) == 4 and real.images.shape[1:] == (3, 64, 64)
    made = W.render_clips(6, 1, seed=1)
    for k in (30, 36, 45, 8):                               # nose, eyes, chin: at most a few pixels apart
        assert (real.points[:, k].mean(0) - made.points[:, k].mean(0)).norm() < 8
    W.make_set(real, 0)
    assert W.photo_clips([read_image(p) for p in paths], 64, [3, 3, 7, 8]).clip.tolist() == [0, 0, 1, 2]


# --- the method

def test_similarities_are_exact_and_finite():
    f = torch.randn(3, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    s = L.patch_similarity(f, 4)
    p = f.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, -1)
    literal = (1 + torch.nn.functional.cosine_similarity(p[:, :, None], p[:, None], dim=-1)) / 2
    torch.testing.assert_close(s, literal)
    w = torch.randn_like(s)
    torch.testing.assert_close(torch.autograd.grad((s * w).sum(), f, retain_graph=True),
                               torch.autograd.grad((literal * w).sum(), f))
    z = torch.zeros(1, 2, 8, 8, requires_grad=True)
    L.patch_similarity(z, 4).sum().backward()
    assert z.grad.isfinite().all()
    for n in (3, 0, (2, 3)):
        with pytest.raises(UserError, match="8×8"):
            L.patch_similarity(f, n)


def test_the_frequency_view_is_a_projection():
    g = torch.rand(2, 48, 64, generator=torch.Generator().manual_seed(0)) * 255
    h = L.high_pass(g)
    torch.testing.assert_close(L.high_pass(h), h, atol=1e-3, rtol=0)                  # twice is once
    torch.testing.assert_close((h * (g - h)).sum() / (g * g).sum(), torch.tensor(0.), atol=1e-5, rtol=0)
    assert L.high_pass(torch.full((1, 64, 64), 99.)).abs().max() < 1e-3
    rows, columns = L.dct_basis(48), L.dct_basis(64)        # as the equation stands, both matrices whole
    whole = rows.T @ ((rows @ g @ columns.T) * L.kept_frequencies(48, 64)) @ columns
    torch.testing.assert_close(h, whole, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="centred"):
        L.views(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), scale="own")


def test_values_outside_of_their_range_are_refused():
    with pytest.raises(UserError, match="uint8 in 0..255"):
        L.views(torch.rand(1, 3, 16, 16))
    with pytest.raises(UserError, match="alpha: 33"):
        L.high_pass(torch.rand(1, 16, 16), 33)
    for mask in (255 * torch.eye(8)[None, None], -torch.eye(8)[None, None], torch.eye(8, dtype=torch.uint8)[None]):
        with pytest.raises(UserError, match="divide by 255"):
            L.target_similarity(mask, 4)


def test_views_and_similarities_stay_exact_under_autocast():
    g, f = torch.rand(2, 64, 64) * 255, torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        h, s = L.high_pass(g), L.patch_similarity(f, 4)
    assert torch.equal(h, L.high_pass(g)) and torch.equal(s, L.patch_similarity(f, 4))
    assert (L.patch_similarity(f.bfloat16(), 4) - s).abs().max() < 0.01


def test_a_row_is_the_network_without_some_parts(forgeries):
    config = L.Config.preset("smoke")
    counts = {}
    for name, row in L.ROWS.items():
        torch.manual_seed(0)
        net = L.build(config, row)
        out = net(*L.views(forgeries.images[:4]))
        lam = [10. * row.target, 1. * row.mask]
        L.losses(out, torch.tensor([0, 1, 0, 1]), forgeries.masks[:4].float() / 255, 4, *lam)["loss"].backward()
        unused = {k.split(".")[0] for k, p in net.named_parameters() if p.grad is None or not p.grad.any()}
        assert not unused, name
        counts[name] = sum(p.numel() for p in net.parameters())
    assert counts[L.COLOUR] < counts[L.NO_RFAM] < counts[L.FULL]
    assert counts[L.NO_TARGET] == counts[L.FULL]            # what supervises adds no part


def test_agreement_is_within_each_picture():
    t = L.target_similarity((torch.rand(3, 1, 64, 64, generator=generator(0, "t")) > .5).float(), 4)
    t[2] = 1                                                # a real picture: nothing to agree with
    r = L.agreement(torch.stack([.3 * t[0] + .5, 1 - t[1], t[0]]), t)
    torch.testing.assert_close(r[:2], torch.tensor([1., -1.]), atol=1e-4, rtol=0)
    assert r[2].isnan()


def test_half_of_the_clips_are_compressed(forgeries):
    made = L.compressed(forgeries, 0)
    assert torch.equal(made.images, L.compressed(forgeries, 0).images) and torch.equal(made.masks, forgeries.masks)
    changed = (made.images != forgeries.images).flatten(1).any(1)
    assert .2 < changed.float().mean() < .8
    assert all(len(changed[forgeries.clip == c].unique()) == 1 for c in forgeries.clip.unique())


def test_pairs_hold_a_forgery_and_its_frame(clips):
    data = W.make_set(clips, 0, real=4)
    pairs = L.Pairs(data, ["swap", "neural"], 0)
    order = pairs.order(3)
    a, b = order[::2], order[1::2]
    assert len(a) == 2 * len(clips) == len(a.unique())
    assert {*data.kind[a].tolist()} == {1, 4} and not data.kind[b].any()
    assert torch.equal(data.source[a], data.source[b]) and torch.equal(a % len(clips), b % len(clips))
    assert torch.equal(order, pairs.order(3)) and not torch.equal(order, pairs.order(4))
    label = pairs.data[2]
    assert label[a].all() and not label[b].any()


def test_measures_by_hand():
    s, forged = np.array([.1, .6, .4, .9]), np.array([False, False, True, True])
    m = L.measures(s, forged)
    assert m["AUC"] == 75 and m["ACC"] == 50 and m["EER"] == 50
    video, first = L.by_video(np.array([.2, .4, .9, .7]), np.array([5, 5, 2, 2]))
    np.testing.assert_allclose(video, [.8, .3])
    assert first.tolist() == [2, 0]
    kind, clip = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 2])
    one = L.one_manipulation(np.array([.3, .1, .2, .9, 0, 0]), kind, clip, "swap")
    assert one["AUC"] == 75 and one["video AUC"] == 100
    rows = L.row_metrics({"swap": [np.array([.3, .1, .2, .9, .0, .9] + [.5] * 4)] * 3},
                         np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), np.arange(10) // 2)
    assert rows["unseen AUC"] == rows["unseen swap"] == 75 and rows["seen AUC c30"] != rows["unseen AUC c30"]


@pytest.mark.parametrize("ours, verdict", [
    ([80, 81, 79], "shown"), ([90, 60, 80], "undecided"), ([71, 71.1, 71], "undecided"), ([60, 61, 59], "refuted"),
    ([70.1, 70.2, 70.1], "refuted"), ([80], "undecided")])
def test_the_claim_needs_an_interval_above_a_point(ours, verdict):
    numbers = {row: {f"unseen AUC{end}": [70.] * len(ours) for end in ("", " c30")} for row in L.ROWS}
    numbers[L.FULL] = {k: ours for k in numbers[L.FULL]}
    claim, findings = L.judge_claim(numbers)
    assert claim.verdict == verdict and len(findings) == len(L.FINDINGS)


def test_a_folder_is_a_person(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "c.png", "d.png"):
        write_image(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    assert sorted(map(len, L.photographed(tmp_path))) == [1, 1, 1, 2]
    paths = sorted(data_folder("portraits").glob("*.png"))[:5]
    for k, path in enumerate(paths):
        write_image(tmp_path / "people" / str(k % 3) / path.name, read_image(path))
    with pytest.raises(UserError, match="faces of 3 people; at least 6"):
        L.faces_of_people(tmp_path / "people", 9, 3, 64, 0)


# --- files in the public formats

def film(path, pictures):
    """A video without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "bgr0"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


class Detector:
    """A face in the middle of every picture."""

    def __init__(self, centres=((64, 60),)):
        mean = torch.tensor([[80., 50], [70, 50], [44, 50], [54, 50], [62, 75]])
        self.points = torch.stack([mean + torch.tensor(c, dtype=torch.float32) - torch.tensor([62., 60])
                                   for c in centres])

    def __call__(self, picture):
        return self


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """FaceForensics++ as released, in miniature: two pairs, two methods, three frames each."""
    root = tmp_path_factory.mktemp("ff")
    pictures = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    for split, pairs in (("train", [["000", "001"]]), ("val", [["002", "003"]]), ("test", [["004", "005"]])):
        write_json(root / "splits" / f"{split}.json", pairs)
        for a, b in pairs:
            for x in (a, b):
                film(root / "original_sequences/youtube/c23/videos" / f"{x}.mp4", pictures)
            for method in ("Deepfakes", "FaceSwap"):
                base = root / "manipulated_sequences" / method
                for name in (f"{a}_{b}", f"{b}_{a}"):
                    film(base / "c23/videos" / f"{name}.mp4", 255 - pictures)
                    mask = np.zeros_like(pictures)
                    mask[:, 60:90, 50:80] = 255
                    film(base / "masks/videos" / f"{name}.mp4", mask)
    return root


def test_faceforensics_is_read_by_its_splits(release):
    found = R.read_faceforensics(release, "test", methods=("Deepfakes", "FaceSwap"))
    assert [v.name for v in found.videos if not v.label] == ["real/004", "real/005"]
    assert {v.name for v in found.videos if v.method == "FaceSwap"} == {"FaceSwap/004_005", "FaceSwap/005_004"}
    assert found.usable and found.with_masks() is found and all(v.masks for v in found.videos if v.label)
    everything = R.read_forgeries(release, "train")
    assert len(everything.missing) == 4                     # Face2Face and NeuralTextures, listed but not there
    assert "4 listed but not there" in str(everything)
    with pytest.raises(UserError, match="splits"):
        R.read_faceforensics(release, "dev")


def test_a_missing_mask_is_an_error_with_a_count(release, tmp_path):
    found = R.read_forgeries(release, "train")
    found.videos = [replace(v, masks=None) if v.method == "FaceSwap" else v for v in found.videos]
    with pytest.raises(UserError, match="2 of 4 forged videos have no mask, first FaceSwap/000_001"):
        found.with_masks()
    assert "2 forged videos without a mask" in str(found)


def test_a_damaged_video_is_reported_and_skipped(release, tmp_path):
    found = R.read_forgeries(release, "test")
    broken = tmp_path / "004.mp4"
    broken.write_bytes(found.videos[0].frames.read_bytes()[:300])
    found.videos[0] = replace(found.videos[0], frames=broken)
    skipped = R.crop_all(found, tmp_path / "faces", "test", 2, 64, Detector())
    assert len(skipped) == 1 and skipped[0].startswith("real/004: ")
    again = R.read_forgeries(tmp_path / "faces/test.json", "test")
    assert len(again) == 5 and not again.missing
    frames = R.FaceFrames(again.with_masks(), 32, 64)
    images, masks, label = frames.batch(range(len(frames)))
    assert images.shape == (10, 64, 64, 3) and label.tolist() == [0] * 2 + [1] * 8 or label.sum() == 8
    assert masks[label == 1].any((1, 2)).all() and not masks[label == 0].any()
    # what is there already is not cut again
    before = next((tmp_path / "faces/test/frames").rglob("*.png")).stat().st_mtime_ns
    R.crop_all(found, tmp_path / "faces", "test", 2, 64, Detector())
    assert next((tmp_path / "faces/test/frames").rglob("*.png")).stat().st_mtime_ns == before


def test_of_two_faces_the_forged_one_is_cut(release):
    video = next(v for v in R.read_forgeries(release, "test").videos if v.label)
    _, masks = R.crop_video(video, 2, 64, Detector([(-40, 60), (64, 70)]))
    assert masks.any((1, 2)).all()
    with pytest.raises(UserError, match="no face"):
        R.crop_video(video, 2, 64, lambda picture: type("None_", (), {"points": torch.zeros(0, 5, 2)}))


def test_celebdf_calls_real_one(tmp_path):
    (tmp_path / "Celeb-real").mkdir()
    (tmp_path / "Celeb-synthesis").mkdir()
    for path in ("Celeb-real/id0_0000.mp4", "Celeb-synthesis/id0_id1_0000.mp4"):
        (tmp_path / path).write_bytes(b"x")
    at = tmp_path / "List_of_testing_videos.txt"
    at.write_text("1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n1 YouTube-real/00001.mp4\n")
    found = R.read_forgeries(tmp_path)
    assert [(v.method, v.label) for v in found.videos] == [("real", 0), ("Celeb-synthesis", 1)]
    assert found.missing == ["YouTube-real/00001"]
    at.write_text("1 a.mp4\nfake b.mp4\n")
    with pytest.raises(UserError, match="line 2"):
        R.read_celebdf(tmp_path)


def test_dfdc_preview_has_words_for_labels(tmp_path):
    write_json(tmp_path / "dataset.json", {
        "method_A/1/1_A.mp4": {"label": "fake", "set": "test"},
        "original_videos/1/1.mp4": {"label": "real", "set": "test"},
        "method_B/2/2_B.mp4": {"label": "fake", "set": "train"}})
    for path in ("method_A/1/1_A.mp4", "original_videos/1/1.mp4"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"x")
    found = R.read_forgeries(tmp_path)
    assert {v.name: v.method for v in found.videos} == {"method_A/1/1_A": "method_A", "original_videos/1/1": "real"}
    for entry, word in (({"set": "test"}, "a.mp4"), ({"set": "test", "label": "surreal"}, "'surreal'")):
        write_json(tmp_path / "dataset.json", {"a.mp4": entry})
        with pytest.raises(UserError, match=word):
            R.read_dfdc_preview(tmp_path)


def test_the_deepfakebench_form_with_and_without_compression(tmp_path):
    picture = np.full((20, 20, 3), 90, np.uint8)
    for path in ("ff/frames/000/0.png", "ff/fake/frames/000_001/0.png", "ff/fake/masks/000_001/0.png"):
        write_image(tmp_path / path, picture if "masks" not in path else picture[..., 0])
    real = {"000": {"label": "FF-real", "frames": ["ff\\frames\\000\\0.png"]}}
    fake = {"000_001": {"label": "FF-DF", "frames": ["ff/fake/frames/000_001/0.png"]},
            "000_002": {"label": "FF-DF", "frames": ["ff/fake/frames/000_002/0.png"]}}
    for nested in (lambda v: {"c23": v, "c40": {}}, lambda v: v):
        labels = {"FF-real": {"test": nested(real)}, "FF-DF": {"test": nested(fake)}}
        write_json(tmp_path / "set.json", {"FF++": labels})
        found = R.read_forgeries(tmp_path)
        assert [(v.name, v.label) for v in found.videos] == [("FF-real/000", 0), ("FF-DF/000_001", 1)]
        assert found.missing == ["FF-DF/000_002"] and found.videos[1].masks[0].name == "0.png"
        images, masks, label = R.FaceFrames(found, 4, 16).batch([0, 1])
        assert images.shape == (2, 16, 16, 3) and masks[1].all() and label.tolist() == [0, 1]
    write_json(tmp_path / "set.json", {"FF++": {"FF-DF": {"test": {"c23": {"000_001": ["0.png"]}}}}})
    with pytest.raises(UserError, match="FF-DF"):
        R.read_forgeries(tmp_path)
    (tmp_path / "set.json").unlink()
    with pytest.raises(UserError, match="none of FaceForensics"):
        R.read_forgeries(tmp_path)


def test_pictures_are_no_masks_of_their_own(tmp_path):
    picture = np.full((20, 20, 3), 90, np.uint8)
    for folder in ("faces", "masks"):
        write_image(tmp_path / folder / "v/0.png", picture)
    entry = lambda label: {label: {"train": {"c23": {"v": {"label": label, "frames": ["faces/v/0.png"]}}}}}
    write_json(tmp_path / "set.json", {"X": entry("DFDC_Real") | entry("whichisreal")})
    found = R.read_deepfakebench(tmp_path / "set.json", "train")
    assert {v.method: v.masks for v in found.videos} == {"real": None, "whichisreal": None}
    with pytest.raises(UserError, match="1 of 1 forged videos have no mask"):
        R.FaceFrames(found)


@pytest.mark.parametrize("change, word", [("short", "3 masks for 4 frames"), ("odd", "20×10 pixels")])
def test_masks_that_do_not_fit_are_that_videos_error(tmp_path, change, word):
    paths = {k: tuple(tmp_path / k / "v" / f"{i}.png" for i in range(4)) for k in ("frames", "masks")}
    for p in sum(paths.values(), ()):
        write_image(p, np.zeros((20, 20, 3), np.uint8))
    if change == "odd":
        write_image(paths["masks"][2], np.zeros((10, 20), np.uint8))
    video = R.FaceVideo("X/v", "X", paths["frames"], paths["masks"][:3 if change == "short" else 4])
    with pytest.raises(UserError, match=word):
        R.crop_video(video, 4, 64, Detector())
    skipped = R.crop_all(R.ForgeryList("two", [video, replace(video, name="real/w", method="real", masks=None)]),
                         tmp_path / "out", "test", 4, 64, Detector())
    assert len(skipped) == 1 and word in skipped[0] and len(R.read_forgeries(tmp_path / "out/test.json")) == 1


# --- what a user runs

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    write_weights(path, L.build(L.Config()).state_dict())
    return path


def test_apply_judges_photos_and_videos(weights, tmp_path):
    x = (255 * W.render_clips(1, 3, size=200).images).byte().permute(0, 2, 3, 1).numpy()
    film(tmp_path / "in/clip.mkv", x)
    write_image(tmp_path / "in/photo.png", x[0])
    write_image(tmp_path / "in/two.png", np.concatenate([x[0], x[1]], 1))
    write_image(tmp_path / "in/grey.png", x[0].mean(2).astype(np.uint8))
    write_image(tmp_path / "in/nobody.png", np.random.default_rng(0).integers(0, 255, x[0].shape, dtype=np.uint8))
    (tmp_path / "in/cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "in/empty.mp4").write_bytes(b"")
    rows = L.apply([tmp_path / "in", tmp_path / "absent.jpg"], weights, tmp_path / "out")
    by = {r["input"].split("/")[-1]: r for r in rows}
    assert all("error" in by[k] and "forgery_probability" not in by[k] for k in ("cut.jpg", "empty.mp4", "absent.jpg"))
    assert by["clip.mkv"]["frames"] == 3 and by["photo.png"]["frames"] == 1
    assert by["two.png"]["faces"] == 2 and by["photo.png"]["faces"] == 1
    for name in ("grey.png", "nobody.png"):
        assert "forgery_probability" not in by[name] and by[name]["reason"]
    assert by["grey.png"]["grey"] and by["nobody.png"]["face"] == "not found"
    alone = L.apply(torch.as_tensor(x[0]), weights)
    assert alone[0]["forgery_probability"] == by["photo.png"]["forgery_probability"] and len(alone) == 1
    for name in ("clip.mkv", "photo.png", "two.png"):
        assert 0 <= by[name]["forgery_probability"] <= 1
        assert read_image(tmp_path / "out" / by[name]["heat_map"]).shape == (256, 512, 3)
    assert read_json(tmp_path / "out/results.json") == rows and (tmp_path / "out/results.csv").exists()


def test_heat_is_where_patches_differ_from_the_corners():
    s = torch.ones(1, 16, 16)
    s[0, 5], s[0, :, 5] = 0, 0
    heat = L.heat_map(L.Output(None, s, None, None, []), 64)[0]
    assert heat[24, 24] == heat.max() and heat[:4].max() < 0.2 * heat.max()


def test_data_are_checked_before_a_run(release, tmp_path):
    found = L.check_data(release)
    assert found.usable and "2 real" in str(found) and "train" in str(found)
    for k in range(6):
        write_image(tmp_path / f"{k}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "cut.jpg").write_bytes(b"")
    found = L.check_data(tmp_path, "book")
    assert found.usable and "cut.jpg" in str(found) and "photographs of 7 people" in str(found)
    assert not L.check_data(tmp_path).usable                # full wants videos
    with pytest.raises(UserError, match="none of"):
        L.check_data(tmp_path / "nothing")


def test_full_refuses_with_a_list(release):
    with pytest.raises(UserError, match="FaceForensics"):
        L.run(L.Config.preset("full"))
    with pytest.raises(UserError, match="backbone"):
        L.run(L.Config.preset("full", data_root=release))


def test_full_trains_a_step_on_files_in_the_released_form(release, tmp_path, monkeypatch):
    monkeypatch.setattr(recognisers, "detect_faces", Detector())
    config = L.Config.preset("full", data_root=release, encoder="small", size=64, epochs=1, batch_size=4, workers=1,
                             video_frames=2, precision="no", out_dir=tmp_path / "run", held_out="FaceSwap")
    report = L.run(config)
    assert set(report.metrics) == {"FaceForensics++, all", "FaceForensics++, Deepfakes", "FaceForensics++, FaceSwap"}
    assert report.metrics["FaceForensics++, all"]["video AUC"][0] >= 0
    assert (tmp_path / "run/weights.safetensors").exists()
    assert (tmp_path / "run/main-test-skipped.txt").read_text() == ""
    assert L.run(config).metrics == report.metrics          # a finished run is read, not repeated
