"""Generate: a request becomes a plan, a run and its files; the command line."""
