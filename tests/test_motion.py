"""The motion worlds: what their symmetry promises, determinism, exact boundaries, files."""
import itertools
import time

import numpy as np
import pytest

from facebook_nb.files import UserError
from facebook_nb.readers.video import open_clip, segment_indices
from facebook_nb.worlds.motion import motion_energy, two_sweeps, two_swells, untrimmed, write_video


def test_a_clip_does_not_depend_on_its_batch():
    many = two_sweeps(9, seed=3, clutter=2)
    alone = two_sweeps(1, seed=3, clutter=2, start=7)
    assert (many.frames[7] == alone.frames[0]).all() and many.labels[7] == alone.labels[0] == 7
    assert (two_sweeps(1, seed=4).frames != many.frames[:1]).any()
    assert (two_sweeps(1, seed=3, split="test").frames != many.frames[:1]).any()
    a, b = untrimmed(3, seed=1, length=128), untrimmed(1, seed=1, length=128, start=2)
    assert (a.frames[2] == b.frames[0]).all() and (a.plans[2].segments == b.plans[0].segments).all()


def test_bits_are_what_one_sees():
    clips = two_sweeps(8, seed=0)
    for path, (o, a, b) in zip(clips.mover, clips.bits):
        p, q = (path[12:], path[:12]) if o else (path[:12], path[12:])
        assert np.ptp(p[:, 1]) == 0 and np.ptp(q[:, 0]) == 0       # P along x, Q along y
        assert (np.sign(np.diff(p[:, 0])) == (-1 if a else 1)).all()
        assert (np.sign(np.diff(q[:, 1])) == (-1 if b else 1)).all()
    step = np.abs(np.diff(clips.mover[:, :12], axis=1)).max()
    assert step == pytest.approx(32 / 12, abs=1e-4)


def test_swells_change_in_size_and_not_in_place():
    clips = two_swells(8, seed=0, size=64, clutter=0)
    alone = two_swells(1, seed=0, size=64, clutter=0, start=5)
    assert (alone.frames[0] == clips.frames[5]).all() and alone.bits[0].tolist() == [1, 0, 1]
    for frames, places, (o, a, b) in zip(clips.frames.astype(float), clips.mover, clips.bits):
        for event, back in ((slice(0, 12), b if o else a), (slice(12, 24), a if o else b)):
            assert np.ptp(places[event], axis=0).max() == 0
            x, y = places[event][0].astype(int)
            near = frames[event][:, max(0, y - 9) : y + 10, max(0, x - 9) : x + 10].mean((1, 2))   # its average colour
            far = np.abs(near - near[-1 if not back else 0]).max(1)
            assert (far[:3].mean() > far[-4:-1].mean()) != back         # goes towards that of the large one


def test_unordered_draws_have_one_law_in_all_classes():
    """All 3^8 segment draws: as multisets of (event, moment) they are equally likely in each class."""
    def law(o, a, b):
        p = [("p", j) for j in (range(11, -1, -1) if a else range(12))]
        q = [("q", j) for j in (range(11, -1, -1) if b else range(12))]
        frames = q + p if o else p + q
        draws = (frozenset(frames[3 * k + u] for k, u in enumerate(us))
                 for us in itertools.product(range(3), repeat=8))
        counts = {}
        for draw in draws:
            counts[draw] = counts.get(draw, 0) + 1
        return counts, frozenset(frames[i] for i in segment_indices(24, 8))

    first = law(0, 0, 0)
    for bits in itertools.product((0, 1), repeat=3):
        assert law(*bits) == first


def test_without_noise_reversal_is_a_change_of_class():
    from facebook_nb.worlds import motion

    class Quiet:
        normal = staticmethod(lambda mean, std, size: np.full(size, mean))
        standard_normal = staticmethod(lambda size, kind: np.zeros(size, kind))

    ground, colours, resting, (p, q), front, offsets = motion._sweep_scene(np.random.default_rng(5), 32, 3, 0, 32)
    draw = lambda mover, kinds: motion._draw(Quiet, ground, colours, resting, mover, kinds, front, offsets, 32)
    forward = draw(np.concatenate([p, q]), np.repeat([0, 1], 12))
    backward = draw(np.concatenate([q[::-1], p[::-1]]), np.repeat([1, 0], 12))     # o, a, b all flipped
    assert (forward == backward[::-1]).all() and (forward != backward).any()


