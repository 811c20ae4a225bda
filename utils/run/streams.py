"""The random streams of a run. Each is a function of its arguments, so a resumed run draws the same numbers.

torch's global generator is seeded from these numbers before each use, for initial weights and random layers of a trunk. The
constants keep the streams of a training step apart.
"""

import numpy as np


def epoch_order(seed: int, epoch: int) -> np.random.Generator:
    """The order of the samples in an epoch."""
    return np.random.default_rng([seed, epoch])


def view_numbers(seed: int, epoch: int, sample_id: int, shape: tuple[int, int]) -> np.ndarray:
    """Uniform numbers in [0, 1) for the views of a sample: views x draws. Row v does not depend on the number of rows."""
    bits = np.random.Philox(key=[seed, epoch], counter=[0, sample_id, 0, 0])
    return np.random.Generator(bits).random(shape)


def step_draws(seed: int, number: int) -> np.random.Generator:
    """Draws of a step that are equal on all processes: permutations, mixtures, shifts of mosaics."""
    return np.random.default_rng([seed, number, 1])


def erased_pixels(seed: int) -> np.random.Generator:
    """The pixels that random erasing puts into an image; the seed is one of `step_draws`."""
    return np.random.default_rng([seed, 4])


def trunk_seed(seed: int, number: int, rank: int) -> int:
    """The torch seed of a trunk's random layers in a step, such as stochastic depth; different on each process."""
    return int(np.random.default_rng([seed, number, 2, rank]).integers(2**63))


def bank_rows(seed: int, number: int, place: int) -> np.random.Generator:
    """The rows of a memory bank that are contrasted with the image at this place of a step's global batch."""
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, place, 1, 0]))


def classifier_seed(seed: int, layer: int) -> int:
    """The torch seed of the initial weights of a layer's linear classifier."""
    return int(np.random.default_rng([seed, layer]).integers(2**63))


def conversion_order(seed: int) -> np.random.Generator:
    """The order of the images that imagenet2wds.py writes."""
    return np.random.default_rng(seed)


def validation_split(seed: int, label: int) -> np.random.Generator:
    """The images of a class that imagenet2wds.py --val-fraction keeps for validation."""
    return np.random.default_rng([seed, label, 3])


def held_out(seed: int, images: int, share: float) -> np.ndarray:
    """The training images on which an evaluation chooses l2 or a learning rate: ids in ascending order."""
    return np.sort(np.random.default_rng([seed, 0, 4]).permutation(images)[: round(share * images)])


def mirrored_copy(seed: int) -> np.random.Generator:
    """The images that w2ssl.mirror mirrors."""
    return np.random.default_rng(seed)
