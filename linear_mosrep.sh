#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_mosrep.sh trained.
#   bash linear_mosrep.sh                        the embedded sample: whole images, batch 64, SGD lr 1.2 per 256, 15 epochs
#   SHARDS=/imagenet-shards bash linear_mosrep.sh          ImageNet: batch 4096, lr 0.2 per 256 (3.2 in all), 90 epochs, LARC
# Expected with ImageNet: top-1 72.3; the authors' figure (ICLR 2023).
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) CHECKPOINT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
use_recipe ""
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}mosrep}
use_checkpoint "$OUTPUT" pretrain_mosrep.sh "$@"

if [[ $SAMPLE ]]; then
    # not the published protocol: a crop of 8 % of 28 pixels shows nothing, and 6,000 images give few steps
    recipe=(--size 64 --resize 64 --crop-min 1 --batch-size 64 --lr 1.2 --trust 0 --epochs 15)
else
    recipe=(--size 224 --batch-size 4096 --lr 0.2 --epochs 90)
fi

launch "${PROJECT}"main_lincls.py --method mosrep --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
