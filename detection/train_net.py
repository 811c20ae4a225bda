"""Train and test a detector of detectron2 on an exported trunk.

python detection/train_net.py --config-file detection/voc_c4.yaml --num-gpus 8 MODEL.WEIGHTS trunk.pkl
"""

from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5NormHeads(Res5ROIHeads):
    """The C4 head with one more norm after res5, because a trunk with BatchNorm is not frozen (arXiv 1911.05722, appendix)."""

    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        return nn.Sequential(*res5, get_norm(cfg.MODEL.RESNETS.NORM, channels)), channels


class Trainer(DefaultTrainer):
    """detectron2's, with the evaluators of VOC and COCO."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        if dataset_name.startswith("voc"):
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=output_folder or cfg.OUTPUT_DIR)


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return Trainer.test(cfg, trainer.model) if args.eval_only else trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
