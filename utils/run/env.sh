# Functions of the launchers, tests/run.sh and .ci/run: they choose Python, images and number of processes.
# shellcheck shell=bash disable=SC2034

die() {
    echo "error: $*" >&2
    exit 1
}

# PROJECT: the project's folder with a slash at its end; empty if it is the working directory, where relative paths start.
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd -P)/
if [[ $PROJECT == "$(pwd -P)/" ]]; then
    PROJECT=
else
    export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}
fi

for name in NPROC NNODES NODE_RANK MASTER_PORT MAX_RESTARTS BATCH; do
    if [[ ${!name:-} == 0 && $name =~ ^(NODE_RANK|MAX_RESTARTS)$ ]]; then continue; fi
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name}: must be a whole number, such as $name=1"
done
[[ ${MULTI_CROP:-0} == [01] ]] || die "MULTI_CROP=$MULTI_CROP: must be 0 or 1"
[[ ${MULTI_CROP:-0} == 0 || ! ${RECIPE:-} ]] || die "RECIPE=$RECIPE: has two crops; leave out MULTI_CROP=1"

# use_environment FILE: set PYTHON to the interpreter of the active environment if it satisfies the requirements file. Otherwise
# create or complete .venv if needed, and use it. No other environment is changed.
use_environment() {
    for PYTHON in python python3 "$PROJECT.venv/bin/python"; do
        if satisfies "$PYTHON" "$1" >/dev/null; then return; fi
    done
    make_environment "$1"
}

satisfies() { # PYTHON FILE; prints the missing packages
    new_enough "$1" && "$1" "${PROJECT}utils/run/requirements.py" "$PROJECT$2"
}

new_enough() { # PYTHON
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# make_environment FILE: install a requirements file into .venv. The file .venv/incomplete exists during the installation,
# so that the next call sees an interrupted one, and starts again.
make_environment() (
    cd "${PROJECT:-.}" || exit
    exec 9<.
    flock 9 2>/dev/null || true # a second launcher waits here for the first, if the file system has locks
    if satisfies .venv/bin/python "$1" >/dev/null; then exit; fi

    local base=python3
    new_enough "$base" || base=python
    new_enough "$base" || die "Python 3.11 or later is required; on Debian 12: apt-get install python3 python3-venv"
    "$base" -c 'import ensurepip' 2>/dev/null || die "$base cannot create environments; on Debian 12: apt-get install python3-venv"
    echo "$(command -v "$base") lacks $(satisfies "$base" "$1")"
    echo "Installing $1 into .venv, once (to use your own environment: activate it, then pip install -r $1)"

    if [[ -e .venv/incomplete ]] || ! new_enough .venv/bin/python; then
        "$base" -m venv --clear --without-pip .venv
    fi
    touch .venv/incomplete
    .venv/bin/python -m ensurepip --default-pip >/dev/null
    .venv/bin/python -m pip install --disable-pip-version-check -r "$1"
    rm .venv/incomplete
)

# use_shards FLAGS...: set TRAIN and VAL from SHARDS: a folder or URL of train/ and val/, or of train/ alone, or any value of
# --shards; for a flat URL, its index.json. If neither SHARDS nor a flag names shards, convert and use the embedded sample.
# Then SAMPLE is 1, otherwise empty.
use_shards() {
    if chosen "$@"; then return; fi
    SAMPLE=1 TRAIN=${PROJECT}output/sample-shards/train VAL=${PROJECT}output/sample-shards/val
    if [[ ! -f $TRAIN/index.json || ! -f $VAL/index.json || ! -f $TRAIN/names.txt ]]; then # an index is written last
        "$PYTHON" "${PROJECT}imagenet2wds.py" -i "${PROJECT}data" -o "${TRAIN%/train}" --dataset FashionMNIST
    fi
}

# use_color_shards FLAGS...: the same with the embedded colour pictures, which are shards already.
use_color_shards() {
    if chosen "$@"; then return; fi
    SAMPLE=1 TRAIN=${PROJECT}data/clipart/train VAL=${PROJECT}data/clipart/val
}

chosen() { # FLAGS...; whether SHARDS or the flags name shards
    SAMPLE='' TRAIN=${SHARDS:-MISSING} VAL=MISSING # flags come last and win
    if [[ ! ${SHARDS:-} ]]; then
        [[ " ${*//_/-}" =~ \ --(train-|val-)?shards(=|\ |$) ]]
    elif [[ $SHARDS =~ ^(.*/)?train/?$ ]]; then
        VAL=${BASH_REMATCH[1]}val
    elif [[ ! $SHARDS =~ [\{*?]|\.tar|\.json$|^pipe: ]] && ! flat "$SHARDS"; then
        TRAIN=${SHARDS%/}/train VAL=${SHARDS%/}/val
    fi
}

flat() { # FOLDER; whether the shards lie in it, not in its train/
    [[ ! -d $1/train ]] && { [[ -f $1/index.json ]] || compgen -G "$1/*.tar" >/dev/null; }
}

# use_recipe NAMES...: check that RECIPE, if it is set, is one of NAMES, the launcher's other published recipes.
use_recipe() {
    local name
    for name in "" "$@"; do
        if [[ ${RECIPE:-} == "$name" ]]; then return; fi
    done
    die "RECIPE=$RECIPE: no such recipe${SAMPLE:+ for the embedded sample}; known: ${*:-none}"
}

# use_checkpoint FOLDER LAUNCHER FLAGS...: set CHECKPOINT to FOLDER, the run folder of LAUNCHER, unless it is set. The probe
# takes the newest checkpoint in it. The flag --pretrained comes last and wins.
use_checkpoint() {
    CHECKPOINT=${CHECKPOINT:-$1}
    if [[ $CHECKPOINT == random || $CHECKPOINT == pixels || " ${*:3}" =~ \ --pretrained(=|\ |$) ]]; then return; fi
    if [[ $CHECKPOINT =~ ^(https?|hf):// ]] || grep -sqF "\"$CHECKPOINT\": {" "${PROJECT}weights.json"; then return; fi
    [[ -f $CHECKPOINT ]] || compgen -G "$CHECKPOINT/checkpoint_*.pth.tar" >/dev/null ||
        die "no checkpoint $CHECKPOINT: run bash $2 first, or set CHECKPOINT to a file or run folder"
}

# launch SCRIPT FLAGS...: run one process for each GPU, or a single one. NPROC overrides the number. On several nodes, run the
# same line on each with NNODES, NODE_RANK and MASTER_ADDR set (and MASTER_PORT, if 29500 is in use). MAX_RESTARTS: how often
# torchrun restarts all processes, from the last checkpoint, after one was lost.
launch() {
    NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    local torchrun=("$PYTHON" -m utils.run.agent --nproc_per_node "$NPROC" --max_restarts "${MAX_RESTARTS:-0}")
    if ((${NNODES:-1} > 1)); then
        # static rendezvous: the c10d one waits for minutes for a lost host
        exec "${torchrun[@]}" --nnodes "$NNODES" --node_rank "${NODE_RANK:?}" \
            --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" "$@"
    elif ((NPROC > 1 || ${MAX_RESTARTS:-0} > 0)); then
        exec "${torchrun[@]}" --standalone "$@"
    else
        exec "$PYTHON" "$@"
    fi
}
