"""Time and memory of the nearest neighbours of main_knn.py, beside the features themselves.

    python -m benchmarks.knn                                         a fortieth of ImageNet's training set, 512 test images
    python -m benchmarks.knn --images 1281167 --queries 64           all of it, few test images
    python -m benchmarks.knn --memory 64 256 1024 --dtype fp32       other limits

The features are random. `plain` multiplies all of them in float32 at once. A row is one new process. The last column is
the CPU time for 50,000 test images and 1,281,167 training images on such cores, in proportion to both numbers.
"""

import argparse
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import step
from utils.evaluation import knn
from utils.evaluation.features import DTYPES, Features
from utils.run.cpu import peak_memory
from utils.run.flags import Parser, one_line_errors, positive

IMAGENET = 1281167, 50000  # training and validation images
MIB = 2**20


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.knn", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=IMAGENET[0] // 40, help="training images")
    add("--queries", type=int, default=512, help="test images")
    add("--width", type=int, default=2048, help="numbers in a feature")
    add("--k", type=int, default=200, help="neighbours of an image")
    add("--memory", type=float, nargs="+", default=[64, 256, 1024], metavar="MIB", help="values of main_knn.py --memory")
    add("--dtype", choices=DTYPES, default="fp16", help="dtype in which the features are kept")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, memory: float | None) -> tuple[float, float]:
    """CPU seconds, and the most bytes beside the features. memory: MiB, None for the plain form. Call in a new process."""
    torch.manual_seed(0)
    train, test = (set_of(images, args) for images in (args.images, args.queries))
    before, start = peak_memory(), time.process_time()
    if memory is None:
        (test.values.float() @ train.values.float().T).topk(args.k)
    else:
        knn.neighbours(train, test, args.k, int(memory * MIB))
    return time.process_time() - start, peak_memory() - before


def set_of(images: int, args: argparse.Namespace) -> Features:
    """Random features of about length 1, made in parts so that they take no more memory than themselves."""
    values = torch.empty(images, args.width, dtype=DTYPES[args.dtype])
    for part in values.split(4096):
        part.copy_(torch.randn(part.shape) / args.width**0.5)
    return Features(values, torch.zeros(images, dtype=torch.long), torch.arange(images), 0)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    with one_line_errors("benchmarks.knn"):
        positive(["--images", "--queries", "--width", "--k"], args)
        results = {}
        for memory in (None, *args.memory):
            with ProcessPoolExecutor(1, step.processes(), max_tasks_per_child=1) as pool:
                seconds, beside = pool.submit(measure, args, memory).result()
            whole = seconds * IMAGENET[0] / args.images * IMAGENET[1] / args.queries
            name = "plain" if memory is None else f"{memory:g}"
            results[name] = {"cpu_s": seconds, "memory_mib": beside / MIB, "imagenet_cpu_h": whole / 3600}
    kept = args.images * args.width * DTYPES[args.dtype].itemsize / MIB
    print(f"{args.images} training images of {args.width} {args.dtype}, {kept:.0f} MiB; {args.queries} test images; "
          f"k {args.k}; torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    print(f"{'--memory':>10}{'CPU s':>10}{'MiB':>10}{'ImageNet CPU h':>16}")
    for name, found in results.items():
        print(f"{name:>10}{found['cpu_s']:10.2f}{found['memory_mib']:10.0f}{found['imagenet_cpu_h']:16.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
