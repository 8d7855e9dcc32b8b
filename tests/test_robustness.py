"""What goes wrong in practice: a run killed at any moment, damaged input, checkpoints that would run code."""
import os
import pickle
import random

import pytest
import torch

from facebook_nb.cli import CHAPTERS, chapter_module
from facebook_nb.files import UserError
from tests.damage import torment
from tests.kill_and_resume import survive


def test_200_damaged_inputs(tmp_path):
    refused, read, defects = torment(200, 0, tmp_path)
    assert not defects, "\n".join(defects)
    assert refused + read == 200 and refused > 150


def test_a_killed_chapter_goes_on_to_the_same_weights(tmp_path):
    assert survive("dmf", 2, random.Random(), tmp_path) >= 1


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_checkpoint_that_would_run_code_is_refused(chapter, tmp_path, monkeypatch):
    network = {"lap": "netD", "d2am": "extractor", "adv_makeup": "encoder"}.get(chapter)
    monkeypatch.chdir(tmp_path)
    load = chapter_module(chapter).load_official
    torch.save({"state_dict": Hostile()}, "hostile.pt")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("hostile.pt", "hostile.pth"):
        with pytest.raises(UserError, match=f"{name}: refused"):
            load(name, network)
    assert not (tmp_path / "hacked").exists()
