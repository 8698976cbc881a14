"""The base model, the roles that share it, and their heads."""
