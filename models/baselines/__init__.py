"""What the papers compare with: one architecture a file, made of `inputs` and `layers`."""
