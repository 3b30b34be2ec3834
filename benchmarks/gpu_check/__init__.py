"""What a GPU makes of this project: every stage against the CPU, then what steps, rows and passes of models cost."""
