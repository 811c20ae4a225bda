#!/usr/bin/env bash
# Linear probe of the frozen trunk that pretrain_moco.sh trained; MULTI_CROP=1 for its multi-crop run, RECIPE for its recipes.
#   bash linear_moco.sh                          the embedded sample: whole images, SGD, 15 epochs, the best of four rates
#   SHARDS=/imagenet-shards bash linear_moco.sh            ImageNet: batch 4096, lr 0.2 per 256 (3.2 in all), 90 epochs, LARC
# Expected with ImageNet: top-1 67.7, multi-crop 69.8; the authors' figures (MosRep, ICLR 2023).
#   RECIPE=v1       MoCo-v1: top-1 59.4. Batch 256, SGD lr 30, 60 epochs, on jittered images; RECIPE=v1-100: 73.4, lr 10
#   RECIPE=unmix    Un-Mix: top-1 68.6. Batch 256, SGD lr 30, 100 epochs
# Without RECIPE the flags of the pre-training, in the checkpoint, decide the protocol. A file without flags is MoCo-v2.
# RECIPE=cifar10 probes the run of that recipe.
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) RECIPE CHECKPOINT MULTI_CROP NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"
# not the published protocol: a crop of 8 % of 28 pixels shows nothing, and few images give few steps
small=(--size 32 --resize 32 --crop-min 1 --aug crop --batch-size 64 --lr 0.3 1.2 5 20 --val-fraction 0.1 --trust 0 --epochs 15 --lr-steps)
if [[ $SAMPLE ]]; then
    use_recipe v1 unmix
    recipe=("${small[@]}")
else
    use_recipe v1 v1-100 unmix cifar10
    recipe=(--size 224)
    v1=(--aug v1 --batch-size 256 --trust 0 --epochs 60 --lr-steps 30 40 50 --lr-gamma 0.2)
    case ${RECIPE:-} in
        v1) recipe+=(--lr 30 --crop-min 0.08 "${v1[@]}") ;;
        v1-100) recipe+=(--lr 10 --crop-min 0.2 "${v1[@]}") ;;
        unmix) recipe+=(--lr 30 --batch-size 256 --trust 0 --epochs 100 --lr-steps 60 80 --lr-gamma 0.1) ;;
        cifar10) recipe=("${small[@]}") ;;
    esac
fi
run=moco
if [[ ${MULTI_CROP:-0} == 1 ]]; then run=moco-multicrop; fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run${RECIPE:+-$RECIPE}}
use_checkpoint "$OUTPUT" pretrain_moco.sh "$@"

launch "${PROJECT}"main_lincls.py --method moco --pretrained "$CHECKPOINT" --resume auto \
    --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
