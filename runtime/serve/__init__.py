"""Many clients, one model: the scheduler, what prompts have in common, and HTTP."""
