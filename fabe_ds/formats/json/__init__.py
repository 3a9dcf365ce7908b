"""JSON and JSON lines, of which every byte but the field comes back."""
