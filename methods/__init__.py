"""The arithmetic of merging: one method a file, one catalogue of them."""
