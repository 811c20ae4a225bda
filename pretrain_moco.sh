#!/usr/bin/env bash
# MoCo-v2 pre-training (arXiv 2003.04297); MULTI_CROP=1 adds four 112-pixel crops.
#   bash pretrain_moco.sh                        ResNet-18, 64-pixel views of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_moco.sh          ResNet-50, ImageNet, batch 256 in all, lr .03, 200 epochs
# Expected with ImageNet, linear probe (linear_moco.sh): top-1 67.7, multi-crop 69.8; the authors' figures (MosRep, ICLR 2023).
# Add or override any flag: bash pretrain_moco.sh --epochs 1. Variables: SHARDS OUTPUT MULTI_CROP NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"

if [[ $SAMPLE ]]; then
    recipe=(-a resnet18 --size 64 --batch-size 64 --lr 0.24 --epochs 10 --moco-k 2048 --moco-m 0.99)
else
    recipe=(-a resnet50 --size 224 --batch-size 256 --lr 0.03 --epochs 200 --moco-k 65536 --moco-m 0.999)
fi
run=moco
if [[ ${MULTI_CROP:-0} == 1 ]]; then
    recipe+=(--local-crops 4 --local-scale 0.1 0.6)
    run=moco-multicrop
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run}

launch "${PROJECT}"main_pretrain.py --method moco --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
