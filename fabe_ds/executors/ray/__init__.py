"""The map over a Ray cluster's actors, with one record cache for all."""
