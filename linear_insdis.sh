#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_insdis.sh trained.
#   bash linear_insdis.sh                        the embedded sample: whole images, SGD, 15 epochs, the best of four rates
#   SHARDS=/imagenet-shards bash linear_insdis.sh          ImageNet: batch 256, SGD lr 30, 60 epochs, on jittered images
# RECIPE is that of pretrain_insdis.sh. Expected: top-1 58.5 (softmax), 57.1 (softmax-4096), 56.5 (nce-4096), and 69.1 on
# ImageNet-100 (100, with lr 10); the authors' figures. RECIPE=cifar10 is ours (docs/results.md).
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) RECIPE CHECKPOINT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
# not the published protocol: a crop of 8 % of 28 pixels shows nothing, and few images give few steps
small=(--size 32 --resize 32 --crop-min 1 --aug crop --batch-size 64 --lr 0.3 1.2 5 20 --val-fraction 0.1 --epochs 15 --lr-steps)
if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=("${small[@]}")
else
    use_recipe softmax softmax-4096 nce-4096 100 cifar10
    recipe=(--size 224 --batch-size 256 --epochs 60)
    case ${RECIPE:-} in
        cifar10) recipe=("${small[@]}") ;;
        100) recipe+=(--lr 10 --crop-min 0.2) ;;
        *) recipe+=(--lr 30) ;;
    esac
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}insdis${RECIPE:+-$RECIPE}}
use_checkpoint "$OUTPUT" pretrain_insdis.sh "$@"

launch "${PROJECT}"main_lincls.py --method insdis --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
