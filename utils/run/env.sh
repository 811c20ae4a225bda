# Functions of the launchers, tests/run.sh and .ci/run: they choose Python, images and number of processes.
# shellcheck shell=bash disable=SC2034

die() {
    echo "error: $*" >&2
    exit 1
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    die "bash $BASH_VERSION is too old: the scripts need 4.4 or later (macOS: brew install bash)"
fi

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
[[ ${MULTI_CROP:-0} == 0 || ! ${RECIPE:-} || $RECIPE == cifar10 ]] || die "RECIPE=$RECIPE: has two crops; leave out MULTI_CROP=1"

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
    if converted; then return; fi
    mkdir -p "${TRAIN%/train}"
    (
        exec 9<"${TRAIN%/train}"
        flock 9 2>/dev/null || true # a second launcher waits here for the first, if the file system has locks
        converted || "$PYTHON" "${PROJECT}imagenet2wds.py" -i "${PROJECT}data" -o "${TRAIN%/train}" --dataset FashionMNIST
    )
}

converted() { # whether the shards of the embedded sample are complete: an index is written last
    [[ -f $TRAIN/index.json && -f $VAL/index.json && -f $TRAIN/names.txt ]]
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

# use_cluster: set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC and MAX_RESTARTS, unless they are set, from the variables
# of a scheduler (docs/clusters.md). NNODES=1 trains on this node alone. Dies if variables are missing or contradict each other.
use_cluster() {
    if [[ ${NNODES:-} == 1 ]]; then return; fi
    [[ ! ${LOCAL_RANK:-} ]] || die "LOCAL_RANK=$LOCAL_RANK: $ONCE_A_NODE, without LOCAL_RANK"
    local name from ips range=${PET_NNODES:-}
    [[ $range != *:* || ${range%:*} == "${range#*:}" ]] ||
        die "PET_NNODES=$range: a run has a fixed number of nodes; make both numbers equal, such as PET_NNODES=${range#*:}"
    take NNODES PET_NNODES "${range%:*}"
    use_pytorchjob
    if [[ ${OMPI_COMM_WORLD_SIZE:-}${OMPI_COMM_WORLD_RANK:-} ]]; then
        [[ ${OMPI_COMM_WORLD_LOCAL_SIZE:-1} == 1 ]] ||
            die "OMPI_COMM_WORLD_LOCAL_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE: $ONCE_A_NODE, with mpirun --map-by ppr:1:node"
        take NNODES OMPI_COMM_WORLD_SIZE
        take NODE_RANK OMPI_COMM_WORLD_RANK
    elif [[ ${SKYPILOT_NODE_IPS:-}${SKYPILOT_NODE_RANK:-}${SKYPILOT_NUM_NODES:-} ]]; then
        read -r -d '' -a ips <<<"${SKYPILOT_NODE_IPS:-}" || true
        take NNODES SKYPILOT_NUM_NODES
        if [[ ${ips[*]:-} ]]; then take NNODES "lines of SKYPILOT_NODE_IPS" "${#ips[@]}"; fi
        take NODE_RANK SKYPILOT_NODE_RANK
        : "${MASTER_ADDR:=${ips[0]:-}}"
        if [[ ${SKYPILOT_NUM_GPUS_PER_NODE:-0} != 0 && ! ${NPROC:-} ]]; then take NPROC SKYPILOT_NUM_GPUS_PER_NODE; fi
    elif [[ ${SLURM_JOB_ID:-} && ! $range${RANK:-} ]]; then # an mpirun or pod inside a job has its own numbers
        use_slurm
    fi

    for name in NODE_RANK MASTER_ADDR PET_RDZV_ENDPOINT; do
        from=from_$name
        [[ ! ${!name:-} || ${NNODES:-} ]] ||
            die "${!from:-$name}=${!name}: the number of nodes is not set; set NNODES, to 1 for this node alone"
    done
    from=${from_NNODES:-NNODES}=${NNODES:=1}
    if ((NNODES == 1)) || [[ ${PET_RDZV_ENDPOINT:-} && ! ${NODE_RANK:-} ]]; then return; fi # there torchrun numbers the nodes
    for name in NODE_RANK MASTER_ADDR; do
        [[ ${!name:-} ]] || die "$from: $name is not set; set $name, or NNODES=1 to train on this node alone"
    done
    ((NODE_RANK < NNODES)) || die "${from_NODE_RANK:-NODE_RANK}=$NODE_RANK: $from, so the last node is $((NNODES - 1))"
    [[ ${PET_STANDALONE-0} == 0 ]] || die "PET_STANDALONE=$PET_STANDALONE: contradicts $from; unset it"
}
ONCE_A_NODE="a launcher starts all processes of its node; start it once on each node"

# take NAME SOURCE [VALUE]: NAME is the value of the variable SOURCE, or VALUE, unless that is empty. If NAME is set, both must agree.
take() {
    local from=from_$1 value=${3-${!2:-}}
    if [[ ! $value ]]; then return; fi
    [[ $value =~ ^[0-9]+$ ]] || die "$2=$value: must be a whole number, such as 1"
    if [[ ! ${!1:-} ]]; then
        printf -v "$1" %s "$value"
        printf -v "$from" %s "$2"
    elif [[ ${!1} != "$value" ]]; then
        die "$2=$value: contradicts ${!from:-$1}=${!1}; unset the wrong one, or set NNODES=1 to train on this node alone"
    fi
}

# use_pytorchjob: what use_cluster takes from torchrun's and Kubeflow's variables. RANK numbers the pods. WORLD_SIZE counts pods, or,
# since pull request 1840 (2023), processes; then PET_NNODES counts pods.
use_pytorchjob() {
    local each=${PET_NPROC_PER_NODE:-auto}
    take NODE_RANK PET_NODE_RANK
    take NODE_RANK RANK
    take MASTER_PORT PET_MASTER_PORT
    : "${MASTER_ADDR:=${PET_MASTER_ADDR:-}}" "${MAX_RESTARTS:=${PET_MAX_RESTARTS:-}}"
    if [[ $each != auto && $each != gpu && ! ${NPROC:-} ]]; then take NPROC PET_NPROC_PER_NODE; fi
    if [[ ! ${PET_NNODES:-} ]]; then
        take NNODES WORLD_SIZE
    elif [[ ! $each =~ ^[0-9]+$ || ${WORLD_SIZE:-} != $((NNODES * each)) ]]; then
        take NNODES WORLD_SIZE
    fi
}

# use_slurm: what use_cluster takes from Slurm. In a step (srun), SLURM_NODEID is the number in the step.
use_slurm() {
    local nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-}} tasks=${SLURM_STEP_NUM_TASKS:-}
    [[ ${SLURM_STEP_ID:-} || ${nodes:-1} == 1 || ${NODE_RANK:-} ]] ||
        die "SLURM_NNODES=$nodes: only this node runs the launcher; start it with srun on each node, or set NNODES=1"
    [[ ! $tasks || $tasks == "$nodes" ]] || die "SLURM_STEP_NUM_TASKS=$tasks: $ONCE_A_NODE, with srun --ntasks-per-node=1"
    take NNODES SLURM_NNODES "$nodes"
    if ((${NNODES:-1} > 1)); then
        take NODE_RANK SLURM_NODEID
        : "${MASTER_ADDR:=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}" 2>/dev/null | head -n 1)}"
        : "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}" # two jobs may share a node
    fi
}

