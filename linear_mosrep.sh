#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_mosrep.sh trained.
#   bash linear_mosrep.sh                        the embedded sample: whole images, SGD, 15 epochs, the best of four rates
#   SHARDS=/imagenet-shards bash linear_mosrep.sh          ImageNet: batch 4096, lr 0.2 per 256 (3.2 in all), 90 epochs, LARC
# Expected with ImageNet: top-1 72.3; the authors' figure (ICLR 2023).
# RECIPE=cifar10 probes the run of that recipe.
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) RECIPE CHECKPOINT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
# not the published protocol: a crop of 8 % of 28 pixels shows nothing, and few images give few steps
small=(--size 32 --resize 32 --crop-min 1 --batch-size 64 --lr 0.3 1.2 5 20 --val-fraction 0.1 --trust 0 --epochs 15)
if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=("${small[@]}")
else
    use_recipe cifar10
    recipe=(--size 224 --batch-size 4096 --lr 0.2 --epochs 90)
    if [[ ${RECIPE:-} == cifar10 ]]; then recipe=("${small[@]}"); fi
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}mosrep${RECIPE:+-$RECIPE}}
use_checkpoint "$OUTPUT" pretrain_mosrep.sh "$@"

launch "${PROJECT}"main_lincls.py --method mosrep --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
