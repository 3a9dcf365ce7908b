"""Commands around a run: dry run, preview, explain, doctor, init."""
