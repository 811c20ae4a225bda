#!/usr/bin/env bash
# MoCo-v2 pre-training (arXiv 2003.04297); MULTI_CROP=1 adds four 112-pixel crops.
#   bash pretrain_moco.sh                        ResNet-18, 32-pixel views of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_moco.sh          ResNet-50, ImageNet, batch 256 in all, lr .03, 200 epochs
# Expected with ImageNet, linear probe (linear_moco.sh): top-1 67.7, multi-crop 69.8; the authors' figures (MosRep, ICLR 2023).
# Other published recipes; the probe takes the same RECIPE:
#   RECIPE=v1       MoCo-v1, ImageNet: top-1 59.4. Batch 128, lr .03 in all, K 16384, 200 epochs; 4 GPUs x 32 images: NPROC=4
#   RECIPE=v1-100   MoCo-v1, ImageNet-100: top-1 73.4. The same with 240 epochs and crops from 20 %
#   RECIPE=unmix    Un-Mix, ImageNet: top-1 68.6
# RECIPE=cifar10 is ours for photographs of 32 pixels (docs/results.md): SHARDS of imagenet2wds.py --dataset CIFAR10.
# Add or override any flag: bash pretrain_moco.sh --epochs 1. Variables: SHARDS OUTPUT RECIPE MULTI_CROP NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"

run=moco crops=() epochs=(16 25) # of the sample, of CIFAR-10
if [[ ${MULTI_CROP:-0} == 1 ]]; then # about the same time
    run=moco-multicrop crops=(--local-crops 4 --local-scale 0.1 0.6) epochs=(7 9)
fi
small=(--size 32 --output-stride 8 --batch-size 64 --lr 0.24 --moco-k 2048 --moco-m 0.99 --bn-splits 2)
v1=(--moco-head linear --aug v1 --moco-t 0.07 --amp fp32) # MoCo-v1, of the CMC authors' code
if [[ $SAMPLE ]]; then
    use_recipe v1 unmix
    recipe=(-a resnet18 "${small[@]}" --epochs "${epochs[0]}")
    if [[ ${RECIPE:-} == v1 ]]; then recipe+=("${v1[@]}" --lr-steps 11 14); fi
else
    use_recipe v1 v1-100 unmix cifar10
    recipe=(-a resnet50 --size 224 --moco-m 0.999)
    case ${RECIPE:-} in
        v1) recipe+=(--batch-size 128 --lr 0.06 --epochs 200 --lr-steps 120 160 --moco-k 16384 --crop-min 0.08 "${v1[@]}") ;;
        v1-100) recipe+=(--batch-size 128 --lr 0.06 --epochs 240 --lr-steps 120 160 200 --moco-k 16384 --crop-min 0.2 "${v1[@]}") ;;
        cifar10) recipe=(-a resnet10t "${small[@]}" --epochs "${epochs[1]}") ;;
        *) recipe+=(--batch-size 256 --lr 0.03 --epochs 200 --moco-k 65536) ;;
    esac
fi
if [[ ${RECIPE:-} == unmix ]]; then recipe+=(--unmix-prob 0.5); fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$run${RECIPE:+-$RECIPE}}

launch "${PROJECT}"main_pretrain.py --method moco --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "${crops[@]}" "$@"
