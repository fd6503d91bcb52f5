"""Several machines for the same projects: NATS JetStream orders their changes. Loaded only with ``--cluster``."""
