"""MoCo-v2 (arXiv 1911.05722, 2003.04297), with two crops or with local crops on the query side (multi-crop), and MoCo-v1."""

import torch
from torch import nn
from torch.nn.functional import normalize

from utils.data.views import ViewSpec, moco_v1_view, moco_v2_view
from utils.evaluation.probe import timm_trunk
from utils.learning import backbones, layouts, mixture
from utils.learning.contrast import Step, ema_, embed, enqueue_, key_copy, shuffled_keys
from utils.learning.criterion import criterion
from utils.run import dist
from utils.run.flags import in_range, positive


class MoCo(nn.Module):
    """Query encoder, its moving average as key encoder, and a queue of the newest keys."""

    # the linear probe of MosRep's table; the released script scaled its lr twice, 0.2 scaled once is the same effective 3.2
    PROBE = {"epochs": 90, "batch_size": 4096, "lr": 0.2, "trust": 0.001}

    @staticmethod
    def add_flags(group):
        MoCo.add_shared_flags(group)
        group.add_argument("--local-crops", type=int, default=0, help="local crops, of half the size, on the query side")
        group.add_argument("--moco-head", choices=["mlp", "linear"], default="mlp", help="head: of MoCo-v2, or of MoCo-v1")
        group.add_argument("--loss", choices=["softmax", "nce"], default="softmax", help="InfoNCE, or MoCo-v1's NCE")
        mixture.add_flags(group)
        group.add_argument("--unmix-prob", type=float,
                           help="Un-Mix: probability of mixup, else CutMix; published 0.5; left out: no Un-Mix")  # fmt: skip
        group.add_argument("--aug", choices=["v2", "v1"], default="v2", help="augmentation of MoCo-v2 or of MoCo-v1")

    @staticmethod
    def add_shared_flags(group):
        backbones.add_flags(group, default=0)
        group.add_argument("--bn-splits", type=int, default=1,
                           help="groups of a process's batch that BatchNorm treats as separate processes")  # fmt: skip
        group.add_argument("--size", type=int, default=224, help="side of a global view in pixels; local crops have half of it")
        group.add_argument("--crop-min", type=float, default=0.2, help="smallest area of a global crop, as share of the image")
        group.add_argument("--local-scale", type=float, nargs=2, default=[0.1, 0.6], metavar=("MIN", "MAX"),
                           help="area of a local crop, as a share of the image")  # fmt: skip
        group.add_argument("--moco-dim", type=int, default=128, help="dimensions of an embedding")
        group.add_argument("--moco-k", type=int, default=65536, help="keys in the queue; a multiple of the batch size")
        group.add_argument("--moco-m", type=float, default=0.999, help="momentum of the key encoder's moving average")
        group.add_argument("--moco-t", type=float, default=0.2, help="temperature of the logits")

    @staticmethod
    def check(args, samples):
        positive(["--size", "--moco-dim", "--moco-k", "--moco-t"], args)
        in_range("--moco-m", args.moco_m, 0, 1)
        in_range("--crop-min", args.crop_min, 1e-8, 1)
        low, high = args.local_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"--local-scale {low} {high}: must be 0 < MIN <= MAX <= 1")
        if args.moco_k % args.batch_size:
            down = args.moco_k // args.batch_size * args.batch_size
            fits = f"{down} or {down + args.batch_size}" if down else f"{args.batch_size}"
            raise ValueError(f"--moco-k {args.moco_k}: must be a multiple of --batch-size {args.batch_size}; {fits} would do")
        if args.moco_k > samples and dist.rank() == 0:
            print(f"warning: --moco-k {args.moco_k} is larger than the data set ({samples} images): "
                  "an image's own older keys are among its negatives")  # fmt: skip
        if args.method == "moco":
            MoCo.check_own(args)

    @staticmethod
    def check_own(args):
        mixture.check(args)
        if args.unmix_prob is not None:
            in_range("--unmix-prob", args.unmix_prob, 0, 1)
        if args.local_crops < 0:
            raise ValueError(f"--local-crops {args.local_crops}: must be 0 or more; 4 is the published multi-crop")
        whole_images = {"--aug": "v1" if args.aug == "v1" else None, "--im-type": args.im_type, "--unmix-prob": args.unmix_prob}
        one_kind = {"--local-crops": args.local_crops or None, "--unmix-prob": args.unmix_prob}
        for flag, value in whole_images.items():
            if args.local_crops and value is not None:
                raise ValueError(f"{flag} {value}: is for two crops; leave out --local-crops {args.local_crops}")
        for flag, value in one_kind.items():
            if args.loss == "nce" and value is not None:
                raise ValueError(f"--loss nce: has one Z, for queries of one kind; leave out {flag} {value}")

    @staticmethod
    def views(args) -> list[ViewSpec]:
        view = moco_v1_view if getattr(args, "aug", "v2") == "v1" else moco_v2_view
        whole = [view(name, args.size, (args.crop_min, 1.0)) for name in ("query", "key")]
        local = moco_v2_view("local", args.size // 2, tuple(args.local_scale), args.local_crops)
        return [*whole, local] if args.local_crops else whole

    frozen, add_probe_flags = staticmethod(timm_trunk), staticmethod(backbones.add_flags)  # what a probe trains on

    @staticmethod
    def trunk(state_dict, args):
        return layouts.trunk_state(state_dict)

    def __init__(self, args):
        super().__init__()
        self.amp, self.bn_splits = args.amp, args.bn_splits
        self.momentum, self.local_crops = args.moco_m, args.local_crops
        self.mixture = mixture.Mixture(args) if "im_type" in args else None  # MosRep has no such flag
        self.unmix_prob = getattr(args, "unmix_prob", None)
        self.criterion = criterion(getattr(args, "loss", "softmax"), args.moco_t, getattr(args, "samples", 0))
        self.build_encoders(args)
        self.register_buffer("queue", normalize(torch.randn(args.moco_dim, args.moco_k), dim=0))  # C x K
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def build_encoders(self, args):
        smallest = args.size // 2 if args.local_crops else args.size
        backbones.feature_shape(backbones.build_trunk(args), args.arch, args.size, smallest)  # refuses what cannot work
        self.encoder_q, self.encoder_k = (self.encoder(args) for _ in range(2))
        key_copy(self.encoder_q, self.encoder_k)

    @staticmethod
    def encoder(args):
        """A timm model with MoCo-v2's head as classifier, Linear - ReLU - Linear (2003.04297, table 1), or MoCo-v1's Linear."""
        model = backbones.build(args.arch, args.output_stride, num_classes=args.moco_dim)
        if args.moco_head == "linear":
            return model
        name = backbones.classifier_name(model)
        last = model.get_submodule(name)
        width = last.in_features
        model.set_submodule(name, nn.Sequential(nn.Linear(width, width), nn.ReLU(), last))
        return model

    def pairs(self):
        """(query module, key module) of everything that the key side averages."""
        return [(self.encoder_q, self.encoder_k)]

    def encoders(self):
        """The modules that --compile compiles."""
        return [module for pair in self.pairs() for module in pair]

    def embed_q(self, x):  # n x 3 x H x W -> n x C
        return self.embed(self.encoder_q, x)

    def embed_k(self, x):
        return self.embed(self.encoder_k, x)

    def embed(self, encoder, x):
        return embed(encoder, x, self.amp, self.bn_splits)

    def contrast(self, q, k):
        """Column 0 is the positive, the others are the queue. q, k: n x C."""
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue], dim=1)  # n x (1 + K)
        return self.criterion(logits)

    def chance(self, batch: int) -> float:
        """The loss of guessing, summed over the terms of the loss."""
        terms = 2 if self.local_crops or self.unmix_prob is not None else 1
        return terms * self.criterion.chance(1 + self.queue.shape[1])

    def forward(self, views, index, step: Step):
        x_q, x_k, *local = views  # n x 3 x H x W each; local n x V x 3 x h x w
        if self.mixture:
            x_q, x_k = self.mixture([x_q, x_k], step.rng)
        self.new_keys = keys = shuffled_keys(self.embed_k, x_k, step.rng)  # N x C
        k = dist.own(keys, len(x_k))  # n x C
        loss, top1 = self.contrast(self.embed_q(x_q), k)
        stats = {"top1": top1}
        if self.unmix_prob is not None:
            x_mix, share = mixture.un_mix(x_q, self.unmix_prob, self.bn_splits, step.rng)
            q_mix = self.embed_q(x_mix)
            itself, other = (self.contrast(q, k)[0] for q in (q_mix, mixture.backwards(q_mix, self.bn_splits)))
            loss_mix = share * itself + (1 - share) * other
            stats |= {"loss_plain": loss.detach(), "loss_mix": loss_mix.detach()}
            loss = loss + loss_mix
        if local:
            crops = local[0].flatten(0, 1)  # n V x 3 x h x w
            loss_local, top1_local = self.contrast(self.embed_q(crops), k.repeat_interleave(self.local_crops, 0))
            stats |= {"loss_global": loss.detach(), "loss_local": loss_local.detach(), "top1_local": top1_local}
            loss = loss + loss_local
        return loss, stats

    @torch.no_grad()
    def commit(self, step: Step):
        """After the optimizer's update: the key side follows, and the queue takes the keys, which backward was not to see."""
        ema_(self.pairs(), self.momentum)
        enqueue_(self.queue, self.queue_ptr, self.new_keys)
        self.criterion.commit()
