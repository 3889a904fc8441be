"""Tasks, one file each: head, loss, metrics and answers."""
