"""Published linear probes that methods of several packages share: defaults of flags of main_lincls.py."""

from collections.abc import Mapping
from typing import Any


def of_cmc_code(trained: Mapping[str, Any], lr: float = 30.0) -> dict[str, Any]:
    """The probe of the CMC authors' code (docs/methods.md, "Linear probes"): CMC, InsDis and MoCo-v1.

    Its crops have the minimum of the pre-training. trained: flags of the pre-training, empty if unknown.
    differs from the released code: ours scales lr by the batch, as every --lr; at batch 256 both are equal.
    """
    schedule = {"epochs": 60, "batch_size": 256, "lr": lr, "trust": 0.0, "lr_steps": [30, 40, 50], "lr_gamma": 0.2}
    return schedule | {"crop_min": trained.get("crop_min", 0.08)}
