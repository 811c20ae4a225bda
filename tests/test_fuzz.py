"""A short run of tests/fuzz.py."""

import fuzz


def test_fuzz__damaged_tars_images_and_indexes():
    counts = fuzz.main(["--seconds", "20", "--tars", "150", "--images", "400", "--indexes", "400"])
    assert min(counts[kind] for kind in ("tars", "images", "indexes")) > 20
