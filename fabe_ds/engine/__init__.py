"""Sends requests, whatever the provider: what is known already, limits, retries, order."""
