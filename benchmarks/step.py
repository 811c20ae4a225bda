"""Time and memory of a training step, beside the straightforward way to write it.

    python -m benchmarks.step                                    every method: ResNet-50, 224 pixels, batch 8
    python -m benchmarks.step --methods moco --batch-size 32     on a GPU, if there is one

`plain` is fp32, contiguous, with the keys' images (of W2SSL the crops) gathered from all processes, a copy of the queue in each
step, all rows of a memory bank copied out at once, an average and an optimizer that go parameter by parameter, queue and
average updated before backward, and torchvision's RoIAlign. `default` is what main_pretrain.py does. Each form has a process of
its own, which takes its turns; printed are medians. Memory is the process's peak beyond what Python and its libraries take, or
the device's own count.
"""

import json
import multiprocessing
import platform
import statistics
import time
from types import SimpleNamespace

import torch
from torchvision.ops import roi_align

import cmc.builder
import main_pretrain
import moco.builder
import mosrep.builder
import w2ssl.builder
from methods import METHODS
from moco.builder import MoCo
from utils.data.photometric import normalized
from utils.learning import amp, optim
from utils.learning.contrast import Step
from utils.run import dist
from utils.run.checkpoint import bare
from utils.run.cpu import keep_freed_memory, peak_memory
from utils.run.engine import Engine, StepInputs
from utils.run.flags import Parser, one_line_errors, positive

CASES = {
    "mosrep": ["mosrep"], "moco": ["moco"], "moco-multicrop": ["moco", "--local-crops", "4"], "w2ssl": ["w2ssl"],
    "cmc": ["cmc"], "insdis": ["insdis"],
}  # fmt: skip


def get_args(argv=None):
    parser = Parser(prog="benchmarks.step", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=CASES, default=list(CASES), help="what to measure")
    add("-a", "--arch", default="resnet50", help="trunk: a timm model")
    add("--size", type=int, default=224, help="side of a view in pixels")
    add("--batch-size", type=int, default=8, help="images in a step")
    add("--moco-k", type=int, default=65536, help="keys in the queue")
    add("--nce-k", type=int, default=16384, help="rows of a memory bank that an image is contrasted with")
    add("--samples", type=int, default=100_000, help="rows of a memory bank; ImageNet has 1281167 images")
    add("--rounds", type=int, default=7, help="turns of each form, after two that warm up")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="where to compute")
    add("--amp", default="auto", choices=["auto", *amp.DTYPES], help="dtype of the default form's encoders")
    add("--compile", action="store_true", help="compile the default form's encoders")
    return parser.parse_args(argv)


def form(pipe, args, case, plain):
    """One form's process: builds the method, says so, then computes a step for each number that it is sent."""
    before = peak_memory()
    device = dist.setup(args.device)
    flags = flags_of(args, case, "fp32" if plain else amp.resolve(args.amp, device), args.batch_size)
    flags.compile = args.compile and not plain
    if plain:
        straightforward()
    elif device.type == "cpu":
        keep_freed_memory()  # as a run does
    method = main_pretrain.build(flags, device).train()
    step = (plain_step if plain else default_step)(method, flags, device)
    views = random_views(METHODS[flags.method].views(flags), args.batch_size, device)
    pixels = count_pixels(method)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        step(views, Step.at(number, 1000, 0))
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(1e3 * (time.perf_counter() - start))
    peak = peak_memory() - before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    pipe.send((peak / 1e6, pixels[0] / (args.batch_size * args.size**2 * pixels[1])))


def flags_of(args, case, amp_name, batch_size):
    """What main_pretrain.py makes of a case's flags."""
    arch = f"{args.arch}v1" if case == "cmc" else args.arch
    flags = ["--arch", arch, "--size", args.size, "--batch-size", batch_size, "--amp", amp_name]
    if case in ("cmc", "insdis"):
        flags += ["--nce-k", args.nce_k]
    elif case != "w2ssl":
        flags += ["--moco-k", args.moco_k]
    if case == "mosrep":
        flags += ["--shift-range", args.size * 48 // 224]
    found = main_pretrain.get_args(["--shards", "none", "--method", *CASES[case], *map(str, flags)])
    found.samples = args.samples
    return found


def random_views(specs, n, device):
    rng = torch.Generator().manual_seed(0)
    shapes = [(n, *([s.count] if s.count > 1 else []), 3, s.size, s.size) for s in specs]
    return [torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8).to(device) for shape in shapes]


def rows_of(views):
    """Sample numbers: this process's images of the global batch."""
    n = len(views[0])
    return torch.arange(dist.rank() * n, (dist.rank() + 1) * n, device=views[0].device)


def count_pixels(method):
    """[pixels that went through the trunks, steps]; a trunk's forward of a whole view per image is worth size x size."""
    seen = [0, 0]

    def add(module, inputs):
        seen[0] += inputs[0].shape[0] * inputs[0].shape[2] * inputs[0].shape[3]

    for module in method.encoders():
        if not isinstance(module, mosrep.builder.Projector):
            module.register_forward_pre_hook(add)
    method.register_forward_pre_hook(lambda *_: seen.__setitem__(1, seen[1] + 1))
    return seen


