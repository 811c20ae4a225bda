#!/usr/bin/env bash
# InsDis pre-training (arXiv 1805.01978): instance discrimination with a memory bank.
#   bash pretrain_insdis.sh                      ResNet-18, 64-pixel views of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_insdis.sh        ResNet-50, ImageNet, batch 128, lr .03 in all, 240 epochs, NCE, K 16384
# Expected with ImageNet, linear probe (linear_insdis.sh): top-1 58.5 with --loss softmax; the authors' figure (of CMC's code).
# Add or override any flag: bash pretrain_insdis.sh --epochs 1. Variables: SHARDS OUTPUT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"

if [[ $SAMPLE ]]; then
    recipe=(-a resnet18 --size 64 --crop-min 0.2 --batch-size 64 --lr 0.24 --epochs 6 --nce-k 1024 --loss softmax --lr-steps 4 5)
else
    recipe=(-a resnet50 --size 224 --batch-size 128 --lr 0.06 --epochs 240 --nce-k 16384)
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}insdis}

launch "${PROJECT}"main_pretrain.py --method insdis --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
