"""RLHF experiments (SFT -> reward model -> PPO) with LoRA on one frozen base model, composed by Hydra."""

__version__ = "0.1.0"
