"""The journal of a project: numbered records in segments, and repairs from them (I1, I2)."""
