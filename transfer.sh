#!/usr/bin/env bash
# Linear transfer of a frozen trunk to the eight sets of MosRep's table: logistic regression, mean per class for Flowers and Pets.
#   DATA=/data/sets CHECKPOINT=output/mosrep bash transfer.sh      evaluates each set that is in DATA, and names the missing ones
#   python imagenet2wds.py --dataset NAME --download -i /data/raw -o /data/sets/NAME      converts a set, with its official parts;
#       NAME is one of SETS below. StanfordCars has no download any more: place its files in /data/raw, and leave out --download
# Expected (MosRep, ICLR 2023; ImageNet, 200 epochs), in the order of SETS: 91.5 74.5 97.1 74.3 84.5 71.3 84.5 44.8
#   MoCo-v2: 90.7 72.7 95.6 71.4 82.6 68.1 81.7 42.4; the authors' figures
# Add or override any flag. Variables: DATA CHECKPOINT (a file, a run's folder, random or pixels; default: output/mosrep) NPROC.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/utils/run/env.sh"
use_environment requirements.txt
use_checkpoint "${PROJECT}output/mosrep" pretrain_mosrep.sh "$@"

SETS=(CIFAR10 CIFAR100 STL10 Food101 Flowers102 DTD OxfordIIITPet StanfordCars)
found=() missing=()
for name in "${SETS[@]}"; do
    folder=${DATA:?set DATA to the folder of the converted sets}/$name
    if [[ -d $folder ]]; then found+=("$folder"); else missing+=("$name"); fi
done
if ((${#missing[@]})); then echo "not in $DATA: ${missing[*]}; the head of transfer.sh tells how to convert them"; fi
if ((${#found[@]} == 0)); then die "DATA=$DATA: holds none of ${SETS[*]}"; fi

launch "${PROJECT}"main_transfer.py --pretrained "$CHECKPOINT" --sets "${found[@]}" "$@"
