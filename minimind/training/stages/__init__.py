"""What the supervised stages and DPO need beside the trainer."""