# launch SCRIPT FLAGS...: run one process for each GPU, or a single one. NPROC overrides the number. On several nodes, run the
# same line on each: a scheduler's variables, or NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT, if 29500 is in use), tell
# the nodes. MAX_RESTARTS: how often torchrun restarts all processes, from the last checkpoint, after one was lost.
launch() {
    use_cluster
    NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    # without torchrun's --numa-binding: it ends the run where numactl is missing or may not bind. And the default of --workers
    # would be too small: each process divides the cores that it may use by the number of processes
    local torchrun=("$PYTHON" -m utils.run.agent --nproc_per_node "$NPROC" --max_restarts "${MAX_RESTARTS:-0}")
    if ((${NNODES:-1} > 1)) && [[ ! ${NODE_RANK:-} ]]; then
        exec "${torchrun[@]}" --nnodes "$NNODES" --rdzv_backend "${PET_RDZV_BACKEND:-c10d}" \
            --rdzv_endpoint "$PET_RDZV_ENDPOINT" --rdzv_id "${PET_RDZV_ID:-none}" "$@"
    fi
    unset RANK WORLD_SIZE PET_STANDALONE PET_NNODES PET_NODE_RANK "${!PET_RDZV_@}" # torchrun would read them
    if ((${NNODES:-1} > 1)); then
        # static rendezvous: the c10d one waits for minutes for a lost host
        exec "${torchrun[@]}" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
    elif ((NPROC > 1 || ${MAX_RESTARTS:-0} > 0)); then
        exec "${torchrun[@]}" --standalone "$@"
    else
        exec "$PYTHON" "$@"
    fi
}