def default_step(model, flags, device):
    """What main_pretrain.py does in a step."""
    optimizer = optim.sgd(model.parameters(), 0.01, flags.momentum, flags.weight_decay, flags.trust, exclude=True)
    engine = Engine(flags, 1, optimizer, amp.scaler(flags.amp), None, device, None)

    def step(views, now):
        loss, _ = model(views, rows_of(views), now)
        engine.update(loss, StepInputs(0, now.number))
        bare(model).commit(now)

    return step


def plain_step(model, flags, device):
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = 0 if flags.trust else flags.weight_decay
    optimizer = torch.optim.SGD(parameters, 0.01, flags.momentum, weight_decay=decay, foreach=False)

    def step(views, now):
        loss, _ = model([normalized(view) for view in views], rows_of(views), now)
        bare(model).commit(now)
        optimizer.zero_grad()
        loss.backward()
        if flags.trust:
            adapt(parameters, flags)
        optimizer.step()

    return step


@torch.no_grad()
def adapt(parameters, flags):
    """LARS, layer by layer."""
    for p in parameters:
        if p.ndim > 1:
            w, g = p.norm(), p.grad.norm()
            rate = torch.where((w > 0) & (g > 0), flags.trust * w / (g + flags.weight_decay * w), 1)
            p.grad = (p.grad + flags.weight_decay * p) * rate


def straightforward():
    """Turn this process's methods into their plain form."""
    torch.channels_last = torch.contiguous_format

    @torch.no_grad()
    def shuffled_keys(key_forward, x_k, rng):
        permutation = torch.from_numpy(rng.permutation(dist.world() * len(x_k))).to(x_k.device)
        mine = permutation.view(dist.world(), -1)[dist.rank()]
        keys = dist.gather(key_forward(dist.gather(x_k)[mine]))
        return keys[torch.argsort(permutation)]

    @torch.no_grad()
    def ema_(pairs, momentum):
        for query, key in pairs:
            for p_q, p_k in zip(query.parameters(), key.parameters(), strict=True):
                p_k.data = p_k.data * momentum + p_q.data * (1 - momentum)

    def with_a_copy_of_the_queue(real):
        def contrast(self, *args, **kwargs):
            queue = self.queue
            self.queue = queue.clone()
            try:
                return real(self, *args, **kwargs)
            finally:
                self.queue = queue

        return contrast

    def cut_tiles(features, boxes, stride):
        rois = [boxes.to(features.device)] * len(features)
        return roi_align(features.float(), rois, tuple(features.shape[2:]), 1 / stride, aligned=True)

    def permute(x, permutation):
        mine = permutation.reshape(dist.world(), -1)[dist.rank()]
        return dist.gather(x)[torch.from_numpy(mine).to(x.device)]

    def scores(features, bank, rows):
        return torch.einsum("nc,nmc->nm", features, bank[rows])  # n x (1 + K) x C are copied

    cmc.builder.Scores = SimpleNamespace(apply=scores)
    for module in (moco.builder, mosrep.builder):
        module.shuffled_keys = shuffled_keys
    moco.builder.ema_ = w2ssl.builder.ema_ = ema_
    mosrep.builder.cut_tiles = cut_tiles
    w2ssl.builder.dist = SimpleNamespace(**(vars(dist) | {"permute": permute}))
    for method in {MoCo, *METHODS.values()}:
        if "contrast" in vars(method):
            method.contrast = with_a_copy_of_the_queue(method.contrast)


def processes():
    """Where each form gets a process of its own: a new interpreter, or its memory would not be its own."""
    return multiprocessing.get_context("spawn")


def measure(args, case) -> dict[str, float]:
    context, forms = processes(), {}
    for name in ("plain", "default"):
        here, there = context.Pipe()
        process = context.Process(target=form, args=(there, args, case, name == "plain"), daemon=True)
        process.start()
        there.close()
        forms[name] = here
    try:
        for pipe in forms.values():
            pipe.recv()
        times = {name: [] for name in forms}
        for number in range(args.rounds + 2):
            for name, pipe in forms.items():
                pipe.send(number)
                times[name].append(pipe.recv())
        for pipe in forms.values():
            pipe.send(None)
        (plain_mb, _), (default_mb, forwards) = (pipe.recv() for pipe in forms.values())
    except EOFError:
        raise ValueError(f"--methods {case}: its process ended, see above") from None
    plain_ms, default_ms = (statistics.median(t[2:]) for t in times.values())
    return {
        "plain_ms": plain_ms, "default_ms": default_ms, "ratio": default_ms / plain_ms, "plain_mb": plain_mb,
        "default_mb": default_mb, "memory_ratio": default_mb / plain_mb, "forwards_per_image": forwards,
    }  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    with one_line_errors("benchmarks.step"):
        positive(["--rounds", "--batch-size", "--size", "--moco-k", "--nce-k", "--samples"], args)
        results = {case: measure(args, case) for case in args.methods}
    print(f"{args.arch}, {args.size} pixels, batch {args.batch_size}, queue {args.moco_k}, {args.rounds} rounds, "
          f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")  # fmt: skip
    print(
        f"{'':16}{'plain ms':>10}{'default ms':>12}{'ratio':>8}{'plain MB':>10}{'default MB':>12}{'ratio':>8}{'forwards':>10}"
    )
    for case, r in results.items():
        print(f"{case:16}{r['plain_ms']:10.0f}{r['default_ms']:12.0f}{r['ratio']:8.2f}{r['plain_mb']:10.0f}"
              f"{r['default_mb']:12.0f}{r['memory_ratio']:8.2f}{r['forwards_per_image']:10.2f}")  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
