"""What the supervised and preference stages add to the trainer."""
