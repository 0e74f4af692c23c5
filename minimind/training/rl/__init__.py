"""Reinforcement learning: prompts, rollouts, their collection, and the stage that GRPO, PPO and SPO share."""
