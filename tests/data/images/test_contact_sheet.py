"""Contact sheets: images and labels do not cover each other."""

import numpy as np
from PIL import Image

from cat_fast.data.images.contact_sheet import GAP, GUTTER, Cell, contact_sheet


def test_long_labels_get_room():
    red = Image.new("RGB", (128, 128), "red")
    cells = [[Cell(red.copy)] * 2]
    plain, short, long = (
        contact_sheet(cells, labels=labels)
        for labels in ((), [("16x",)], [("unconditioned 16", "2304 bits")])
    )
    assert short.width == plain.width + GUTTER
    assert long.width > short.width
    pixels = np.asarray(long)
    first = pixels.shape[1] - 2 * (128 + GAP)
    assert (pixels[GAP : GAP + 128, first : first + 128] == (255, 0, 0)).all()
    assert (pixels[:, first - GAP // 2 : first] == 255).all()
