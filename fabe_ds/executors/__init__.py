"""Who maps: this process, a process for each device, the actors of a Ray cluster."""
