"""Training: the teacher, and banks against it (TALoRA, DFA)."""
