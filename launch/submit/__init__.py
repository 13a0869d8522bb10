"""The command ``dreamscale submit slurm|ray|k8s STAGE``: write the job file for a cluster, and submit it."""
