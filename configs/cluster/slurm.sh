#!/bin/bash
# Written by 'dreamscale submit slurm'. Two minutes before the time is up, or when the job is preempted, training writes
# a checkpoint and ends with 75; the job then goes back into the queue and on from there.
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
@GPU_LINE@
#SBATCH --cpus-per-task=@CPUS@
#SBATCH --time=@TIME@
#SBATCH --output=@LOGS@/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --requeue
@EXTRA_LINES@
cd @DIRECTORY@
export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=@THREADS@

code=0
srun --kill-on-bad-exit=1 bash -c '@LAUNCH@' || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