def test_a_linear_probe_on_single_frames_is_at_chance():
    from sklearn.linear_model import RidgeClassifier

    train, test = (two_sweeps(160, seed=0, split=s) for s in ("train", "test"))
    flat = lambda c: c.frames[:, 1::3, ::4, ::4].reshape(160 * 8, -1) / 255
    probe = RidgeClassifier(alpha=10).fit(flat(train), np.repeat(train.labels, 8))
    right = (probe.predict(flat(test)) == np.repeat(test.labels, 8)).reshape(160, 8).mean(1)
    assert abs(right.mean() - 1 / 8) < 3 * right.std() / 160**0.5 + 3 * (1 / 8 * 7 / 8 / 160 / 8) ** 0.5


def test_knobs():
    assert two_sweeps(1, 0, size=64, shake=2, clutter=0).frames.shape == (1, 24, 64, 64, 3)
    still, shaken = (two_sweeps(2, 0, shake=s).frames.astype(int) for s in (0, 2))
    jump = lambda f: np.abs(np.diff(f, axis=1)).mean()
    assert jump(shaken) > 1.2 * jump(still)


def test_speed():
    started = time.process_time()
    two_sweeps(6, 0, size=64)
    untrimmed(1, 0, length=144, size=64)
    assert 288 / (time.process_time() - started) > 200               # frames a second of one core


def test_untrimmed_boundaries_and_decoys():
    world = untrimmed(12, seed=2, length=512)
    lengths, classes, slow, quiet = [], set(), [], []
    for plan in world.plans:
        n = np.diff(plan.segments, axis=1)[:, 0]
        assert (n >= 4).all() and (plan.segments[1:, 0] - plan.segments[:-1, 1] >= 6).all()
        assert plan.segments.max() <= 512 - 4
        lengths += n.tolist()
        classes |= set(plan.labels.tolist())
        slow += plan.gradual.tolist()
        inside = np.zeros(512, bool)
        for (first, last), _ in zip(plan.segments.astype(int), plan.labels):
            inside[first:last] = True
            assert np.abs(plan.place[first:last]).max() > 1
            assert np.abs(plan.place[first]).max() > 0 and np.abs(plan.place[last - 1]).max() > 0
        for d in plan.decoys:
            assert not inside[d] and np.abs(plan.place[d]).max() > 2
            inside[d : d + 2] = True
        quiet.append(np.abs(plan.place[~inside]).max())
        for first, last in plan.pauses:
            assert np.ptp(plan.place[first : last - 1], axis=0).max() < 1e-6 or last - first <= 1
    assert max(quiet) == 0                                             # nothing moves elsewhere
    assert classes == set(range(5)) and max(lengths) > 10 * min(lengths)
    assert 0.1 < np.mean(slow) < 0.5
    assert 5 < sum(len(p.decoys) for p in world.plans) < 120
    moved = untrimmed(6, seed=2, length=512, inset=0.2, decoys=0.04).plans
    assert sum(len(p.decoys) for p in moved) > 1.5 * sum(len(p.decoys) for p in world.plans[:6])


def test_motion_energy_tells_direction():
    x = np.arange(32)
    wave = np.stack([127 + 100 * np.sin(0.6 * (x - t)) for t in range(16)])
    right = np.repeat(wave[:, None], 32, axis=1).astype(np.uint8)
    there, back = motion_energy(right), motion_energy(right[::-1])
    assert there.shape == (8, 48)
    assert there[1:, 16:32].mean() * back[1:, 16:32].mean() < 0      # sign of I_x I_t
    assert np.abs(there[1:, 32:]).max() < 1e-3                        # nothing along y


def test_too_short_is_said():
    with pytest.raises(UserError, match="at least 18"):
        untrimmed(1, 0, length=10)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_written_and_read_back(tmp_path, suffix):
    frames = untrimmed(1, 0, length=60).frames[0]
    write_video(tmp_path / f"a{suffix}", frames, fps=25)
    clip = open_clip(tmp_path / f"a{suffix}")
    assert len(clip) == 60 and clip.fps == pytest.approx(25, rel=1e-2)
    back = clip.read(range(60)).mean(-1)
    errors = np.abs(back[:, None] - frames[None]).mean((2, 3))
    assert (errors.argmin(1) == np.arange(60)).all()                  # each frame is itself
    with pytest.raises(UserError, match="even"):
        write_video(tmp_path / "odd.mp4", frames[:, :31])
