#!/bin/bash
# stdist train on all nodes of a Slurm job: a Ray cluster for this job alone. From the repository's folder, on a file
# system that all nodes share, with stdist installed in .venv there:
#
#   sbatch cluster/slurm.sh configs/milan_7b.yaml data.store=/shared/milan.zarr learners.num_workers=8 learners.engine=deepspeed
#
# Ten minutes before its time is over the run saves its step; the same command, submitted again, goes on from there.
# What to change first: the nodes, their GPUs and CPUs, the partition and the account.
#SBATCH --job-name=stdist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@600
#SBATCH --output=%x-%j.log

set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: sbatch cluster/slurm.sh CONFIG [key=value ...]" >&2
    exit 2
fi
if [ -d .venv ]; then
    source .venv/bin/activate
fi

RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$address:$port"
on_every_node="--disable-usage-stats --num-cpus=$SLURM_CPUS_PER_TASK --temp-dir=/tmp/ray-$SLURM_JOB_ID --block"

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
# shellcheck disable=SC2086  # several options
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$address" --port="$port" --ray-client-server-port=$((port + 10000)) \
    --include-dashboard=false $on_every_node &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    # shellcheck disable=SC2086
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$RAY_ADDRESS" $on_every_node &
fi
for _ in $(seq 150); do
    nodes=$(python -c "import ray; ray.init(log_to_driver=False); print(len(ray.nodes()))" 2>/dev/null || echo 0)
    [ "$nodes" -ge "$SLURM_JOB_NUM_NODES" ] && break
    sleep 2
done
if [ "$nodes" -lt "$SLURM_JOB_NUM_NODES" ]; then
    echo "only $nodes of $SLURM_JOB_NUM_NODES nodes joined the Ray cluster at $RAY_ADDRESS" >&2
    exit 1
fi

set -m # else a process in the background ignores the signal
stdist train "$@" &
training=$!
trap 'kill -INT $training' INT
# A trapped signal ends a wait, not the training.
while kill -0 $training 2>/dev/null; do
    wait $training && code=0 || code=$?
done
exit "$code"
