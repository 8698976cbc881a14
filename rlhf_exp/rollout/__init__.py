"""Sampling answers from a policy, and computing log-probs of sampled answers."""
