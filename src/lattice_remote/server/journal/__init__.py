"""Journal of a project: numbered records in segments, and repair from them (I1, I2)."""
