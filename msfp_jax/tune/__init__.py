"""Training the teacher, and TALoRA's banks against it (DFA)."""
