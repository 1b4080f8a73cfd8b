"""The order of a run: compose the configuration, open the pool, merge, evaluate, record."""
