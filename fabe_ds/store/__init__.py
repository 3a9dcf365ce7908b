"""What is kept between runs: completions, marks of written values, finished runs."""
