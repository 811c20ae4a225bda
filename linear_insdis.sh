#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_insdis.sh trained.
#   bash linear_insdis.sh                        the embedded sample: whole images, batch 64, SGD lr 1.2 per 256, 15 epochs
#   SHARDS=/imagenet-shards bash linear_insdis.sh          ImageNet: batch 256, SGD lr 30 (ImageNet-100: --lr 10), 60 epochs
# Expected with ImageNet: top-1 58.5 if InsDis was trained with --loss softmax (the authors' figure).
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) CHECKPOINT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}insdis}
use_checkpoint "$OUTPUT" pretrain_insdis.sh "$@"

if [[ $SAMPLE ]]; then
    # not the published protocol: a crop of 8 % of 28 pixels shows nothing, and 6,000 images give few steps
    recipe=(--size 64 --resize 64 --crop-min 1 --batch-size 64 --lr 1.2 --epochs 15 --lr-steps)
else
    recipe=(--size 224 --batch-size 256 --lr 30 --epochs 60)
fi

launch "${PROJECT}"main_lincls.py --method insdis --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
