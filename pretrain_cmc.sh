#!/usr/bin/env bash
# CMC pre-training (arXiv 1906.05849): the channels of a colour space as two views of one crop,
# each compared with the memory bank of the other.
#   bash pretrain_cmc.sh                      two half-width ResNets-18, 64-pixel views of 1,507 embedded colour pictures
#   SHARDS=/imagenet-shards bash pretrain_cmc.sh   half-width ResNets-50, ImageNet, batch 128, lr .03 in all, 240 epochs, NCE, K 16384
# Expected with ImageNet-100, linear probe (linear_cmc.sh): top-1 75.8 with --loss softmax --space YCbCr; the authors' figure.
# AlexNet: -a alexnet --crop-min 0.2.
# Add or override any flag: bash pretrain_cmc.sh --epochs 1. Variables: SHARDS OUTPUT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_color_shards "$@"

if [[ $SAMPLE ]]; then
    recipe=(-a resnet18v1 --size 64 --crop-min 0.2 --batch-size 32 --lr 0.48 --epochs 40 --nce-k 512 --loss softmax --lr-steps 30 36)
else
    recipe=(-a resnet50v1 --size 224 --batch-size 128 --lr 0.06 --epochs 240 --nce-k 16384)
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}cmc}

launch "${PROJECT}"main_pretrain.py --method cmc --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
