#!/usr/bin/env bash
# CMC pre-training (arXiv 1906.05849): the channels of a colour space as two views of one crop,
# each compared with the memory bank of the other.
#   bash pretrain_cmc.sh                      two half-width ResNets-18, 64-pixel views of 1,507 embedded colour pictures
#   SHARDS=/imagenet-shards bash pretrain_cmc.sh   half-width ResNets-50, ImageNet, batch 128, lr .03 in all, 240 epochs, NCE, K 16384
# RECIPE=100 is the published recipe of ImageNet-100: softmax, YCbCr, K 4096, crops from 20 %. Expected in the linear probe
# (linear_cmc.sh with the same RECIPE): top-1 75.8; the authors' figure.
# AlexNet: -a alexnet --crop-min 0.2. More views: --views L ab Y CbCr, with --graph core for L and each other one.
# RECIPE=cifar10 is ours for photographs of 32 pixels (docs/results.md): SHARDS of imagenet2wds.py --dataset CIFAR10.
# Add or override any flag: bash pretrain_cmc.sh --epochs 1. Variables: SHARDS OUTPUT RECIPE NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_color_shards "$@"

if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=(-a resnet18v1 --size 64 --crop-min 0.2 --batch-size 32 --lr 0.48 --epochs 40 --nce-k 512 --loss softmax --lr-steps 30 36)
else
    use_recipe 100 cifar10
    recipe=(-a resnet50v1 --size 224 --batch-size 128 --lr 0.06 --epochs 240)
    case ${RECIPE:-} in
        cifar10)
            recipe=(-a resnet18v1 --size 64 --crop-min 0.2 --batch-size 64 --lr 0.12 --lr-steps --epochs 28 --nce-k 1024 --loss softmax
                --fill-banks --amp auto)
            ;;
        100) recipe+=(--loss softmax --space YCbCr --nce-k 4096 --crop-min 0.2) ;;
        *) recipe+=(--loss nce --nce-k 16384) ;;
    esac
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}cmc${RECIPE:+-$RECIPE}}

launch "${PROJECT}"main_pretrain.py --method cmc --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
