"""Searches over the parameters of a merge, for the best score on the validation split."""
