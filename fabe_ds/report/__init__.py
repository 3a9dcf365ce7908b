"""What a run leaves behind, and how far it is: counts, run.json, progress, the page."""
