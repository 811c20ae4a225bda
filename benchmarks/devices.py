"""Devices, and an estimate of a step's time on them from counted work."""

from collections.abc import Iterable
from typing import NamedTuple

COMPUTE, STREAM = 0.5, 0.8  # shares of the peaks that convolutions and memory-bound operations reach
LAUNCH = 8e-6  # seconds of the host for one operation: the step is not shorter than all of them
IN_NODE = 8  # devices that the fast link connects


class Device(NamedTuple):
    """Peaks of data sheets: bf16 FLOP/s (fp16 before A100) without sparsity, bytes/s and bytes of memory.

    link, network: bytes/s that one device receives from its node, and from other nodes. The network is an assumption: 400 Gb/s
    for each B200, H100 and H200, 200 for A100, 100 for others.
    """

    flops: float
    memory_rate: float
    memory: float
    link: float
    network: float


DEVICES = {
    "B200": Device(2250e12, 8000e9, 180e9, 900e9, 50e9),
    "H200": Device(989e12, 4800e9, 141e9, 450e9, 50e9),
    "H100": Device(989e12, 3350e9, 80e9, 450e9, 50e9),
    "A100-80GB": Device(312e12, 2039e9, 80e9, 300e9, 25e9),
    "A100-40GB": Device(312e12, 1555e9, 40e9, 300e9, 25e9),
    "L40S": Device(362e12, 864e9, 48e9, 32e9, 12.5e9),
    "RTX4090": Device(165e12, 1008e9, 24e9, 32e9, 12.5e9),
    "V100": Device(125e12, 900e9, 32e9, 150e9, 12.5e9),
    "T4": Device(65e12, 320e9, 16e9, 16e9, 12.5e9),
}


def seconds(device: Device, work: Iterable[tuple[float, float]], received: float, processes: int) -> float:
    """Of a step. work: (FLOPs, bytes read and written) of each operation. received: bytes from other devices.

    An operation takes the longer of its arithmetic and its memory traffic. Traffic between devices overlaps with nothing.
    """
    work = list(work)
    on_device = sum(max(flops / (COMPUTE * device.flops), moved / (STREAM * device.memory_rate)) for flops, moved in work)
    traffic = received / (device.link if processes <= IN_NODE else device.network)
    return max(on_device, LAUNCH * len(work)) + traffic
