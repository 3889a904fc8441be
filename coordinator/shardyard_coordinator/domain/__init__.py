"""What a job is: states, causes, reasons and records. Standard library only."""
