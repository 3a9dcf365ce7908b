"""Files and Datasets as records, and answers written back into them: one class a format."""
