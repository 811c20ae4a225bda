#!/usr/bin/env bash
# MosRep pre-training (ICLR 2023, openreview JAezPMehaUu): MoCo-v2 with mosaics of four local crops.
#   bash pretrain_mosrep.sh                      ResNet-18, 64-pixel views of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_mosrep.sh        ResNet-50, ImageNet, batch 256 in all, lr .03, 200 epochs
# Expected with ImageNet, linear probe (linear_mosrep.sh): top-1 72.3; the authors' figure.
# Add or override any flag: bash pretrain_mosrep.sh --epochs 1. Variables: SHARDS OUTPUT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
use_recipe ""

if [[ $SAMPLE ]]; then
    recipe=(-a resnet18 --size 64 --batch-size 64 --lr 0.24 --epochs 10 --moco-k 2048 --moco-m 0.99 --shift-range 14)
else
    recipe=(-a resnet50 --size 224 --batch-size 256 --lr 0.03 --epochs 200 --moco-k 65536 --moco-m 0.999 --shift-range 48)
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}mosrep}

launch "${PROJECT}"main_pretrain.py --method mosrep --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
