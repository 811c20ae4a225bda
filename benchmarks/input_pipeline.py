"""CPU time per image of the input pipeline, compared with the usual chain of PIL operations.

    python -m benchmarks.input_pipeline                            MosRep's views of scikit-image's photographs, 500 x 375
    python -m benchmarks.input_pipeline --shards DIR --workers 8   your shards, and images per second of 1, 2, 4, 8 workers
    python -m benchmarks.input_pipeline --views 2x224              the two views of MoCo-v2

One process, one thread. The rows take turns for several rounds, and the table shows the median of each.
"""

import argparse
import io
import itertools
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageFilter
from torchvision import transforms

from utils.data.index import Index, load_index
from utils.data.loader import Chunks
from utils.data.measure import images_per_second
from utils.data.photometric import MEAN, STD, normalized
from utils.data.reader import Reader
from utils.data.shards import training_plan
from utils.data.views import ViewSpec, moco_v2_view
from utils.run.cpu import cpu_ms, keep_freed_memory
from utils.run.flags import Parser, one_line_errors, positive

GLOBAL, LOCAL = moco_v2_view("global", 224, (0.2, 1.0), 2), moco_v2_view("local", 112, (0.1, 0.6), 4)
VIEWS = {"2x224+4x112": [GLOBAL, LOCAL], "2x224": [GLOBAL]}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.input_pipeline", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shards", metavar="DIR", help="folder of shards; default: photographs of scikit-image")
    add("--views", choices=VIEWS, default="2x224+4x112", help="views of an image: number x size")
    add("--images", type=int, default=48, help="number of different images")
    add("--rounds", type=int, default=9, help="number of measurements of each row")
    add("--workers", type=int, default=0, help="also measure images per second of 1, 2, 4, ... worker processes")
    return parser.parse_args(argv)


def photographs(folder: Path, count: int) -> Index:
    """A shard of crops of real photographs, 500 x 375, JPEG of quality 90."""
    import skimage.data

    whole = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "photographs.tar")) as tar:
        for number in range(count):
            image = whole[number % len(whole)]
            width = int(min(image.width, image.height * 4 / 3) * rng.uniform(0.7, 1))
            height = width * 3 // 4
            left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
            file = io.BytesIO()
            image.resize((500, 375), box=(left, top, left + width, top + height)).save(file, "JPEG", quality=90)
            tar.write({"__key__": f"{number:06d}", "jpg": file.getvalue()})
    return load_index(str(folder))


def pil_chain(spec: ViewSpec) -> transforms.Compose:
    """A view of the released code: torchvision's transforms of a PIL image."""
    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(*spec.blur))))
    return transforms.Compose([
        transforms.RandomResizedCrop(spec.size, spec.scale),
        transforms.RandomApply([transforms.ColorJitter(*spec.jitter)], spec.jitter_p),
        transforms.RandomGrayscale(spec.gray_p),
        transforms.RandomApply([blur], spec.blur_p),
        transforms.RandomHorizontalFlip(spec.flip_p),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def rows(index: Index, specs: list[ViewSpec]) -> dict[str, Callable]:
    """The measured functions of sample ids, by name."""
    reader = Reader(index)
    plan = training_plan(index, 1, 0, range(1))
    on_device, in_worker = (Chunks(index, specs, plan, seed=0, photometric_here=here) for here in (False, True))
    chains = [pil_chain(spec) for spec in specs for _ in range(spec.count)]

    def decode(samples, chains=()):
        reader.expect(samples)
        for number in samples:
            image = Image.open(io.BytesIO(reader(number).image)).convert("RGB")
            for chain in chains:
                chain(image)

    def worker(samples, chunks=on_device):
        reader.expect(samples)
        return chunks.chunk(reader, next(epoch), samples).crops

    def all_cpu(samples):
        for views in worker(samples, in_worker):
            normalized(views)

    epoch = itertools.count()  # new views in every round
    return {"decode_ms": decode, "pil_ms": partial(decode, chains=chains), "worker_ms": worker, "all_cpu_ms": all_cpu}


def dali(index: Index, specs: list[ViewSpec], batch: int) -> Callable:
    """DALI's CPU pipeline with the same operations, as a function of `batch` sample ids."""
    from nvidia.dali import fn, pipeline_def, types

    reader = Reader(index)

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, exec_pipelined=False, exec_async=False)
    def pipeline():
        data = fn.external_source(name="images", dtype=types.UINT8)
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        return tuple(view(image, spec) for spec in specs for _ in range(spec.count))

    def sometimes(p, changed, unchanged):
        dice = fn.cast(fn.random.coin_flip(probability=p), dtype=types.FLOAT)
        return dice * changed + (1 - dice) * unchanged

    def view(image, spec):
        b, c, s, h = spec.jitter
        x = fn.random_resized_crop(image, size=spec.size, random_area=list(spec.scale), random_aspect_ratio=list(spec.ratio))
        brightness, contrast, saturation = (fn.random.uniform(range=(1 - r, 1 + r)) for r in (b, c, s))
        hue = fn.random.uniform(range=(-360 * h, 360 * h))
        jittered = fn.color_twist(x, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        x = sometimes(spec.jitter_p, jittered, x)
        x = sometimes(spec.gray_p, fn.hsv(x, saturation=0.0), x)
        x = sometimes(spec.blur_p, fn.gaussian_blur(x, sigma=fn.random.uniform(range=spec.blur)), x)
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        return fn.crop_mirror_normalize(x, mirror=fn.random.coin_flip(), mean=mean, std=std, dtype=types.FLOAT)

    pipe = pipeline()
    pipe.build()

    def run(samples):
        reader.expect(samples)
        pipe.feed_input("images", [np.frombuffer(reader(number).image, np.uint8) for number in samples])
        pipe.run()

    return run


def medians(measured: dict, samples: np.ndarray, rounds: int) -> dict[str, float]:
    """CPU ms per image of each row. They take turns, and the first round warms up."""
    times = [{name: cpu_ms(work, samples) for name, work in measured.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(turn[name] for turn in times[1:]) for name in measured}


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    specs = VIEWS[args.views]
    with tempfile.TemporaryDirectory() as folder, one_line_errors("benchmarks.input_pipeline"):
        positive(["--images", "--rounds"], args)
        index = load_index(args.shards) if args.shards else photographs(Path(folder), args.images)
        measured = rows(index, specs)
        samples = np.arange(min(args.images, index.total))
        result = medians(measured, samples, args.rounds)
        if find_spec("nvidia") and find_spec("nvidia.dali"):  # last: it returns the process's memory to the system
            result |= medians({"dali_ms": dali(index, specs, len(samples))}, samples, args.rounds)

        print(f"{args.views}, {len(samples)} images, {args.rounds} rounds, torch {torch.__version__}, {platform.machine()}")
        print(f"{'':12}{'CPU ms / image':>16}{'of the PIL chain':>20}{'of decoding':>14}")
        for name, value in result.items():
            print(f"{name[:-3]:12}{value:16.2f}{value / result['pil_ms']:20.3f}{value / result['decode_ms']:14.2f}")
        rates = {}
        for workers in (2**k for k in range(args.workers.bit_length())):
            rates[workers] = images_per_second(index, specs, workers)
            print(f"{workers} workers: {rates[workers]:.0f} images/s")
        print(json.dumps(result | {"views": args.views, "images_per_s": rates}))


if __name__ == "__main__":
    main()
