#!/usr/bin/env bash
# Fine-tuning of the trunk that pretrain_insdis.sh trained; finetune_mosrep.sh has the recipes and variables.
set -euo pipefail
METHOD=insdis exec bash "$(dirname "$(realpath "$0")")/finetune_mosrep.sh" "$@"
