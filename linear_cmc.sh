#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_cmc.sh trained.
#   bash linear_cmc.sh                           the embedded colour pictures, not cropped: batch 64, SGD lr 1.2 per 256, 60 epochs
#   SHARDS=/imagenet-shards bash linear_cmc.sh             ImageNet: batch 256, 60 epochs, SGD lr 30 (v1, v2), 50 (v3), .1 (AlexNet)
#   SHARDS=/imagenet-shards bash linear_cmc.sh --layer 1 2 3 4 5        all layers of an AlexNet in one pass
# RECIPE is that of pretrain_cmc.sh: cifar10, or 100 with crops from 20 %. Expected with ImageNet-100: top-1 75.8 (the authors' figure).
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) RECIPE CHECKPOINT NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_color_shards "$@"
if [[ $SAMPLE ]]; then
    use_recipe ""
    # not the published protocol: a crop of 8 % of 64 pixels shows little, and 1,507 images give few steps
    recipe=(--size 64 --resize 64 --crop-min 1 --batch-size 64 --lr 1.2 --epochs 60)
else
    use_recipe 100 cifar10
    recipe=(--size 224 --batch-size 256 --epochs 60)
    case ${RECIPE:-} in
        cifar10) recipe=(--size 64 --resize 64 --crop-min 1 --batch-size 64 --lr 0.3 1.2 5 20 --val-fraction 0.1 --epochs 15 --lr-steps) ;;
        100) recipe+=(--crop-min 0.2) ;;
    esac
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}cmc${RECIPE:+-$RECIPE}}
use_checkpoint "$OUTPUT" pretrain_cmc.sh "$@"

launch "${PROJECT}"main_lincls.py --method cmc --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
