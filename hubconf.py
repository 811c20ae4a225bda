"""torch.hub: the trunks of all methods. Needs torch, torchvision and timm.

    model = torch.hub.load("PATH_OF_THIS_CODE", "mosrep_resnet50", source="local", weights="RUN_OR_FILE")
    model = torch.hub.load("PATH_OF_THIS_CODE", "trunk", source="local", weights="RUN_OR_FILE")      # any method and arch

The model takes n x 3 x H x W images, normalized with ImageNet's mean and standard deviation. It gives n x C features.
"""

dependencies = ["torch", "torchvision", "timm"]

from torch import nn as _nn  # noqa: E402  torch.hub lists the names without underscore

from methods import METHODS as _METHODS  # noqa: E402
from utils.evaluation import frozen as _frozen  # noqa: E402
from utils.run.flags import Parser as _Parser  # noqa: E402


class _Features(_nn.Module):
    """The features of several branches side by side, without gradient."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):  # n x 3 x H x W -> n x C
        (features,) = self.trunk.features(x, "fp32").values()
        return features


def _load(weights, *flags, size=224):
    argv = [str(weights or "random"), *flags]
    source = _frozen.read_source("torch.hub", _METHODS, argv, flag="weights")
    parser = _Parser(prog="torch.hub")
    _frozen.add_weights_flags(parser, _METHODS, source)
    args = parser.parse_args(argv)
    args.size = size
    method = _METHODS[args.method]
    trunk = _frozen.build_trunk(args, method, source)
    trunk.choose(None, args.arch)
    networks = method.networks(trunk.trunk, args)
    return networks[""].model.requires_grad_(True) if "" in networks else _Features(trunk)


def trunk(weights, size=224, space=None):
    """The trunk of a run, or of a checkpoint of any layout that the evaluations load; in eval mode, without classifier.

    weights: a folder, a file or a name of weights.json. size: side of the images, where the trunk depends on it. space: the
    colour space of a CMC checkpoint that does not name its own.
    """
    return _load(weights, *(["--space", space] if space else []), size=size)


def _entry(method, arch):
    def load(weights=None, size=224):
        return _load(weights, "--method", method, "--arch", arch, size=size)

    load.__doc__ = f"The trunk {arch} of {method}; see `trunk`. weights None: untrained."
    return load


globals().update({f"{name}_{method.ARCH}": _entry(name, method.ARCH) for name, method in _METHODS.items()})
