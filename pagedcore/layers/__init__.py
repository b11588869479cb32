"""The building blocks of the models; tensor parallelism lives in `linear` and nowhere else."""
