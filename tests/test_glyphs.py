"""The glyph worlds: functions of their seed, with classes that are told apart by what should tell them apart."""
import numpy as np
import pytest
import torch

from facebook_nb.files import UserError
from facebook_nb.worlds import glyphs


def test_strokes_are_a_function_of_the_seed():
    one = glyphs.stroke_glyphs(12, 3, seed=5)
    assert one.shape == (12, 3, 3, 32, 32) and one.dtype == torch.uint8
    assert glyphs.stroke_glyphs(12, 3, seed=5) is one                   # remembered
    assert torch.equal(glyphs.stroke_glyphs.__wrapped__(12, 3, seed=5), one)
    assert not torch.equal(glyphs.stroke_glyphs(12, 3, seed=6), one)


def test_programs():
    p = glyphs.stroke_programs(200, 1)
    assert set(p.used.sum(1).tolist()) == {3, 4, 5, 6}
    assert (p.colours[:, 0] != p.colours[:, 1]).any(1).all()
    assert len({tuple(x.flatten().tolist()) for x in p.points}) == 200


def test_object_lies_inside_and_moves():
    clean = glyphs.stroke_glyphs(20, 10, seed=2, clutter=0).float().amax(2)
    bright = clean > 150                        # grounds are dark, strokes are not
    assert (bright.flatten(2).float().mean(2) > 0.01).float().mean() > 0.95
    ys = (bright.float() * torch.arange(32)[:, None]).sum((2, 3)) / bright.float().sum((2, 3)).clamp(min=1)
    assert ys.std(1).mean() > 3                 # pixels


def test_clutter_covers_and_any_size_is_drawn():
    clean, full = (glyphs.stroke_glyphs(10, 4, clutter=n).float() for n in (0, 8))
    share = lambda x: (x.amax(2) > 150).float().mean()
    assert share(full) > share(clean) + 0.05
    assert glyphs.stroke_glyphs(3, 2, size=84).shape[-1] == 84


def test_coverage_of_one_segment():
    ink = glyphs._coverage(torch.tensor([[[[2.0, 5.5], [8.0, 5.5]]]]), 12, 2.0)[0, 0]
    assert ink[5, 2:8].min() == 1 and ink[9].max() == 0 and ink[5, 11] == 0


def test_scripts_of_the_default_fonts():
    scripts = glyphs.font_scripts(tuple(glyphs.font_files()))
    assert len(scripts) >= 12 and all(len(c) >= 20 for c in scripts.values())
    assert "Braille" not in scripts
    assert "é" not in scripts["Latin"] and "e" in scripts["Latin"] and "E" not in scripts["Latin"]


def test_characters_share_no_shape_and_follow_the_seed():
    pictures, names = glyphs.font_characters(("Latin", "Cyrillic", "Greek"), 3, seed=1, limit=25)
    assert pictures.shape == (len(names), 3, 3, 32, 32) and len(set(names)) == len(names)
    again = glyphs.font_characters.__wrapped__(("Latin", "Cyrillic", "Greek"), 3, seed=1, limit=25)
    assert torch.equal(again[0], pictures) and again[1] == names
    assert "Latin/o" in names and not {"Cyrillic/о", "Greek/ο"} & set(names)
    ink = pictures.float().mean((1, 2, 3, 4)) / 255
    assert ink.min() > 0.01 and ink.max() < 0.6
    assert not torch.equal(pictures[:, 0], pictures[:, 1])


def test_characters_are_more_alike_within_a_class():
    x = glyphs.font_characters(("Armenian", "Tifinagh"), 6, limit=30)[0][:, :, 0].float()
    x = torch.nn.functional.avg_pool2d(x, 4).flatten(2)
    x = torch.nn.functional.normalize(x - x.mean((0, 1)), dim=2)
    near = np.einsum("nkd,mld->nmkl", x.numpy(), x.numpy()).mean((2, 3))
    assert np.diag(near).mean() > near.mean() + 0.3


def test_unknown_script_names_those_that_exist():
    with pytest.raises(UserError, match="Klingon.*Armenian"):
        glyphs.font_characters(("Klingon",), 1)
