"""Export the trunk of a run to another library, and check that it has the same features there.

    python export.py RUN --to timm -o trunk.pth
    python export.py RUN --to huggingface -o folder --classifier RUN/linear

RUN is a run folder, or a checkpoint in any layout that the evaluations load. OUT gets its name only after the library
has loaded it, and has computed the features of RUN for sample images.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from methods import METHODS
from utils.data.views import side_before_crop
from utils.evaluation.card import card
from utils.evaluation.exports import TARGETS, Export, Loaded, pickled, safetensors
from utils.evaluation.frozen import Frozen, Source, add_weights_flags, build_trunk, read_source
from utils.learning import layouts
from utils.learning.backbones import Network
from utils.learning.released import released
from utils.run import checkpoint, flags
from utils.run.files import atomic_files
from utils.run.log import say
from utils.run.text import brief

PROG, RUN = "export.py", "RUN"
LIMIT = 1e-5  # largest difference of a feature, as a share of the largest feature
IMAGES = 4  # on which features are compared
# the files to write by name, the features that are wanted, and how to load the files: from a path to a model of the images
Parts = tuple[dict[str, bytes], torch.Tensor, Callable[[Path], Loaded]]


def get_args(argv: list[str], source: Source) -> flags.Flags:
    """Parse the flags; some defaults are those of the checkpoint."""
    parser = flags.Parser(prog=PROG, usage="%(prog)s RUN --to LIBRARY -o OUT [flags]", description=__doc__)
    add_weights_flags(parser, METHODS, source)
    add = parser.group("export").add_argument
    add("--to", choices=[*TARGETS, "released"], required=True, help="library; released: the layout of the released code")
    add("-o", "--output", required=True, metavar="OUT", help="file, or folder of huggingface, to write; must not exist")
    add("--branch", help="CMC: the branch to export, l or ab; default: both, which safetensors and released can hold")
    add("--classifier", metavar="PROBE", help="linear probe of RUN whose classifier is exported too: its folder or checkpoint")
    add("--size", type=int, default=source.flags.get("size", 224), help="side of an image in pixels; default: as trained")
    add("--license", metavar="NAME", help="licence of the weights, for the model card of huggingface; default: unknown")
    return parser.parse_args(argv)


def check(args: Namespace, source: Source) -> Path:
    """The path to write. Raises ValueError for flags that cannot work."""
    out, ending = Path(args.output), ".pth.tar" if args.to == "released" else TARGETS[args.to][0]
    flags.positive(["--size"], args)
    if source.path is None:
        raise ValueError(f"{RUN} {args.pretrained}: has no weights to export; pass the folder of a run")
    if out.exists():
        raise ValueError(f"-o {out}: exists; pass another name")
    if not out.name.endswith(ending):
        raise ValueError(f"-o {out}: --to {args.to} needs the ending {ending}; pass {out.name.partition('.')[0]}{ending}")
    if not out.parent.is_dir():
        raise ValueError(f"-o {out}: there is no folder {out.parent}; make it")
    if args.license and args.to != "huggingface":
        raise ValueError(f"--license {args.license}: is for the model card of --to huggingface; leave it out")
    if args.to == "released" and (args.branch or args.classifier):
        other = "--branch" if args.branch else "--classifier"
        raise ValueError(f"--to released: holds the whole checkpoint; leave out {other}")
    return out


def only_network(args: Namespace, networks: dict[str, Network]) -> Network | None:
    """The network to export; None for a whole trunk of several branches. Raises ValueError."""
    if args.branch is not None and args.branch not in networks:
        known = " or ".join(name for name in networks if name)
        fix = f"pass {known}" if known else "leave it out"
        raise ValueError(f"--branch {args.branch}: {args.arch} of {args.method} has no such branch; {fix}")
    if args.branch is None and "" not in networks and args.to != "safetensors":
        fix = f"pass --branch {' or '.join(networks)}" if networks else "pass --to safetensors or released"
        raise ValueError(f"--to {args.to}: cannot hold the trunk {args.arch} of {args.method} as one network; {fix}")
    if args.classifier and "" not in networks:
        raise ValueError(f"--classifier {args.classifier}: belongs to all branches of {args.method} together; leave it out")
    return networks.get(args.branch or "")


def classifier(path: str, source: Source) -> nn.Linear:
    """The classifier of the last layer of a linear probe. Raises ValueError if the probe is of other weights."""
    found = checkpoint.find(path, "--classifier")
    probe, state = found.content.get("probe"), checkpoint.unprefixed(found.content.get("state_dict", {}))
    if not isinstance(probe, dict) or not state:
        raise ValueError(f"--classifier {found.path}: is not a linear probe; pass a folder of results of main_lincls.py")
    if probe.get("weights") != source.sha256:
        raise ValueError(f"--classifier {found.path}: is of another checkpoint than {source.path}; pass a probe of that one")
    name = max(name for name in state if name.endswith(".weight")).removesuffix(".weight")
    head = nn.Linear(*reversed(state[f"{name}.weight"].shape)).requires_grad_(False)
    head.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})
    return head


def all_layers(frozen: Frozen, images: torch.Tensor) -> torch.Tensor:
    """n x 3 x H x W uint8 -> n x C: the features of all layers side by side."""
    return torch.cat([*frozen.features(images, "fp32").values()], 1)


def released_parts(args: Namespace, source: Source, frozen: Frozen, images: torch.Tensor) -> Parts:
    """The whole checkpoint in the layout of the released code."""
    saved = checkpoint.read(source.path or "", RUN)
    if "method" not in saved or "flags" not in saved:
        raise ValueError(f"--to released: {source.path} is not a checkpoint of this code, and its layout stays as it is")

    def load(path: Path) -> Loaded:
        state = layouts.weights_of(checkpoint.read(path, "-o"), f"-o {path}")
        again = build_trunk(args, METHODS[args.method], replace(source, state=state))
        return partial(all_layers, again), f"the linear probe of the released code, or --pretrained {path.name}"

    return {"": pickled(released(saved))}, all_layers(frozen, images), load


def whole_parts(args: Namespace, frozen: Frozen, images: torch.Tensor) -> Parts:
    """All branches of a trunk, in the names of this code."""

    def load(path: Path) -> Loaded:
        probed = METHODS[args.method].frozen(args)
        layouts.load_trunk(probed.trunk, safetensors().load_file(str(path)), probed.classifier, f"-o {path}")
        return partial(all_layers, Frozen(probed)), f'safetensors.torch.load_file("{path.name}")'

    return {"": safetensors().save(frozen.trunk.state_dict())}, all_layers(frozen, images), load


def network_parts(args: Namespace, source: Source, network: Network, images: torch.Tensor) -> Parts:
    """One network, in the names of a library."""
    head = classifier(args.classifier, source) if args.classifier else None
    resize = side_before_crop(args.size)
    text = card(source, network, args.size, resize, args.license or "unknown") if args.to == "huggingface" else ""
    facts = {"method": source.method, "arch": network.arch, "checkpoint_sha256": source.sha256 or ""}
    export = Export(network, args.size, resize, head, text, facts)
    _, files, loaded = TARGETS[args.to]

    def load(path: Path) -> Loaded:
        model, how = loaded(export, path)
        return lambda x: model(network.inputs(x)), how

    return files(export), export.answer(images), load


def compare(images: torch.Tensor, wanted: torch.Tensor, loaded: Loaded, to: str) -> str:
    """The largest difference and how to load the model, for the user. Raises ValueError above LIMIT."""
    model, how = loaded
    found = model(images)
    if found.shape != wanted.shape:
        raise ValueError(f"--to {to}: gives {tuple(found.shape)} numbers, not {tuple(wanted.shape)}; nothing is written")
    difference, largest = (found - wanted).abs().max().item(), wanted.abs().max().item()
    line = f"largest difference {difference:.2g}, largest feature {largest:.3g}"
    if not difference <= LIMIT * largest:
        raise ValueError(f"--to {to}: gives other features ({line}); nothing is written")
    return f"equal features of {len(images)} images ({line})\nLoad it: {how}"


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with flags.one_line_errors(PROG):
        if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
            raise ValueError(f"{RUN}: is the first word; pass {PROG} {RUN} --to LIBRARY -o OUT")
        source = read_source(PROG, METHODS, argv, flag=RUN)
        args = get_args(argv, source)
        out = check(args, source)
        frozen = build_trunk(args, METHODS[args.method], source)
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (IMAGES, 3, args.size, args.size), dtype=torch.uint8, generator=rng)
        if not all_layers(frozen, images).any():
            raise ValueError(f"{RUN} {source.path}: its features are all 0, so they prove nothing; pass another checkpoint")
        if args.to == "released":
            files, wanted, load = released_parts(args, source, frozen, images)
        elif network := only_network(args, METHODS[args.method].networks(frozen.trunk, args)):
            files, wanted, load = network_parts(args, source, network, images)
        else:
            files, wanted, load = whole_parts(args, frozen, images)
        try:
            with atomic_files(out, files) as temporary:
                result = compare(images, wanted, load(temporary), args.to)
        except RuntimeError as error:  # of load_state_dict
            raise ValueError(f"--to {args.to}: does not load the trunk ({brief(str(error))}); nothing is written") from None
        except OSError as error:
            raise ValueError(f"-o {out}: {error.strerror}; pass a place where you may write") from None
    say(f"{out}: {source.facts}; {result}")
    if args.to == "huggingface" and not args.license:
        say("The model card says that the licence is unknown; --license NAME writes it")


if __name__ == "__main__":
    main()
