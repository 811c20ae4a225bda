"""Colour spaces against scikit-image, and their normalisation."""

import numpy as np
import pytest
import skimage.color
import torch

from cmc.color import SCALES, SPACES, color_views, convert

THEIRS = {space: getattr(skimage.color, f"rgb2{space.lower().replace('-', '')}") for space in SPACES}


def colours():
    """1 x 3 x M x 1 in [0, 1]: a grid over the cube, its corners, greys, the darkest colours and random ones."""
    steps = np.linspace(0, 1, 18)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    greys, dark = np.repeat(np.arange(256)[:, None] / 255, 3, 1), np.random.default_rng(0).integers(0, 12, (500, 3)) / 255
    return np.concatenate([grid, greys, dark, np.random.default_rng(1).random((2000, 3))])


@pytest.mark.parametrize("space", SPACES)
def test_convert__is_scikit_images(space):
    rgb = colours()
    found = convert(torch.tensor(rgb.T[None, :, :, None], dtype=torch.float32), space)[0, :, :, 0].T
    wanted = THEIRS[space](rgb[None])[0]
    assert np.abs(found.numpy() - wanted).max() <= 1e-4


@pytest.mark.parametrize("space", sorted(set(SPACES) - {"YCbCr"}))
def test_scales__are_the_middle_and_half_of_each_channels_range(space):
    """This includes the published numbers of Lab. Those of YCbCr have another origin."""
    steps = np.arange(0, 256, 5) / 255
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3)
    wanted = THEIRS[space](grid)[0]
    low, high = wanted.min(0), wanted.max(0)
    middle, half = map(np.array, SCALES[space])
    assert np.abs(middle - (low + high) / 2).max() <= 0.01 * half.max()
    assert np.abs(half - (high - low) / 2).max() <= 0.01 * half.max()


def test_color_views__published_normalisation_of_lab():
    views = torch.randint(0, 256, (3, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, others = color_views(views, "Lab")
    lab = skimage.color.rgb2lab(views.permute(0, 2, 3, 1).numpy() / 255)
    wanted = (lab - [50, 6.025, -6.6895]) / [50, 92.208, 101.1675]
    assert first.shape == (3, 1, 5, 4) and others.shape == (3, 2, 5, 4)
    np.testing.assert_allclose(torch.cat([first, others], 1).permute(0, 2, 3, 1), wanted, atol=1e-5)


def test_color_views__a_grey_image_has_no_information_in_ab():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    a, b = color_views(grey, "Lab")[1][0].unbind(0)
    assert a.std() < 1e-4 and b.std() < 1e-4
