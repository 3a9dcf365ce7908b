"""From an instruction to prompts, and from completions to values."""
