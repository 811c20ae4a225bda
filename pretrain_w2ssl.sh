#!/usr/bin/env bash
# W2SSL pre-training (TCSVT 2023, doi 10.1109/TCSVT.2023.3298937): montages of half images, location loss and crop loss.
#   bash pretrain_w2ssl.sh                       ResNet-18, 64-pixel montages of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_w2ssl.sh   ResNet-50, ImageNet, BATCH 256 montages = 512 images, LARS lr .6, 200 epochs
# Expected with ImageNet, linear probe (linear_w2ssl.sh): top-1 70.8, with BATCH=1024 72.8; the authors' figures.
# Add or override any flag: bash pretrain_w2ssl.sh --epochs 1. Variables: SHARDS OUTPUT BATCH NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
use_recipe ""

if [[ $SAMPLE ]]; then
    recipe=(-a resnet18 --size 64 --batch-size 64 --lr 4.8 --epochs 10 --warmup-epochs 1)
else
    recipe=(-a resnet50 --size 224 --batch-size $((2 * ${BATCH:-256})) --lr 0.6 --epochs 200 --warmup-epochs 10)
fi
run=w2ssl${BATCH:+-$BATCH}
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run}

launch "${PROJECT}"main_pretrain.py --method w2ssl --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
