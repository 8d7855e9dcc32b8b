"""Photo sets: grouping by person, whole-set mirroring, CelebA lists, rendered faces with depth."""
import numpy as np
import pytest
import torch

from facebook_nb.files import UserError, write_image
from facebook_nb.readers.photosets import celeba_sets, cut, depth_pairs, folder_sets


@pytest.fixture
def people(tmp_path):
    """Three people with 4, 2 and 1 photos; the left half of each photo is dark."""
    for person, count in (("ada", 4), ("bob", 2), ("carol", 1)):
        for k in range(count):
            image = np.full((12, 12, 3), 40 + 10 * k, np.uint8)
            image[:, :6] = 0
            write_image(tmp_path / person / f"{k}.png", image)
    return tmp_path


def test_sets_are_drawn_without_replacement_from_people_with_enough_photos(people):
    sets = folder_sets(people, 2, 12)
    assert len(sets) == 2 and sets.dropped == 1 and sets.usable
    torch.manual_seed(0)
    for _ in range(20):
        levels = sets[0].amax((1, 2, 3))
        assert levels[0] != levels[1]


def test_a_set_is_mirrored_as_a_whole(people):
    sets = folder_sets(people, 3, 12)
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        left = sets[0][:, 0, 6, 0] == -1
        assert left.all() or not left.any()
        seen.add(bool(left[0]))
    assert seen == {True, False}


def test_a_draw_follows_the_seed(people):
    sets = folder_sets(people, 2, 12)
    torch.manual_seed(3)
    first = sets[0]
    torch.manual_seed(3)
    assert torch.equal(first, sets[0])


def test_too_few_photos_is_said(people):
    with pytest.raises(UserError, match="nobody has 9 photos"):
        folder_sets(people, 9)


def test_celeba_boxes_cut_before_scaling(tmp_path):
    image = np.zeros((20, 20, 3), np.uint8)
    image[5:15, 5:15] = 200
    for k in range(2):
        write_image(tmp_path / "img_celeba" / f"{k}.png", image)
    (tmp_path / "identity_CelebA.txt").write_text("0.png 7\n1.png 7\n")
    (tmp_path / "celeba_crop_bbox.txt").write_text("0.png 0 5 5 10 10\n1.png 0 5 5 10 10\n")
    sets = celeba_sets(tmp_path, 2, 8, split=None)
    torch.testing.assert_close(sets[0], torch.full((2, 3, 8, 8), 200 / 127.5 - 1))
    with pytest.raises(UserError, match="list_eval_partition"):
        celeba_sets(tmp_path, 2, 8)
    (tmp_path / "list_eval_partition.txt").write_text("0.png 0\n1.png two\n")
    with pytest.raises(UserError, match="line 2"):
        celeba_sets(tmp_path, 2, 8)


def test_missing_identity_list_is_named(tmp_path):
    with pytest.raises(UserError, match="identity_CelebA.txt"):
        celeba_sets(tmp_path, 2)


def test_cut_repeats_edges_and_refuses_an_empty_box():
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert (cut(image, -2, -2, 3, 3) == image[0, 0]).all()
    with pytest.raises(UserError, match="empty"):
        cut(image, 0, 0, 0, 3)


def test_depth_pairs_need_their_depth(tmp_path):
    write_image(tmp_path / "test" / "image" / "image_0.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="depth_0.png"):
        depth_pairs(tmp_path)
    with pytest.raises(UserError, match="no images"):
        depth_pairs(tmp_path, "val")
