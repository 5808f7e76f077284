"""What happens at an optimizer step, and what can be seen of it."""
