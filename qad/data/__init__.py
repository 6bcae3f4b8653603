"""Data: reading rows, tokenizing and packing them, and making them from a teacher."""
