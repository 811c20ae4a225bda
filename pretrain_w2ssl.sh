#!/usr/bin/env bash
# W2SSL pre-training (TCSVT 2023, doi 10.1109/TCSVT.2023.3298937): montages of half images, location loss and crop loss.
#   bash pretrain_w2ssl.sh                       ResNet-18, 32-pixel montages of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_w2ssl.sh   ResNet-50, ImageNet, BATCH 256 montages = 512 images, LARS lr .6, 200 epochs
# Expected with ImageNet, linear probe (linear_w2ssl.sh): top-1 70.8, with BATCH=1024 72.8; the authors' figures.
# RECIPE=cifar10 is ours for photographs of 32 pixels (docs/results.md): SHARDS of imagenet2wds.py --dataset CIFAR10.
# Add or override any flag: bash pretrain_w2ssl.sh --epochs 1. Variables: SHARDS OUTPUT RECIPE BATCH NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"

small=(--size 32 --output-stride 8 --batch-size 64 --lr 4.8 --warmup-epochs 1)
if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=(-a resnet18 "${small[@]}" --epochs 12)
else
    use_recipe cifar10
    recipe=(-a resnet50 --size 224 --batch-size $((2 * ${BATCH:-256})) --lr 0.6 --epochs 200 --warmup-epochs 10)
    if [[ ${RECIPE:-} == cifar10 ]]; then recipe=(-a resnet10t "${small[@]}" --epochs 20); fi
fi
run=w2ssl${BATCH:+-$BATCH}${RECIPE:+-$RECIPE}
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run}

launch "${PROJECT}"main_pretrain.py --method w2ssl --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
