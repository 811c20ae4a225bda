#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_w2ssl.sh trained.
#   bash linear_w2ssl.sh                         the embedded sample: whole images, SGD, 15 epochs, the best of four rates
#   SHARDS=/imagenet-shards bash linear_w2ssl.sh           ImageNet: batch 256, SGD lr 0.1, 100 epochs
# Expected with ImageNet: top-1 70.8, or 72.8 after pre-training with BATCH=1024 (the authors' figures).
# RECIPE=cifar10 probes the run of that recipe.
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) RECIPE CHECKPOINT BATCH NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
# not the published protocol: a crop of 8 % of 28 pixels shows nothing, and few images give few steps
small=(--size 32 --resize 32 --crop-min 1 --batch-size 64 --lr 0.3 1.2 5 20 --val-fraction 0.1 --epochs 15)
if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=("${small[@]}")
else
    use_recipe cifar10
    recipe=(--size 224 --batch-size 256 --lr 0.1 --epochs 100)
    if [[ ${RECIPE:-} == cifar10 ]]; then recipe=("${small[@]}"); fi
fi
run=w2ssl${BATCH:+-$BATCH}${RECIPE:+-$RECIPE}
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run}
use_checkpoint "$OUTPUT" pretrain_w2ssl.sh "$@"

launch "${PROJECT}"main_lincls.py --method w2ssl --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
