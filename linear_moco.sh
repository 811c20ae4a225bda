#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_moco.sh trained; MULTI_CROP=1 for its multi-crop run.
#   bash linear_moco.sh                          the embedded sample: whole images, batch 64, SGD lr 1.2 per 256, 15 epochs
#   SHARDS=/imagenet-shards bash linear_moco.sh            ImageNet: batch 4096, lr 0.2 per 256 (3.2 in all), 90 epochs, LARC
# Expected with ImageNet: top-1 67.7, multi-crop 69.8; the authors' figures (MosRep, ICLR 2023).
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) CHECKPOINT MULTI_CROP NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
if [[ ${MULTI_CROP:-0} == 1 ]]; then run=moco-multicrop; else run=moco; fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run}
use_checkpoint "$OUTPUT" pretrain_moco.sh "$@"

if [[ $SAMPLE ]]; then
    # not the published protocol: a crop of 8 % of 28 pixels shows nothing, and 6,000 images give few steps
    recipe=(--size 64 --resize 64 --crop-min 1 --batch-size 64 --lr 1.2 --trust 0 --epochs 15)
else
    recipe=(--size 224 --batch-size 4096 --lr 0.2 --epochs 90)
fi

launch "${PROJECT}"main_lincls.py --method moco --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
