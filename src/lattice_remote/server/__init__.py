"""The server: one process for the network, one worker a project.

``server`` starts it, ``registry`` holds the projects, ``project`` queues and publishes, ``worker`` runs lattice.
"""
