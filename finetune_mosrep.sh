#!/usr/bin/env bash
# Fine-tuning of the trunk that pretrain_mosrep.sh trained, with a part of the labels or with all. finetune_METHOD.sh do the same.
#   bash finetune_mosrep.sh                                the embedded sample: 10 % of its labels, batch 64, 20 epochs
#   RECIPE=1percent IMAGES=1percent.txt SHARDS=/imagenet-shards bash finetune_mosrep.sh
#   RECIPE=transfer SHARDS=/food101-shards OUTPUT=output/mosrep bash finetune_mosrep.sh --lr 0.4 --lr-head 0.4
# RECIPE, rates of trunk and head for a batch of 256:
#   1percent, 10percent: SwAV's, batch 256, 20 epochs, x .2 after 12 and 16, .02 and 5, .01 and .2
#   barlow-1percent: Barlow Twins', batch 256, 20 epochs, cosine, .005 and .5
#   transfer: all labels, 5,000 steps of 64 images, Nesterov, cosine; choose the rate (.0004 .004 .04 .4) and --weight-decay on a
#   validation part (Kornblith et al., arXiv 1805.08974, as ssl-transfer runs it)
# IMAGES: the list of file names, imagenet_subsets/ of github.com/google-research/simclr; IMAGES=all: SHARDS has only those images.
# Expected with ImageNet: 1percent top-1 52.8, 10percent 65.7, the authors' figures (ICLR 2023); their own settings are not published.
# Add or override any flag. Variables: SHARDS OUTPUT (the run's folder) CHECKPOINT RECIPE IMAGES NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
METHOD=${METHOD:-mosrep}
for name in MULTI_CROP BATCH; do # these choose a run of pre-training
    [[ ${!name:-0} == 0 ]] || die "$name=${!name}: does not choose the run here; leave it out and set OUTPUT, such as OUTPUT=output/$METHOD"
done
use_environment requirements.txt
if [[ $METHOD == cmc ]]; then use_color_shards "$@"; else use_shards "$@"; fi
OUTPUT=${OUTPUT:-${PROJECT}output/${SAMPLE:+sample-}$METHOD}
use_checkpoint "$OUTPUT" "pretrain_$METHOD.sh" "$@"

if [[ $SAMPLE ]]; then
    use_recipe
    case $METHOD in cmc) side=64 ;; *) side=32 ;; esac
    # not a published protocol: few labels give few steps
    recipe=(--size "$side" --resize "$side" --crop-min 0.5 --batch-size 64 --lr 0.04 --lr-head 0.4 --lr-steps --eval-every 5)
    if [[ $METHOD != cmc && ! ${IMAGES:-} ]]; then # the shards are in random order
        IMAGES=${TRAIN%/train}/10percent.txt
        head -n 600 "$TRAIN/names.txt" >"$IMAGES"
    fi
else
    use_recipe 1percent 10percent barlow-1percent transfer
    case ${RECIPE:=10percent} in
        1percent) recipe=(--lr 0.02 --lr-head 5) ;;
        10percent) recipe=(--lr 0.01 --lr-head 0.2) ;;
        barlow-1percent) recipe=(--lr 0.005 --lr-head 0.5 --lr-steps) ;;
        transfer) recipe=(--steps 5000 --batch-size 64 --nesterov --lr 0.04 --lr-head 0.04 --lr-steps) IMAGES=${IMAGES:-all} ;;
    esac
    if [[ ! ${IMAGES:-} && " ${*//_/-}" != *" --images"[=\ ]* ]]; then
        die "RECIPE=$RECIPE: set IMAGES to SimCLR's ${RECIPE#barlow-}.txt, or to all if SHARDS has only these images"
    fi
fi
if [[ ${IMAGES:-all} != all ]]; then recipe+=(--images "$IMAGES"); fi

name=${CHECKPOINT##*/} name=${name%%[.?]*} # the same folders as without --output-dir, and the recipe
if [[ -d $CHECKPOINT ]]; then
    folder=$CHECKPOINT/finetune
elif [[ ! -f $CHECKPOINT ]]; then # random, or weights of a name or URL
    folder=${PROJECT}output/$name/finetune
else
    folder=$(dirname "$CHECKPOINT")/finetune
    if [[ $name != checkpoint_* ]]; then folder+=-$name; fi
fi

launch "${PROJECT}"main_finetune.py --method "$METHOD" --pretrained "$CHECKPOINT" --resume auto \
    --output-dir "$folder${RECIPE:+-$RECIPE}" --train-shards "$TRAIN" --val-shards "$VAL" "${recipe[@]}" "$@"
