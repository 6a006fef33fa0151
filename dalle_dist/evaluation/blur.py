"""The Gaussian blur under which the paper compares models: FID and inception score by radius.

The paper says "Gaussian filter of radius r" and no more. Here r is the standard deviation in
pixels, and the filter is Pillow's: three box filters in turn, edge pixels repeated outwards before
each. Away from the border it stays within 4 of 255 of a Gaussian; at r = 1 it may lose half a level
of brightness (Pillow 12; figures in `docs/log.md`).
"""

from __future__ import annotations

from PIL import Image, ImageFilter

RADII = (0, 1, 2, 4, 8)  # pixels, at 256 x 256 (paper, Fig. 9)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """The image under a Gaussian of standard deviation `radius`, pixels; 0: as it is.

    Both the reference and the generated images are blurred, after `Preparation` and before any
    resizing of a feature network.
    """
    return image.filter(ImageFilter.GaussianBlur(radius)) if radius else image
