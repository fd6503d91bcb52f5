"""The worker process of a project: it runs lattice's commands in transactions."""
