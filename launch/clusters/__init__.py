"""Jobs on clusters: Slurm, Ray and Kubernetes from one run file."""
