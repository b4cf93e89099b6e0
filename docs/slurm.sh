#!/bin/bash
# Trains on the machines of a job, and goes on in another job when the time of this one is up:
#
#     sbatch docs/slurm.sh --preset imagenet128-cond --data-dir /data/imagenet --sharding hybrid --out runs/imagenet128
#
#SBATCH --job-name=tarflow
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300 --requeue --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A number that two jobs on one machine are not likely to share.
port=$((20000 + SLURM_JOB_ID % 10000))

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m -- tarflow train "$@" &
step=$!

# Slurm tells this script five minutes before the end. Training then finishes its step and writes a checkpoint, with
# which the same command goes on.
trap 'stopped=yes; kill -TERM "$step"' TERM
wait "$step"
status=$?
if [ -n "$stopped" ]; then
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
