"""Draw the moving picture of the README and the landing page: rendered people who turn their heads.

    python tools/picture.py [docs/faces.webp]
"""
import sys
from dataclasses import replace

import torch
from PIL import Image

from facebook_nb.worlds.faces import render_faces, sample_people, sample_photos

PEOPLE, FRAMES, SIDE = 6, 14, 120


def frames() -> list[Image.Image]:
    """A row of people, one picture for each angle, there and back."""
    people = sample_people(PEOPLE, seed=2)
    photos = sample_photos(list(range(PEOPLE)), 1, seed=4, pose=0, light=0.3, expression=0.3)
    found = []
    for k in range(FRAMES):
        yaw = torch.full((PEOPLE,), 70 * k / (FRAMES - 1) - 35)
        images = render_faces(people, replace(photos, yaw=yaw), SIDE).image
        strip = (255 * images.permute(2, 0, 3, 1).reshape(SIDE, -1, 3)).byte()
        found.append(Image.fromarray(strip.numpy()))
    return found + found[-2:0:-1]


if __name__ == "__main__":
    first, *rest = frames()
    first.save(sys.argv[1] if len(sys.argv) > 1 else "docs/faces.webp", save_all=True, append_images=rest,
               duration=90, loop=4, quality=72, method=6)
