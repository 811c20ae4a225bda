#!/usr/bin/env bash
# MosRep pre-training (ICLR 2023, openreview JAezPMehaUu): MoCo-v2 with mosaics of four local crops.
#   bash pretrain_mosrep.sh                      ResNet-18, 32-pixel views of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_mosrep.sh        ResNet-50, ImageNet, batch 256 in all, lr .03, 200 epochs
# Expected with ImageNet, linear probe (linear_mosrep.sh): top-1 72.3; the authors' figure.
# RECIPE=cifar10 is ours for photographs of 32 pixels (docs/results.md): SHARDS of imagenet2wds.py --dataset CIFAR10.
# Add or override any flag: bash pretrain_mosrep.sh --epochs 1. Variables: SHARDS OUTPUT RECIPE NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"

small=(--size 32 --output-stride 8 --batch-size 64 --lr 0.24 --moco-k 2048 --moco-m 0.99 --bn-splits 2 --shift-range 7)
if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=(-a resnet18 "${small[@]}" --epochs 10)
else
    use_recipe cifar10
    recipe=(-a resnet50 --size 224 --batch-size 256 --lr 0.03 --epochs 200 --moco-k 65536 --moco-m 0.999 --shift-range 48)
    if [[ ${RECIPE:-} == cifar10 ]]; then recipe=(-a resnet10t "${small[@]}" --epochs 11); fi
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}mosrep${RECIPE:+-$RECIPE}}

launch "${PROJECT}"main_pretrain.py --method mosrep --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
