"""Helpers of several test files: a method built from real flags, its inputs, and functions run on several processes."""

import functools
import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as td
import torch.multiprocessing as mp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet

import cmc.builder
import main_lincls
import main_pretrain
from cmc import nets
from methods import METHODS
from utils.data.batch import Batch
from utils.evaluation.frozen import build_trunk, read_source
from utils.run import dist
from utils.run.checkpoint import bare

TINY = ["--arch", "tiny_resnet", "--size", "64", "--moco-dim", "16", "--moco-k", "32", "--batch-size", "8"]
BANK = ["--nce-dim", "16", "--nce-k", "24", "--lr", "0.03", "--lr-steps", "1"]
IMAGES = 40  # in the data set of conftest.py
DEFAULT = ["--arch", "tiny_resnet", "--size", "64", "--batch-size", "8"]  # flags of a method that is not listed
SMALL = {
    "moco": TINY,
    "mosrep": [*TINY, "--shift-range", "14"],
    "cmc": ["--arch", "tiny_resnetv0", "--size", "32", "--batch-size", "8", *BANK],
    "insdis": [*TINY[:4], "--batch-size", "8", *BANK],
    "w2ssl": [*TINY[:4], "--batch-size", "8", "--moco-dim", "16", "--moco-mlp-dim", "32", "--warmup-epochs", "0.4"],
}

# timm has tiny trunks of its own (test_resnet, test_convnext), but not yet in the oldest release that requirements.txt allows
default_cfgs = generate_default_cfgs({"tiny_resnet.x": {"classifier": "fc"}, "tiny_convnext.x": {"classifier": "head.fc"}})


@register_model
def tiny_resnet(pretrained=False, **kwargs):
    """A ResNet with 96 channels at stride 32."""
    model = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (64, 32, 48, 96)} | kwargs
    return build_model_with_cfg(ResNet, "tiny_resnet", pretrained, **model)


@register_model
def tiny_convnext(pretrained=False, **kwargs):
    """A ConvNeXt with 64 channels at stride 32."""
    model = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 64)} | kwargs
    return build_model_with_cfg(ConvNeXt, "tiny_convnext", pretrained, **model)


# a network of CMC with 8 to 64 channels, and one with 32 to 256, for benchmarks/step.py
nets.RESNETS["tiny_resnet"], nets.WIDTHS["v0"] = (BasicBlock, (1, 1, 1, 1)), 0.125
cmc.builder.ARCHS = (*nets.ARCHS, "tiny_resnetv0", "tiny_resnetv1")


def tiny(method):
    return ["--method", method, *SMALL.get(method, DEFAULT)]


def method_args(name, *flags):
    """The parsed flags of `--method name flags`: a tiny trunk, the CPU, no data set. Later flags win."""
    return main_pretrain.get_args([*tiny(name), "--shards", "none", "--device", "cpu", "--amp", "fp32", *flags])


def method_of(args, samples=IMAGES):
    return METHODS[args.method](args, samples)


def build(name, *flags, seed=0):
    """A method in training mode. Its query and key side differ in all weights, and no BatchNorm scale hides a branch."""
    torch.manual_seed(seed)
    method = method_of(method_args(name, *flags)).to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for parameter in method.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.3 * noise if parameter.ndim == 1 else 0.3 * parameter * noise)
        for buffer_name, buffer in method.named_buffers():
            if "running" in buffer_name:
                buffer.add_(torch.rand_like(buffer))
    return method


def batch_of(views, sample_ids=None, flips=()):
    """A batch of these views; without flips no view was mirrored."""
    n = len(views[0])
    flips = list(flips) or [torch.zeros(n, 1 if view.ndim == 4 else view.shape[1], dtype=torch.bool) for view in views]
    ids = torch.arange(n, device=views[0].device) if sample_ids is None else sample_ids
    return Batch(list(views), flips, ids, torch.full_like(ids, -1), [])


def own_part(batch):
    """This process's part of a global batch."""
    n = len(batch) // dist.world()
    return batch.part(slice(dist.rank() * n, (dist.rank() + 1) * n))


def forward(model, batch, step):
    """(loss, stats) of a step, of views or a batch, under DDP or not."""
    batch = batch if isinstance(batch, Batch) else batch_of(batch)
    return model(batch, bare(model).targets(batch, step), step)


def opened(*argv):
    """The frozen trunk of a command line of main_lincls.py, and its flags."""
    source = read_source("main_lincls.py", METHODS, [*map(str, argv)])
    args = main_lincls.get_args([*map(str, argv)], source)
    return build_trunk(args, METHODS[args.method], source), args


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def random_views(n, size=64, local_crops=4, seed=1):
    """Query views, key views and, unless `local_crops` is 0, local crops of n images."""
    rng = torch.Generator().manual_seed(seed)
    whole = [torch.randn(n, 3, size, size, generator=rng) for _ in range(2)]
    return [*whole, torch.randn(n, local_crops, 3, size // 2, size // 2, generator=rng)] if local_crops else whole


def uint8_batch(args, seed=1):
    """A batch of --batch-size images like the loader's: random pixels, randomly mirrored."""
    specs, n, rng = METHODS[args.method].views(args), args.batch_size, torch.Generator().manual_seed(seed)
    shapes = [(n, *([spec.count] if spec.count > 1 else []), 3, spec.size, spec.size) for spec in specs]
    views = [torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8) for shape in shapes]
    return batch_of(views, flips=[torch.rand(n, spec.count, generator=rng) < 0.5 for spec in specs])


def uint8_views(args, seed=1):
    return uint8_batch(args, seed).views


def in_two(method):
    """Flags with which one process gives the result of two."""
    return ["--bn-splits", "2"] if "bn_splits" in method_args(method) else []  # without it, BatchNorm spans all processes


@functools.cache
def forkserver():
    """Starts processes that have imported the slow packages. (In Python 3.11 it has only this sys.path.)"""
    multiprocessing.set_forkserver_preload(["runs", "pytest", "torch.utils.tensorboard", "frozen"])
    here = Path(__file__).parent
    with mock.patch.dict(os.environ, PYTHONPATH=f"{here}:{here.parent}", OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def default_start_method():
    """Set Python's default. A process of the fork server has another one: its loader workers would need one more server."""
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)


def spawn(fn, *args, processes=2, timeout=150):
    """[fn(*args) of process 0, of process 1, ...], in processes that gloo joins, as with torchrun. fn: from a test module.

    The first error in a process is raised here with its traceback; after an error or `timeout` seconds all of them are ended.
    """
    # as torchrun's agent does, the store is ours and takes a port that is free
    store = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    forkserver()
    start = partial(mp.start_processes, nprocs=processes, join=False, start_method="forkserver")
    with tempfile.TemporaryDirectory() as folder:
        running, end = start(_process, (processes, store.port, folder, fn, args)), time.monotonic() + timeout
        try:
            while not running.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"{fn.__name__} on {processes} processes: not done after {timeout} seconds")
        finally:
            for process in running.processes:
                process.kill()
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(processes)]


def _process(rank, processes, port, folder, fn, args):
    warnings.simplefilter("error")
    default_start_method()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    dist.setup("cpu")
    td.barrier()  # gloo may hang if a process leaves while another still connects
    result = fn(*args)
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.teardown()
