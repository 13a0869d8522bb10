"""Train variants of a model, and compare each of them with the base model on the same trials."""
