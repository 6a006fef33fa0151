# What your site needs, read by every job before anything else: set it once, here. It is bash.
# Another file: DALLE_DIST_SITE=FILE, or dalle-dist submit --site FILE.

# An environment: modules, conda, a virtual environment.
#   module load cuda/12.8
#   source ~/miniforge3/bin/activate dalle
[ ! -d .venv ] || source .venv/bin/activate

# The network: a proxy for S3, the interface between nodes (by default: the one that leads to the
# first node), another first node or port.
#   export HTTPS_PROXY=http://proxy:3128 GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
#   export MASTER_ADDR=... MASTER_PORT=...

# A container by Apptainer: each task and each question of the job's own runs inside it.
#   inside=(apptainer exec --nv --bind /data dalle.sif) batch=("${inside[@]}")
# A container by Pyxis: srun starts it, also for the job's own questions.
#   task_options=(--container-image=/images/dalle.sqsh --container-mounts="$PWD,/data")
#   batch=(srun --overlap --ntasks=1 --nodes=1 "${task_options[@]}")
