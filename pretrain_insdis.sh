#!/usr/bin/env bash
# InsDis pre-training (arXiv 1805.01978): instance discrimination with a memory bank.
#   bash pretrain_insdis.sh                      ResNet-18, 32-pixel views of the embedded 6,000 images of Fashion-MNIST
#   SHARDS=/imagenet-shards bash pretrain_insdis.sh        ResNet-50, ImageNet, batch 128, lr .03 in all, 240 epochs, NCE, K 16384
# The published recipes, with the authors' figures (of CMC's code) in the linear probe; linear_insdis.sh takes the same RECIPE.
# On ImageNet they have 200 epochs, lr x .1 after 120 and 160. All had 4 GPUs x 32 images: NPROC=4.
#   RECIPE=softmax        top-1 58.5, K 16384        RECIPE=softmax-4096   top-1 57.1, K 4096
#   RECIPE=nce-4096       top-1 56.5, NCE, K 4096    RECIPE=100            ImageNet-100, top-1 69.1: softmax, 240 epochs
# RECIPE=cifar10 is ours for photographs of 32 pixels (docs/results.md): SHARDS of imagenet2wds.py --dataset CIFAR10.
# Add or override any flag: bash pretrain_insdis.sh --epochs 1. Variables: SHARDS OUTPUT RECIPE NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_shards "$@"

small=(--size 32 --output-stride 8 --crop-min 0.2 --batch-size 64 --lr 0.06 --lr-steps --nce-k 1024 --nce-t 0.1 --loss softmax
    --fill-banks --amp auto)
if [[ $SAMPLE ]]; then
    use_recipe ""
    recipe=(-a resnet18 "${small[@]}" --epochs 20)
else
    use_recipe softmax softmax-4096 nce-4096 100 cifar10
    recipe=(-a resnet50 --size 224 --batch-size 128 --lr 0.06)
    case ${RECIPE:-} in
        softmax) recipe+=(--loss softmax --nce-k 16384 --epochs 200 --lr-steps 120 160) ;;
        softmax-4096) recipe+=(--loss softmax --nce-k 4096 --epochs 200 --lr-steps 120 160) ;;
        nce-4096) recipe+=(--loss nce --nce-k 4096 --epochs 200 --lr-steps 120 160) ;;
        cifar10) recipe=(-a resnet10t "${small[@]}" --epochs 38) ;;
        100) recipe+=(--loss softmax --nce-k 16384 --epochs 240 --crop-min 0.2) ;;
        *) recipe+=(--loss nce --nce-k 16384 --epochs 240) ;;
    esac
fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}insdis${RECIPE:+-$RECIPE}}

launch "${PROJECT}"main_pretrain.py --method insdis --shards "$TRAIN" --output-dir "$OUTPUT" --resume auto "${recipe[@]}" "$@"
